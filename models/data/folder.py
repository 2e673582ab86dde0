"""Folders of images of any size, as networks for 224x224 pixels see them.

    from models.data.folder import ImageFolder

    folder = ImageFolder.open("val")  # val/n01440764/*.JPEG and so on, or images without folders
    for images, labels in folder.batches(32):  # (n, 224, 224, 3) uint8
        ...

As in torchvision's references for ImageNet, the shorter side is resized to 256 pixels, bilinearly
and with antialiasing, and the central 224x224 pixels are cut out. Threads decode the images while
the network runs.
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
from typing import Any, ClassVar

import numpy as np
from PIL import UnidentifiedImageError
from PIL.Image import MAX_IMAGE_PIXELS, Image, Resampling, fromarray
from PIL.Image import open as open_image

from models.data import Batch, count_images, evenly_spaced
from models.data.labels import label_folders

RESIZE, CROP = 256, 224  # pixels: the shorter side; both sides
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # some others start programs
LARGEST = 256 * 2**20  # bytes of a file
AHEAD = 2  # batches that are decoded in advance


@dataclass(frozen=True)
class ImageFolder:
    """Image files, sorted by path: an `ImageSet`.

    labels: (N,) int64, or None if they are not known.
    folders: number of class folders; 0 if the images are not in class folders.
    digests: SHA-256 of each file that was read so far.
    """

    path: Path
    files: list[Path]
    labels: np.ndarray | None
    labels_known: str
    folders: int
    classes: int
    total: int
    digests: dict[Path, bytes] = field(default_factory=dict)
    side: ClassVar[int] = CROP

    @classmethod
    def open(cls, path: str | Path) -> ImageFolder:
        """Find the images of a folder; ValueError, with its path, if there are none."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(
                f"{path}: no such folder; --data takes a folder of images for a network of "
                f"{CROP}x{CROP} input"
            )
        files = image_files(path)
        if not files:
            raise ValueError(
                f"{path}: no images here; looked for {', '.join(SUFFIXES)} files, "
                "directly in it and in class folders"
            )
        if any(file.parent == path for file in files):
            why = "the images are not in class folders"
            return cls(path, files, None, why, 0, 0, len(files))
        names = {file.parent.name for file in files}
        by_name, why = label_folders(names)
        labels = None if why else np.array([by_name[file.parent.name] for file in files], np.int64)
        classes = len(set(by_name.values()))
        return cls(path, files, labels, why, len(names), classes, len(files))

    def __len__(self) -> int:
        return len(self.files)

    def describe(self) -> str:
        where = f"in {self.folders:,} class folders" if self.folders else "without labels"
        return (
            f"{count_images(len(self), self.total)} images {where} ({self.path}), "
            f"shorter side to {RESIZE}, central {CROP}x{CROP} pixels"
        )

    def provenance(self) -> dict[str, Any]:
        """Return where the images come from that were read so far, for JSON.

        The digest is a SHA-256 over the files' sorted digests. It does not depend on their names.
        """
        digest = hashlib.sha256(b"".join(sorted(self.digests.values()))).hexdigest()
        return {"path": str(self.path), "layout": "folder of images", "sha256": digest}

    def some(self, count: int) -> ImageFolder:
        chosen = evenly_spaced(len(self), count)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, files=[self.files[i] for i in chosen], labels=labels)

    def sample(self, count: int) -> np.ndarray:
        return next(self.some(count).batches(count))[0]

    def batches(self, size: int, first: int = 0, end: int | None = None) -> Iterator[Batch]:
        """Yield the images from `first` to before `end`: (n, 224, 224, 3) uint8, (n,) labels."""
        files = self.files[first:end]
        labels = None if self.labels is None else self.labels[first:end]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting: deque[list[Future[np.ndarray]]] = deque()
            try:
                for start in range(-AHEAD * size, len(files), size):
                    ahead = max(start + AHEAD * size, 0)
                    part = files[ahead : ahead + size]
                    waiting.append([pool.submit(self.decode, file) for file in part])
                    if start >= 0:
                        images = np.stack([future.result() for future in waiting.popleft()])
                        yield images, None if labels is None else labels[start : start + size]
            finally:  # an error or a reader that stops does not wait for the rest
                pool.shutdown(wait=False, cancel_futures=True)

    def decode(self, file: Path) -> np.ndarray:
        """Return one image (224, 224, 3), uint8 RGB; ValueError, with its path, if damaged."""
        try:
            if file.stat().st_size > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            content = file.read_bytes()
            with open_image(BytesIO(content), formats=FORMATS) as image:
                pixels, limit = image.width * image.height, MAX_IMAGE_PIXELS
                if limit and pixels > limit:
                    raise ValueError(
                        f"Image size ({pixels} pixels) exceeds limit of {limit} pixels"
                    )
                cropped = crop(image)
        except FileNotFoundError:  # it vanished, and is not damaged
            raise
        except Exception as error:  # a damaged image raises anything
            raise ValueError(
                f"{file}: damaged, too large or no image ({reason(error)}); "
                "remove it from the folder"
            ) from error
        self.digests[file] = hashlib.sha256(content).digest()
        return cropped


def image_files(path: Path) -> list[Path]:
    """Return the image files directly in a folder and in its folders, sorted."""
    files = (file for pattern in ("*", "*/*") for file in path.glob(pattern))
    return sorted(
        file
        for file in files
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def reason(error: Exception) -> str:
    """Return why an image cannot be decoded; Pillow's own words may name an object in memory."""
    unknown = isinstance(error, UnidentifiedImageError)
    return "of no known format" if unknown else str(error)


def crop(image: Image) -> np.ndarray:
    """Resize the shorter side to 256 pixels and cut out the centre: (224, 224, 3) uint8 RGB.

    Both are one step, so that a narrow image does not grow to gigabytes in between.
    """
    width, height = image.size
    side = min(width, height) * CROP / RESIZE
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(as_rgb(image).resize((CROP, CROP), Resampling.BILINEAR, box=box))


def as_rgb(image: Image) -> Image:
    """Return an image with 8 bits a channel: 16 bits are scaled, transparency is left out."""
    if image.mode in ("I;16", "I;16B", "I"):  # Pillow would clip 16 bits to 8
        image = fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
