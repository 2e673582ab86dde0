"""Messages of the commands: one line each, whatever is in the names and files that they speak of.

>>> one_line(ValueError("a\\nb.pth: \\x1b[2J is no number"))
'a b.pth: \\\\x1b[2J is no number'
"""

from __future__ import annotations

import sys

LENGTH = 800  # characters


def one_line(error: BaseException | str) -> str:
    """The message of an error without line breaks and control characters, cut in the middle where it is very long."""
    words = " ".join(str(error).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    half = LENGTH // 2
    return shown if len(shown) <= LENGTH else f"{shown[:half]} ... {shown[-half:]}"


def report(error: BaseException | str) -> int:
    """Print the message of an error that ends a command; its exit status."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2
