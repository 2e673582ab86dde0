"""Messages of the commands: one line each, whatever is in the names and files that they speak of.

>>> one_line(ValueError("a\\nb.pth: \\x1b[2J is no number"))
'a b.pth: \\\\x1b[2J is no number'
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

LENGTH = 800  # characters
SHORT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",
)  # torch's words
ROOM = "take another device, fewer images at a time, a smaller network, or end other programs"  # where memory is short


def one_line(error: BaseException | str) -> str:
    """The message of an error without line breaks and control characters, cut in the middle where
    it is very long.
    """
    words = " ".join(str(error).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    half = LENGTH // 2
    return shown if len(shown) <= LENGTH else f"{shown[:half]} ... {shown[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: torch's CPU allocator has no class of its own for
    that.
    """
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in SHORT_OF_MEMORY
    )


def out_of_memory(error: BaseException, advice: str = ROOM) -> str:
    """What to say of such an error, and what to do."""
    return f"out of memory: {advice}" + (f" ({error})" if str(error) else "")


def does_not_run(error: BaseException) -> str:
    """What to say where a network of the user's raises an error on images."""
    return f"the network does not run on these images ({type(error).__name__}: {error}); --debug shows where"


def is_plain(name: str) -> bool:
    """Whether a name can stand in a line and in a table: it is printable, and no formula for a
    spreadsheet.
    """
    return name.isprintable() and not name.startswith(("=", "+", "-", "@"))


def report(error: BaseException | str) -> int:
    """Print the message of an error that ends a command; its exit status."""
    if isinstance(error, FileNotFoundError) and error.filename:  # Python's own, not one of ours
        error = f"{error.filename}: {error.strerror}, and it was there before; run the command again when it is back"
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


def answer_interrupts() -> None:
    """For a command that begins: Ctrl-C where no `except` of ours is, as in imports, is one line
    and status 130 too.

    In the middle of an import the process ends at once: there is nothing to clean up, and torch's
    modules swallow a KeyboardInterrupt, or make another error of it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if is_importing(frame):
            end("interrupted", 130)
        raise KeyboardInterrupt

    def answer(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            end("interrupted", 130)
        sys.__excepthook__(kind, error, traceback)

    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # what a script starts with & is not meant
        return
    signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = answer
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # all is done and said by then


def is_importing(frame: FrameType | None) -> bool:
    """Whether a signal came in the middle of an import, where what a handler raises may be
    swallowed.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def end(words: str, status: int) -> NoReturn:
    """Say so, and end the process, whatever runs in it."""
    sys.stdout.flush()
    print(words, file=sys.stderr, flush=True)
    os._exit(status)
