"""From `[LABEL=]ITEM` on the command line to networks, and to images that suit them.

networks, images = open_networks([find_item("resnet-20"), find_item("mine=file.pth")], options)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.cli.options import CIFAR10, PROBE
from analysis.running.networks import Network, Options
from analysis.running.processes import together
from models.messages import is_plain

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    from models.checkpoints.loading import Candidates, Checkpoint, CheckpointFile
    from models.data import ImageSet

LONGEST = 80  # characters of a label
SAMPLES = {32: 10_000, 224: 64}  # images by which networks are recognised, by their side
NO_IMAGES = "no images: the closed form from BN's tensors instead (--source batchnorm)"


@dataclass(frozen=True)
class Item:
    """A checkpoint: its path, the label and kind that were given, and the file if it was read.

    group: the label of its group.
    """

    label: str | None
    path: Path
    kind: str | None = None
    file: CheckpointFile | None = None
    group: str | None = None

    @property
    def names(self) -> tuple[str | None, ...]:
        """What `--model NAME=...` may call it; None is for every checkpoint."""
        return self.label, self.group, self.path.stem, None

    def builder(self, models: Mapping[str | None, str]) -> str | None:
        """Return what builds the network. A shipped one needs nothing."""
        if is_shipped(self.path):
            return None
        return next((models[name] for name in self.names if name in models), None)


def split_label(item: str) -> tuple[str | None, Path]:
    """Split `LABEL=PATH`. An existing file wins: Lightning writes epoch=3-step=100.ckpt.

    >>> split_label("mine=runs/best.pth")
    ('mine', PosixPath('runs/best.pth'))
    """
    label, equals, path = item.partition("=")
    if not equals or Path(item).is_file():
        return None, Path(item)
    return label or None, Path(path)


def find_item(text: str, kind: str | None = None) -> Item:
    """Return the checkpoint that `[LABEL=]ITEM` names. An existing file wins over a shipped name."""
    from models import zoo

    label, path = split_label(text)
    name = None if path.is_file() else zoo.spelling(str(path))
    return Item(label, path if name is None else zoo.find(name), kind)


def open_networks(items: Sequence[Item], options: Options) -> tuple[list[Network], ImageSet | None]:
    """Read each file once, find images for the networks, and say what each is and how it is known.

    Returns None for the images if only the closed form can be computed. Raises ValueError or
    OSError, with what to do, for bad input.
    """
    with together():
        check_models(items, options)
        opened = [open_file(item, options) for item in items]
        every = find_images([candidates.side for candidates in opened], options)
        sample = None if every is None else every.sample(SAMPLES[every.side])
        images = None if every is None else choose_images(every, options)
        networks: list[Network] = []
        for item, candidates in zip(items, opened, strict=True):
            checkpoint = candidates.choose(sample, likely_kind=kind_in(item.label))
            warn_of_label(item, checkpoint)
            label = choose_label(item, checkpoint, {network.label for network in networks})
            networks.append(Network(label, checkpoint, item.builder(options.models)))
            announce(networks[-1], images)
    return networks, images


def check_models(items: Sequence[Item], options: Options) -> None:
    """Raise ValueError if --model names a checkpoint that is not there."""
    known = {name for item in items for name in item.names}
    for label, spec in options.models.items():
        if label not in known:
            names = ", ".join(sorted({item.label or item.path.stem for item in items}))
            raise ValueError(f"--model {label}={spec}: no checkpoint is called {label}: {names}")


def open_file(item: Item, options: Options) -> Candidates:
    """Read one checkpoint. The card of a shipped network says what options say of other files."""
    from models.checkpoints.custom import build_from
    from models.checkpoints.loading import read

    needed = not options.only_closed_form
    if is_shipped(item.path):
        return read(item.path).candidates(kind=item.kind, need_model=needed)
    spec = item.builder(options.models)
    file = item.file or read(item.path, weights=options.weights, ema=options.ema)
    return file.candidates(
        kind=item.kind,
        normalize=None if options.normalize == "auto" else options.normalize,
        model=build_from(spec) if spec else None,
        need_model=needed,
    )


def is_shipped(path: Path) -> bool:
    """Whether a file is one of the networks that come with the project."""
    from models import zoo

    return path.parent == Path(zoo.__file__).parent


def kind_in(label: str | None) -> str | None:
    """Return the kind of network that a label names, such as `plain` for plain-20."""
    from models.resnet import parse_name

    try:
        return parse_name(label or "").kind
    except ValueError:
        return None


def warn_of_label(item: Item, checkpoint: Checkpoint) -> None:
    """Add a warning if the label names another network than the file holds."""
    from models.resnet import parse_name

    config = checkpoint.config
    if config is None or kind_in(item.label) is None:
        return
    if parse_name(item.label or "").name != config.name:
        line = f"the label says {item.label}, the file holds {config.name}"
        checkpoint.warnings.append(line)


def choose_label(item: Item, checkpoint: Checkpoint, taken: set[str]) -> str:
    """Return the given label, or else the network's name, or else the file's."""
    label = item.label
    if label is None:
        label = item.path.stem if checkpoint.config is None else checkpoint.config.name
        label = item.path.stem if label in taken else label
    if label in taken:
        raise ValueError(f"two networks are called {label}: name them, LABEL=PATH LABEL=PATH")
    return check_label(label)


def check_label(label: str) -> str:
    """Return the label. Raise ValueError if it cannot stand in a table, a legend and a file."""
    if not 0 < len(label) <= LONGEST or not is_plain(label):
        raise ValueError(
            f"{label!r} cannot be a label: 1 to {LONGEST} printable characters are needed, without "
            "= + - @ at the beginning (spreadsheets read that as a formula); name it, LABEL=PATH"
        )
    return label


def announce(network: Network, images: ImageSet | None) -> None:
    """Print what a network is and how that is known; warnings go to stderr."""
    label, checkpoint = network.label, network.checkpoint
    config, model, iterations = checkpoint.config, checkpoint.model, checkpoint.iterations
    name = config.name if config else type(model).__name__ if model else "none of the paper's"
    length = "" if iterations is None else f", trained for {iterations:,} iterations"
    copy = f", weights: {checkpoint.weights_note}" if checkpoint.weights_note else ""
    print(f"{label}: network {name} ({checkpoint.how_kind()}){length}{copy}")
    if images is not None and checkpoint.preprocessing is not None:
        padding = checkpoint.crop_padding
        word = "no" if padding == "none" else padding
        words = "" if padding is None else f", {word} padding in training"
        known = checkpoint.how_preprocessing()
        print(f"{label}: preprocessing {checkpoint.preprocessing.name}{words} ({known})")
    for warning in checkpoint.warnings:
        print(f"warning: {label}: {warning}", file=sys.stderr)


def find_images(sides: Sequence[int | None], options: Options) -> ImageSet | None:
    """Return images that suit the networks, or None for the closed form alone.

    sides: pixels on a side of each network's input, 32 or 224; None if that is not known.
    """
    if options.only_closed_form:
        return None
    known = {side for side in sides if side is not None}
    if len(known) > 1:
        raise ValueError("networks for 32x32 and for 224x224 images: measure them in two commands")
    return find_folder(options) if known == {224} else find_cifar10(options, known)


def choose_images(every: ImageSet, options: Options) -> ImageSet:
    """Return and describe the images to measure on; the probe set is of use only as a whole."""
    from models.data.probe import Probe

    count = options.images or len(every)
    if isinstance(every, Probe):
        count = len(every)
    elif count > len(every):
        raise ValueError(f"--images {count}: there are only {len(every)} images")
    if every.labels_known and not isinstance(every, Probe):
        print(f"no accuracy: {every.labels_known}")
    images = every.some(count)
    print(images.describe())
    return images


def find_folder(options: Options) -> ImageSet | None:
    """Return a folder of images for networks with 224x224 input."""
    from models.data.folder import ImageFolder

    if options.data == PROBE:
        raise ValueError(
            "--data probe: its images have 32x32 pixels, and these networks take 224x224: name a "
            "folder of images with --data"
        )
    if options.data:
        return ImageFolder.open(options.data)
    message = "no images for networks with 224x224 input: name a folder of them with --data"
    do_without_images(message, options)
    return None


def do_without_images(message: str, options: Options) -> None:
    """Say that the closed form is computed instead. Raise ValueError if hooks were asked for."""
    if options.sources:
        raise ValueError(message)
    print(f"{message}\n{NO_IMAGES}", file=sys.stderr)


def find_cifar10(options: Options, sides: set[int]) -> ImageSet | None:
    """Return CIFAR-10 or the probe set; a folder of images if the input size is not known."""
    from models.data import cifar10, probe
    from models.data.formats import NoData, WrongSize

    if options.data == PROBE:
        return find_probe(options)
    try:
        return cifar10.load(place_of(options.data), options.split)
    except (NoData, WrongSize) as error:
        if options.data and not sides and options.data.is_dir():
            return find_folder(options)
        if options.data or os.environ.get("CIFAR10"):
            raise
        if sides != {32} or options.split != "test":
            do_without_images(str(error), options)
            return None
        whole = ", all of it whatever --images says" if options.images else ""
        line = (
            f"{error}. The probe set stands for them{whole} (--data cifar10 asks for no stand-in)"
        )
        print(line, file=sys.stderr)
        return probe.load()


def place_of(path: Path | None) -> Path | None:
    """Return the place of the real images; None for the word `cifar10`: wherever they are found.

    A file or folder called cifar10 wins over the word; the word `probe` wins over a folder.
    """
    return None if path == CIFAR10 and not path.exists() else path


def find_probe(options: Options) -> ImageSet:
    """Return the probe set. Raise ValueError if a part of it is asked for."""
    from models.data import probe

    if options.split != "test":
        raise ValueError(
            f"--split {options.split}: the probe set stands for test images; leave --split out"
        )
    if options.images:
        raise ValueError(
            f"--images {options.images}: the probe set holds only as a whole; leave --images out"
        )
    return probe.load()
