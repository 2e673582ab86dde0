"""Run the pickle of a checkpoint without running code from it."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

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
DESCRIBED = re.compile(
    r"torch\._utils\._rebuild_(?!.*numpy)\w+|torch\._tensor\._rebuild_from_type_v2"
)
PASSED_OVER = re.compile(  # plain data that training scripts keep beside the weights
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib(\._local)?\.\w*Path|datetime\.\w+"
    r"|collections\.(OrderedDict|defaultdict|deque|Counter)|decimal\.Decimal|fractions\.Fraction"
    r"|uuid\.UUID|copyreg\._reconstructor|_codecs\.encode"
    r"|builtins\.(set|frozenset|list|dict|tuple|int|long|float|str|unicode|bool|bytes|bytearray|complex|range|object)"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|random\._pickle\.\w+|bool_?|u?int\d+|float\d+)"
    r"|numpy\._?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|torch\.(device|Size|u?int\d+|b?float\d+\w*|bool|complex\d+|per_\w+)"
    r"|torch\.(torch_version\.TorchVersion|serialization\._get_layout)"
    r"|omegaconf\.[\w.]+|mmengine\.(config|logging)\.[\w.]+"
)
DIRECTORIES = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")
FREE_STEPS = 1_000_000  # of a pickle, besides one for every 6 bytes of the file: bounds its objects


class Unreadable(ValueError):
    """A file is not a checkpoint; the message says what it is and what to do."""


class Storage(NamedTuple):
    """Numbers in a file: their key, their dtype (None if they are not plain numbers), how many."""

    key: str
    dtype: torch.dtype | None
    length: int


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
        if (
            kind == "from_type_v2"
        ):  # a tensor with attributes: function, type, arguments, attributes
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

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    rebuilders: ClassVar[dict[str, Callable[..., Any]]] = {}
    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}
        left = FREE_STEPS + size // 6

        def counted(count: int) -> bytes:
            nonlocal left
            left -= count == 1
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
