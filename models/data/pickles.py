"""Pickles of dictionaries, lists, strings, numbers and numpy arrays, read without running code from
them.

>>> import pickle
>>> import numpy as np
>>> from models.data.pickles import read_pickle
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


def read_pickle(content: bytes) -> Any:
    """What a pickle holds; byte strings of Python 2 stay such. Refused, or any other error, for a
    damaged one.
    """
    check_memo(content)
    return ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


def check_memo(content: bytes) -> None:
    """ValueError for a pickle that remembers something under a huge number: room for all below
    would be made.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name.endswith("PUT") and int(argument or 0) > len(content):
            raise ValueError("it remembers more than it holds")


class Refused(pickle.UnpicklingError):
    """A pickle names something other than a numpy array."""


class ArrayUnpickler(pickle.Unpickler):
    """Reads the official pickles: dictionaries, lists, strings, numbers and numpy arrays.

    numpy itself sees nothing of the pickle but bytes: its arrays and dtypes take over any state,
    and then any memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return {"ndarray": Array, "dtype": Number}[name]
        raise Refused(f"the pickle asks for {module}.{name}, and only numpy arrays are admitted")


class Number:
    """Stands for a dtype: of whole numbers, in the byte order of the machine that wrote them."""

    def __init__(self, code: bytes | str, *options: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else str(code)
        if not re.fullmatch("[iu][1248]", self.code):
            raise Refused(f"it holds an array of {self.code}, and only arrays of whole numbers are admitted")
        self.order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1].decode() if isinstance(state[1], bytes) else state[1]


class Array:
    """Stands for an array: its values are made of the bytes that the pickle holds."""

    values: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, number, fortran, content = state
        flat = np.frombuffer(content, np.dtype(number.code).newbyteorder(number.order))
        self.values = flat.reshape(shape, order="F" if fortran else "C")


def reconstruct(kind: Any, shape: Any, typecode: Any) -> Array:
    """In place of numpy's own function: an array whose state is set by the pickle."""
    return Array()
