"""What the commands of this package measure: networks from files, and images that suit them.

The options are the same in every command (`add_options`), and so is the way from them to frames:

    plan = prepare(args, found)  # found: label, file and kind of each network
    frames = measure_all(args, plan)  # analysis.measuring.networks
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.measuring.processes import rank, together
from models.messages import is_plain

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    from torch import nn

    from models.checkpoints.loading import Checkpoint
    from models.data.cifar10 import Cifar10
    from models.data.folder import ImageFolder
    from models.data.probe import Probe

    Data = Cifar10 | Probe | ImageFolder

LABEL = 80  # characters at most
SAMPLE = 64  # images of 224x224 pixels by which a network is recognised
ON_IMAGES = (
    "data",
    "split",
    "images",
    "normalize",
    "batch_size",
    "device",
    "precision",
)  # options that need some
CIFAR10, PROBE = (
    Path("cifar10"),
    Path("probe"),
)  # words that --data takes: the real images or an error, a stand-in


@dataclass(frozen=True)
class Found:
    """A file to read: the label that was asked for, if any, where it lies, and its kind, if that
    was said.
    """

    label: str | None
    path: Path
    kind: str | None = None


@dataclass(frozen=True)
class Network:
    """A checkpoint under the label that the frame and the figure give it."""

    label: str
    checkpoint: Checkpoint

    @property
    def model(self) -> nn.Module:
        """The network; there is one wherever it is to run."""
        assert self.checkpoint.model is not None
        return self.checkpoint.model


@dataclass(frozen=True)
class Plan:
    """The networks, the images to measure them on (None for the closed form alone), and the sources
    of the numbers.
    """

    networks: list[Network]
    data: Data | None
    sources: list[str]


def add_options(
    parser: argparse.ArgumentParser, *, both: bool = False, source: str | None = None
) -> None:
    """Options that say what is measured, on what, and how. both: whether two sources may be named.
    source: default.
    """
    add = parser.add_argument
    add(
        "--source",
        nargs="+" if both else 1,
        choices=("hooks", "batchnorm"),
        default=source and [source],
        help=f"measure on images, {'' if both else 'or '}compute from BN's tensors alone{', or both' if both else ''} "
        f"(default: {source or 'hooks, and batchnorm where there are no images'})",
    )
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="CIFAR-10: parquet, official version, archive or folder of images "
        "(default: $CIFAR10, ./data, cache folder, download, else the probe set); for ImageNet's networks a folder of "
        "images; probe: synthetic images in place of CIFAR-10's; cifar10: these, or an error",
    )
    add(
        "--split",
        choices=("test", "train"),
        default="test",
        help="of CIFAR-10 (default: %(default)s)",
    )
    add(
        "--images",
        type=positive,
        metavar="N",
        help="measure on N of the images, evenly spaced (default: all)",
    )
    add(
        "--normalize",
        default="auto",
        metavar="PRESET",
        help="imagenet, cifar10, cifar10-2, [-1,1], [0,1], per-pixel "
        "or auto (the file's card, else what fits; the default); not of shipped networks: they have one",
    )
    add(
        "--model",
        metavar="FILE.py:FUNCTION",
        help="builds the network of the checkpoints, where it is none of the "
        "paper's; or PACKAGE.MODULE:FUNCTION",
    )
    add(
        "--ema",
        action="store_true",
        help="take the averaged copy of the weights (EMA) that lies in a checkpoint",
    )
    add(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images at a time (default: as many as the caches, or a GPU's memory, have room for)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="default: %(default)s",
    )
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: %(default)s")
    add(
        "--format",
        choices=("png", "pdf", "svg"),
        nargs="+",
        default=["png", "pdf"],
        help="default: png pdf",
    )
    add(
        "--verbose",
        action="store_true",
        help="say whether a folded copy of each network was measured, or why not",
    )
    add("--debug", action="store_true", help="show the traceback of an error")


def positive(text: str) -> int:
    """A whole number of 1 or more; argparse says so where it is not."""
    if not re.fullmatch("[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number of 1 or more")
    return int(text)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with argparse's usage line and status 2 where an option's value does not exist on this
    machine.

    A source that is named twice counts once. Options that say how images are measured are named on
    stderr where only the closed form is asked for.
    """
    from models.checkpoints.loading import parse_normalize

    try:
        parse_normalize(None if args.normalize == "auto" else args.normalize)
    except ValueError as error:
        parser.error(f"--normalize: {error}")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device on this machine; use --device cpu")
    if args.source:
        args.source = list(dict.fromkeys(args.source))
    if args.source == ["batchnorm"] and rank() == 0:
        given = [name for name in ON_IMAGES if getattr(args, name) != parser.get_default(name)]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            print(f"{options}: without effect, --source batchnorm takes no images", file=sys.stderr)


