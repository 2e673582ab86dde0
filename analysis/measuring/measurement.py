"""Measuring the responses of a network: hooks feed the moments while batches of images run through
it.

    import analysis
    frame = analysis.measure(model, batches)  # batches: image tensors, or (images, labels)

Which layers there are is proven by data flow (see analysis.measuring.pairs). From the second batch
on a folded copy runs in place of the network, where that is right (see analysis.measuring.folding).
The network is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from analysis.measuring.batches import (
    Parts,
    compare_labels,
    count_images,
    device_of,
    run,
    tensors_in,
)
from analysis.measuring.folding import Doubt, Folded, NotFolded, count_hooks, fold, obstacle
from analysis.measuring.frame import make_frame
from analysis.measuring.pairs import Layer, Recording, is_norm, is_wrapper, recording
from analysis.measuring.threads import Shared, alone
from models.resnet import config_of

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and TF32; training flags and buffers come back at the end.

    TF32 is off for all threads, until the last of such blocks ends.
    """
    training = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for module, flag in training:  # not model.eval(): networks override it and do more there
            stack.callback(setattr, module, "training", flag)
            module.training = False
            stack.callback(module._buffers.update, dict(module._buffers))
        stack.enter_context(WITHOUT_TF32())
        stack.enter_context(torch.inference_mode(False))  # there tensors have no versions
        stack.enter_context(torch.no_grad())
        for buffer in model.buffers():
            if not is_lazy(buffer):
                stack.callback(put_back, buffer, buffer.clone())
        yield


def put_back(buffer: Tensor, before: Tensor) -> None:
    if not torch.equal(buffer, before):
        buffer.copy_(before)


@contextmanager
def without_tf32() -> Iterator[None]:
    with ExitStack() as stack:
        for backend, setting, value in tf32_settings():
            stack.callback(setattr, backend, setting, getattr(backend, setting))
            setattr(backend, setting, value)
        yield


WITHOUT_TF32 = Shared(without_tf32)


def tf32_settings() -> list[tuple[Any, str, object]]:
    """What turns TF32 off: object, attribute, value. Since torch 2.9 reading `allow_tf32` raises
    after the new way.
    """
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    if hasattr(matmul, "fp32_precision"):
        return [(backend, "fp32_precision", "ieee") for backend in (matmul, cudnn.conv, cudnn.rnn)]
    return [(backend, "allow_tf32", False) for backend in (matmul, cudnn)]


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    network: str = "network",
    precision: str = "float32",
    kernel_size: int | tuple[int, int] = (3, 3),
    grouped: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Callable[[int], object] = lambda images: None,
) -> pd.DataFrame:
    """The std of every layer's response over all images: the frame, one row a layer (see
    analysis.measuring.frame).

    model: any network, on a CPU or a CUDA GPU; it is left as it was. batches: image tensors (N, C,
    H, W), (images, labels), or dicts of tensors that the network takes as keywords, already
    normalised; where memory is short, they run in halves, and a line on stderr says so (not what
    `forward` runs). precision: `float32`, or `bfloat16` for autocast. kernel_size: of the
    convolutions that are measured. grouped: False leaves out convolutions of several groups.
    forward: runs the model on one batch of any other type, brings it to the model's device and
    returns the output; the images of a batch are counted from the first tensor in it. progress:
    called with the number of images after each batch.

    `frame.attrs["path"]` is `folded`, or `hooks: ` and why the network was not folded.
    `frame.attrs["unpaired"]` lists the convolutions of that kernel with an output that went into no
    BN unchanged, `frame.attrs["unseen"]` those of which hooks saw no call: it did not run, or not
    as a module. `frame.attrs["accuracy"]` is the share of labels hit, or None: labels are the
    second of two, or `labels` in a dict; logits are the output, the first tensor of a tuple, or
    `logits` or `out` in a dict. Raises ValueError where there are no images, no pairs of
    convolution and BN, where a response holds NaN or infinity, or where the model, or a part of it,
    is being measured already. What other threads run on the model meanwhile is not measured, and
    runs in evaluation mode.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> frame = measure(model, torch.randn(2, 16, 3, 32, 32), network="mine")  # two batches
    >>> print(frame[["network", "name", "norm", "channels", "height", "images", "count"]].to_string(index=False))
    network name norm  channels  height  images  count
       mine    0    1         8      30      32 230400
    """
    options: dict[str, Any] = {"kernel_size": kernel_size, "grouped": grouped, "forward": forward}
    with measuring(model, precision=precision, **options) as measurement:
        for batch in batches:
            progress(measurement.add(batch))
    return measurement.result().to_frame(network)


