"""CIFAR-10 in the layouts that people have it in: found, recognised, checked, downloaded.

    from models.data import cifar10
    data = cifar10.load("path/to/cifar-10-python.tar.gz", split="test")
    print(data.describe())  # 10,000 test images, complete and exact (official python version, path/to/...)

Layouts: the Hugging Face hub's parquet shards (`uoft-cs/cifar10`), the official python and binary
versions (https://www.cs.toronto.edu/~kriz/cifar.html; a folder or the .tar.gz), and folders of PNG
or JPEG files by class. No code in any of these files is run.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from models.files import replacing
from models.data.formats import BATCHES, LAYOUTS, Decoded, Decoder, NoData, OtherData, missing_files

SIZES = {"test": 10_000, "train": 50_000}

# sha256 over the sorted, concatenated sha256 digests of (label byte + image bytes, row-major H, W,
# C) of all images
DIGESTS = {
    "test": "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
    "train": "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
}

ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"  # 163 MB
HUB_TEST = (
    "https://huggingface.co/datasets/uoft-cs/cifar10/resolve/main/plain_text/test-00000-of-00001.parquet"  # 23 MB
)
SOURCES = {"test": (HUB_TEST, ARCHIVE), "train": (ARCHIVE,)}
TIMEOUT = 5  # seconds to wait for a server's answer


@dataclass(frozen=True)
class Images:
    """Images in memory. images: (N, 32, 32, 3) uint8 RGB; labels: (N,) int64, or None where there
    are none.
    """

    images: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)

    def some(self, count: int) -> Self:
        """At most `count` of the images, evenly spaced: they may be sorted by class."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, images=self.images[chosen], labels=labels)

    def batches(
        self, size: int, first: int = 0, end: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The images from `first` to before `end`, `size` at a time: (n, 32, 32, 3) uint8 and (n,)
        labels.
        """
        end = len(self) if end is None else end
        for start in range(first, end, size):
            part = slice(start, min(start + size, end))
            yield self.images[part], None if self.labels is None else self.labels[part]


@dataclass(frozen=True)
class Cifar10(Images):
    """The images of one split.

    layout: in words. missing: what of the split is known to be missing, in words. digest:
    order-free, see `DIGESTS`.
    """

    split: str
    path: Path
    layout: str
    missing: str
    digest: str

    @property
    def exact(self) -> bool:
        """True if these are the published images and labels, all of them and nothing else, in any
        order.
        """
        return self.digest == DIGESTS[self.split]

    def describe(self) -> str:
        """One line: how many images, whether they are complete and exact, which layout and where.
        """
        size = SIZES[self.split]
        if self.exact:
            state = "complete and exact"
        elif self.missing:
            state = f"incomplete: {self.missing}"
        elif len(self.images) < size:
            state = f"incomplete: {size - len(self.images):,} of {size:,} are missing"
        elif self.labels is None:
            state = "without labels, so not checked"
        else:
            state = "not exact: other images or labels than the published ones"
        return f"{len(self.images):,} {self.split} images, {state} ({self.layout}, {self.path})"

    def provenance(self) -> dict[str, Any]:
        """Where the images come from, as JSON can hold it."""
        facts = {"path": str(self.path), "layout": self.layout, "split": self.split}
        return {**facts, "sha256": self.digest, "exact": self.exact}


def load(path: str | Path | None = None, split: str = "test", download: bool = True) -> Cifar10:
    """CIFAR-10's images of one split (`test` or `train`), from a path in any of the layouts, or
    found, or downloaded.

    Without a path it looks into $CIFAR10, ./data and the cache folder, then downloads (with
    `download`) into the cache folder. Raises NoData (a FileNotFoundError) where there is nothing,
    ValueError where a file is damaged.
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
        except (NoData, OtherData):  # other people's data is none of our business
            tried.append(str(folder))
    if download:
        for source in SOURCES[split]:
            try:
                return fetch(source, split)
            except OSError as error:
                tried.append(f"{source} ({reason(error)})")
                if reason(error) == "timed out":  # so would the next one: the way out is closed
                    break
    raise NoData(f"no CIFAR-10 {split} images found: tried {', '.join(tried)}; name its folder or archive with --data")


def cache_folder() -> Path:
    """Where downloads and decoded images are kept: $LAYER_RESPONSES_CACHE, or the user's cache
    folder.
    """
    import pooch

    return Path(os.environ.get("LAYER_RESPONSES_CACHE") or pooch.os_cache("layer-responses"))


def fetch(url: str, split: str) -> Cifar10:
    """Download a source into the cache folder and read it. OSError where it cannot be had or is not
    CIFAR-10.
    """
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    name = url.rsplit("/", 1)[1]
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    try:
        file = Path(pooch.retrieve(url, known_hash=None, fname=name, path=cache_folder(), downloader=downloader))
    except ValueError as error:  # not an http address
        raise OSError(str(error)) from error
    try:
        data = read(file, split)
    except (ValueError, NoData) as error:
        file.unlink()
        raise OSError(f"the download is not CIFAR-10: {error}") from error
    if not data.exact:
        file.unlink()
        raise OSError("the download is not CIFAR-10: its content differs from the published images")
    return data


def reason(error: OSError) -> str:
    """A network error in a few words: requests nests the cause in repr()s of connection pools."""
    causes = re.findall(r"(?:Failed to resolve|Connection refused|timed out|Network is unreachable)", str(error))
    return causes[-1].lower() if causes else " ".join(str(error).split())[:200]


def read(path: Path, split: str) -> Cifar10:
    """Read one split from a folder or file in any of the layouts; decoded images are cached.

    Raises NoData where the path holds no CIFAR-10, ValueError where a file of it is damaged.
    """
    if not path.exists():
        raise NoData(f"{path}: no such file or folder; --data takes a folder or an archive of CIFAR-10")
    for layout, find, decode in LAYOUTS:
        files = find(path, split)
        if files:
            images, labels = cached(path, split, files, decode)
            if not len(images):
                raise NoData(f"{path}: {layout} without a single image")
            return Cifar10(images, labels, split, path, layout, missing_files(files, split), digest(images, labels))
    raise NoData(
        f"{path}: no CIFAR-10 {split} images here; looked for {split}*.parquet, {BATCHES[split][0]}, "
        f"{BATCHES[split][0]}.bin, cifar-10-python.tar.gz, cifar-10-binary.tar.gz and folders of PNG or JPEG files"
    )


def digest(images: np.ndarray, labels: np.ndarray | None) -> str:
    """The digest of images (N, 32, 32, 3) and labels (N,) that does not depend on their order; see
    `DIGESTS`.
    """
    if labels is None:
        labels = np.full(len(images), 255)
    singles = sorted(
        hashlib.sha256(bytes([label]) + image.tobytes()).digest() for image, label in zip(images, labels, strict=True)
    )
    return hashlib.sha256(b"".join(singles)).hexdigest()


def cached(path: Path, split: str, files: list[Path], decode: Decoder) -> Decoded:
    """What `decode` makes of the files, from the cache folder where they were decoded before and
    have not changed.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fingerprint = hashlib.sha256(repr(stats).encode()).hexdigest()
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    store = cache_folder() / "decoded" / f"{split}-{place}.npz"
    try:
        with open(store, "rb") as file, np.load(file) as kept:
            if str(kept["fingerprint"]) == fingerprint:
                return kept["images"], kept.get("labels")
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        pass  # not there, or not whole: decode again
    images, labels = decode(files, split)
    arrays: dict[str, Any] = {"fingerprint": np.array(fingerprint), "images": images}
    if labels is not None:
        arrays["labels"] = labels
    try:
        content = io.BytesIO()  # numpy 1.26 would leave a file open that it could not write
        np.savez(content, **arrays)
        with replacing(store) as temporary:
            temporary.write_bytes(content.getbuffer())
    except OSError:
        pass  # a cache that cannot be written only costs time
    return images, labels
