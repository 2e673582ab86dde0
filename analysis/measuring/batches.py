"""Batches: running a network on one, splitting it, its images, and the labels that it hits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BATCHES = (
    "a batch is a tensor of normalised images (N, C, H, W), (images, integer labels), or a dict "
    "of tensors that the network takes as keywords"
)


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def run(model: nn.Module, batch: Any) -> Any:
    """Return the model's output for one batch, which is moved to the model's device.

    Raises ValueError, which says what a batch is, if it is something else.
    """
    device = device_of(model)
    if isinstance(batch, Mapping):
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return model(**moved)
    images = images_of(batch)
    try:
        return model(images.to(device))
    except RuntimeError as error:
        if images.is_floating_point():
            raise
        raise ValueError(
            f"the images are {images.dtype} and the network does not take them: "
            "normalise them to floats as in its training"
        ) from error


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch that is no dict. ValueError if it is not what `run` takes."""
    images, labels = batch, None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        images, labels = batch[0], batch[1] if len(batch) == 2 else None
    if isinstance(images, Tensor) and (labels is None or is_labels(labels)):
        return images
    words = type(batch).__name__
    if isinstance(batch, tuple | list):
        parts = (str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in batch[:4])
        words += f" of {len(batch)} ({', '.join(parts)})"
    raise ValueError(f"{BATCHES}, not {words}: pass the images alone, or say forward=")


def is_labels(x: Any) -> bool:
    """Whether x is a tensor of integers."""
    return isinstance(x, Tensor) and not (
        x.is_floating_point() or x.is_complex() or x.dtype == torch.bool
    )


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(part)


def count_images(batch: Any) -> int:
    """Return the length of the first tensor in a batch."""
    first = next(tensors_in(batch), None)
    if first is None or first.dim() == 0:
        raise ValueError(f"no images in a batch of type {type(batch).__name__}: {BATCHES}")
    return len(first)


def part_of_batch(batch: Any, total: int, first: int, end: int) -> Any:
    """Return the images from `first` to before `end` of a batch of `total` images."""
    if isinstance(batch, Tensor):
        return batch[first:end] if batch.dim() and len(batch) == total else batch
    if isinstance(batch, Mapping):
        return {key: part_of_batch(value, total, first, end) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [part_of_batch(value, total, first, end) for value in batch]
    return batch


def compare_labels(output: Any, batch: Any, classes: int | None = None) -> Tensor:
    """Return whether each label is hit, (n,); no values without labels or logits.

    Labels below 0, and 255 if there is no such class, stand for what is to be ignored.

    output: logits (N, classes, ...), or a tuple or dict that holds them. classes: number of
    classes of the labels, if known; logits of another number are not compared.
    """
    logits, labels = logits_of(output), labels_of(batch)
    if logits is None or labels is None or logits.dim() < 2 or logits.shape[1] < 2:
        return torch.zeros(0)
    predicted = logits.argmax(1)
    if predicted.shape != labels.shape or classes not in (None, logits.shape[1]):
        return torch.zeros(0)
    labels = labels.to(predicted.device)
    counted = (labels >= 0) & ((labels != 255) | (logits.shape[1] > 255))
    return (predicted == labels)[counted]


def labels_of(batch: Any) -> Tensor | None:
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if pair else None
    return labels if is_labels(labels) else None


def logits_of(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = [output.get("logits"), output.get("out")]
    parts = output if isinstance(output, tuple | list) else [output]
    return next((part for part in parts if isinstance(part, Tensor)), None)
