"""The options that say what is measured, on what, and how; every command has the same."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.running.networks import Options
from analysis.running.processes import rank

CIFAR10 = Path("cifar10")  # a value of --data: the real images or an error
PROBE = Path("probe")  # a value of --data: the probe set
NEED_IMAGES = ("data", "split", "images", "normalize", "batch_size", "device", "precision", "fold")


def add_options(
    parser: argparse.ArgumentParser, *, both: bool = False, source: str | None = None
) -> None:
    """Add the options that `options_of` reads.

    both: whether two sources may be named.
    source: the default source.
    """
    add = parser.add_argument
    add(
        "--source",
        nargs="+" if both else 1,
        choices=("hooks", "batchnorm"),
        default=[source] if source else [],
        help="measure on images (hooks) or compute from BN's tensors (batchnorm)"
        f"{', or both' if both else ''} (default: {source or 'hooks if there are images'})",
    )
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="CIFAR-10 as parquet files, official version, archive or folders of images; a folder "
        "of images for networks with 224x224 input; `probe` for the probe set; `cifar10` for "
        "CIFAR-10 or an error (default: $CIFAR10, ./data, the cache folder, a download, or else "
        "the probe set)",
    )
    add("--split", choices=("test", "train"), default="test", help="default: test")
    add("--images", type=positive, metavar="N", help="measure on N evenly spaced images")
    add(
        "--normalize",
        default="auto",
        metavar="NAME",
        help="a preset (imagenet, cifar10, cifar10-2, [-1,1], [0,1], per-pixel), mean and std "
        "(0.5,0.5,0.5/0.25,0.25,0.25), or auto: the file's card, or else what fits BN's statistics "
        "(default: auto)",
    )
    add(
        "--model",
        action="append",
        default=[],
        metavar="[LABEL=]FILE.py:FUNCTION",
        help="a function without arguments that builds the network of a checkpoint, also as "
        "PACKAGE.MODULE:FUNCTION; repeat it with labels for several networks",
    )
    add("--ema", action="store_true", help="use the averaged weights (EMA) of a checkpoint")
    add("--weights", metavar="KEY", help="use the weights under this key of a checkpoint")
    add("--eps", type=float, help="BN's epsilon, for closed forms of files (default: 1e-5)")
    add("--batch-size", type=positive, metavar="N", help="images per batch (default: what fits)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add(
        "--no-fold",
        dest="fold",
        action="store_false",
        help="run convolution and BN one after the other, as the network does",
    )
    add("--verbose", action="store_true", help="say how each network was measured")


def options_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Options:
    """Return the options; end with a usage error if a value does not exist on this machine."""
    from models.data.preprocessing import parse_normalize

    try:
        parse_normalize(args.normalize)
        models = split_models(args.model)
    except ValueError as error:
        parser.error(str(error))
    check_device(parser, args.device)
    if args.eps is not None and not 0 <= args.eps < 1:
        parser.error(f"--eps {args.eps}: a number from 0 to 1 is needed, such as 1e-5")
    names = Options.__dataclass_fields__.keys() & vars(args).keys()
    given = {name: getattr(args, name) for name in names}
    options = Options(**given, sources=tuple(dict.fromkeys(args.source)), models=models)
    if options.only_closed_form and rank() == 0:
        unused = [name for name in NEED_IMAGES if getattr(args, name) != parser.get_default(name)]
        if unused:
            flags = ", ".join(flag_of(name) for name in unused)
            print(f"{flags}: no effect, --source batchnorm takes no images", file=sys.stderr)
    return options


def flag_of(name: str) -> str:
    """Return how an option is written on the command line."""
    return "--no-fold" if name == "fold" else f"--{name.replace('_', '-')}"


def split_models(items: Sequence[str]) -> dict[str | None, str]:
    """Split each `[LABEL=]FILE.py:FUNCTION`. Raise ValueError if two are for the same label."""
    models: dict[str | None, str] = {}
    for item in items:
        label, equals, spec = item.partition("=")
        name = label if equals and ":" in spec else None
        if name in models:
            what = f"two for {name}" if name else "two without a label"
            raise ValueError(f"--model {item}: {what}; write LABEL=FILE.py:FUNCTION for each")
        models[name] = item if name is None else spec
    return models


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End with a usage error if this machine has no such device."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")


def positive(text: str) -> int:
    """Return a whole number of 1 or more; argparse reports anything else."""
    if not re.fullmatch("[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number of 1 or more")
    return int(text)
