"""How far a long computation is: a bar on a terminal, otherwise a line on stderr every minute."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

LINE_EVERY = 60  # seconds


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line at once, on stdout by default. A line that cannot be printed ends no run."""
    with suppress(OSError, ValueError):
        print(line, file=file, flush=True)


class Display:
    """Count to a total, visibly. `with display.bar:` closes the bar at the end.

    name: in front of the count.
    """

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.done, self.numbers = name, total, done, ""
        disable = None if sys.stderr else True  # None: unless stderr is a terminal
        self.bar = tqdm(total=total, initial=done, desc=name, disable=disable)
        self.shown_at = time.monotonic()

    def advance(self, numbers: str = "") -> None:
        """Count one more. numbers: what to show behind the count."""
        self.done, self.numbers = self.done + 1, f", {numbers}" if numbers else ""
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update()
        self.remind()

    def remind(self) -> None:
        """Print a line if there is no bar and the last line is a minute old."""
        if self.bar.disable and time.monotonic() - self.shown_at >= LINE_EVERY:
            self.shown_at = time.monotonic()
            say(f"{self.name}: {self.done:,} of {self.total:,}{self.numbers}", sys.stderr)
