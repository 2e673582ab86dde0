"""Measuring the responses of a network: hooks feed the moments while batches of images run through it.

    import analysis
    frame = analysis.measure(model, batches)  # batches: image tensors, or (images, labels)

Which layers there are is proven by data flow (see analysis.pairs). The network is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.frame import make_frame
from analysis.pairs import Layer, is_wrapper, recording

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = "a tensor, (images, labels), or a dict of tensors that the network takes as keywords"


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and TF32; every module's own training flag comes back at the end."""
    training = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for module, flag in training:  # not model.eval(): networks override it and do more there
            stack.callback(setattr, module, "training", flag)
            module.training = False
        for backend, setting, value in tf32_settings():
            stack.callback(setattr, backend, setting, getattr(backend, setting))
            setattr(backend, setting, value)
        stack.enter_context(torch.inference_mode(False))  # there tensors have no versions
        stack.enter_context(torch.no_grad())
        yield


def tf32_settings() -> list[tuple[Any, str, object]]:
    """What turns TF32 off: object, attribute, value. Since torch 2.9 reading `allow_tf32` raises after the new way."""
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
    """The std of every layer's response over all images: the frame, one row a layer (see analysis.frame).

    model: any network, on any device; it is left as it was. batches: image tensors (N, C, H, W), (images, labels), or
    dicts of tensors that the network takes as keywords, already normalised. precision: `float32`, or `bfloat16` for
    autocast. kernel_size: of the convolutions that are measured. grouped: False leaves out convolutions of several
    groups. forward: runs the model on one batch of any other type, brings it to the model's device and returns the
    output; the images of a batch are counted from the first tensor in it. progress: called with the number of images
    after each batch.

    `frame.attrs["unpaired"]` lists the convolutions of that kernel with an output that went into no BN unchanged.
    `frame.attrs["accuracy"]` is the share of labels hit, or None: labels are the second of two, or `labels` in a dict;
    logits are the output, the first tensor of a tuple, or `logits` or `out` in a dict. Raises ValueError where there
    are no images, no pairs of convolution and BN, or where a response holds NaN or infinity.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: one of {', '.join(PRECISIONS)}")
    autocast = torch.autocast(device_of(model).type, PRECISIONS[precision], enabled=precision != "float32")
    images = labelled = correct = 0
    with evaluation(model), autocast, recording(model, kernel_size, grouped=grouped) as record:
        for batch in batches:
            finished = record.batch
            size = count_images(batch)
            output = (forward or run)(model, batch)
            if record.batch == finished:  # `forward` ran parts of the model, so that the model's own hook did not
                record.end_pass()
            hits = compare(output, batch)
            images, labelled, correct = images + size, labelled + len(hits), correct + int(hits.sum())
            progress(size)
    if images == 0:
        raise ValueError("no images: there is nothing to measure")
    while is_wrapper(model):
        model = next(model.children())
    config = getattr(model, "config", None)
    frame = make_frame(
        describe_layers(record.layers),
        network=network,
        kind=getattr(config, "kind", "other"),
        depth=getattr(config, "depth", None),
        images=images,
        source="hooks",
    )
    frame.attrs["accuracy"] = correct / labelled if labelled else None
    frame.attrs["unpaired"] = record.unpaired
    return frame


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def run(model: nn.Module, batch: Any) -> Any:
    """The output for one batch, on the model's device."""
    device = device_of(model)
    if isinstance(batch, Mapping):
        return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    images = batch[0] if isinstance(batch, tuple | list) and len(batch) in (1, 2) else batch
    if not isinstance(images, Tensor):
        raise ValueError(
            f"a batch is {BATCHES}, not {type(batch).__name__} of {len(batch)}: say forward=, which runs it"
        )
    return model(images.to(device))


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(part)


def count_images(batch: Any) -> int:
    first = next(tensors_in(batch), None)
    if first is None or first.dim() == 0:
        raise ValueError(f"no tensor (N, ...) in a batch of type {type(batch).__name__}: its images cannot be counted")
    return len(first)


def compare(output: Any, batch: Any) -> Tensor:
    """Whether each label is hit (n,); no values where there are no labels, or no logits (N, classes, ...) for them."""
    logits, labels = logits_of(output), labels_of(batch)
    if logits is None or logits.dim() < 2 or labels is None or labels.is_floating_point():
        return torch.zeros(0)
    predicted = logits.argmax(1)
    return (predicted == labels.to(predicted.device)).flatten() if predicted.shape == labels.shape else torch.zeros(0)


def labels_of(batch: Any) -> Tensor | None:
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if pair else None
    return labels if isinstance(labels, Tensor) else None


def logits_of(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = [output.get("logits"), output.get("out")]
    parts = output if isinstance(output, tuple | list) else [output]
    return next((part for part in parts if isinstance(part, Tensor)), None)


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
            {"layer": position, "name": layer.name, "norm": layer.norm, "stage": stage, "channels": channels}
            | {"height": layer.height, "width": layer.width, "count": moments.count * channels}
            | {"mean": moments.mean.mean().item(), "std": moments.std}
            | {"within": moments.within, "between": moments.between}
        )
    return rows
