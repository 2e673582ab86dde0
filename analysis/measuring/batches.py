"""What a batch is: running a network on it, in parts where memory is short, its images, and the
labels it hits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.messages import ROOM, is_out_of_memory

T = TypeVar("T")
BATCHES = "a tensor, (images, labels), or a dict of tensors that the network takes as keywords"


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def run(model: nn.Module, batch: Any) -> Any:
    """The output for one batch, on the model's device."""
    device = device_of(model)
    if isinstance(batch, Mapping):
        return model(
            **{
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
        )
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
        raise ValueError(
            f"no tensor (N, ...) in a batch of type {type(batch).__name__}: its images cannot be counted"
        )
    return len(first)


class Parts:
    """Does something with a batch; where it does not fit into memory, with its halves, and so on
    from there on.

    what: it is done to, in a message. why_whole: why its batches cannot be split; empty where they
    can.
    """

    def __init__(self, what: str, why_whole: str = "") -> None:
        self.what, self.why_whole = what, why_whole
        self.most: float = math.inf  # images at a time

    def __call__(self, batch: Any, attempt: Callable[[Any], T]) -> Iterator[T]:
        """What `attempt` gives for each part of a batch. It must leave no trace where it raises for
        want of memory.

        ValueError where one image does not fit, or a batch that cannot be split.
        """
        total = count_images(batch)
        done = 0
        while True:
            size = int(min(self.most, total - done))
            part = batch if size == total else part_of_batch(batch, total, done, done + size)
            try:
                result = attempt(part)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self.halve(size, error)
            else:
                done += size
                yield result
                if done == total:
                    return

    def halve(self, size: int, error: BaseException) -> None:
        """Say that so many images are too many, and take half of them from here on."""
        if size == 1:
            raise ValueError(f"{self.what}: out of memory at one image: {ROOM}") from error
        if self.why_whole:
            raise ValueError(
                f"{self.what}: out of memory at a batch of {size} images, {self.why_whole}"
            ) from error
        self.most = size // 2
        line = f"{self.what}: out of memory at {size} images at a time, going on with {self.most}"
        tqdm.write(line, file=sys.stderr)  # above a progress bar, where there is one


def part_of_batch(batch: Any, total: int, first: int, end: int) -> Any:
    """Images `first` to before `end` of a batch of `total`: a tensor, or such tensors in a tuple,
    list or dict.
    """
    if isinstance(batch, Tensor):
        return batch[first:end] if batch.dim() and len(batch) == total else batch
    if isinstance(batch, Mapping):
        return {key: part_of_batch(value, total, first, end) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [part_of_batch(value, total, first, end) for value in batch]
    return batch


def compare_labels(output: Any, batch: Any, classes: int | None = None) -> Tensor:
    """Whether each label is hit (n,); no values where there are no labels, or no logits (N, 2
    classes or more, ...).

    classes: of the labels; where it is known, logits of as many. Labels below 0, and 255 where no
    class has that number, stand for what is to be ignored.
    """
    logits, labels = logits_of(output), labels_of(batch)
    if (
        logits is None
        or logits.dim() < 2
        or logits.shape[1] < 2
        or labels is None
        or labels.is_floating_point()
    ):
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
    return labels if isinstance(labels, Tensor) else None


def logits_of(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = [output.get("logits"), output.get("out")]
    parts = output if isinstance(output, tuple | list) else [output]
    return next((part for part in parts if isinstance(part, Tensor)), None)
