"""Train the paper's CIFAR-10 networks by the paper's recipe.

    python -m models.train --depth 20 --kind residual --data path/to/cifar10 --out runs

An interrupted run, even a killed one, continues if the command is repeated. `models.training` holds
the recipe and the loop.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from models.messages import is_out_of_memory, one_line, out_of_memory, report
from models.training.recipe import DECAY, WARM_UP_DEPTH, Recipe

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    from models.data.cifar10 import Cifar10

EXPECTED = (ValueError, OSError, FloatingPointError)
KEPT = "what was saved stays, and the same command continues from there"
LARGEST = 2**64 - 1  # the largest seed that torch takes


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see --help."""

    depth: list[int]
    kind: list[str] | None
    out: Path
    data: Path | None
    iterations: int
    decay: str
    warm_up: bool
    seed: list[int]
    device: str
    precision: str
    snapshots: int
    debug: bool


def parse(argv: list[str] | None) -> Options:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description="Train the CIFAR-10 networks of He et al., CVPR 2016, by the paper's recipe. "
        "An interrupted run is continued, a finished one is skipped.",
    )
    add = parser.add_argument
    depths, kinds = [20, 56, 110], ("residual", "plain")
    add("--depth", type=int, nargs="+", default=depths, metavar="N", help="6n + 2 (20 56 110)")
    add("--kind", nargs="+", choices=kinds, help="default: both, but no plain-110")
    add("--out", type=Path, default=Path("runs"), help="folder of the runs' folders (runs)")
    where = "CIFAR-10 in any layout; by default it is looked for, then downloaded"
    add("--data", type=Path, metavar="PATH", help=where)
    add("--iterations", type=int, default=64_000, metavar="N", help="of 128 images (64000)")
    which = "what decays: weights (default), also BN's gamma, or all parameters"
    add("--decay", choices=DECAY, default="weights", help=which)
    how = "learning rate 0.01 until the error is below 80 %%; always on from 110 layers on"
    add("--warm-up", action="store_true", help=how)
    add("--seed", type=int, nargs="+", default=[0], metavar="N", help="one run per seed (0)")
    devices, gpu = ("auto", "cpu", "cuda"), "CUDA_VISIBLE_DEVICES chooses among GPUs"
    add("--device", choices=devices, default="auto", help=gpu)
    precisions, auto = ("auto", "float32", "bfloat16"), "auto: bfloat16 if the device has it"
    add("--precision", choices=precisions, default="auto", help=auto)
    kept = "networks to keep on the way, the first and the last included (9)"
    add("--snapshots", type=int, default=9, metavar="K", help=kept)
    add("--debug", action="store_true", help="show the traceback of an error")
    return Options(**vars(parser.parse_args(argv)))


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of the SIGTERM or SIGINT that came, or 0.

    A second signal raises KeyboardInterrupt. Signals that are ignored stay so: Ctrl-C is not meant
    for what a script runs in the background.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, note)
        yield lambda: came[0] if came else 0
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def load_data(path: Path | None) -> tuple[Cifar10, Cifar10]:
    """Return the training and the test images. Raises ValueError unless they are CIFAR-10's."""
    from models.data import cifar10

    try:
        splits = cifar10.load(path, "train"), cifar10.load(path, "test")
    except OSError as error:
        raise ValueError(error) from error
    for split in splits:
        if not split.exact:
            raise ValueError(f"training needs all of CIFAR-10: {split.describe()}")
    return splits


def choose_device(name: str) -> str:
    """Return `cuda` or `cpu` for the value of --device."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; --device cpu trains without one")
    return "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"


def choose_precision(name: str, device: str) -> str:
    """Return the precision for the value of --precision.

    `auto` is bfloat16 if the device computes in it; emulated, it is much slower than float32.
    """
    import torch

    if name != "auto":
        return name
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def check(options: Options) -> None:
    """Raise ValueError if a number among the options is impossible."""
    from models.resnet import check_depth

    given = [("iterations", options.iterations, 1), ("snapshots", options.snapshots, 0)]
    for name, value, least in [*given, *(("seed", seed, 0) for seed in options.seed)]:
        if not least <= value <= LARGEST:
            raise ValueError(f"--{name} {value}: must be {least} to {LARGEST}")
    for depth in options.depth:
        try:
            check_depth(depth)
        except ValueError as error:
            raise ValueError(f"--depth {depth}: {error}") from error


def make_recipes(options: Options) -> list[Recipe]:
    """Return the runs that the options ask for. Without --kind, plain-110 is left out as in Fig. 7.

    Raises ValueError if an option has an impossible value.
    """
    check(options)
    common: dict[str, Any] = {
        name: getattr(options, name) for name in ("iterations", "decay", "snapshots")
    }
    common["device"] = choose_device(options.device)
    common["precision"] = choose_precision(options.precision, common["device"])
    return [
        Recipe(kind, depth, seed=seed, warm_up=options.warm_up and depth < WARM_UP_DEPTH, **common)
        for seed in options.seed
        for depth in options.depth
        for kind in options.kind or ("residual", "plain")
        if options.kind or kind == "residual" or depth < WARM_UP_DEPTH
    ]


def train_all(options: Options) -> None:
    """Train all networks that the options ask for, one after another, except finished ones."""
    from models.training import loop
    from models.training.display import say

    data = functools.cache(load_data)
    wanted = make_recipes(options)
    for recipe in wanted:  # all before the first: a mistake should not show after days
        loop.check_folder(recipe, options.out / recipe.label)
    for recipe in wanted:
        folder = options.out / recipe.label
        finished = folder / f"{recipe.network}.safetensors"
        if finished.exists():
            say(f"{recipe.label}: finished before, skipped ({finished})")
            continue
        train, test = data(options.data)
        with deferred_signals() as stop:
            outcome = loop.run(recipe, train, test, folder, stop)
        say(f"{recipe.label}: {outcome} ({finished})")
        if number := stop():
            raise loop.Stopped(number, f"{folder} is finished")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: all is trained. 1: a run diverged or could not be written. 2: bad input or too little memory.
    128 + n: ended by signal n.
    """
    options = parse(argv)
    try:
        train_all(options)
    except KeyboardInterrupt:
        print(f"interrupted: {KEPT}", file=sys.stderr)
        return 130
    except Exception as error:
        if signal_number := getattr(error, "signal_number", 0):  # loop.Stopped
            print(one_line(error), file=sys.stderr)
            return 128 + signal_number
        short = is_out_of_memory(error)
        if options.debug or not (short or isinstance(error, EXPECTED)):
            raise
        advice = f"choose another device or end other programs; {KEPT}"
        status = report(out_of_memory(error, advice) if short else error)
        return status if short or isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
