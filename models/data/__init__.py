"""Images to measure on: CIFAR-10, the probe set, and folders of images of any size.

>>> from models import data
>>> images, labels = next(data.load("probe").batches(100))
>>> images.shape
(100, 32, 32, 3)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

Batch = tuple[np.ndarray, np.ndarray | None]  # images (n, side, side, 3) uint8; labels (n,) int64


class ImageSet(Protocol):
    """A set of images, or an evenly spaced part of one.

    side: height and width of an image in pixels, 32 or 224.
    classes: number of classes; 0 if it is not known.
    labels_known: why there are no labels to compare with; empty if there are labels.
    total: number of images in the whole set, of which this may be a part.
    some: returns at most `count` of the images, evenly spaced.
    sample: likewise, as one array (n, side, side, 3).
    batches: yields the images from `first` to before `end`, `size` at a time.
    describe: returns how many images these are and where they come from, in one line.
    provenance: returns the same in types that JSON can hold.
    """

    @property
    def side(self) -> int: ...
    @property
    def classes(self) -> int: ...
    @property
    def labels_known(self) -> str: ...
    @property
    def total(self) -> int: ...
    def __len__(self) -> int: ...
    def some(self, count: int) -> Self: ...
    def sample(self, count: int) -> np.ndarray: ...
    def batches(self, size: int, first: int = 0, end: int | None = None) -> Iterator[Batch]: ...
    def describe(self) -> str: ...
    def provenance(self) -> dict[str, Any]: ...


def load(name: str | Path, split: str = "test", side: int = 32) -> ImageSet:
    """Load images; OSError or ValueError if they are not there or damaged.

    name: `probe`, `cifar10` (which is found or downloaded), or a path.
    side: 32 to read CIFAR-10 from the path, 224 to read a folder of images of any size.
    """
    from models.data import cifar10, folder, probe

    if side == folder.CROP:
        return folder.ImageFolder.open(name)
    if name == "probe":
        return probe.load()
    return cifar10.load(None if name == "cifar10" else name, split)


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """Return at most `count` of the positions 0 to total - 1; data are often sorted by class."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def count_images(part: int, total: int) -> str:
    return f"{part:,}" if part == total else f"{part:,} of {total:,}"
