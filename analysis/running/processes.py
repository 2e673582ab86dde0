"""Several processes that measure together, each its own part of the images, started by torchrun.

    torchrun --nproc-per-node=2 -m analysis.responses --depth 20 56 110

No image is measured twice or left out (a DistributedSampler repeats some to fill the last batch).
The results are merged exactly, and the first process prints and writes. Without torchrun there is
one process, and these functions do nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # for slower processes; a process that dies is noticed at once
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")  # set by torchrun, all together


def count_processes() -> int:
    """Return how many processes measure together."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in TORCHRUN) else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ["RANK"]) if count_processes() > 1 else 0


def part_of(total: int) -> tuple[int, int]:
    """Return which of `total` images this process measures: the first, and one past the last."""
    return rank() * total // count_processes(), (rank() + 1) * total // count_processes()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Connect the processes inside the block; only the first one prints.

    device: `auto`, `cpu` or `cuda`.
    """
    if count_processes() == 1:
        yield
        return
    import torch
    from torch import distributed

    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("gloo", timeout=TIMEOUT)  # nccl needs a GPU for each process
    with ExitStack() as stack:
        stack.callback(distributed.destroy_process_group)
        if rank():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        yield


@contextmanager
def together() -> Iterator[None]:
    """End all processes if bad input ends the block in one of them; the first one says why."""
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        if count_processes() == 1:
            raise
        own = error
    for number, reason in enumerate(exchange(None if own is None else str(own))):
        if reason is not None:
            if rank():
                sys.exit(2)
            where = f"process {number} of {count_processes()}: " if number else ""
            raise ValueError(where + reason) from own


def exchange(item: T) -> list[T]:
    """Return the items of all processes, in their order."""
    if count_processes() == 1:
        return [item]
    from torch import distributed

    items: list[T | None] = [None] * count_processes()
    try:
        distributed.all_gather_object(items, item)
    except RuntimeError as error:
        message = f"another process of this run has died, nothing was written ({error})"
        raise ValueError(message) from error
    return items  # type: ignore[return-value]


def leave() -> None:
    """End all processes but the first, which has all results."""
    if rank():
        sys.exit(0)
