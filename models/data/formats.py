"""The layouts in which people have CIFAR-10, and how each is read. No code in any file is run."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from models.data.folder import FORMATS, as_rgb, image_files, reason
from models.data.labels import CLASSES, label_folders
from models.data.pickles import Array, Refused, read_pickle

BATCHES = {"test": ("test_batch",), "train": tuple(f"data_batch_{i}" for i in range(1, 6))}
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
FOLDERS = "folders of images"
SIDE = 32  # pixels
VALUES = 3 * SIDE * SIDE  # of an image
ROWS = 50_000  # images in the larger split
CELL = 2**20  # bytes of an image in a parquet file: it has about 2,300
LARGEST = 32 * 2**20  # bytes of a batch: the official ones have 31 million
UNPACKED = 16 * LARGEST  # bytes in an archive: the official ones have 186 million
HEADER = 2**20  # bytes of a header in an archive
MEMBERS = 1000  # files in an archive: the official ones have 8

Part = tuple[np.ndarray, Any]  # images (n, 32, 32, 3) uint8; labels (n,), not checked


class NoData(FileNotFoundError):
    """There is no CIFAR-10 in this place."""


class OtherData(ValueError):
    """A file is sound, but it does not hold CIFAR-10."""


class WrongSize(OtherData):
    """An image does not have 32x32 pixels."""


def find_files(path: Path, split: str) -> tuple[str, list[Path], Iterator[Part]]:
    """Return the layout of a path, its files of a split and a reader of them; NoData if none."""
    name = "test_batch" if split == "test" else "data_batch_[1-5]"
    parquet = (f"{split}*.parquet", f"*/{split}*.parquet")
    python, binary = (name, f"cifar-10-batches-py/{name}"), (f"{name}.bin", f"*-bin/{name}.bin")
    unpack = partial(read_archive, split=split)
    for layout, files, read in (
        ("parquet shards of the hub", first_of(path, parquet, (".parquet",)), read_parquet),
        ("official python version", first_of(path, python), read_batch),
        ("official binary version", first_of(path, binary), read_batch),
        ("official archive", first_of(path, ARCHIVES, (".tar.gz", ".tgz", ".tar")), unpack),
    ):
        if files:
            return layout, files, chain.from_iterable(map(read, files))
    if files := image_files(path / split) or image_files(path):
        return FOLDERS, files, read_images(files)
    raise NoData(
        f"{path}: no CIFAR-10 {split} images here; looked for {split}*.parquet, {name}, "
        f"{name}.bin, {', '.join(ARCHIVES)} and {FOLDERS}"
    )


def first_of(path: Path, patterns: tuple[str, ...], suffixes: tuple[str, ...] = ()) -> list[Path]:
    """Return a file itself, if its suffix fits, or a folder's files of the first pattern."""
    if path.is_file():
        return [path] if path.name.endswith(suffixes) else []
    found = (sorted(f for f in path.glob(pattern) if f.is_file()) for pattern in patterns)
    return next(filter(None, found), [])


def missing_files(files: list[Path], split: str) -> str:
    """Return which files of a split are missing, as far as the names of the others tell."""
    names = [file.name for file in files]
    expected = [name + files[0].suffix for name in BATCHES[split]]
    if shards := re.fullmatch(rf"{split}-\d+-of-(\d{{1,5}})\.parquet", names[0]):
        expected = [f"{split}-{i:05}-of-{shards[1]}.parquet" for i in range(int(shards[1]))]
    missing = [name for name in expected if name not in names]
    return f"{', '.join(missing[:5])} not there" if names[0] in expected and missing else ""


def read_parquet(file: Path) -> Iterator[Part]:
    """Yield the images of a parquet file one by one."""
    for i, (image, label) in enumerate(parquet_rows(file)):
        name = f"{file}: row {i}"
        if len(image) > CELL:
            raise ValueError(f"{name}: damaged or no image (more than {CELL:,} bytes)")
        yield decode_image(io.BytesIO(image), name)[None], [label]


def parquet_rows(file: Path) -> Iterator[tuple[memoryview, Any]]:
    """Yield the encoded image and the label of each row.

    What the file says about its sizes is not believed: rows are read one at a time, and a page of
    Snappy unpacks to at most 21 times its bytes.
    """
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, thrift_container_size_limit=ROWS) as table:
            schema, metadata = table.schema_arrow, table.metadata
            image = "img" if "img" in schema.names else "image"
            schema.field(image).type.field("bytes"), schema.field("label")
            if metadata.num_rows > ROWS:
                raise OtherData(f"{file}: far larger than CIFAR-10")
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                codecs = {group.column(i).compression for i in range(group.num_columns)}
                if other := codecs - {"UNCOMPRESSED", "SNAPPY"}:
                    raise OtherData(f"{file}: packed with {min(other)}; write it with Snappy")
            columns = [f"{image}.bytes", "label"]
            for rows in table.iter_batches(1, columns=columns, use_threads=False):
                yield memoryview(rows[image][0].as_py()["bytes"]), rows["label"][0].as_py()
    except OtherData:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise OtherData(
            f"{file}: no columns img (struct with bytes) and label; "
            "this is not the layout of uoft-cs/cifar10"
        ) from error
    except Exception as error:
        if getattr(error, "errno", None):  # it could not be opened
            raise
        words = "damaged or truncated parquet file; copy or download it again"
        raise ValueError(f"{file}: {words}") from error


