"""How trained networks differ, and whether a difference means anything.

    python -m analysis.compare resnet-56 other=checkpoint.pth earlier/responses.csv
    python -m analysis.compare --group a=a0.pth,a1.pth,a2.pth,a3.pth --group b=b0.pth,b1.pth,b2.pth,b3.pth

takes checkpoints, shipped networks by name and frames made earlier, in any mixture. It writes compare.csv (every pair,
layer by layer), compare.json, the curves with their difference (compare.png/.pdf) and the std by stage
(compare-stages.png/.pdf), with --html also a page to look at (compare.html), and prints a table of the pairs. The
networks of a group (seeds of one configuration) are drawn as mean and band, and two groups come with a permutation test
over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.inputs import Found, add_options, check_folder, check_label, check_options, split_label
from analysis.outputs import add_page_option, as_csv, as_images, as_json, as_page, describe_network, finish, write_files

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd
    from torch import Tensor

CAPTIONS = (
    "Std of the layer responses, and what differs from the first",
    "Std by stage: a point a layer, a line at the median",
)


@dataclass
class Entry:
    """One thing to compare: a network, or a group of them. frames: one a network. states: their tensors, if known."""

    label: str
    group: bool
    frames: list[pd.DataFrame] = field(default_factory=list)
    states: list[dict[str, Tensor] | None] = field(default_factory=list)

    @property
    def means(self) -> list[float]:
        """Mean std of each network."""
        return [frame["std"].mean() for frame in self.frames]

    @property
    def curve(self) -> pd.DataFrame:
        """The frame of the network, or of the group's mean."""
        std = sum(frame["std"].to_numpy(float) for frame in self.frames) / len(self.frames)
        return self.frames[0].assign(network=self.label, std=std)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.compare",
        description="Compare the layer responses of trained networks, or of groups of them.",
    )
    add = parser.add_argument
    add("items", nargs="*", metavar="[LABEL=]ITEM", help="a checkpoint, a shipped network's name, or a responses.csv")
    add("--group", action="append", default=[], metavar="LABEL=ITEM,ITEM,...", help="networks of one configuration")
    add_options(parser)
    add_page_option(parser)
    args = parser.parse_args(argv)
    if len(args.items) + len(args.group) < 2:
        parser.error("name two things to compare, or more: checkpoints, shipped networks, responses.csv or groups")
    if args.source and len(args.source) > 1:
        parser.error("--source: one of hooks and batchnorm, for all that is compared")
    check_options(parser, args)
    return finish(run, args)


def run(args: argparse.Namespace) -> None:
    """Read, measure, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from analysis.differences import compare_frames
    from plots import draw_compare, draw_stages

    check_folder(args.out)
    entries, provenance = read_entries(args)
    pairs = list(combinations(entries, 2))
    differences = [compare_frames(first.curve, second.curve) for first, second in pairs]
    parts = [frame.assign(entry=entry.label, member=i) for entry in entries for i, frame in enumerate(entry.frames)]
    curves = pd.concat(parts, ignore_index=True)
    files = {"compare.csv": as_csv(pd.concat(differences, ignore_index=True)), "compare.json": as_json(provenance)}
    to_first = differences[: len(entries) - 1]
    figures = {"compare": draw_compare(curves, to_first), "compare-stages": draw_stages(curves)}
    for name, figure in figures.items():
        files |= as_images(name, figure, args.format)
    if args.html:
        title = f"Layer responses: {', '.join(entry.label for entry in entries)}"
        shown = zip(CAPTIONS, figures.values(), strict=True)
        files |= as_page("compare", title, shown, list_layers(entries, to_first), provenance)
    written = write_files(args.out, files)
    print_pairs(pairs)
    print_groups(pairs)
    print(written)


def list_layers(entries: Sequence[Entry], to_first: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Every layer of every network, under the label of its curve, with its difference to the first one's, if known."""
    import pandas as pd

    parts = []
    for entry, layers in zip(entries, [None, *to_first], strict=True):
        for frame in entry.frames:
            part = frame.assign(network=entry.label)
            if entry.group:
                part["member"] = frame["network"]
            if layers is not None and len(layers) == len(frame):  # else it is aligned with the first one's layers
                part["difference"] = layers["difference"].to_numpy()
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def read_entries(args: argparse.Namespace) -> tuple[list[Entry], dict[str, Any]]:
    """All that is to be compared, measured where it must be, and where it comes from."""
    from analysis.inputs import prepare
    from analysis.sources import measure_all

    slots: list[tuple[Entry, Found | None]] = []  # in the order of the networks; None where the frame is read already
    entries: list[Entry] = []
    for item in args.items:
        entries += read_item(item, slots)
    for words in args.group:
        entries.append(read_group(words, slots))
    check_labels(entries)
    found = [item for _, item in slots if item is not None]
    provenance: dict[str, Any] = {}
    measured: dict[int, tuple[pd.DataFrame, dict[str, Tensor]]] = {}
    if found:
        plan = prepare(args, found)
        for item, network, frame in zip(found, plan.networks, measure_all(args, plan), strict=True):
            provenance[network.label] = describe_network(args, network, frame, plan)
            measured[id(item)] = frame, network.checkpoint.state
    for entry, item in slots:
        if item is not None:
            frame, state = measured[id(item)]
            entry.frames.append(frame)
            entry.states.append(state)
    check_frames(entries)
    return entries, provenance | describe_frames(entries)


def describe_frames(entries: Sequence[Entry]) -> dict[str, Any]:
    """Which files of frames the entries come from, by path: digest, and the networks that were taken from it."""
    from models.files import sha256

    files: dict[str, Any] = {}
    for frame in (frame for entry in entries for frame in entry.frames if "csv" in frame.attrs):
        path = frame.attrs.pop("csv")
        file = files.setdefault(str(path), {"sha256": sha256(path), "networks": []})
        file["networks"].append(str(frame["network"].iloc[0]))
    return files


def read_item(item: str, slots: list[tuple[Entry, Found | None]]) -> list[Entry]:
    """One thing to compare; several where a frame holds several networks."""
    from models import zoo

    label, path = split_label(item)
    if path.suffix == ".csv":
        found = []
        for network, frame in read_frames(path).items():
            found.append(Entry(network if label is None else label, False, [frame], [None]))
        if label is not None and len(found) > 1:
            raise ValueError(f"{path}: it holds {len(found)} networks, so {label} cannot be the label of all")
        return found
    shipped = str(path) in zoo.shipped() and not path.exists()
    path = zoo.find(str(path)) if shipped else path
    entry = Entry(label or path.stem, False)
    slots.append((entry, Found(entry.label, path)))
    return [entry]


def read_group(words: str, slots: list[tuple[Entry, Found | None]]) -> Entry:
    """A group of networks: LABEL=ITEM,ITEM,..."""
    label, equals, items = words.partition("=")
    names = [item for item in items.split(",") if item]
    if not equals or not label or not names:
        raise ValueError(f"--group {words}: not LABEL=ITEM,ITEM,... with one item or more")
    group = Entry(label, True)
    for item in names:
        own: list[tuple[Entry, Found | None]] = []
        for entry in read_item(item, own):
            group.frames += entry.frames
            group.states += entry.states
        for _, found in own:
            assert found is not None  # read_item adds none
            position = len(group.frames) + sum(entry is group for entry, _ in slots) + 1
            slots.append((group, Found(f"{label} {position}", found.path)))
    return group


