"""A folder of images of any size, as networks for 224x224 pixels see them: resized, cropped, in
batches.

    from models.data.folder import ImageFolder
    folder = ImageFolder.open("val")  # val/n01440764/*.JPEG, ..., or a flat folder
    for images, labels in folder.batches(32):  # (n, 224, 224, 3) uint8
        ...

As usual for ImageNet (torchvision's references): the shorter side is resized to 256 pixels,
bilinearly and with antialiasing, and the central 224x224 are cut out. Files are decoded in threads,
ahead of the network.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError
from PIL.Image import MAX_IMAGE_PIXELS, Image, Resampling, fromarray
from PIL.Image import open as open_image

RESIZE, CROP = 256, 224  # pixels: of the shorter side; of both sides
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of Pillow's others, some call programs
LARGEST = 256 * 2**20  # bytes of a file
AHEAD = 2  # batches decoded before they are needed


@dataclass(frozen=True)
class ImageFolder:
    """Image files, sorted. labels: (N,) int64, the position of a file's folder among the sorted
    folders, or None.
    """

    path: Path
    files: list[Path]
    labels: np.ndarray | None
    digests: dict[Path, bytes] = field(default_factory=dict)  # of the files read so far

    @classmethod
    def open(cls, path: str | Path) -> ImageFolder:
        """The images of a folder: in folders by class, or flat. ValueError, with the path, where
        there are none.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder; --data takes a folder of images for a network of 224x224 input")
        files = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if is_image(file))
        if not files:
            raise ValueError(
                f"{path}: no images here; looked for {', '.join(SUFFIXES)} files, flat and in class folders"
            )
        folders = sorted({file.parent for file in files})
        if path in folders:
            return cls(path, files, None)
        return cls(path, files, np.array([folders.index(file.parent) for file in files], np.int64))

    def __len__(self) -> int:
        return len(self.files)

    @property
    def classes(self) -> int:
        """The number of class folders; 0 for a flat folder."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def digest(self) -> str:
        """SHA-256 over the sorted SHA-256 digests of the files read so far: it does not depend on
        names or order.
        """
        return hashlib.sha256(b"".join(sorted(self.digests.values()))).hexdigest()

    def describe(self) -> str:
        """One line: how many images, and where."""
        kind = f"in {self.classes:,} class folders" if self.classes else "without labels"
        return (
            f"{len(self.files):,} images {kind} ({self.path}), shorter side to {RESIZE}, central {CROP}x{CROP} pixels"
        )

    def provenance(self) -> dict[str, Any]:
        """Where the images that were read come from, as JSON can hold it."""
        return {"path": str(self.path), "layout": "folder of images", "sha256": self.digest}

    def some(self, count: int) -> ImageFolder:
        """At most `count` of the files, evenly spaced: they are sorted by class."""
        chosen = np.linspace(0, len(self.files) - 1, min(count, len(self.files))).astype(int)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, files=[self.files[i] for i in chosen], labels=labels)

    def sample(self, count: int) -> np.ndarray:
        """At most `count` images (n, 224, 224, 3), evenly spaced over the sorted files."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self.decode, self.some(count).files)))

    def batches(
        self, size: int, first: int = 0, end: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The images from `first` to before `end`, `size` at a time: (n, 224, 224, 3) uint8 and
        (n,) labels.
        """
        files = self.files[first:end]
        labels = None if self.labels is None else self.labels[first:end]
        starts = range(0, len(files), size)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting: deque[list[Future[np.ndarray]]] = deque()
            try:
                for start in range(-AHEAD * size, len(files), size):
                    ahead = start + AHEAD * size
                    if ahead in starts:
                        waiting.append([pool.submit(self.decode, file) for file in files[ahead : ahead + size]])
                    if start >= 0:
                        images = np.stack([future.result() for future in waiting.popleft()])
                        yield images, None if labels is None else labels[start : start + len(images)]
            finally:  # an error, or a reader that has enough, does not wait for the rest
                pool.shutdown(wait=False, cancel_futures=True)

    def decode(self, file: Path) -> np.ndarray:
        """One image (224, 224, 3) uint8 RGB. ValueError, with the path, where it cannot be read."""
        try:
            if file.stat().st_size > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            content = file.read_bytes()
            with open_image(BytesIO(content), formats=FORMATS) as image:
                pixels, limit = image.width * image.height, MAX_IMAGE_PIXELS
                if limit and pixels > limit:
                    raise ValueError(f"Image size ({pixels} pixels) exceeds limit of {limit} pixels")
                cropped = crop(image)
        except FileNotFoundError:  # it vanished, and is not damaged
            raise
        except Exception as error:  # a damaged image raises anything
            raise ValueError(
                f"{file}: damaged, too large or no image ({reason(error)}); remove it from the folder"
            ) from error
        self.digests[file] = hashlib.sha256(content).digest()
        return cropped


def is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def reason(error: Exception) -> str:
    """Why an image could not be decoded. Pillow's own words for an unknown format name an object in
    memory.
    """
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def crop(image: Image) -> np.ndarray:
    """The shorter side to 256 pixels, the central 224x224: uint8 (224, 224, 3) RGB."""
    width, height = image.size
    side = min(width, height) * CROP / RESIZE
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)  # in one step: a narrow image grows to no gigabytes on the way
    return np.asarray(as_rgb(image).resize((CROP, CROP), Resampling.BILINEAR, box=box))


def as_rgb(image: Image) -> Image:
    """8 bits a channel, whatever the image has: 16 bits are scaled, transparency is left out."""
    if image.mode in ("I;16", "I;16B", "I"):  # Pillow clips 16 bits to 8 instead of scaling them
        image = fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
