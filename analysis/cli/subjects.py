"""The networks of `python -m analysis.branches`, each with its own input."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.hubs import PREFIXES, HubNetwork
from analysis.cli.items import check_label, find_network, trained
from analysis.cli.outputs import versions

if TYPE_CHECKING:  # torch is imported when it is needed: --help does without
    from torch import Tensor, nn

IMAGES = 1000  # images, or windows of text, if --images does not say


@dataclass
class Subject:
    """A network to measure and its input.

    batches: makes the batches, as often as it is called.
    family: networks of one family, of different depth, are compared.
    iterations: how long it was trained, if that is known.
    """

    label: str
    model: nn.Module
    batches: Callable[[], Iterable[Any]]
    provenance: dict[str, Any]
    forward: Callable[[nn.Module, Any], Any] | None = None
    mask: Callable[[Any], Tensor] | None = None
    family: str = ""
    iterations: int | None = None


def find_subjects(args: argparse.Namespace) -> Iterator[Subject]:
    """Load each item and find its input, and say on stdout what both are."""
    from analysis.cli.hubs import load_hub

    given = None if args.batches is None else load_batches(args.batches)
    taken: set[str] = set()
    for item in args.items:
        label, equals, rest = item.partition("=")
        name = rest if equals and rest.startswith(PREFIXES) else item
        if name.startswith(PREFIXES):
            network = load_hub(name)
            subject = hub_subject(args, network, label if name is rest else network.name, given)
        else:
            subject = own_subject(args, item, given)
        if check_label(subject.label) in taken:
            raise ValueError(f"two networks are called {subject.label}: name them, LABEL=ITEM")
        taken.add(subject.label)
        subject.provenance["versions"] = versions()
        yield subject


def load_batches(words: str) -> Callable[[], Iterable[Any]]:
    """Return the function that --batches names."""
    from models.checkpoints.custom import import_place, user_modules

    place, _, name = words.rpartition(":")
    folder = Path(place).resolve().parent if place.endswith(".py") else Path.cwd()
    try:
        with user_modules(folder):
            function = getattr(import_place(words, place), name, None) if place else None
    except ValueError as error:
        raise ValueError(str(error).replace("--model", "--batches")) from error
    if not callable(function):
        raise ValueError(
            f"--batches {words}: not FILE.py:FUNCTION, a function that returns batches"
        )
    made: Callable[[], Iterable[Any]] = function
    return made


def hub_subject(
    args: argparse.Namespace,
    network: HubNetwork,
    label: str,
    given: Callable[[], Iterable[Any]] | None,
) -> Subject:
    """Return a network of timm or transformers with its input."""
    from analysis.cli.hubs import image_batches, ordinary_tokens, run_text, text_batches
    from analysis.cli.items import find_cifar10

    print(f"{label}: network {type(network.model).__name__} ({network.known})")
    provenance: dict[str, Any] = {"network": network.known}
    subject = Subject(label, network.model, lambda: (), provenance, family=family_of(network.model))
    if given is not None:
        subject.batches, provenance["data"] = given, args.batches
    elif network.tokenizer is not None:
        if args.data is None or not args.data.is_file():
            raise ValueError(f"{label}: it takes text: name a text file with --data")
        count = args.images or IMAGES
        subject.batches = lambda: text_batches(
            network, args.data, args.length, count, args.batch_size
        )
        subject.forward, subject.mask = run_text, ordinary_tokens
        provenance["data"] = {"text": str(args.data), "length": args.length}
        print(f"{label}: windows of {args.length} tokens of {args.data}, special tokens left out")
    else:
        data = find_cifar10(args, set())
        if data is None:
            raise ValueError(f"{label}: no images: name a folder of them with --data")
        some = data.some(args.images or min(IMAGES, len(data)))
        subject.batches = lambda: image_batches(network, some, args.batch_size)
        provenance["data"] = data.provenance()
        print(f"{data.describe()}; measured on {len(some)} of them")
    return subject


def own_subject(
    args: argparse.Namespace, item: str, given: Callable[[], Iterable[Any]] | None
) -> Subject:
    """Return a shipped network or a checkpoint with its input."""
    from analysis.cli.items import prepare
    from analysis.measuring.networks import make_batches

    source = ["hooks"] if given is None else ["batchnorm"]
    options = argparse.Namespace(**vars(args) | {"source": source})
    plan = prepare(options, [find_network(item)])
    [network] = plan.networks
    checkpoint = network.checkpoint
    if checkpoint.model is None:
        raise ValueError(f"{checkpoint.path}: an unknown network: build it with --model")
    provenance: dict[str, Any] = {
        "checkpoint": {"path": str(checkpoint.path), "sha256": checkpoint.digest},
        "network": checkpoint.how["kind"],
    }
    subject = Subject(network.label, checkpoint.model, lambda: (), provenance)
    subject.family, subject.iterations = family_of(checkpoint.model), trained(checkpoint)
    if given is not None:
        subject.batches, provenance["data"] = given, args.batches
        return subject
    assert plan.data is not None  # with hooks, missing images are an error
    some = plan.data.some(args.images or min(IMAGES, len(plan.data)))
    subject.batches = lambda: (
        batches[0] for batches in make_batches(options, some, [network], 0, len(some))
    )
    provenance["data"] = plan.data.provenance() | {"images": len(some)}
    return subject


def family_of(model: nn.Module) -> str:
    """Return what the networks of one family have in common, beside the shapes of their streams."""
    from analysis.measuring.measurement import unwrapped

    return type(unwrapped(model)).__name__