def read_frames(path: Path) -> dict[str, pd.DataFrame]:
    """The networks in a responses.csv made earlier. ValueError, with the path, where it is not whole or was edited."""
    import numpy as np
    import pandas as pd

    from analysis.frame import COLUMNS, INTEGERS

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a frame is the responses.csv of analysis.responses")
    try:
        frame = pd.read_csv(path, dtype={"network": str, "name": str, "norm": str})
        if list(frame.columns) != list(COLUMNS):
            raise ValueError(f"its columns are {', '.join(map(str, frame.columns))[:200]}")
        if frame.empty:
            raise ValueError("it has no rows")
        frame = frame.astype(dict.fromkeys(INTEGERS, "Int64"))
        numbers = frame[["mean", "std", "within", "between"]].astype(float).to_numpy()
    except (ValueError, TypeError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise ValueError(f"{path}: not a frame of analysis.responses: {error}") from error
    networks: dict[str, pd.DataFrame] = {}
    for name, layers in frame.groupby("network", sort=False):
        layers = layers[layers["source"] == layers["source"].iloc[0]].reset_index(drop=True)
        label = check_label(str(name))
        if layers["layer"].tolist() != list(range(1, len(layers) + 1)):
            raise ValueError(
                f"{path}: the layers of {label} are not 1 to {len(layers)}: rows are missing, or were added"
            )
        layers.attrs["csv"] = path
        networks[label] = layers
    wrong = ~np.isclose(numbers[:, 1] ** 2, numbers[:, 2] ** 2 + numbers[:, 3] ** 2, rtol=1e-6)
    if wrong.any():
        row = frame[wrong].iloc[0]
        raise ValueError(
            f"{path}: std, within and between of {row['network']}, layer {row['layer']} do not belong together "
            f"({row['std']}, {row['within']}, {row['between']}): the file was edited; measure again"
        )
    return networks


def check_labels(entries: Sequence[Entry]) -> None:
    labels = [check_label(entry.label) for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two things to compare are called {label}: name them, LABEL=ITEM")


def check_frames(entries: Sequence[Entry]) -> None:
    """ValueError where a group's networks differ in layout; a line where sources are mixed."""
    from analysis.differences import same_layout

    for entry in entries:
        for frame in entry.frames[1:]:
            if not same_layout(entry.frames[0], frame):
                raise ValueError(
                    f"the networks of group {entry.label} have different layouts ({len(entry.frames[0])} and "
                    f"{len(frame)} layers, or other channels): a group is one configuration"
                )
    sources = {frame["source"].iloc[0] for entry in entries for frame in entry.frames}
    if len(sources) > 1:
        print("warning: measured networks are compared with closed forms: --source makes them alike", file=sys.stderr)


def print_pairs(pairs: Sequence[tuple[Entry, Entry]]) -> None:
    """A row a pair: the second against the first."""
    import pandas as pd

    from analysis.differences import summarise_pair

    rows = []
    for first, second in pairs:
        found = summarise_pair(first.curve, second.curve)
        verdict = "identical" if same_tensors(first, second) else "same numbers" if found["identical"] else ""
        rows.append(
            {
                "second vs first": f"{second.label} vs {first.label}",
                "mean std": f"{second.curve['std'].mean():.4f} vs {first.curve['std'].mean():.4f}",
                "ratio": f"{found['ratio']:.3f}",
                "largest difference": f"{found['largest']:+.4f} in {found['layer']} ({found['name']})",
                "r": dash(found["r"]),
                "rank r": dash(found["rho"]),
                "area": f"{found['area']:.4f}",
                "": verdict,
            }
        )
    print("\n" + "\n".join(line.rstrip() for line in pd.DataFrame(rows).to_string(index=False).splitlines()))


def dash(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def same_tensors(first: Entry, second: Entry) -> bool:
    """Whether two networks have the same tensors, bit for bit, BN's counters aside."""
    import torch

    if first.group or second.group or first.states[0] is None or second.states[0] is None:
        return False
    states = [
        {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        for state in (first.states[0], second.states[0])
    ]
    return set(states[0]) == set(states[1]) and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def print_groups(pairs: Sequence[tuple[Entry, Entry]]) -> None:
    """For each pair of groups the seeds' values, and what they say."""
    from analysis.differences import permutation_test

    for first, second in pairs:
        if not (first.group and second.group):
            continue
        test = permutation_test(first.means, second.means)
        for entry in (first, second):
            print(
                f"\n{entry.label}: mean std of each network: {', '.join(f'{mean:.4f}' for mean in entry.means)}", end=""
            )
        interval = (
            "too few networks for an interval (there are enough from 4 and 4, or 3 and 4, on)"
            if test.interval is None
            else f"95 % interval {test.interval[0]:+.4f} to {test.interval[1]:+.4f}"
        )
        print(
            f"\n{second.label} - {first.label}: {test.difference:+.4f}, p = {test.p:.4f} (permutation of networks, "
            f"two-sided; the smallest that {len(first.frames)} and {len(second.frames)} can give is "
            f"{test.smallest:.4f}); {interval}"
        )


if __name__ == "__main__":
    sys.exit(main())
