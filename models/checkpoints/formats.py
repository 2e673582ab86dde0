"""Read the bytes of a checkpoint file without running code from it.

Files of torch.save, as zip archives or in the format before torch 1.6, and of safetensors are read.
torch.load is not used: a pickle is run by `Machine`, which knows no class and no function but the
few below, and tensors are copied out of the bytes after every size and checksum was compared.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

EXPECTED = "a checkpoint is a file of torch.save (.pt, .pth, .th, .ckpt) or a .safetensors file"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files of torch before 1.6 begin
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
DESCRIBED = re.compile(r"torch\._utils\._rebuild_(?!.*numpy)\w+|torch\._tensor\._rebuild_from_type_v2")
PASSED_OVER = re.compile(  # plain data that training scripts keep beside the weights
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib(\._local)?\.\w*Path|datetime\.\w+"
    r"|collections\.(OrderedDict|defaultdict|deque|Counter)|decimal\.Decimal|fractions\.Fraction"
    r"|uuid\.UUID|copyreg\._reconstructor|_codecs\.encode"
    r"|builtins\.(set|frozenset|list|dict|tuple|int|long|float|str|unicode|bool|bytes|bytearray|complex|range|object)"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|random\._pickle\.\w+|bool_?|u?int\d+|float\d+)"
    r"|numpy\._?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|torch\.(device|Size|u?int\d+|b?float\d+|bool|complex\d+|torch_version\.TorchVersion)"
    r"|omegaconf\.[\w.]+|mmengine\.(config|logging)\.[\w.]+"
)
DIRECTORIES = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")
FREE_READS = 3_000_000  # of a pickle, besides one for every 5 bytes of the file: bounds its objects
SIGNS = (  # what else is called a checkpoint: how it begins, what it is, what to do
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (rb"\x08[\x01-\x20]\x12", "an ONNX model; save the state_dict() of the torch network instead"),
    (rb"\s*<(!DOCTYPE|html|\?xml)", "a web page, not the file itself; download it again"),
    (rb"\x89HDF", "an HDF5 file; save the state_dict() of a torch network instead"),
)


class Unreadable(ValueError):
    """A file is not a checkpoint; the message says what it is and what to do."""


class Storage(NamedTuple):
    """Numbers in a file: their key, their dtype (None if they are not plain numbers), how many."""

    key: str
    dtype: torch.dtype | None
    count: int


@dataclass(frozen=True)
class Described:
    """A tensor in a file, before its numbers are read. `special` says why it cannot be, if so."""

    storage: Storage | None
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    special: str = ""

    @property
    def nbytes(self) -> int:
        """Return how many bytes the tensor takes."""
        assert self.storage is not None
        assert self.storage.dtype is not None
        return math.prod(self.shape) * self.storage.dtype.itemsize


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


class Directory(dict[Any, Any]):
    """Stands for any mapping in a pickle, made from nothing or from [name, value] pairs."""

    def __init__(self, *args: Any) -> None:
        pairs = args[0] if args and isinstance(args[0], list) else []
        super().__init__((key, value) for key, value in pairs if isinstance(key, str))


class PassedOver:
    """Stands for an object that is not read; nothing can be done to it."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> PassedOver:
        """Ignore the arguments."""
        return super().__new__(cls)

    def append(self, *args: Any) -> None: ...

    add = extend = append


def describe(name: str) -> Callable[..., Any]:
    """Return the function that stands for one of torch's functions that rebuild a tensor."""
    kind = name.rpartition("_rebuild_")[2]

    def rebuild(*args: Any) -> Any:
        if kind.startswith("parameter"):
            return args[0]
        if kind == "from_type_v2":  # a tensor with attributes: function, type, arguments, attributes
            return args[0](*args[2]) if args[0] in Machine.rebuilders.values() else Described(None)
        if kind not in ("tensor", "tensor_v2") or args[0].dtype is None or any(args[6:]):
            return Described(None, special="quantised" if kind == "qtensor" else kind)
        storage, offset, shape, stride = args[:4]
        if not all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
            raise Unreadable("damaged: a tensor in it has an impossible shape")
        return Described(storage, offset, tuple(shape), tuple(stride))

    return rebuild


class Machine(pickle._Unpickler):
    """An unpickler that makes mappings, lists, numbers, text and descriptions of tensors only.

    Every class and function that a pickle asks for is one of this module's. No opcode here sets an
    attribute, hashes anything but a name or a number, or makes room for more than the file holds.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)
    rebuilders: ClassVar[dict[str, Callable[..., Any]]] = {}
    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}
        left = FREE_READS + size // 5

        def counted(count: int) -> bytes:
            nonlocal left
            left -= 1
            if left < 0:
                raise Unreadable("refused: it holds more objects than a checkpoint of its size")
            return file.read(count)

        self._file_read = counted

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or a function. Unreadable if nothing does."""
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        path = f"{module}.{name}"
        if path in DIRECTORIES:
            return Directory
        if DESCRIBED.fullmatch(path):
            return self.rebuilders.setdefault(path, describe(path))
        if path == "torch.nn.parameter.Parameter":
            return describe("_rebuild_parameter")
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        if PASSED_OVER.fullmatch(path):
            return PassedOver
        raise Unreadable(
            f"refused: it asks for {path}, which could run code, and only tensors are read; "
            "save it again with torch.save(model.state_dict(), ...)"
        )

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor names."""
        kind, name, key, _, count, *view = pid
        if kind != "storage" or not isinstance(name, str) or any(view) or count < 0:
            raise Unreadable(f"damaged: {kind!r} is not a storage")
        return self.storages.setdefault(str(key), Storage(str(key), DTYPES.get(name), int(count)))

    def set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.set_item(key, value)

    def set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_item(key, value)

    def set_item(self, key: Any, value: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, dict) and isinstance(key, str | int):
            target[key] = value

    def make_mapping(self) -> None:
        items = self.pop_mark()
        self.stack.append(Directory([*zip(items[::2], items[1::2], strict=True)]))

    def pass_over_items(self) -> None:
        self.pop_mark()
        self.stack.append(PassedOver())

    def pass_over_bytes(self) -> None:
        self.read(int.from_bytes(self.read(8), "little"))
        self.stack.append(PassedOver())

    dispatch |= {
        pickle.SETITEM[0]: set_one,
        pickle.SETITEMS[0]: set_items,
        pickle.DICT[0]: make_mapping,
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # the state of an object
        pickle.EMPTY_SET[0]: lambda self: self.stack.append(PassedOver()),
        pickle.FROZENSET[0]: pass_over_items,
        pickle.FRAME[0]: lambda self: self.read(8),  # only the size of a part
        pickle.BYTEARRAY8[0]: pass_over_bytes,
    }


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
        raise Unreadable("the index of a checkpoint in several files; join them in one, and name it")
    return parse_legacy(data)


def parse_safetensors(data: bytes, header: bytes) -> Content:
    try:
        tensors = safetensors.torch.load(data)
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
        if count != storage.count or key in storages:
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
