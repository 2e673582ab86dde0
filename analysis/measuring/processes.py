"""Several processes that measure together, each its own part of the images: on one machine or more,
by torchrun.

    torchrun --nproc-per-node=2 -m analysis.responses --depth 20 56 110

No image is measured twice or left out (a DistributedSampler repeats some to fill the last batch).
What the processes have measured is merged exactly, and the first of them prints and writes. Without
torchrun there is one process, and all of this does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # with slower processes; one that died is noticed at once


def count_processes() -> int:
    """How many there are: torchrun says so in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if count_processes() > 1 else 0


def part_of(total: int) -> tuple[int, int]:
    """Which of `total` images are this process's: first, and one after the last."""
    return rank() * total // count_processes(), (rank() + 1) * total // count_processes()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside the block processes can exchange results, and only the first one prints. device: auto,
    cpu or cuda.
    """
    if count_processes() == 1:
        yield
        return
    import torch
    from torch import distributed

    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("gloo", timeout=PATIENCE)  # nccl wants a GPU for each process
    with ExitStack() as stack:
        stack.callback(distributed.destroy_process_group)
        if rank():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        yield


@contextmanager
def together() -> Iterator[None]:
    """If bad input ends the block in one process, it ends in all of them; the first one says why."""
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
    """What every process gives, in their order, known to all of them."""
    if count_processes() == 1:
        return [item]
    from torch import distributed

    items: list[T | None] = [None] * count_processes()
    try:
        distributed.all_gather_object(items, item)
    except RuntimeError as error:
        raise ValueError(
            f"another process of this run has died, nothing was written ({error})"
        ) from error
    return items  # type: ignore[return-value]


def leave() -> None:
    """End all processes but the first, which has all results."""
    if rank():
        sys.exit(0)
