"""Measure the responses of a network while batches of images run through it.

    import analysis
    frame = analysis.measure(model, batches)  # batches: image tensors, or (images, labels)

Data flow proves which layers there are (analysis.measuring.pairs). The first batch of each image
size runs through plain hooks; in later ones BN is folded into its convolution, if that is right
(analysis.measuring.folding). The network is left as it was.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pandas as pd
import torch
from torch import nn

from analysis.additions.finding import AdditionRecord, recording_additions
from analysis.measuring.batches import (
    compare_labels,
    count_images,
    device_of,
    part_of_batch,
    run,
    tensors_in,
)
from analysis.measuring.eval_mode import evaluation, restoring
from analysis.measuring.flow import Doubt
from analysis.measuring.folding import Folding
from analysis.measuring.pairs import Recording, list_reasons
from analysis.measuring.result import Measurement, name_of, network_in
from models.messages import is_out_of_memory

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    network: str = "network",
    precision: str = "float32",
    kernel_size: int | tuple[int, int] = (3, 3),
    grouped: bool = True,
    fold: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Callable[[int], object] = lambda images: None,
) -> pd.DataFrame:
    """Return the std of every layer's response over all images: the frame, one row a layer.

    The columns are described in analysis.measuring.frame. `frame.attrs` holds `accuracy` (the
    share of labels hit, or None), `unpaired` and `unseen` (layers that are missing and why, by
    name), and `method` (`folded`, or `hooks: ` and why the network was not folded).

    model: any network on a CPU or a CUDA GPU. It is left as it was.
    batches: tensors of normalised images (N, C, H, W), (images, integer labels), or dicts of
        tensors that the network takes as keywords, `labels` among them if there are any.
    network: label in the frame.
    precision: `float32`, or `bfloat16` for autocast.
    kernel_size: kernel of the convolutions to measure.
    grouped: False leaves out convolutions with several groups.
    fold: False measures every batch by plain hooks.
    forward: runs the model on one batch of any other type, moves it to the model's device and
        returns the output. The images of a batch are counted from the first tensor in it.
    progress: called with the number of images after each batch.

    Warns of convolutions that are missing in the frame. Raises ValueError if there are no images or
    no layers, for a response with NaN or infinity, and for what is not a batch. One network is
    measured by one thread at a time.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> frame = measure(model, torch.randn(2, 16, 3, 32, 32), network="mine")  # two batches
    >>> print(frame[["network", "name", "norm", "height", "images", "count"]].to_string(index=False))
    network name norm  height  images  count
       mine    0    1      30      32 230400
    """
    with measuring(
        model,
        precision=precision,
        kernel_size=kernel_size,
        grouped=grouped,
        fold=fold,
        forward=forward,
    ) as meter:
        for batch in batches:
            progress(meter.add(batch))
    result = meter.result()
    frame = result.to_frame(network)
    if missing := {**result.unpaired, **result.unseen}:
        several = f"{len(missing)} layers are" if len(missing) > 1 else "1 layer is"
        warnings.warn(f"{several} not in the frame: {list_reasons(missing)}", stacklevel=2)
    frame.attrs = {
        "accuracy": result.accuracy,
        "unpaired": result.unpaired,
        "unseen": result.unseen,
        "method": result.method,
    }
    return frame


def measuring(
    model: nn.Module,
    *,
    precision: str = "float32",
    kernel_size: int | tuple[int, int] = (3, 3),
    grouped: bool = True,
    fold: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    classes: int | None = None,
    first_image: int = 0,
    additions: bool = False,
) -> AbstractContextManager[Meter]:
    """Return a context that measures a network on what is added inside it.

        with measuring(first) as a, measuring(second) as b:  # two networks on the same batches
            for batch in batches:
                a.add(batch), b.add(batch)
        frame = a.result().to_frame("first")

    Arguments and errors are those of `measure`, and:

    classes: number of classes of the labels; a network with another number gets no accuracy.
    first_image: position of the first image in the data set, if several processes share it. The
        sampling errors depend on positions.
    additions: also measure the residual additions, in the same passes.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: one of {', '.join(PRECISIONS)}")
    device = device_of(model).type
    if device == "meta":
        raise ValueError(
            "the network is on the meta device, where tensors have no values: load its weights first"
        )
    if device == "mps":
        raise ValueError("the network is on mps, which has no float64: move it to the CPU")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the network'} is a torch.jit module, and hooks see nothing of what "
                "runs inside it: measure the network that it was made from"
            )

    def setup(stack: ExitStack) -> Meter:
        stack.enter_context(evaluation(model))  # first, since eval() may replace modules
        record = Recording(model, kernel_size, grouped=grouped)
        sums = stack.enter_context(recording_additions(model)) if additions else None
        return Meter(model, record, precision, fold, forward, classes, first_image, sums)

    return restoring(setup)


