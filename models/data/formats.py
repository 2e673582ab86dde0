"""The layouts in which people have CIFAR-10: how each is recognised and decoded.

A finder gives the files of a split, or none where the path is not of its layout; a decoder makes
images (N, 32, 32, 3) uint8 and labels (N,) int64 of them. No code in any of the files is run.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from models.data.pickles import Array, Refused, read_pickle

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"test": ("test_batch",), "train": tuple(f"data_batch_{i}" for i in range(1, 6))}  # official versions
SHAPE = (32, 32, 3)  # H, W, C
PIXELS = 32 * 32 * 3  # bytes of an image
ROWS = 50_000  # images in the larger split: more are in no file of it
LARGEST = 64 * 2**20  # bytes that are taken in at once: an official batch has 31 MB

Decoded = tuple[np.ndarray, np.ndarray | None]
Finder = Callable[[Path, str], list[Path]]
Decoder = Callable[[list[Path], str], Decoded]


class NoData(FileNotFoundError):
    """There is no CIFAR-10 where it was looked for."""


class OtherData(ValueError):
    """A file is sound, and none of CIFAR-10."""


class WrongSize(OtherData):
    """An image is not one of CIFAR-10's 32x32 pixels."""


def find_parquet(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    found = ([file for file in path.glob(f"{place}{split}*.parquet") if file.is_file()] for place in ("", "*/"))
    return sorted(next(found)) or sorted(next(found))


def decode_parquet(files: list[Path], split: str) -> Decoded:
    parts: list[Decoded] = [(np.empty((0, *SHAPE), np.uint8), np.empty(0, np.int64))]
    for file in files:
        for first, pngs, labels in parse_parquet(file):
            named = ((f"{file}: image {i}", io.BytesIO(png)) for i, png in enumerate(pngs, first))
            parts.append((decode_images(named, len(pngs)), labels))
    return join(parts)


def parse_parquet(file: Path) -> Iterator[tuple[int, list[bytes], np.ndarray]]:
    """Some rows at a time: the number of the first, encoded images and labels."""
    from pyarrow import ArrowException

    first = 0
    try:
        for cells, labels in read_parquet(file):
            pngs = [cell["bytes"] for cell in cells]
            if not {type(png) for png in pngs} <= {bytes}:
                raise TypeError("an image that is not there")
            yield first, pngs, as_labels(labels)
            first += len(pngs)
    except OtherData:
        raise
    except (KeyError, TypeError) as error:
        raise OtherData(
            f"{file}: no columns img (struct with bytes) and label; this is not the layout of uoft-cs/cifar10"
        ) from error
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # it could not be opened
            raise
        raise ValueError(f"{file}: damaged or truncated parquet file; copy or download it again") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_parquet(file: Path) -> Iterator[tuple[list[Any], list[Any]]]:
    """The cells of both columns, so many at a time that they fit into memory if each is as large as
    all together.

    A file of kilobytes may say in each row that it holds the same megabytes.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        column = "img" if "img" in table.schema_arrow.names else "image"
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        if table.metadata.num_rows > ROWS or any(group.total_byte_size > 4 * LARGEST for group in groups):
            raise OtherData(f"{file}: far larger than CIFAR-10")
        for i, group in enumerate(groups):
            size = max(1, LARGEST // max(1, group.total_byte_size))
            for rows in table.iter_batches(size, row_groups=[i], columns=[f"{column}.bytes", "label"]):
                yield rows[column].to_pylist(), rows["label"].to_pylist()


def find_python(path: Path, split: str) -> list[Path]:
    return find_batches(path, "cifar-10-batches-py", BATCHES[split])


def find_binary(path: Path, split: str) -> list[Path]:
    return find_batches(path, "cifar-10-batches-bin", [f"{name}.bin" for name in BATCHES[split]])


def find_batches(path: Path, folder: str, names: Iterable[str]) -> list[Path]:
    """The official files of a split, in `path` or in the official folder there."""
    names = list(names)
    return [file for base in (path, path / folder) for name in names if (file := base / name).is_file()][: len(names)]


def decode_python(files: list[Path], split: str) -> Decoded:
    return join(parse_python(read_bytes(file), str(file)) for file in files)


def decode_binary(files: list[Path], split: str) -> Decoded:
    return join(parse_binary(read_bytes(file), str(file)) for file in files)


def read_bytes(file: Path) -> bytes:
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file}: far larger than a batch of CIFAR-10")
    return file.read_bytes()


def find_archive(path: Path, split: str) -> list[Path]:
    if path.is_dir():
        return [file for name in ("python", "binary") if (file := path / f"cifar-10-{name}.tar.gz").is_file()][:1]
    return [path] if path.name.endswith((".tar.gz", ".tgz", ".tar")) else []


def decode_archive(files: list[Path], split: str) -> Decoded:
    """Read the official batches inside an archive without unpacking it."""
    [file] = files
    parsers = dict.fromkeys(BATCHES[split], parse_python)
    parsers |= {f"{name}.bin": parse_binary for name in BATCHES[split]}
    batches = {}
    try:
        with decompressed(file) as content, tarfile.open(fileobj=content, mode="r:") as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in parsers:
                    if member.size > LARGEST:
                        raise ValueError(f"{file}: {member.name} is far larger than a batch of CIFAR-10")
                    batch = archive.extractfile(member)
                    assert batch is not None  # a regular file has content
                    batches[name] = parsers[name](batch.read(), f"{file}: {member.name}")
    except FileNotFoundError:  # it vanished, and is not damaged
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{file}: damaged or truncated archive; copy or download it again") from error
    if not batches:
        raise NoData(f"{file}: no {BATCHES[split][0]} in this archive; it is not the official CIFAR-10")
    return join(batches[name] for name in sorted(batches))


@contextmanager
def decompressed(file: Path) -> Iterator[IO[bytes]]:
    """An archive's content, of which not much is read at once: tarfile takes in whole headers of
    any length.
    """
    with open(file, "rb") as raw:
        gzipped = raw.peek(2)[:2] == b"\x1f\x8b"
        with gzip.open(raw) if gzipped else raw as content:
            yield cast(IO[bytes], Bounded(content))


class Bounded:
    """A file that is read in pieces of at most `LARGEST`."""

    def __init__(self, file: Any) -> None:
        self.seek, self.tell, self.whole = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST:
            raise tarfile.ReadError("a header that is far too long")
        content: bytes = self.whole(size)
        return content


def find_folders(path: Path, split: str) -> list[Path]:
    """The image files of `path/split` or `path`, in folders by class or flat."""
    folder = path / split if (path / split).is_dir() else path
    if not folder.is_dir():
        return []
    files = [file for pattern in ("*", "*/*") for file in folder.glob(pattern)]
    return sorted(file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg") and file.is_file())


def decode_folders(files: list[Path], split: str) -> Decoded:
    images = decode_images(((str(file), file) for file in files), len(files))
    folders = sorted({file.parent for file in files})
    if len(folders) == 1 and folders[0].name not in CLASSES:
        return images, None
    names = [folder.name for folder in folders]
    order = CLASSES if set(names) <= set(CLASSES) else names
    return images, as_labels([order.index(file.parent.name) for file in files])


LAYOUTS: tuple[tuple[str, Finder, Decoder], ...] = (
    ("parquet shards of the hub", find_parquet, decode_parquet),
    ("official python version", find_python, decode_python),
    ("official binary version", find_binary, decode_binary),
    ("official archive", find_archive, decode_archive),
    ("folders of images", find_folders, decode_folders),
)


def missing_files(files: list[Path], split: str) -> str:
    """Which files of a split are missing, as far as the names of those that are there tell."""
    names = [file.name for file in files]
    shards = re.fullmatch(rf"{split}-\d+-of-(\d+)\.parquet", names[0])
    if shards:
        expected = [f"{split}-{i:05}-of-{shards[1]}.parquet" for i in range(int(shards[1]))]
    elif names[0].removesuffix(".bin") in BATCHES[split]:
        expected = [name + (".bin" if names[0].endswith(".bin") else "") for name in BATCHES[split]]
    else:
        return ""
    missing = [name for name in expected if name not in names]
    return f"{', '.join(missing)} not there" if missing else ""


def decode_images(files: Iterator[tuple[str, Any]], count: int) -> np.ndarray:
    """Decode PNG or JPEG files (name, path or file object) of 32x32 pixels to (N, 32, 32, 3) uint8
    RGB.
    """
    from PIL import Image

    from models.data.folder import as_rgb, reason

    images = np.empty((count, *SHAPE), np.uint8)
    for i, (name, file) in enumerate(files):
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as image:  # others may call programs
                if image.size != (32, 32):
                    width, height = image.size
                    raise WrongSize(f"{name}: {width}x{height} pixels; the images of CIFAR-10 have 32x32")
                images[i] = np.asarray(as_rgb(image))
        except FileNotFoundError as error:  # vanished, not damaged
            error.filename = name  # Pillow 10 gives its absolute path
            raise
        except WrongSize:
            raise
        except Exception as error:  # a damaged image raises anything
            raise ValueError(f"{name}: damaged or no image ({reason(error)})") from error
    return images


def parse_binary(content: bytes, name: str) -> Decoded:
    """Records of a label byte and 3072 bytes (C, H, W)."""
    if len(content) % (1 + PIXELS):
        raise ValueError(f"{name}: {len(content):,} bytes are no multiple of {1 + PIXELS}: damaged or truncated")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    return chw_to_hwc(records[:, 1:]), as_labels(records[:, 0])


def parse_python(content: bytes, name: str) -> Decoded:
    """A pickled dictionary of data (N, 3072) uint8 and labels; nothing but arrays of numbers is
    admitted.
    """
    try:
        batch = read_pickle(content)
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        data, labels = batch["data"].values, batch["labels"]
        if not isinstance(labels, Array) and not {type(label) for label in labels} <= {int}:
            raise ValueError("its labels are no numbers")
        labels = as_labels(labels.values if isinstance(labels, Array) else labels)
        if data.dtype != np.uint8 or data.shape != (len(labels), PIXELS):
            raise ValueError(f"data is {data.dtype} {data.shape}")
    except Refused as error:
        raise ValueError(f"{name}: refused: {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{name}: damaged, truncated or not a batch of CIFAR-10 ({error})") from error
    return chw_to_hwc(data), labels


def chw_to_hwc(flat: np.ndarray) -> np.ndarray:
    """(N, 3072) of planes to images (N, 32, 32, 3)."""
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def as_labels(labels: Any) -> np.ndarray:
    """Labels as (N,) int64. ValueError where one is not a byte."""
    try:
        array = np.asarray(labels, dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"a label is no number ({error})") from error
    if array.size and not (array.min() >= 0 and array.max() <= 255):
        raise ValueError("a label is not between 0 and 255")
    return array


def join(batches: Iterable[Decoded]) -> Decoded:
    """Batches of images and labels, one behind another."""
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)
