"""Files written whole or not at all, and named in errors."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

FORGOTTEN = 3600  # seconds after which a temporary file is one that a killed process has left
RANDOM = "[0-9a-f]" * 8  # in the name of a temporary file
LEFT = f".*-{RANDOM}.*"  # matches the names of temporary files


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, and rename the file to `path` at the end of the block.

    If the block raises, what was at `path` stays. The folder is made if there is none, and what
    killed processes have left of `path` is removed. Raises OSError if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path.parent.glob(f".{escape(path.stem)}-{RANDOM}{escape(path.suffix)}"), FORGOTTEN)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_left(temporary: Iterable[Path], age: float = 0) -> None:
    """Remove temporary files that killed processes have left, if they are at least `age` seconds old."""
    for file in temporary:
        with suppress(FileNotFoundError):  # another process may have removed it
            if time.time() - file.stat().st_mtime >= age:
                file.unlink()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Make Ctrl-C wait for the end of the block."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():  # there it never comes
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