def sizes_in(batch: Any) -> tuple[torch.Size, ...]:
    """The shapes of the tensors in a batch, of one image each."""
    return tuple(x.shape[1:] for x in tensors_in(batch))


def whole(model: nn.Module) -> str:
    """Why batches are not to be split, in words; empty where they may be."""
    own = any(is_norm(norm) and norm.running_mean is None for norm in model.modules())
    return "whose own statistics its norms take" if own else ""


@contextmanager
def measuring(
    model: nn.Module,
    *,
    precision: str = "float32",
    kernel_size: int | tuple[int, int] = (3, 3),
    grouped: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Iterator[Measurement]:
    """Measure a network on what is added inside the block; arguments and errors as for `measure`.

    with measuring(first) as a, measuring(second) as b:  # several networks on the same batches
        for batch in batches:
            a.add(batch), b.add(batch)
    frame = a.result().to_frame("first")
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: one of {', '.join(PRECISIONS)}")
    device = device_of(model).type
    if device == "meta":
        raise ValueError(
            "the network is on the meta device, where tensors have no values: load its weights first"
        )
    if device == "mps":
        raise ValueError(
            "the network is on mps, which has no float64 to add up in: move it to the CPU to measure it"
        )
    # no cache: in a block of the caller's it would keep weights without their gradients, or from
    # before a step
    autocast = torch.autocast(
        device, PRECISIONS[precision], enabled=precision != "float32", cache_enabled=False
    )
    why_not = "forward= runs the network" if forward else obstacle(model)
    why_whole = "which forward= runs" if forward else whole(model)
    parts = Parts(
        name_of(model), why_whole and f"{why_whole}, so it is not split: make smaller ones"
    )
    with alone(model), recording(model, kernel_size, grouped=grouped) as record, evaluation(model):
        measurement = Measurement(model, record, forward or run, why_not, autocast, parts)
        yield measurement
        measurement.finish()


class Measurement:
    """Runs batches: the first through the network itself, the others through a folded copy of it
    where that is right.

    why_not: why it is not, where that is known before; empty where it may be. parts: runs what does
    not fit in memory. A batch that fails leaves no trace.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Recording,
        run: Callable[[nn.Module, Any], Any],
        why_not: str,
        autocast: torch.autocast,
        parts: Parts,
    ) -> None:
        self.model, self.record, self.run, self.why_not = model, record, run, why_not
        self.autocast, self.parts = autocast, parts
        self.hooks = count_hooks(model)
        self.first: Any = None  # the first batch of a size, until the network is folded
        self.sizes: set[Any] = set()  # of images, that the network itself has run
        self.through = 0  # batches that a folded copy has run
        self.folded: Folded | None = None
        self.images = self.labelled = self.correct = 0
        self.classes: int | None = None  # of the labels, where it is known

    def add(self, batch: Any) -> int:
        """Measure one batch, in the thread that began, in parts where it does not fit into memory.

        Returns the number of its images.
        """
        if get_ident() != self.record.thread:
            raise ValueError(
                "a batch was added in another thread than the one that began to measure: add it there"
            )
        if count_images(batch) == 0:
            return 0
        return sum(self.parts(batch, self.add_part))

    def add_part(self, part: Any) -> int:
        """Measure what runs at once. Returns the number of its images."""
        images = count_images(part)
        self.record.drop_pass()  # what ran since the last batch was not added
        try:
            with self.autocast:
                labelled, correct = self.classify(part)
        except BaseException:
            self.record.drop_pass()
            raise
        self.images += images
        self.labelled += labelled
        self.correct += correct
        return images

    def classify(self, part: Any) -> tuple[int, int]:
        """How many labels there are, and are hit; the responses go into the record when all else is
        done.
        """

        def hits(output: Any) -> tuple[int, int]:
            found = compare_labels(output, part, self.classes)
            return len(found), int(found.sum())

        if not self.why_not and count_hooks(self.model) != self.hooks:
            self.doubt("it has hooks of its own")
        if self.first is not None:
            self.try_to_fold()
        size = sizes_in(part)
        if size not in self.sizes:  # it may take another way through the network
            self.finish()
        if self.folded is not None:
            try:
                counts: tuple[int, int] = self.folded(part, hits)
            except Doubt as reason:
                self.doubt(str(reason))
            else:
                self.record.batch += 1
                self.through += 1
                return counts
        counts = hits(self.run(self.model, part))
        self.record.end_pass()
        if size not in self.sizes and not self.why_not:
            self.first = part
        self.sizes.add(size)
        return counts

    def doubt(self, why: str) -> None:
        """The network itself runs from here on."""
        self.why_not = f"from batch {self.record.batch + 1} on, {why}"
        self.finish()
        self.first = None

    def try_to_fold(self) -> None:
        try:
            self.folded = fold(self.model, self.record, self.first, self.run)
        except NotFolded as reason:
            self.why_not = str(reason)
        self.first = None

    def finish(self) -> None:
        """Hand over what the folded copy has measured."""
        if self.folded is not None:
            self.folded.hand_over()
        self.folded = None

    @property
    def path(self) -> str:
        """`folded`, or `hooks: ` and why."""
        if self.why_not:
            return f"hooks: {self.why_not}"
        several = self.record.batch > 1
        return (
            "folded"
            if self.through
            else f"hooks: one batch{' of each size' if several else ''} only"
        )

    def result(self) -> Result:
        """What was measured so far."""
        if self.folded is not None:
            self.folded.hand_over()
        layers = [replace(layer, moments=layer.moments.to("cpu")) for layer in self.record.layers]
        counts = self.images, self.labelled, self.correct
        return Result(
            network_in(self.model),
            layers,
            self.record.unpaired,
            self.record.unseen,
            *counts,
            self.path,
        )


