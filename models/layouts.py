"""The layouts in which people have CIFAR-10: how each is recognised and decoded.

A finder gives the files of a split, or none where the path is not of its layout; a decoder makes images
(N, 32, 32, 3) uint8 and labels (N,) int64 of them. No code in any of the files is run.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"test": ("test_batch",), "train": tuple(f"data_batch_{i}" for i in range(1, 6))}  # official versions
SHAPE = (32, 32, 3)  # H, W, C
PIXELS = 32 * 32 * 3  # bytes of an image

Decoded = tuple[np.ndarray, np.ndarray | None]
Finder = Callable[[Path, str], list[Path]]
Decoder = Callable[[list[Path], str], Decoded]


class NoData(FileNotFoundError):
    """There is no CIFAR-10 where it was looked for."""


class WrongSize(ValueError):
    """An image is not one of CIFAR-10's 32x32 pixels."""


def find_parquet(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.glob(f"{split}*.parquet")) or sorted(path.glob(f"*/{split}*.parquet"))


def decode_parquet(files: list[Path], split: str) -> Decoded:
    import pyarrow
    from pyarrow import parquet

    pngs: list[bytes] = []
    labels: list[np.ndarray] = []
    for file in files:
        try:
            table = parquet.read_table(file)
            column = "img" if "img" in table.column_names else "image"
            pngs += [cell["bytes"] for cell in table[column].to_pylist()]
            labels.append(as_labels(table["label"].to_pylist()))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file}: damaged or truncated parquet file; copy or download it again") from error
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file}: no columns img (struct with bytes) and label; this is not the layout of uoft-cs/cifar10"
            ) from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return decode_images(((f"image {i}", io.BytesIO(png)) for i, png in enumerate(pngs)), len(pngs)), np.concatenate(
        labels
    )


def find_python(path: Path, split: str) -> list[Path]:
    return find_batches(path, "cifar-10-batches-py", BATCHES[split])


def find_binary(path: Path, split: str) -> list[Path]:
    return find_batches(path, "cifar-10-batches-bin", [f"{name}.bin" for name in BATCHES[split]])


def find_batches(path: Path, folder: str, names: Iterable[str]) -> list[Path]:
    """The official files of a split, in `path` or in the official folder there."""
    names = list(names)
    return [file for base in (path, path / folder) for name in names if (file := base / name).is_file()][: len(names)]


def decode_python(files: list[Path], split: str) -> Decoded:
    return join(parse_python(file.read_bytes(), str(file)) for file in files)


def decode_binary(files: list[Path], split: str) -> Decoded:
    return join(parse_binary(file.read_bytes(), str(file)) for file in files)


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
        with tarfile.open(file) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in parsers:
                    if member.size > 64 * 2**20:
                        raise ValueError(f"{file}: {member.name} is far larger than a batch of CIFAR-10")
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file has content
                    batches[name] = parsers[name](content.read(), f"{file}: {member.name}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{file}: damaged or truncated archive; copy or download it again") from error
    if not batches:
        raise NoData(f"{file}: no {BATCHES[split][0]} in this archive; it is not the official CIFAR-10")
    return join(batches[name] for name in sorted(batches))


def find_folders(path: Path, split: str) -> list[Path]:
    """The image files of `path/split` or `path`, in folders by class or flat."""
    folder = path / split if (path / split).is_dir() else path
    if not folder.is_dir():
        return []
    files = [file for pattern in ("*", "*/*") for file in folder.glob(pattern)]
    return sorted(file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg"))


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
    """Decode PNG or JPEG files (name, path or file object) of 32x32 pixels to (N, 32, 32, 3) uint8 RGB."""
    from PIL import Image

    images = np.empty((count, *SHAPE), np.uint8)
    for i, (name, file) in enumerate(files):
        try:
            with Image.open(file) as image:
                if image.size != (32, 32):
                    width, height = image.size
                    raise WrongSize(f"{name}: {width}x{height} pixels; the images of CIFAR-10 have 32x32")
                images[i] = np.asarray(image.convert("RGB"))
        except WrongSize:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name}: damaged or no image ({error})") from error
    return images


def parse_binary(content: bytes, name: str) -> Decoded:
    """Records of a label byte and 3072 bytes (C, H, W)."""
    if len(content) % (1 + PIXELS):
        raise ValueError(f"{name}: {len(content):,} bytes are no multiple of {1 + PIXELS}: damaged or truncated")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    return chw_to_hwc(records[:, 1:]), as_labels(records[:, 0])


def parse_python(content: bytes, name: str) -> Decoded:
    """A pickled dictionary of data (N, 3072) uint8 and labels; nothing but numpy arrays is admitted."""
    try:
        batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        data, labels = batch["data"], as_labels(batch["labels"])
        if data.dtype != np.uint8 or data.shape != (len(labels), PIXELS):
            raise ValueError(f"data is {data.dtype} {data.shape}")
    except Refused as error:
        raise ValueError(f"{name}: refused: {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{name}: damaged, truncated or not a batch of CIFAR-10 ({error})") from error
    return chw_to_hwc(data), labels


class Refused(pickle.UnpicklingError):
    """A pickle names something other than a numpy array."""


class ArrayUnpickler(pickle.Unpickler):
    """Reads the official pickles: dictionaries, lists, strings, numbers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise Refused(f"the pickle asks for {module}.{name}, and only numpy arrays are admitted")


def reconstruct(kind: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    """What numpy's own function does for an array: make an empty one, whose state is set by the pickle."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise Refused("the pickle asks for an array of another kind than numpy writes")
    return np.ndarray((0,), np.uint8)


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
