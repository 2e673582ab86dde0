"""Messages of the commands: one line each, whatever is in the names and files that they speak of.

>>> one_line(ValueError("a\\nb.pth: \\x1b[2J is no number"))
'a b.pth: \\\\x1b[2J is no number'
"""

from __future__ import annotations

import sys

LENGTH = 800  # characters
SHORT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")  # torch's words

ROOM = "take another device, fewer images at a time, a smaller network, or end other programs"  # where memory is short


def one_line(error: BaseException | str) -> str:
    """The message of an error without line breaks and control characters, cut in the middle where it is very long."""
    words = " ".join(str(error).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    half = LENGTH // 2
    return shown if len(shown) <= LENGTH else f"{shown[:half]} ... {shown[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: torch's CPU allocator has no class of its own for that."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SHORT_OF_MEMORY)


def out_of_memory(error: BaseException) -> str:
    """What to say of such an error, and what to do."""
    return f"out of memory: {ROOM}" + (f" ({error})" if str(error) else "")


def report(error: BaseException | str) -> int:
    """Print the message of an error that ends a command; its exit status."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2
