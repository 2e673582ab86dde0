"""Put the checkpoints of one training in order, by the step that each one is of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from models.checkpoints.formats import EXPECTED
from models.checkpoints.loading import PROGRESS, CheckpointFile, read

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".safetensors", ".pth.tar")
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # of transformers, in checkpoint-500/


class Snapshot(NamedTuple):
    """A checkpoint: its step, its file, in words where the step was found, and what else it says.

    facts: of the training: the numbers beside the weights, and what the card of a run says.
    """

    step: int
    path: Path
    file: CheckpointFile
    source: str
    facts: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.file.tensors.items()}


def find_snapshots(
    items: Sequence[Path],
    step_regex: str | None = None,
    *,
    weights: str | None = None,
    ema: bool = False,
) -> tuple[list[Snapshot], list[str]]:
    """Return the checkpoints in order, and a line for each file that was skipped as unreadable.

    items: checkpoint files, folders of them, or folders of folders such as checkpoint-500/.
    step_regex: finds the step in the name of a file or of checkpoint-500/. Without it the step is
        the one that the file says, else the number in the name.
    weights, ema: which copy of the weights to take, as for models.checkpoints.loading.read.

    Raises ValueError, with the file, if a step cannot be found, if two files are of one step or of
    two networks, or if no checkpoint can be read; FileNotFoundError if an item does not exist.
    """
    snapshots, skipped = [], []
    for path in [file for item in items for file in files_of(item)]:
        try:
            file = read(path, weights=weights, ema=ema)
        except ValueError as error:  # a running training may be writing it
            skipped.append(f"{error}; skipped")
            continue
        snapshots.append(find_step(file, step_regex))
    if not snapshots:
        raise ValueError(skipped[0] if skipped else f"{items[0]}: no checkpoint in it; {EXPECTED}")
    snapshots.sort(key=lambda snapshot: snapshot.step)
    for before, after in pairwise(snapshots):
        check_pair(before, after)
    return snapshots, skipped


def files_of(item: Path) -> list[Path]:
    """Return a file itself, or the checkpoints in a folder."""
    if not item.is_dir():
        return [item]
    inside = sorted(path for path in item.iterdir() if path.name[0] != ".")
    if own := [path for path in inside if path.name in IN_FOLDERS]:
        return own[:1]  # the other files are the optimizer's and the like
    files = [path for path in inside if path.is_file() and path.name.endswith(SUFFIXES)]
    inner = [folder / name for folder in inside for name in IN_FOLDERS]
    return files + [path for path in inner if path.is_file()]


def find_step(file: CheckpointFile, regex: str | None) -> Snapshot:
    """Return a checkpoint with its step, and where that was found."""
    path = file.path
    name = path.parent.name if path.name in IN_FOLDERS else path.name
    training = file.card.get("training")
    facts = file.progress | (training if isinstance(training, dict) else {})
    for key in PROGRESS if regex is None else ():
        if type(step := facts.get(key)) is int and 0 <= step < 2**62:
            return Snapshot(step, path, file, f"{key} in the file", facts)
    try:
        numbers = numbers_in(name) if regex is None else re.findall(regex, name)
    except re.error as error:
        raise ValueError(f"--step-regex {regex}: not a regular expression: {error}") from error
    if len(numbers) != 1 or not str(numbers[0]).isdecimal():
        raise ValueError(
            f"{path}: its step is unknown: {len(numbers)} numbers in its name may be the step; "
            r"--step-regex 'net-(\d+)', for example, says which one is"
        )
    return Snapshot(int(numbers[0]), path, file, "its name", facts)


def numbers_in(name: str) -> list[str]:
    """Return the number after step, iteration or epoch in a name, else those that may be the step.

    >>> [numbers_in(name) for name in ("epoch=3-step=100.ckpt", "resnet20_7.pth", "net-20-7.pth")]
    [['100'], ['7'], ['20', '7']]
    """
    for word in ("step", "iter(?:ation)?", "epoch"):
        if found := re.findall(rf"{word}[=_-]?(\d+)", name, re.IGNORECASE):
            return found[-1:]
    return re.findall(r"(?<![A-Za-z\d])\d+", name)


def check_pair(before: Snapshot, after: Snapshot) -> None:
    """Raise ValueError unless two checkpoints are of two steps of one network."""
    if before.source != after.source:
        raise ValueError(
            f"{after.path}: its step is from {after.source}, that of {before.path} from "
            f"{before.source}; --step-regex takes both from the names"
        )
    if before.step == after.step:
        raise ValueError(f"{after.path}: step {after.step}, as {before.path}; leave one out")
    if different := dict(before.shapes.items() ^ after.shapes.items()):
        name = min(different)
        there, here = (snapshot.shapes.get(name, "missing") for snapshot in (before, after))
        raise ValueError(
            f"{after.path}: another network than in {before.path}: {name} is {here}, not {there}; "
            "give the checkpoints of one training"
        )