def read_archive(file: Path, split: str) -> Iterator[Part]:
    """Yield the official batches in an archive, by name, without unpacking it to the disk."""
    batches: dict[str, bytes] = {}
    try:
        with open(file, "rb") as raw, unpacked(raw) as content:
            headers = cast(IO[bytes], Headers(content))
            with tarfile.open(fileobj=headers, mode="r:") as archive:
                for count, member in enumerate(archive):
                    end = member.offset_data + member.size
                    if count == MEMBERS or end > UNPACKED or len(batches) > len(BATCHES[split]):
                        raise OtherData(f"{file}: far larger than the official archive")
                    name = Path(member.name).name
                    if member.isreg() and name.removesuffix(".bin") in BATCHES[split]:
                        content.seek(member.offset_data)
                        batches[name] = content.read(min(member.size, LARGEST + 1))
    except (FileNotFoundError, OtherData):
        raise
    except Exception as error:  # tarfile and gzip raise anything
        words = "damaged or truncated archive; copy or download it again"
        raise ValueError(f"{file}: {words}") from error
    if not batches:
        first = BATCHES[split][0]
        raise NoData(f"{file}: no {first} in this archive; it is not the official CIFAR-10")
    for name in sorted(batches):
        yield parse_batch(batches.pop(name), f"{file}: {name}")


def unpacked(raw: io.BufferedReader) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(raw)) if raw.peek(2)[:2] == b"\x1f\x8b" else raw


class Headers:
    """An archive of which tarfile reads the headers: it would take in one of any length."""

    def __init__(self, content: IO[bytes]) -> None:
        self.content, self.seek, self.tell = content, content.seek, content.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER:
            raise tarfile.ReadError("a header is too long")
        return self.content.read(size)


def read_batch(file: Path) -> Iterator[Part]:
    """Yield the images of one official file."""
    with open(file, "rb") as opened:
        content = opened.read(LARGEST + 1)
    yield parse_batch(content, str(file))


def parse_batch(content: bytes, name: str) -> Part:
    """Return what an official batch holds: records of a label and an image, or a pickle."""
    if len(content) > LARGEST:
        raise ValueError(f"{name}: far larger than a batch of CIFAR-10")
    if not name.endswith(".bin"):
        data, labels = parse_pickle(content, name)
    elif len(content) % (1 + VALUES):
        size = f"{len(content):,} bytes are not a multiple of {1 + VALUES}"
        raise ValueError(f"{name}: {size}: damaged or truncated")
    else:
        records = np.frombuffer(content, np.uint8).reshape(-1, 1 + VALUES)  # (N, 3073)
        data, labels = records[:, 1:], records[:, 0]
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels  # (N, 32, 32, 3)


def parse_pickle(content: bytes, name: str) -> Part:
    """Return the pixels (N, 3072) and the labels of a pickled dictionary."""
    try:
        batch = read_pickle(content)
        batch = {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}
        data, labels = batch["data"].values, batch["labels"]
        if isinstance(labels, Array):
            labels = labels.values
        elif {type(label) for label in labels} - {int}:
            raise ValueError("labels that are not integers")
        if data.dtype != np.uint8 or data.shape != (len(labels), VALUES):
            raise ValueError("not one row of 3072 bytes a label")
    except Refused as error:
        raise ValueError(f"{name}: refused: {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{name}: damaged, truncated or not a batch of CIFAR-10") from error
    return data, labels


def read_images(files: list[Path]) -> Iterator[Part]:
    """Yield image files one by one, with the labels of their folders, or 0 if not known."""
    labels, _ = label_files(files)
    for file in files:
        yield decode_image(file, str(file))[None], [labels.get(file.parent.name, 0)]


def label_files(files: list[Path]) -> tuple[dict[str, int], str]:
    """Return the labels by folder, or none and the reason."""
    names = {file.parent.name for file in files}
    if len(names) == 1 and not names & set(CLASSES):
        return {}, "the images are not in class folders"
    return label_folders(names, len(CLASSES))


def decode_image(file: Path | io.BytesIO, name: str) -> np.ndarray:
    """Return an image of 32x32 pixels as (32, 32, 3) uint8 RGB."""
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.size != (SIDE, SIDE):
                width, height = image.size
                raise WrongSize(f"{name}: {width}x{height} pixels; CIFAR-10's images have 32x32")
            return np.asarray(as_rgb(image))
    except FileNotFoundError as error:  # it vanished, and is not damaged
        error.filename = name  # Pillow 10 gives its absolute path
        raise
    except WrongSize:
        raise
    except Exception as error:  # a damaged image raises anything
        raise ValueError(f"{name}: damaged or no image ({reason(error)})") from error


def collect(parts: Iterator[Part], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Check labels, and join parts to (N, 32, 32, 3) and (N,) without a second copy of them."""
    images, labels = np.empty((ROWS, SIDE, SIDE, 3), np.uint8), np.empty(ROWS, np.int64)
    count = 0
    for some, theirs in parts:
        end, array = count + len(some), np.asarray(theirs)
        if array.ndim != 1 or array.dtype.kind not in "iu" or np.any((array < 0) | (array > 9)):
            raise OtherData(f"{name}: a label is not an integer from 0 to 9")
        if end > ROWS:
            raise OtherData(f"{name}: far larger than CIFAR-10")
        images[count:end], labels[count:end] = some, array
        count = end
    return images[:count], labels[:count]
