"""CIFAR-10 in any of the layouts that people have: found, read, checked, downloaded.

    from models.data import cifar10

    data = cifar10.load("path/to/cifar-10-python.tar.gz", split="test")
    print(data.describe())  # 10,000 test images, complete and exact (official archive, path/to/...)

The layouts are the parquet shards of the Hugging Face hub (`uoft-cs/cifar10`), the official python
and binary versions (https://www.cs.toronto.edu/~kriz/cifar.html; a folder or the .tar.gz), and
folders of images by class.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from models.data import Batch, count_images, evenly_spaced, formats
from models.data.formats import NoData, OtherData
from models.data.labels import CLASSES

SIZES = {"test": 10_000, "train": 50_000}
DIGESTS = {  # see `digest`
    "test": "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
    "train": "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
}

HUB = "https://huggingface.co/datasets/uoft-cs/cifar10/resolve/main/plain_text"
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"  # 163 MB
SOURCES = {"test": (f"{HUB}/test-00000-of-00001.parquet", ARCHIVE), "train": (ARCHIVE,)}  # 23 MB
TIMEOUT = 5  # seconds to wait for the answer of a server


@dataclass(frozen=True)
class Images:
    """Images in memory: an `ImageSet` but for its description.

    images: (N, 32, 32, 3) uint8 RGB.
    labels: (N,) int64, or None if they are not known.
    whole: number of images in the set that this is a part of.
    """

    images: np.ndarray
    labels: np.ndarray | None
    labels_known: str = field(default="", kw_only=True)
    whole: int | None = field(default=None, kw_only=True)
    side: ClassVar[int] = formats.SIDE
    classes: ClassVar[int] = len(CLASSES)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def total(self) -> int:
        return self.whole or len(self)

    def some(self, count: int) -> Self:
        chosen = evenly_spaced(len(self), count)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, images=self.images[chosen], labels=labels, whole=self.total)

    def sample(self, count: int) -> np.ndarray:
        return self.some(count).images

    def batches(self, size: int, first: int = 0, end: int | None = None) -> Iterator[Batch]:
        end = len(self) if end is None else end
        for start in range(first, end, size):
            part = slice(start, min(start + size, end))
            yield self.images[part], None if self.labels is None else self.labels[part]


@dataclass(frozen=True)
class Cifar10(Images):
    """The images of one split of CIFAR-10, or a part of them.

    missing: the files of the split that are known to be missing.
    digest: of the whole split, as it was read now; see the function `digest`.
    """

    split: str
    path: Path
    layout: str
    missing: str
    digest: str

    @property
    def exact(self) -> bool:
        """True if the published images and labels were read, and nothing else, in any order."""
        return self.digest == DIGESTS[self.split]

    def describe(self) -> str:
        """Return one line: how many images, whether the set is complete and exact, and where."""
        size, count = SIZES[self.split], count_images(len(self), self.total)
        if self.exact:
            state = "complete and exact"
        elif self.missing:
            state = f"incomplete: {self.missing}"
        elif self.total < size:
            state = f"incomplete: {size - self.total:,} of {size:,} are missing"
        elif self.labels is None:
            state = "without labels, so not checked"
        else:
            state = "not exact: other images or labels than the published ones"
        return f"{count} {self.split} images, {state} ({self.layout}, {self.path})"

    def provenance(self) -> dict[str, Any]:
        facts = {"path": str(self.path), "layout": self.layout, "split": self.split}
        return {**facts, "sha256": self.digest, "exact": self.exact}


def load(path: str | Path | None = None, split: str = "test", download: bool = True) -> Cifar10:
    """Load CIFAR-10. NoData, an OSError, if there is none; ValueError if a file is damaged.

    path: of any layout. Without it $CIFAR10, ./data and the cache folder are tried.
    split: `test` or `train`.
    download: whether to download CIFAR-10 into the cache folder if it is not found.
    """
    if split not in SIZES:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SIZES)}")
    if path:
        return read(Path(path), split)
    if named := os.environ.get("CIFAR10"):
        try:
            return read(Path(named), split)
        except NoData as error:
            raise NoData(f"$CIFAR10: {error}") from error
    tried = ["$CIFAR10 (not set)"]
    for folder in (Path("data"), cache_folder()):
        try:
            return read(folder, split)
        except (NoData, OtherData):  # there may be data of other kinds
            tried.append(str(folder))
    for source in SOURCES[split] if download else ():
        try:
            return fetch(source, split)
        except OSError as error:
            tried.append(f"{source} ({reason(error)})")
            if reason(error) == "timed out":  # the next one would, too
                break
    raise NoData(
        f"no CIFAR-10 {split} images found: tried {', '.join(tried)}; "
        "name its folder or archive with --data"
    )


def cache_folder() -> Path:
    """Return the folder of downloads: $LAYER_RESPONSES_CACHE, or one in the user's cache folder."""
    import pooch

    return Path(os.environ.get("LAYER_RESPONSES_CACHE") or pooch.os_cache("layer-responses"))


def fetch(url: str, split: str) -> Cifar10:
    """Download a file into the cache folder and read it; OSError if it is not all of CIFAR-10."""
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    name, folder = url.rsplit("/", 1)[1], cache_folder()
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    try:
        file = Path(pooch.retrieve(url, None, fname=name, path=folder, downloader=downloader))
    except ValueError as error:  # not an address
        raise OSError(str(error)) from error
    try:
        data = read(file, split)
        if not data.exact:
            raise ValueError("its content differs from the published images")
    except (ValueError, NoData) as error:
        file.unlink()
        raise OSError(f"the download is not CIFAR-10: {error}") from error
    return data


def reason(error: OSError) -> str:
    """Return a network error in a few words; requests nests the cause in long texts."""
    known = "Failed to resolve|Connection refused|timed out|Network is unreachable"
    causes = re.findall(known, str(error))
    return causes[-1].lower() if causes else " ".join(str(error).split())[:200]


def read(path: Path, split: str) -> Cifar10:
    """Read one split from a file or folder; see `load` for the errors."""
    if not path.exists():
        raise NoData(
            f"{path}: no such file or folder; --data takes a folder or an archive of CIFAR-10"
        )
    layout, files, parts = formats.find_files(path, split)
    images, labels = formats.collect(parts, str(path))
    if not len(images):
        raise NoData(f"{path}: {layout} without a single image")
    why = formats.label_files(files)[1] if layout == formats.FOLDERS else ""
    known = None if why else labels
    facts = (split, path, layout, formats.missing_files(files, split), digest(images, known))
    return Cifar10(images, known, *facts, labels_known=why)


def digest(images: np.ndarray, labels: np.ndarray | None) -> str:
    """Return a digest of images (N, 32, 32, 3) and labels (N,) that does not depend on their order.

    It is the SHA-256 of the sorted SHA-256 digests of each label (a byte, 255 if there are no
    labels) and its image.
    """
    if labels is None:
        labels = np.full(len(images), 255)
    pairs = zip(labels.tolist(), images, strict=True)
    single = [hashlib.sha256(bytes([label]) + image.tobytes()).digest() for label, image in pairs]
    return hashlib.sha256(b"".join(sorted(single))).hexdigest()
