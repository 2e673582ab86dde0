"""What is compared: networks and groups of them, read from checkpoints, shipped networks and frames
made earlier.

entries, provenance = read_entries(args)  # args.items, args.group and the options of
analysis.cli.items
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.items import Found, check_label, find_network, split_label
from analysis.cli.outputs import describe_network
from analysis.measuring.processes import leave, together
from models.messages import is_plain

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd
    from torch import Tensor

HUGE = 1e38  # float32 ends there


@dataclass
class Entry:
    """One thing to compare: a network, or a group of them. frames: one a network. states: their
    tensors, if known.
    """

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


def read_entries(args: argparse.Namespace) -> tuple[list[Entry], dict[str, Any]]:
    """All that is to be compared, measured where it must be, and where it comes from."""
    from analysis.cli.items import prepare
    from analysis.measuring.networks import measure_all

    slots: list[
        tuple[Entry, Found]
    ] = []  # networks that are still to be measured, in order, and whose they are
    entries: list[Entry] = []
    with together():
        for item in args.items:
            entries += read_item(item, args.source, slots)
        for words in args.group:
            entries.append(read_group(words, args.source, slots))
        check_labels(
            [entry.label for entry in entries]
            + [str(item.label) for entry, item in slots if entry.group]
        )
    provenance: dict[str, Any] = {}
    if slots:
        plan = prepare(args, [item for _, item in slots])
        for (entry, _), network, frame in zip(
            slots, plan.networks, measure_all(args, plan), strict=True
        ):
            provenance[network.label] = describe_network(args, network, frame, plan)
            entry.frames.append(frame)
            entry.states.append(network.checkpoint.state)
    leave()  # where nothing was to be measured, all processes are still here
    check_frames(entries, args.source)
    return entries, provenance | describe_frames(entries)


def describe_frames(entries: Sequence[Entry]) -> dict[str, Any]:
    """Which files of frames the entries come from, by path: digest, and the networks that were
    taken from it.
    """
    from models.files import sha256

    files: dict[str, Any] = {}
    for frame in (frame for entry in entries for frame in entry.frames if "csv" in frame.attrs):
        path = frame.attrs.pop("csv")
        file = files.setdefault(str(path), {"sha256": sha256(path), "networks": []})
        file["networks"].append(str(frame["network"].iloc[0]))
    return files


def read_item(
    item: str, sources: list[str] | None, slots: list[tuple[Entry, Found]]
) -> list[Entry]:
    """One thing to compare; several where a frame holds several networks, which a label goes
    before.
    """
    label, path = split_label(item)
    if path.suffix == ".csv":
        frames = read_frames(path, sources)
        before = "" if label is None else f"{label} "
        labels = [label] if label and len(frames) == 1 else [before + network for network in frames]
        return [
            Entry(name, False, [frame], [None])
            for name, frame in zip(labels, frames.values(), strict=True)
        ]
    network_file = find_network(item)
    entry = Entry(label or network_file.path.stem, False)
    slots.append((entry, Found(entry.label, network_file.path)))
    return [entry]


def read_group(words: str, sources: list[str] | None, slots: list[tuple[Entry, Found]]) -> Entry:
    """A group of networks: LABEL=ITEM,ITEM,..."""
    label, equals, items = words.partition("=")
    names = [item for item in items.split(",") if item]
    if not equals or not label or not names:
        raise ValueError(f"--group {words}: not LABEL=ITEM,ITEM,... with one item or more")
    group = Entry(label, True)
    for item in names:
        own: list[tuple[Entry, Found]] = []
        for entry in read_item(item, sources, own):
            group.frames += entry.frames
            group.states += entry.states
        for _, found in own:
            position = len(group.frames) + sum(entry is group for entry, _ in slots) + 1
            slots.append((group, Found(f"{label} {position}", found.path)))
    return group


def read_frames(path: Path, sources: list[str] | None) -> dict[str, pd.DataFrame]:
    """The networks in a responses.csv made earlier, by label.

    sources: which one is wanted, where the file has both; without, the first of each network is
    taken. ValueError, with the path, where the file is not whole or was edited.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a frame is the responses.csv of analysis.responses"
        )
    try:
        frame = read_frame(path)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a frame of analysis.responses: {error}") from error
    networks: dict[str, pd.DataFrame] = {}
    for name, layers in frame.groupby("network", sort=False):
        label = check_label(str(name))
        there = set(layers["source"])
        wanted = sources[0] if sources and sources[0] in there else layers["source"].iloc[0]
        if sources and wanted != sources[0]:
            print(
                f"warning: {label}: {path} has no numbers from {sources[0]}, only from {wanted}",
                file=sys.stderr,
            )
        layers = layers[layers["source"] == wanted].reset_index(drop=True)
        if layers["layer"].tolist() != list(range(1, len(layers) + 1)):
            raise ValueError(
                f"{path}: the layers of {label} are not 1 to {len(layers)}: rows are missing, or were added"
            )
        layers.attrs["csv"] = path
        networks[label] = layers
    return networks


