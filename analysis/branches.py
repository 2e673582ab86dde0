"""How much each residual addition changes the signal, in any network.

    python -m analysis.branches resnet-20 resnet-56 resnet-110
    python -m analysis.branches hf:path/to/gpt2 --data text.txt --positions
    python -m analysis.branches timm:vit_tiny_patch16_224 --data folder/of/images --lesion 500

finds the residual additions of each network by data flow (analysis.measuring.dataflow), measures
them while the input runs through, and writes branches.csv, branches.json (where the numbers come
from) and branches.png/.pdf into --out. It prints the ratio std(branch) / std(shortcut) by network,
stage and kind of branch, and judges the paper's claim that an individual layer changes the signal
less if there are more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.hubs import PREFIXES, HubNetwork
from analysis.cli.items import (
    add_options,
    check_folder,
    check_label,
    check_options,
    find_network,
    positive,
    trained,
)
from analysis.cli.outputs import as_csv, as_images, as_json, finish, versions, write_files
from models.messages import does_not_run, is_out_of_memory, one_line

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd
    from torch import Tensor, nn

IMAGES = 1000  # on which branches are measured, if --images does not say
LENGTH = 128  # tokens of a window of text
CLAIM = "an individual layer of a ResNet modifies the signal less when there are more"


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


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.source != ["hooks"]:
        parser.error("--source batchnorm: additions are measured on input, not computed")
    check_options(parser, args)
    return finish(run, args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.branches",
        description="Measure how much each residual addition of a network changes the signal.",
    )
    add = parser.add_argument
    add(
        "items",
        nargs="+",
        metavar="[LABEL=]ITEM",
        help="a shipped network such as resnet-20, a checkpoint, timm:NAME, or hf:NAME_OR_FOLDER",
    )
    add_options(parser, source="hooks")
    add("--batches", metavar="FILE.py:FUNCTION", help="returns the batches, for any other input")
    add("--length", type=positive, default=LENGTH, metavar="N", help="tokens of a window of text")
    add("--positions", action="store_true", help="measure norms and angles at each position, too")
    add(
        "--lesion",
        type=positive,
        metavar="N",
        help="also measure what is lost on N inputs with labels if one branch is left out",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from plots import draw_branches

    check_folder(args.out)
    frames, provenance, families, iterations = [], {}, {}, {}
    for subject in find_subjects(args):
        frame = measure_subject(args, subject)
        if frame is None:
            continue
        frames.append(frame)
        others = frame.attrs.pop("others")
        provenance[subject.label] = subject.provenance | {"other_sums": others}
        families[subject.label] = subject.family, tuple(frame["shape"].unique())
        iterations[subject.label] = subject.iterations
    if not frames:
        raise ValueError("none of the networks has a residual addition")
    frame = pd.concat(frames, ignore_index=True)
    files = {"branches.csv": as_csv(frame), "branches.json": as_json(provenance)}
    files |= as_images("branches", draw_branches(frame), args.format)
    written = write_files(args.out, files)
    print("\n" + table_of(frame).to_string(index=False))
    print_claim(frame, families, iterations)
    print(written)


def measure_subject(args: argparse.Namespace, subject: Subject) -> pd.DataFrame | None:
    """Return the frame of a network; None, with a line, if it has no residual additions."""
    from tqdm import tqdm

    from analysis.measuring.branch_measurement import NoAdditions, measure_branches

    model = subject.model.to(device_of(args))
    options: dict[str, Any] = {"forward": subject.forward, "mask": subject.mask}
    options |= {"precision": args.precision, "positions": args.positions}
    with tqdm(unit=" inputs", desc=subject.label, leave=False, disable=None) as bar:
        try:
            frame = measure_branches(
                model, subject.batches(), network=subject.label, progress=bar.update, **options
            )
        except NoAdditions as reason:
            print(one_line(reason))
            return None
        except ValueError as error:
            raise ValueError(f"{subject.label}: {error}") from error
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{subject.label}: {does_not_run(error)}") from error
    return add_lesion_columns(args, subject, frame) if args.lesion else frame


def add_lesion_columns(
    args: argparse.Namespace, subject: Subject, frame: pd.DataFrame
) -> pd.DataFrame:
    """Return the frame with the columns of --lesion."""
    from tqdm import tqdm

    from analysis.measuring.lesion import add_lesions

    options: dict[str, Any] = {"images": args.lesion, "forward": subject.forward}
    words = f"{subject.label}, one branch left out"
    with tqdm(unit=" passes", desc=words, leave=False, disable=None) as bar:
        try:
            return add_lesions(
                frame, subject.model, subject.batches(), progress=bar.update, **options
            )
        except ValueError as error:
            raise ValueError(f"{subject.label}: {error}") from error


def device_of(args: argparse.Namespace) -> str:
    import torch

    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"


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


def table_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return median and range of the ratio by network, stage and kind of branch."""
    import pandas as pd

    rows = []
    for network, additions in frame.groupby("network", sort=False):
        groups = [("all", additions)]
        for column, word in (("stage", "stage {}"), ("branch_kind", "{}")):
            if len(set(additions[column])) > 1:
                parts = additions.groupby(column, sort=False)
                groups += [(word.format(key), part) for key, part in parts]
        for words, part in groups:
            ratio = part["ratio"]
            rows.append(
                {"network": network, "of": words, "additions": len(part)}
                | {"median ratio": f"{ratio.median():.3f}", "smallest": f"{ratio.min():.3f}"}
                | {"largest": f"{ratio.max():.3f}"}
            )
    return pd.DataFrame(rows)


def print_claim(
    frame: pd.DataFrame, families: dict[str, tuple[Any, ...]], iterations: dict[str, int | None]
) -> None:
    """Judge the claim on any two networks of one family and different depth.

    Networks that were trained for different numbers of iterations are shown, but not judged.
    """
    ratios = {str(name): part["ratio"] for name, part in frame.groupby("network", sort=False)}
    lines = []
    for first, second in combinations(ratios, 2):
        shallow, deep = sorted((first, second), key=lambda name: len(ratios[name]))
        same = families[first] == families[second]
        if not same or len(ratios[shallow]) == len(ratios[deep]):
            continue
        less = ratios[deep].median() < ratios[shallow].median()
        known = iterations[deep], iterations[shallow]
        unequal = None not in known and known[0] != known[1]
        lines.append(
            f"    {'?' if unequal else '+' if less else '-'} a branch has "
            f"{ratios[deep].median():.3f} times the std of its shortcut in {deep}, "
            f"{ratios[shallow].median():.3f} times in {shallow} (medians over additions)"
            + (f"; after {known[0]:,} and {known[1]:,} iterations" if unequal else "")
        )
    marks = {line.strip()[0] for line in lines} - {"?"}
    words = {"+": "holds", "-": "does not hold"}
    verdict = "holds in part" if len(marks) > 1 else words[marks.pop()] if marks else None
    print(f"\n{CLAIM}: {verdict or 'cannot be judged here'}")
    print("\n".join(lines) or "    ? no two networks of one family and different depth")


if __name__ == "__main__":
    sys.exit(main())
