"""Messages of the commands: one line each, whatever is in the names and files that they speak of.

>>> one_line(ValueError("a\\nb.pth: \\x1b[2J is no number"))
'a b.pth: \\\\x1b[2J is no number'
"""

from __future__ import annotations

import sys
from contextlib import suppress

LENGTH = 800  # characters
SHORT_OF_MEMORY = (  # torch's words
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",
)
ROOM = "take another device, fewer images at a time, a smaller network, or end other programs"


def one_line(error: BaseException | str) -> str:
    """Return an error's message without line breaks and control characters.

    A very long one is cut in the middle.
    """
    words = " ".join(str(error).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    half = LENGTH // 2
    return shown if len(shown) <= LENGTH else f"{shown[:half]} ... {shown[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is short: torch's CPU allocator has no class for it."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    import torch

    known = any(words in str(error) for words in SHORT_OF_MEMORY)
    return known or isinstance(error, torch.OutOfMemoryError)


def out_of_memory(error: BaseException, advice: str = ROOM) -> str:
    """Return what to say of such an error, and what to do."""
    return f"out of memory: {advice}" + (f" ({error})" if str(error) else "")


def does_not_run(error: BaseException) -> str:
    """Return what to say if a user's network raises an error on images."""
    words = f"{type(error).__name__}: {error}"
    return f"the network does not run on these images ({words}); --debug shows where"


def is_plain(name: str) -> bool:
    """Return whether a name is printable and no formula for a spreadsheet."""
    return name.isprintable() and not name.startswith(("=", "+", "-", "@"))


def report(error: BaseException | str) -> int:
    """Print the message of an error that ends a command, and return its exit status."""
    if isinstance(error, FileNotFoundError) and error.filename:  # Python's own, not one of ours
        error = (
            f"{error.filename}: {error.strerror}, and it was there before; "
            "run the command again when it is back"
        )
    with suppress(OSError, ValueError):  # nobody reads stderr, or it cannot show the characters
        print(f"error: {one_line(error)}", file=sys.stderr)
    return 2