class Meter:
    """Run batches through a network, and add up the moments of its responses.

    A batch that fails leaves no trace in them.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Recording,
        precision: str,
        fold: bool,
        forward: Callable[[nn.Module, Any], Any] | None,
        classes: int | None,
        first_image: int,
        sums: AdditionRecord | None = None,
    ) -> None:
        self.model, self.record, self.run = model, record, forward or run
        self.sums = sums  # of the residual additions, if they are measured, too
        self.classes, self.first_image = classes, first_image
        self.device = device_of(model).type
        self.precision = precision
        half = precision != "float32"
        self.folding = Folding(record, channels_last=self.device == "cpu" or half)
        self.why_not = "" if fold else "fold=False"
        self.sizes: set[Hashable] = set()  # of images that ran through plain hooks
        self.later = 0  # batches of sizes that were known
        self.splits = forward is None and not any(
            norm.running_mean is None for norm in record.norms
        )
        self.most = sys.maxsize  # images at a time, as far as memory goes
        self.images = self.labelled = self.correct = 0

    def add(self, batch: Any) -> int:
        """Measure one batch, in halves if memory runs out; return the number of its images."""
        images, done = count_images(batch), 0
        while done < images:
            size = min(self.most, images - done)
            part = batch if size == images else part_of_batch(batch, images, done, done + size)
            try:
                self.add_part(part, size)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or size == 1 or not self.splits:
                    raise
                self.most = size // 2
                name = name_of(self.model)
                line = (
                    f"{name}: out of memory at {size} images at a time, going on with {self.most}"
                )
                print(line, file=sys.stderr)
            else:
                done += size
        return images

    def add_part(self, part: Any, images: int) -> None:
        """Measure what runs at once."""
        size = tuple(x.shape[1:] for x in tensors_in(part))
        self.record.position, self.record.images = self.first_image + self.images, images
        hits = None
        if self.sums is not None:
            self.sums.drop_pass()
            self.sums.images = self.record.position
        if size in self.sizes and not self.why_not:
            hits = self.run_folded(part, size)
        if hits is None:
            if self.sums is not None:
                self.sums.drop_pass()  # what a pass in doubt has left
            self.record.proving = size not in self.sizes
            hits = self.run_once(part)
            self.record.end_pass()
            if self.sums is not None:
                self.sums.end_pass()  # before folding: it takes hooks away
            if self.record.proving and not self.why_not:
                self.folding.prove(size)
        elif self.sums is not None:
            self.sums.end_pass()
        self.later += size in self.sizes
        self.sizes.add(size)
        self.record.drop_pass()
        self.images += images
        self.labelled += len(hits)
        self.correct += int(hits.sum())

    def run_once(self, part: Any) -> torch.Tensor:
        """Run one pass under the recording; return which labels it hits."""
        # no cache: in a block of the caller's it keeps weights from before a change
        half = self.precision != "float32"
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device, dtype, enabled=half, cache_enabled=False):
            with self.record.watching():
                output = self.run(self.model, part)
            return compare_labels(output, part, self.classes)

    def run_folded(self, part: Any, size: Hashable) -> torch.Tensor | None:
        """Run one pass with folded pairs; None, and plain hooks from here on, if in doubt."""
        pairs = self.folding.ready(size)
        if not pairs:
            return None
        self.record.proving = False
        try:
            with self.folding.folded(pairs):
                hits = self.run_once(part)
                self.folding.check(pairs)
            self.record.end_pass()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            words = str(error) if isinstance(error, Doubt) else f"{type(error).__name__}: {error}"
            self.why_not = f"from batch {self.record.passes + 1} on, {words}"
            return None
        return hits

    @property
    def method(self) -> str:
        """`folded`, or `hooks: ` and why."""
        reasons = self.folding.reasons
        if self.why_not:
            return f"hooks: {self.why_not}"
        if not self.later:
            return f"hooks: one batch{' of each size' if len(self.sizes) > 1 else ''} only"
        if not reasons:
            return "folded"
        layers, first = self.record.first, next(iter(reasons.values()))
        some = sum(layer.name in reasons for layer in layers)
        return f"hooks: {f'{some} of {len(layers)} layers, since ' * (some < len(layers))}{first}"

    def result(self) -> Measurement:
        """Return what was measured so far."""
        kind, depth = network_in(self.model)
        return Measurement(
            kind=kind,
            depth=depth,
            layers=self.record.layers,
            additions=None if self.sums is None else self.sums.additions,
            unpaired=dict(self.record.unpaired),
            unseen=self.record.unseen,
            images=self.images,
            labelled=self.labelled,
            correct=self.correct,
            method=self.method,
        )
