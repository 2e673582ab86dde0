"""What a batch is: running a network on it, counting its images, and the labels that its output hits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BATCHES = "a tensor, (images, labels), or a dict of tensors that the network takes as keywords"


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


def compare_labels(output: Any, batch: Any) -> Tensor:
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
