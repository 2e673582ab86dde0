"""What is compared: networks, and groups of them, from checkpoints and from frames.

found = read_entries(items, groups, options)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.frames import read_frames
from analysis.cli.items import Item, check_label, find_item, open_networks, split_label
from analysis.cli.outputs import provenance_of
from analysis.running.networks import measure_networks
from analysis.running.processes import leave, together

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd
    from torch import Tensor

    from analysis.running.networks import Measured, Options
    from models.data import ImageSet


@dataclass
class Entry:
    """One thing to compare: a network, or a group of networks.

    frames: one a network.
    states: the tensors of each network by name; None if it came from a frame.
    """

    label: str
    is_group: bool
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


@dataclass
class Entries:
    """All that is compared, the images it was measured on, and where the numbers come from."""

    entries: list[Entry]
    results: list[Measured]  # of the networks that had to be measured
    images: ImageSet | None
    provenance: dict[str, Any]


class Reader:
    """Reads items one after the other; networks that have to be measured wait for each other."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self.waiting: list[tuple[Entry, Item]] = []
        self.files: dict[str, dict[str, Any]] = {}  # frames' paths -> digest and networks

    def read_item(self, text: str) -> list[Entry]:
        """Return what `[LABEL=]ITEM` names: several things if a frame holds several networks."""
        label, path = split_label(text)
        if path.suffix != ".csv":
            item = find_item(text)
            entry = Entry(label or item.path.stem, is_group=False)
            self.waiting.append((entry, Item(entry.label, item.path)))
            return [entry]
        frames = self.read_csv(path)
        prefix = "" if label is None else f"{label} "
        labels = [label] if label and len(frames) == 1 else [prefix + name for name in frames]
        return [
            Entry(name, False, [frame], [None])
            for name, frame in zip(labels, frames.values(), strict=True)
        ]

    def read_csv(self, path: Path) -> dict[str, pd.DataFrame]:
        """Return the networks of a frame by label, and note where they come from."""
        from models.files import sha256

        frames = read_frames(path, self.sources)
        known = self.files.setdefault(str(path), {"sha256": sha256(path), "networks": []})
        known["networks"] += list(frames)
        return frames

    def read_group(self, text: str) -> Entry:
        """Return the group of networks that `LABEL=ITEM,ITEM,...` names."""
        label, equals, items = text.partition("=")
        names = [item for item in items.split(",") if item]
        if not equals or not label or not names:
            raise ValueError(f"--group {text}: LABEL=ITEM,ITEM,... with one item or more is needed")
        group, others = Entry(label, is_group=True), self.waiting
        self.waiting = []
        for name in names:
            for entry in self.read_item(name):
                group.frames += entry.frames
                group.states += entry.states
        for number, (_, item) in enumerate(self.waiting, start=len(group.frames) + 1):
            others.append((group, Item(f"{label} {number}", item.path, group=label)))
        self.waiting = others
        return group


def read_entries(items: Sequence[str], groups: Sequence[str], options: Options) -> Entries:
    """Read all that is to be compared, and measure the networks that no frame holds."""
    reader = Reader(options.sources)
    with together():
        entries = [entry for item in items for entry in reader.read_item(item)]
        entries += [reader.read_group(text) for text in groups]
        members = [str(item.label) for entry, item in reader.waiting if entry.is_group]
        check_labels([entry.label for entry in entries] + members)
    images, results, provenance = None, [], {}
    if reader.waiting:
        networks, images = open_networks([item for _, item in reader.waiting], options)
        results = measure_networks(networks, images, options)
        for (entry, _), result in zip(reader.waiting, results, strict=True):
            label = result.network.label
            provenance[label] = provenance_of(result, images, options).to_json()
            entry.frames.append(result.frame)
            entry.states.append(result.network.checkpoint.state)
    leave()  # if nothing was measured, all processes are still here
    check_frames(entries, advise=not options.sources)
    return Entries(entries, results, images, provenance | reader.files)


def check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError if two things to compare have the same label."""
    for label in map(check_label, labels):
        if labels.count(label) > 1:
            raise ValueError(f"two things to compare are called {label}: name them, LABEL=ITEM")


def check_frames(entries: Sequence[Entry], *, advise: bool) -> None:
    """Check that what is compared can be compared; print a warning if it is not quite alike.

    Raises ValueError if the networks of a group have different layers, or are the same network.
    """
    for entry in entries:
        check_group(entry)
    frames = [frame for entry in entries for frame in entry.frames]
    if len({frame["source"].iloc[0] for frame in frames}) > 1:
        advice = "; --source makes them alike" if advise else ""
        print(f"warning: measured networks are compared with closed forms{advice}", file=sys.stderr)
    counts = {int(frame["images"].iloc[0]) for frame in frames if frame["images"].notna().all()}
    if len(counts) > 1:
        numbers = ", ".join(f"{count:,}" for count in sorted(counts))
        line = f"the networks were measured on different numbers of images ({numbers})"
        print(f"warning: {line}", file=sys.stderr)


def check_group(entry: Entry) -> None:
    """Raise ValueError if the networks of a group have different layers, or the same numbers."""
    from analysis.statistics import same_layout

    first = entry.frames[0]
    for frame in entry.frames[1:]:
        if not same_layout(first, frame):
            raise ValueError(
                f"the networks of group {entry.label} have different layers ({len(first)} and "
                f"{len(frame)}, or other channels): a group is one configuration"
            )
    stds = [tuple(frame["std"]) for frame in entry.frames]
    for position, curve in enumerate(stds):
        if curve in stds[:position]:
            raise ValueError(
                f"networks {stds.index(curve) + 1} and {position + 1} of group {entry.label} have "
                "the same numbers: one network counts once; a group's networks differ in their "
                "seeds"
            )


def same_tensors(first: Entry, second: Entry) -> bool:
    """Whether two networks have the same tensors, bit for bit, BN's counters aside."""
    import torch

    if first.is_group or second.is_group or first.states[0] is None or second.states[0] is None:
        return False
    ours, theirs = (
        {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
        for state in (first.states[0], second.states[0])
    )
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
