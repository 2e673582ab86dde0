"""Train the paper's CIFAR-10 networks by the paper's recipe. Killed at any moment, the same command
goes on.

    python -m models.train --depth 20 --kind residual --data path/to/cifar10 --out runs

models.training.recipe holds what is trained and how, models.training.loop what is kept in a run's
folder.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from models.messages import is_out_of_memory, one_line, out_of_memory
from models.training.recipe import DECAY, WARM_UP_DEPTH, Fault, Recipe

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it: functions import it
    from models.data.cifar10 import Cifar10

KEPT = "what was saved stays, and the same command goes on from there"
LARGEST_SEED = 2**64 - 1  # torch's


@contextmanager
def answered(
    answer: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    """Answer these signals in this way, but for those that are ignored: a script's Ctrl-C does not
    mean what it put into the background.
    """
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, answer) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def at_once(number: int) -> str:
    return f"stopped by {signal.Signals(number).name} at once: {KEPT}"


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """A function that gives the number of the SIGTERM or SIGINT that came, or 0."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            end_at_once(number, frame)  # the second one does not wait for the iteration to end
        came.append(number)

    with answered(note, signal.SIGTERM, signal.SIGINT):
        yield lambda: came[0] if came else 0


def load_data(path: Path | None) -> tuple[Cifar10, Cifar10]:
    """The training and the test images. Fault unless they are complete and exact."""
    from models.data import cifar10

    try:
        train, test = cifar10.load(path, "train"), cifar10.load(path, "test")
    except (OSError, ValueError) as error:
        raise Fault(str(error), 2) from error
    for split in (train, test):
        if not split.exact:
            raise Fault(f"training needs all of CIFAR-10: {split.describe()}", 2)
    return train, test


def choose_device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise Fault(
            f"--device {name}: unknown; one of auto, cpu, cuda (CUDA_VISIBLE_DEVICES says which GPU)",
            2,
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise Fault("--device cuda: torch finds no GPU here; --device cpu trains without one", 2)
    return "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"


def choose_precision(name: str, device: str) -> str:
    """bfloat16 where the device computes in it; where it is emulated it is many times slower than
    float32.
    """
    import torch

    if name != "auto":
        return name
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def recipes(args: argparse.Namespace) -> list[Recipe]:
    """The runs that the command asks for; without --kind no plain network as deep as plain-110, as
    in Fig. 7.
    """
    from models.resnet import check_depth

    for option, values, least in (
        ("iterations", [args.iterations], 1),
        ("snapshots", [args.snapshots], 0),
        ("seed", args.seed, 0),
    ):
        if min(values) < least:
            raise Fault(f"--{option} {min(values)}: must be {least} or more", 2)
    if max(args.seed) > LARGEST_SEED:
        raise Fault(f"--seed {max(args.seed)}: must be {LARGEST_SEED} or less", 2)
    for depth in args.depth:
        try:
            check_depth(depth)
        except ValueError as error:
            raise Fault(f"--depth {depth}: {error}", 2) from error
    device = choose_device(args.device)
    common = {
        "iterations": args.iterations,
        "decay": args.decay,
        "snapshots": args.snapshots,
        "device": device,
    }
    common["precision"] = choose_precision(args.precision, device)
    return [
        Recipe(kind, depth, seed=seed, warm_up=args.warm_up and depth < WARM_UP_DEPTH, **common)
        for seed in args.seed
        for depth in args.depth
        for kind in args.kind or ("residual", "plain")
        if args.kind or kind == "residual" or depth < WARM_UP_DEPTH
    ]


def train_all(args: argparse.Namespace) -> None:
    """Train what is asked for, one after another, but for what is finished."""
    from models.training import loop as training

    data = functools.cache(load_data)
    wanted = recipes(args)
    for recipe in wanted:  # all of them first: the last one's is not told after days
        training.check_folder(recipe, args.out / recipe.label)
    for recipe in wanted:
        folder = args.out / recipe.label
        finished = folder / f"{recipe.network}.safetensors"
        if finished.exists():
            print(f"{recipe.label}: finished before, skipped ({finished})")
            continue
        train, test = data(args.data)
        with signals() as stop:
            outcome = training.run(recipe, train, test, folder, stop)
        print(f"{recipe.label}: {outcome} ({finished})", flush=True)
        if number := stop():
            raise training.stopped(number, f"{folder} is finished")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description="Train the CIFAR-10 networks of He et al., CVPR 2016, by the paper's recipe. An interrupted run "
        "goes on where it was, a finished one is skipped.",
    )
    add = parser.add_argument
    add(
        "--depth",
        type=int,
        nargs="+",
        default=[20, 56, 110],
        metavar="N",
        help="6n + 2 layers (20 56 110)",
    )
    add("--kind", nargs="+", choices=("residual", "plain"), help="default: both, but for plain-110")
    add("--out", type=Path, default=Path("runs"), help="folder of the runs' folders (runs)")
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="CIFAR-10, in any layout; otherwise it is looked for, or downloaded",
    )
    add("--iterations", type=int, default=64_000, metavar="N", help="of 128 images (64000)")
    add(
        "--decay",
        choices=DECAY,
        default="weights",
        help="weights (default): not BN's gamma and beta",
    )
    add(
        "--warm-up",
        action="store_true",
        help="at 0.01 until the error is below 80 %%, as 110 layers always do",
    )
    add("--seed", type=int, nargs="+", default=[0], metavar="N", help="(0)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 where native",
    )
    add(
        "--snapshots",
        type=int,
        default=9,
        metavar="K",
        help="kept networks, first and last included (9)",
    )
    add("--debug", action="store_true", help="show where a fault comes from")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    args = parse(argv)
    try:
        with answered(end_at_once, signal.SIGTERM):
            train_all(args)
    except (Exception, KeyboardInterrupt) as error:
        fault = as_fault(error)
        if fault is None or (args.debug and not isinstance(error, KeyboardInterrupt)):
            raise
        print(f"models.train: {one_line(fault)}", file=sys.stderr)
        return fault.status
    return 0


def as_fault(error: BaseException) -> Fault | None:
    """What the command says of an error, and its exit status; None where nothing but the traceback
    helps.
    """
    if is_out_of_memory(error):
        return Fault(out_of_memory(error, f"take another device, or end other programs; {KEPT}"), 2)
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        return Fault(at_once(number), 128 + number)
    if isinstance(error, OSError):
        return Fault(str(error))
    return error if isinstance(error, Fault) else None


if __name__ == "__main__":
    sys.exit(main())
