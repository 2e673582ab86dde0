"""Run a command: its exit status, its one line for bad input, and streams that may be closed."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

from analysis.running.processes import joined
from models.messages import is_out_of_memory, out_of_memory, report


def run_command(run: Callable[[], None], *, device: str, debug: bool) -> int:
    """Run a command. Return 0, 2 with one line for bad input, or 130 after Ctrl-C.

    debug: show the traceback of an error instead of the line.
    """
    with surviving_streams():
        try:
            with joined(device), warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")  # the error says enough
                run()
        except KeyboardInterrupt:
            print("interrupted: no file is half-written", file=sys.stderr)
            return 130
        except Exception as error:
            short = is_out_of_memory(error)
            if debug or not (short or isinstance(error, ValueError | OSError)):
                raise
            return report(out_of_memory(error) if short else error)
    return 0


@contextmanager
def surviving_streams() -> Iterator[None]:
    """Let no line that cannot be printed end the command inside the block."""
    with redirect_stdout(Surviving(sys.stdout)), redirect_stderr(Surviving(sys.stderr)):
        yield


class Surviving(io.TextIOBase):
    """A text stream that drops what it cannot write: to a closed pipe, say, or to a full disk."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    def write(self, text: str) -> int:
        text_as_shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self.attempt(lambda stream: stream.write(text_as_shown))
        return len(text)

    def flush(self) -> None:
        self.attempt(lambda stream: stream.flush())

    def attempt(self, do: Callable[[TextIO], object]) -> None:
        """Use the stream; after a failure what is left in its buffer goes nowhere."""
        if self.stream is None:
            return
        try:
            do(self.stream)
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            self.stream = None