@dataclass(frozen=True)
class Result:
    """What one or several measurements of a network on different images have given.

    config: kind and depth of one of our networks. images, labelled, correct: how many there were,
    had labels, and were classified as these say. unpaired, unseen, path: see `measure`.
    """

    config: tuple[str, int | None]
    layers: list[Layer]
    unpaired: list[str]
    unseen: list[str]
    images: int
    labelled: int
    correct: int
    path: str

    def merge(self, other: Result) -> Result:
        """Both together. ValueError where they are not of the same layers."""
        if not (self.images and other.images):
            return self if self.images else other
        if [(layer.name, layer.norm) for layer in self.layers] != [
            (layer.name, layer.norm) for layer in other.layers
        ]:
            raise ValueError("two parts of the images ran through different layers of the network")
        pairs = zip(self.layers, other.layers, strict=True)
        return Result(
            config=self.config,
            layers=[
                replace(ours, moments=ours.moments.merge(theirs.moments)) for ours, theirs in pairs
            ],
            unpaired=list(dict.fromkeys(self.unpaired + other.unpaired)),
            unseen=[name for name in self.unseen if name in other.unseen],
            images=self.images + other.images,
            labelled=self.labelled + other.labelled,
            correct=self.correct + other.correct,
            path=other.path if self.path == "folded" else self.path,
        )

    def to_frame(self, network: str) -> pd.DataFrame:
        """The frame, with unpaired, unseen, accuracy and path as attrs (see `measure`). ValueError
        for no values.
        """
        if self.images == 0:
            raise ValueError("no images: there is nothing to measure")
        if empty := [layer.name for layer in self.layers if layer.moments.count == 0]:
            raise ValueError(f"no image gave a response of {empty[0]}: take others")
        kind, depth = self.config
        rows = describe_layers(self.layers)
        frame = make_frame(
            rows, network=network, kind=kind, depth=depth, images=self.images, source="hooks"
        )
        frame.attrs["accuracy"] = self.correct / self.labelled if self.labelled else None
        frame.attrs["unpaired"] = self.unpaired
        frame.attrs["unseen"] = self.unseen
        frame.attrs["path"] = self.path
        return frame


def unwrapped(model: nn.Module) -> nn.Module:
    while is_wrapper(model):
        model = next(model.children())
    return model


def network_in(model: nn.Module) -> tuple[str, int | None]:
    """Kind and depth, without the wrappers around it."""
    config = config_of(unwrapped(model))
    return (config.kind, config.depth) if config else ("other", None)


def name_of(model: nn.Module) -> str:
    """Such as `resnet-56`; the class of a network that is none of ours."""
    config = config_of(unwrapped(model))
    return config.name if config else type(unwrapped(model)).__name__


def describe_layers(layers: list[Layer]) -> list[dict[str, object]]:
    """The rows of a frame."""
    rows: list[dict[str, object]] = []
    stage, size = 0, None
    for position, layer in enumerate(layers, start=1):
        stage += (layer.height, layer.width) != size
        size = layer.height, layer.width
        moments = layer.moments
        channels = len(moments.mean)
        rows.append(
            {
                "layer": position,
                "name": layer.name,
                "norm": layer.norm,
                "stage": stage,
                "channels": channels,
            }
            | {"height": layer.height, "width": layer.width, "count": moments.count * channels}
            | {"mean": moments.mean.mean().item(), "std": moments.std}
            | {"within": moments.within, "between": moments.between}
        )
    return rows
