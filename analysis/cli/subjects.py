"""The networks of `python -m analysis.branches`, each with its own input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.hubs import (
    PREFIXES,
    HubNetwork,
    image_batches,
    load_hub,
    ordinary_tokens,
    run_text,
    text_batches,
)
from analysis.cli.items import check_label, find_cifar10, find_item, open_networks
from analysis.cli.outputs import command_line, provenance_of, versions
from analysis.running.networks import Measured, Network, Options, make_batches, normalised

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    from torch import Tensor, nn

    from models.data import ImageSet

HUB_INPUTS = 1000  # images or windows of text for a network of a hub, if --images does not say


@dataclass
class Subject:
    """A network to measure, and its input.

    batches: makes the batches, as often as it is called.
    provenance: where the network and its input come from.
    data: its input, in words. note: what has to stand under its figure.
    forward, mask: as for `measure_branches`.
    iterations: how long it was trained, if that is known.
    """

    label: str
    model: nn.Module
    batches: Callable[[], Iterable[Any]]
    provenance: dict[str, Any]
    data: str
    note: str = ""
    forward: Callable[[nn.Module, Any], Any] | None = None
    mask: Callable[[Any], Tensor] | None = None
    iterations: int | None = None


def find_subjects(
    items: Sequence[str], options: Options, *, batches: str | None = None, length: int
) -> Iterator[Subject]:
    """Load each item and find its input. Print what both are.

    batches: `FILE.py:FUNCTION` that returns the batches of every network, or None.
    length: tokens of a window of text.

    Raises ValueError or OSError, with what to do, for bad input.
    """
    given = None if batches is None else load_batches(batches)
    files = [find_item(item) for item in items if split_hub(item) is None]
    wanted = options if given is None else replace(options, sources=("batchnorm",))  # no images
    networks, images = open_networks(files, wanted) if files else ([], None)
    own = iter(networks)
    note = note_of(images)
    taken: set[str] = set()
    for item in items:
        found = split_hub(item)
        if found is None:
            subject = own_subject(next(own), images, options)
            subject.note = note
        else:
            hub = load_hub(found[1])
            subject = hub_subject(hub, found[0] or hub.name, options, length, given is None)
        if given is not None:
            subject.batches, subject.data = given, f"batches of {batches}"
            subject.provenance["data"] = batches
        if check_label(subject.label) in taken:
            raise ValueError(f"two networks are called {subject.label}: name them, LABEL=ITEM")
        taken.add(subject.label)
        yield subject


def split_hub(item: str) -> tuple[str | None, str] | None:
    """Split `[LABEL=]timm:NAME` and the like; None for an item that is no network of a hub."""
    label, equals, rest = item.partition("=")
    if equals and rest.startswith(PREFIXES):
        return label, rest
    return (None, item) if item.startswith(PREFIXES) else None


def load_batches(spec: str) -> Callable[[], Iterable[Any]]:
    """Return the function that --batches names."""
    from models.checkpoints.custom import import_place, user_modules

    place, _, name = spec.rpartition(":")
    folder = Path(place).resolve().parent if place.endswith(".py") else Path.cwd()
    try:
        with user_modules(folder):
            function = getattr(import_place(spec, place), name, None) if place else None
    except ValueError as error:
        raise ValueError(str(error).replace("--model", "--batches")) from error
    if not callable(function):
        raise ValueError(f"--batches {spec}: not FILE.py:FUNCTION, a function that returns batches")
    made: Callable[[], Iterable[Any]] = function
    return made


def own_subject(network: Network, images: ImageSet | None, options: Options) -> Subject:
    """Return a shipped network or a checkpoint; its input is images, if there are some."""
    import pandas as pd

    checkpoint = network.checkpoint
    if checkpoint.model is None:
        raise ValueError(f"{checkpoint.path}: an unknown network: build it with --model")
    measured = Measured(network, pd.DataFrame({"source": ["hooks"]}))
    provenance = provenance_of(measured, None, options).to_json()
    subject = Subject(network.label, checkpoint.model, lambda: (), provenance, "")
    subject.iterations = checkpoint.iterations
    if images is not None and checkpoint.preprocessing is not None:
        subject.batches = lambda: (
            normalised(network, *batch) for batch in make_batches(images, 0, len(images), options)
        )
        subject.data = images.describe()
        provenance["preprocessing"] = {
            "name": checkpoint.preprocessing.name,
            "known": checkpoint.how_preprocessing(),
        }
        provenance["data"] = images.provenance() | {"images": len(images)}
    return subject


def hub_subject(
    network: HubNetwork, label: str, options: Options, length: int, needs_input: bool
) -> Subject:
    """Return a network of timm or transformers; its input is text or images, if it needs some."""
    from models.data.probe import Probe

    print(f"{label}: network {type(network.model).__name__} ({network.known})")
    provenance: dict[str, Any] = {"network": network.known, "versions": versions()}
    provenance["command"] = command_line()
    subject = Subject(label, network.model, lambda: (), provenance, "")
    if not needs_input:
        return subject
    path, count, size = options.data, options.images or HUB_INPUTS, options.batch_size
    if network.tokenizer is not None:
        if path is None or not path.is_file():
            raise ValueError(f"{label}: it takes text: name a text file with --data")
        subject.batches = lambda: text_batches(network, path, length, count, size)
        subject.forward, subject.mask = run_text, ordinary_tokens
        subject.data = f"windows of {length} tokens of {path}, special tokens left out"
        provenance["data"] = {"text": str(path), "length": length}
        print(f"{label}: {subject.data}")
        return subject
    images = find_cifar10(options, set())
    if images is None:
        raise ValueError(f"{label}: no images: name a folder of them with --data")
    some = images if isinstance(images, Probe) else images.some(count)
    subject.batches = lambda: image_batches(network, some, size)
    subject.data, subject.note = some.describe(), note_of(some)
    provenance["data"] = some.provenance() | {"images": len(some)}
    print(f"{label}: {subject.data}")
    return subject


def note_of(images: ImageSet | None) -> str:
    """Return which images these are, if they are not all of the real ones."""
    from models.data.probe import Probe

    if isinstance(images, Probe):  # the errors on its card are those of responses, not of ratios
        return "measured on the probe set; how far its ratios are from the test set's is not known"
    if images is not None and len(images) < images.total:
        return f"measured on {len(images):,} of {images.total:,} images"
    return ""
