"""Read the bytes of a checkpoint file without running code from it.

Files of torch.save, as zip archives or in the format before torch 1.6, and of safetensors are read.
torch.load is not used: a pickle is run by `Machine`, which knows no class and no function but the
few below, and tensors are copied out of the bytes after every size and checksum was compared.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from models.checkpoints.pickles import Described, Machine, Unreadable

EXPECTED = "a checkpoint is a file of torch.save (.pt, .pth, .th, .ckpt) or a .safetensors file"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files of torch before 1.6 begin
SIGNS = (  # what else is called a checkpoint: how it begins, what it is, what to do
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (rb"\x08[\x01-\x20]\x12", "an ONNX model; save the state_dict() of the torch network instead"),
    (rb"\s*<(!DOCTYPE|html|\?xml)", "a web page, not the file itself; download it again"),
    (rb"\x89HDF", "an HDF5 file; save the state_dict() of a torch network instead"),
)


@dataclass(frozen=True)
class Content:
    """What a file holds.

    tree: mappings by name, down to tensors (`Tensor` or `Described`).
    storages: the bytes of the described tensors, by key.
    metadata: text beside the tensors of a .safetensors file.
    """

    tree: Any
    storages: dict[str, memoryview]
    metadata: dict[str, str]


def parse(data: bytes, suffix: str) -> Content:
    """Return what a checkpoint file holds.

    data: the bytes of the file. suffix: how its name ends, `.safetensors` or any other.
    Raises Unreadable, or anything at all, if it is not a checkpoint.
    """
    for sign, words in SIGNS:
        if re.match(sign, data):
            raise Unreadable(words)
    if data[:4] == b"PK\x03\x04":
        return parse_zip(data)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    if suffix == ".safetensors" or (len(header) < len(data) - 8 and header[:1] == b"{"):
        return parse_safetensors(data, header)
    if data.lstrip()[:1] == b"{" and b'"weight_map"' in data:
        raise Unreadable(
            "the index of a checkpoint in several files; join them in one, and name it"
        )
    return parse_legacy(data)


def parse_safetensors(data: bytes, header: bytes) -> Content:
    try:
        tensors = dict(sorted(safetensors.torch.load(data).items()))  # it has no order
        metadata = json.loads(header).get("__metadata__", {})
    except Exception as error:  # a stranger's bytes
        raise Unreadable(f"damaged or truncated safetensors file ({error})") from error
    return Content(tensors, {}, metadata)


def parse_legacy(data: bytes) -> Content:
    """Return what a file of torch before 1.6 holds: five pickles, then the numbers."""
    file = io.BytesIO(data)
    machine = Machine(file, len(data))
    first = machine.load()
    if first != MAGIC:
        raise ValueError(f"begins with {type(first).__name__}")
    if machine.load() != PROTOCOL or machine.load().get("little_endian") is not True:
        raise ValueError("another protocol or byte order")
    tree, keys = machine.load(), machine.load()
    storages: dict[str, memoryview] = {}
    position, view = file.tell(), memoryview(data)
    for key in map(str, keys):
        storage = machine.storages[key]
        (count,) = struct.unpack_from("<q", data, position)
        if count != storage.length or key in storages:
            raise ValueError(f"storage {key} has another size")
        start = position + 8
        position = start + count * (storage.dtype or torch.uint8).itemsize
        storages[key] = view[start:position]
    return Content(tree, storages, {})


def parse_zip(data: bytes) -> Content:
    """Return what a zip archive of torch.save holds."""
    parts = zip_parts(data)
    roots = {name.partition("/")[0] for name in parts}
    if len(roots) != 1:
        raise ValueError(f"{len(roots)} folders in the archive")
    parts = {name.partition("/")[2]: part for name, part in parts.items()}
    if parts.get("byteorder", b"little") != b"little":
        raise Unreadable("its numbers are big-endian, and only little-endian ones are read")
    machine = Machine(io.BytesIO(parts["data.pkl"]), len(data))
    tree = machine.load()
    storages = {key: memoryview(parts[f"data/{key}"]) for key in machine.storages}
    return Content(tree, storages, {})


def zip_parts(data: bytes) -> dict[str, memoryview]:
    """Return the bytes of every entry of an archive, by name, after all that is said of them is
    checked: entries are stored as they are, nowhere overlap, and have the checksum they had.
    """
    parts: dict[str, memoryview] = {}
    view, end = memoryview(data), 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise Unreadable(
            "refused: a TorchScript archive, which holds code; "
            "save torch.jit.load(...).state_dict() instead"
        )
    checked = any(entry.CRC for entry in entries)  # torch.save can leave all checksums at 0
    for entry in entries:
        name = entry.filename
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Unreadable(f"refused: {name} in it is compressed, which torch.save never does")
        start = entry.header_offset
        sign, name_size, extra_size = struct.unpack_from("<4s22x2H", data, start)
        header = data[start + 30 : start + 30 + name_size]
        first = start + 30 + name_size + extra_size
        stated = entry.flag_bits & ~0x808, entry.external_attr & 0xFFFF, entry.compress_size
        if (
            (sign, header, stated) != (b"PK\x03\x04", name.encode(), (0, 0, entry.file_size))
            or start < end
            or name in parts
        ):
            raise ValueError(f"{name} is not an entry as torch.save writes it")
        end = first + entry.file_size
        parts[name] = view[first:end]
        if checked and zlib.crc32(parts[name]) != entry.CRC:
            raise Unreadable(f"damaged: the checksum of {name} in it is wrong")
    return parts


def materialise(
    tensors: Mapping[str, Tensor | Described], content: Content, size: int
) -> dict[str, Tensor]:
    """Return tensors that own their numbers.

    tensors: by name. content: where they come from. size: of the file, in bytes.
    Raises Unreadable if a tensor has no plain numbers, or if all of them together are larger than
    the file, as views of a few numbers may say they are.
    """
    described = {x: name for name, x in tensors.items() if isinstance(x, Described)}
    for x, name in described.items():
        if x.special == "quantised":
            raise Unreadable(
                f"{name} is quantised: its numbers are rounded; save the state_dict() of the network "
                "before it was quantised"
            )
        if x.special or x.storage is None:
            raise Unreadable(
                f"{name} is sparse, quantized or without data: only dense tensors are read"
            )
    total = sum(x.nbytes for x in described)
    if total > size:
        largest = max(described, key=lambda x: x.nbytes)
        raise Unreadable(
            f"its tensors would take {total:,} bytes ({described[largest]}: {largest.nbytes:,}), "
            f"and the file has {size:,}: it is damaged"
        )
    storages: dict[str, Tensor] = {}
    made = {x: numbers(x, content, storages) for x in described}
    return {name: made[x] if isinstance(x, Described) else x for name, x in tensors.items()}


def numbers(x: Described, content: Content, storages: dict[str, Tensor]) -> Tensor:
    """Return a tensor with the numbers of the file. storages: those copied before, by key."""
    assert x.storage is not None
    key, dtype, count = x.storage
    assert dtype is not None
    if key not in storages:
        part = content.storages[key]
        if len(part) != count * dtype.itemsize:
            raise Unreadable(f"damaged: storage {key} in it has another size")
        empty = torch.empty(0, dtype=dtype)
        storages[key] = torch.frombuffer(bytearray(part), dtype=dtype) if part else empty
    view = storages[key].as_strided(x.shape, x.stride, x.offset)
    return view if view.is_contiguous() and x.nbytes == len(content.storages[key]) else view.clone()