def read_frame(path: Path) -> pd.DataFrame:
    """The frame in a CSV file. Raises ValueError, with what is wrong, where it is not as one is
    written.
    """
    import numpy as np
    import pandas as pd

    from analysis.measuring.frame import COLUMNS, COLUMNS_0_1, complete, read_columns

    text = ["network", "kind", "name", "norm", "source"]
    real = ["mean", "std", "within", "between"]
    columns = read_columns(path)
    if tuple(columns) not in (COLUMNS, COLUMNS_0_1):
        raise ValueError(f"its columns are {', '.join(columns)[:200]}")
    frame = pd.read_csv(
        path, dtype=dict.fromkeys(text + real, str), keep_default_na=False, na_values=[""]
    )
    if frame.empty:
        raise ValueError("it has no rows")
    if (empty := frame[[*text, "layer", "stage", "channels"]].isna()).any(axis=None):
        row, column = np.argwhere(empty.to_numpy())[0]
        raise ValueError(f"no {empty.columns[column]} in line {row + 2}")
    for column in text:
        if odd := [word for word in frame[column].unique() if not is_plain(word)]:
            raise ValueError(
                f"{odd[0][:80]!r} in column {column} is unprintable, or a formula for a spreadsheet"
            )
    frame = complete(frame)
    frame = frame.astype(
        dict.fromkeys(real, float)
    )  # exactly what was written, which read_csv of pandas 2 misses
    numbers = frame[real].to_numpy()
    _, std, within, between = numbers.T
    sound = np.isclose(std, np.hypot(within, between), rtol=1e-6) & (
        np.minimum(std, np.minimum(within, between)) >= 0
    )
    sound &= (np.abs(numbers) < HUGE).all(axis=1)
    if not sound.all():
        row = frame[~sound].iloc[0]
        raise ValueError(
            f"std, within and between of {row['network']}, layer {row['layer']} do not belong together "
            f"({row['std']}, {row['within']}, {row['between']}): the file was edited; measure again"
        )
    return frame


def check_labels(labels: Sequence[str]) -> None:
    """ValueError where two things to compare, or two networks of groups, are called alike."""
    for label in map(check_label, labels):
        if labels.count(label) > 1:
            raise ValueError(f"two things to compare are called {label}: name them, LABEL=ITEM")


def check_frames(entries: Sequence[Entry], asked: list[str] | None) -> None:
    """ValueError where a group's networks differ in layout, or are the same; a line where sources
    are mixed.
    """
    from analysis.statistics import same_layout

    for entry in entries:
        for frame in entry.frames[1:]:
            if not same_layout(entry.frames[0], frame):
                raise ValueError(
                    f"the networks of group {entry.label} have different layouts ({len(entry.frames[0])} and "
                    f"{len(frame)} layers, or other channels): a group is one configuration"
                )
        stds = [tuple(frame["std"]) for frame in entry.frames]
        for position, curve in enumerate(stds):
            if curve in stds[:position]:
                raise ValueError(
                    f"networks {stds.index(curve) + 1} and {position + 1} of group {entry.label} have the same "
                    "numbers: one network counts once; a group's networks differ in their seeds"
                )
    sources = {frame["source"].iloc[0] for entry in entries for frame in entry.frames}
    if len(sources) > 1:
        advice = "" if asked else "; --source makes them alike"
        print(f"warning: measured networks are compared with closed forms{advice}", file=sys.stderr)
    counts = {
        int(frame["images"].iloc[0])
        for entry in entries
        for frame in entry.frames
        if frame["images"].notna().all()
    }
    if len(counts) > 1:
        numbers = ", ".join(f"{count:,}" for count in sorted(counts))
        print(
            f"warning: the networks were measured on different images ({numbers} of them)",
            file=sys.stderr,
        )


def same_tensors(first: Entry, second: Entry) -> bool:
    """Whether two networks have the same tensors, bit for bit, BN's counters aside."""
    import torch

    if first.group or second.group or first.states[0] is None or second.states[0] is None:
        return False
    states = [
        {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        for state in (first.states[0], second.states[0])
    ]
    return set(states[0]) == set(states[1]) and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )
