"""Read pickles of dictionaries, lists, strings, numbers and numpy arrays. No code in them is run.

>>> import pickle
>>> import numpy as np
>>> read_pickle(pickle.dumps({"data": np.array([1, 2], np.uint8)}))["data"].values
array([1, 2], dtype=uint8)
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

BUDGET = 100_000  # opcodes, and places in the memo; an official batch of CIFAR-10 has 30,000


class Refused(pickle.UnpicklingError):
    """A pickle asks for more than arrays of integers, or for too much memory."""


def read_pickle(content: bytes) -> Any:
    """Return what a pickle holds: arrays as `Array`, the strings of Python 2 as bytes.

    One byte can make an object of hundreds of bytes, and one number a memo of gigabytes. So both
    are counted before anything is built. Refused if it is over the budget or names other classes;
    any other exception if it is damaged.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count >= BUDGET or ("PUT" in opcode.name and int(argument or 0) >= BUDGET):
            raise Refused(f"more than {BUDGET:,} parts; this is not a batch of CIFAR-10")
    return ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that admits arrays of integers.

    numpy gets nothing but bytes from it: its own classes take any state, and with it any memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        place = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if place not in ADMITTED:
            raise Refused(f"the pickle asks for {place[:80]}, and only numpy arrays are admitted")
        return ADMITTED[place]


class DType:
    """Stands for a dtype of integers."""

    def __init__(self, code: bytes | str, *options: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else str(code)
        self.order: Any = "|"
        if not re.fullmatch("[iu][1248]", self.code):
            kind = self.code[:20]
            raise Refused(f"an array of {kind}, and only arrays of whole numbers are admitted")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1].decode() if isinstance(state[1], bytes) else state[1]


class Array:
    """Stands for an array; its values are a view of the pickle's bytes."""

    values: np.ndarray

    def __init__(self, *arguments: Any) -> None:
        pass  # the state follows

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        flat = np.frombuffer(content, np.dtype(dtype.code).newbyteorder(dtype.order))
        self.values = flat.reshape(shape, order="F" if fortran else "C")


def from_buffer(content: Any, dtype: DType, shape: Any, order: str) -> Array:
    """Return an array as protocol 5 stores it."""
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


ADMITTED = {
    "numpy.ndarray": Array,
    "numpy.dtype": DType,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy.core.numeric._frombuffer": from_buffer,
}