def check_folder(folder: Path) -> None:
    """Make the folder for the results, before the work. ValueError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {folder}: {error.strerror}; name a folder that can be written"
        ) from error


def split_label(item: str) -> tuple[str | None, Path]:
    """LABEL=PATH or PATH. A file that exists wins: Lightning's files are called
    epoch=3-step=100.ckpt.
    """
    label, equals, path = item.partition("=")
    if not equals or Path(item).is_file():
        return None, Path(item)
    return label or None, Path(path)


def find_network(item: str) -> Found:
    """The file of [LABEL=]ITEM: a shipped network by its name, or a checkpoint. A file that exists
    wins.
    """
    from models import zoo

    label, path = split_label(item)
    shipped = str(path) in zoo.shipped() and not path.is_file()
    return Found(label, zoo.find(str(path)) if shipped else path)


def prepare(args: argparse.Namespace, found: Sequence[Found]) -> Plan:
    """Read the files, find images for their networks, and say on stdout what each is and how that
    is known.

    Raises ValueError or OSError, with what to do, for bad input.
    """
    with together():
        checkpoints = [load_checkpoint(args, item, None) for item in found]
        data = find_data(args, checkpoints)
        if data is not None:
            sample = sample_of(data)
            checkpoints = [load_checkpoint(args, item, sample) for item in found]
        networks: list[Network] = []
        for item, checkpoint in zip(found, checkpoints, strict=True):
            label = choose_label(item, checkpoint, {network.label for network in networks})
            networks.append(Network(label, checkpoint))
            announce(networks[-1], data)
    return Plan(networks, data, args.source or (["batchnorm"] if data is None else ["hooks"]))


def load_checkpoint(args: argparse.Namespace, item: Found, sample: Any) -> Checkpoint:
    """Read one checkpoint; where nothing else says whether it is residual or plain, its label does."""
    from models.checkpoints.custom import build_from
    from models.checkpoints.loading import read
    from models.resnet import parse_name

    ours = is_shipped(item.path)  # its card says all that options say of others
    model = build_from(args.model) if args.model and not ours else None
    normalize = None if args.normalize == "auto" or ours else args.normalize
    options: dict[str, Any] = {"normalize": normalize, "ema": args.ema and not ours, "model": model}
    options["need_model"] = args.source != ["batchnorm"]
    try:
        named = parse_name(item.label or "")
    except ValueError:
        named = None  # a label of the user's own
    file = read(item.path, ema=options.pop("ema"))
    candidates = file.candidates(kind=item.kind, **options)
    checkpoint = candidates.choose(sample, likely_kind=named.kind if named else None)
    config = checkpoint.config
    if named is not None and config is not None and named.name != config.name:
        checkpoint.warnings.append(f"the label says {item.label}, the file holds {config.name}")
    return checkpoint


def is_shipped(path: Path) -> bool:
    from models import zoo

    return path.parent == Path(zoo.__file__).parent


def choose_label(item: Found, checkpoint: Checkpoint, taken: set[str]) -> str:
    """The label that was asked for, else the network's name, else the file's. ValueError where it
    is taken.
    """
    label = item.label
    if label is None:
        label = item.path.stem if checkpoint.config is None else checkpoint.config.name
        label = item.path.stem if label in taken else label
    if label in taken:
        raise ValueError(f"two networks are called {label}: name them, LABEL=PATH LABEL=PATH")
    return check_label(label)


def check_label(label: str) -> str:
    """The label itself. ValueError where it could not stand in a table, a legend and a file."""
    if not 0 < len(label) <= LABEL or not is_plain(label):
        raise ValueError(
            f"{label!r} is no label: 1 to 80 printable characters, not beginning with = + - @ (spreadsheets take that "
            "for a formula); name it, LABEL=PATH"
        )
    return label


def announce(network: Network, data: Data | None) -> None:
    """Say what a network is and how that is known; warnings go to stderr."""
    label, checkpoint = network.label, network.checkpoint
    config = checkpoint.config
    iterations = trained(checkpoint)
    length = "" if iterations is None else f", trained for {iterations:,} iterations"
    copy = f", weights: {checkpoint.weights_note}" if checkpoint.weights_note else ""
    name = (
        config.name
        if config
        else type(checkpoint.model).__name__
        if checkpoint.model
        else "none of the paper's"
    )
    print(f"{label}: network {name} ({checkpoint.how_kind()}){length}{copy}")
    if data is not None and checkpoint.preprocessing is not None:
        padding = (
            ""
            if checkpoint.crop_padding is None
            else f", {checkpoint.crop_padding} padding in training"
        )
        print(
            f"{label}: preprocessing {checkpoint.preprocessing.name}{padding} ({checkpoint.how_preprocessing()})"
        )
    for warning in checkpoint.warnings:
        print(f"warning: {label}: {warning}", file=sys.stderr)


def trained(checkpoint: Checkpoint) -> int | None:
    """For how many iterations, where the file has a card of our trainer that says so."""
    return checkpoint.iterations


def find_data(args: argparse.Namespace, checkpoints: list[Checkpoint]) -> Data | None:
    """The images to measure on, or None for the closed form."""
    if args.source == ["batchnorm"]:
        return None
    sizes = {
        checkpoint.config.images for checkpoint in checkpoints if checkpoint.config is not None
    }
    if len(sizes) > 1:
        raise ValueError(
            "networks for 32x32 and for 224x224 images in one command: measure them in two"
        )
    data = find_folder(args) if sizes == {"imagenet"} else find_cifar10(args, sizes)
    if data is not None:
        if args.images and args.images > len(data):
            raise ValueError(f"--images {args.images}: there are {len(data)} images in {data.path}")
        print(data.describe())
    return data


def find_folder(args: argparse.Namespace) -> ImageFolder | None:
    """A folder of images for networks of 224x224 input."""
    from models.data.folder import ImageFolder

    if args.data == PROBE:
        raise ValueError(
            "--data probe: 32x32 images; these networks take 224x224: name a folder of images with --data"
        )
    if args.data:
        return ImageFolder.open(args.data)
    message = "no images for networks of 224x224 input: name a folder of them with --data"
    if args.source:
        raise ValueError(message)
    print(f"{message}\n{INSTEAD}", file=sys.stderr)
    return None


INSTEAD = "no images: the closed form from BN's tensors instead (--source batchnorm)"


def find_cifar10(args: argparse.Namespace, sizes: set[str]) -> Data | None:
    """CIFAR-10, or the probe set; for a network of the user's own, whose input size is unknown,
    else a folder.
    """
    from models.data import cifar10
    from models.data.formats import NoData, WrongSize

    if args.data == PROBE:
        return find_probe(args)
    try:
        return cifar10.load(place_of(args.data), args.split)
    except (NoData, WrongSize) as error:
        if args.data and not sizes and args.data.is_dir():
            return find_folder(args)
        if args.data or os.environ.get("CIFAR10"):
            raise
        if sizes == {"cifar"} and args.split == "test":
            whole = ", all of it whatever --images says" if args.images else ""
            print(
                f"{error}. The probe set stands for them{whole} (--data cifar10 asks for no stand-in)",
                file=sys.stderr,
            )
            args.images = None
            return find_probe(args)
        if args.source:
            raise
        print(f"{error}\n{INSTEAD}", file=sys.stderr)
        return None


def place_of(path: Path | None) -> Path | None:
    """Where the real images lie; None, wherever they can be found, for the word that asks for no
    stand-in.

    A file or folder of this name wins: it is the real images either way. Of PROBE the word wins, as
    a folder of results may well bear its name.
    """
    return None if path == CIFAR10 and not path.exists() else path


def find_probe(args: argparse.Namespace) -> Probe:
    """The shipped probe set, all of it."""
    from models.data import probe

    if args.split != "test":
        raise ValueError(
            f"--split {args.split}: the probe set stands for the test images; leave --split out"
        )
    if args.images:
        raise ValueError(
            f"--images {args.images}: the probe set holds only as a whole; leave --images out"
        )
    return probe.load()


def sample_of(data: Data) -> Any:
    """Images (n, H, W, 3) uint8 by which networks are recognised."""
    from models.data.folder import ImageFolder

    return data.sample(SAMPLE) if isinstance(data, ImageFolder) else data.images
