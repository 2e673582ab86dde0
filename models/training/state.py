"""The state of a training run, and the lock on its folder.

The state is one file. Its tensors are the network, its BN statistics and its momentum; its metadata
hold the progress as JSON, the SHA-256 of the training images, and a SHA-256 over all of these. It
is written beside its name and renamed, so a kill leaves the old state or the new one, and it is
verified before any of it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from models.files import LEFT, remove_left, replacing
from models.training.recipe import Recipe

STATE = "state.safetensors"
OLD_STATE = "state.pt"  # the form of version 0.1
COLUMNS = ("epoch", "iteration", "loss", "train_error", "test_error", "lr", "mean_std")  # errors: %
RESTART = "remove it to train from the beginning, or choose another --out"


@dataclass
class Progress:
    """How far a run is, and the sums behind the next row of metrics.csv and the warm-up's end."""

    warming_up: bool
    iteration: int = 0
    warm_up_wrong: int = 0  # images classified wrongly in the current warm-up window
    batches: int = 0  # since the last row
    loss: float = 0.0  # sum over these batches
    wrong: int = 0  # images of these batches classified wrongly
    seconds: float = 0.0  # of training and evaluating; interruptions do not count
    rows: list[dict[str, float]] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)

    def note_machine(self, machine: str, iteration: int) -> None:
        """Remember which machine trains from an iteration on."""
        if not self.machines or not self.machines[-1].endswith(machine):
            since = f"from iteration {iteration:,} on " if iteration else ""
            self.machines.append(since + machine)


def machine(recipe: Recipe) -> str:
    """Return the GPU, or the processor and torch's threads; the precision; torch's version."""
    how = f"{recipe.precision}, torch {torch.__version__}"
    if recipe.device == "cuda":
        return f"{torch.cuda.get_device_name()}, {how}"
    info = Path("/proc/cpuinfo")  # on Linux only
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{[*names, platform.machine()][0]}, {torch.get_num_threads()} threads, {how}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it does not exist, and remove what killed trainers left in it.

    Raises ValueError if another trainer holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            remove_left(folder.rglob(LEFT))
            yield
    except Timeout as error:
        message = f"{folder}: another trainer is at work here; choose another --out"
        raise ValueError(message) from error


def write_state(path: Path, progress: Progress, images: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a state, whole or not at all.

    images: the SHA-256 of the training images.
    tensors: everything that a step changes, by name, on any device.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"progress": json.dumps(asdict(progress)), "images": images}
    metadata["sha256"] = checksum(metadata, tensors)
    with replacing(path) as temporary:
        temporary.write_bytes(serialise(tensors, metadata))


def read_state(
    path: Path, iterations: int, images: str, expected: Mapping[str, Tensor]
) -> tuple[Progress, dict[str, Tensor]]:
    """Return the progress and the tensors of a state, all verified.

    iterations: the length of the run.
    images: the SHA-256 of the training images.
    expected: tensors with the names, shapes and dtypes that the state must have.

    Raises ValueError, in one line, if the state is damaged or belongs to another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.pop("sha256", None) != checksum(metadata, tensors):
            raise ValueError("its checksum does not match")
        if layout(tensors) != layout(expected):
            raise ValueError("its tensors are not those of this network")
        progress = parse_progress(metadata["progress"], iterations)
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{path}: damaged ({error}); {RESTART}") from error
    if metadata["images"] != images:
        message = "begun on other training images, or on the same ones in another order"
        raise ValueError(f"{path}: {message}; choose another --out")
    return progress, tensors


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over metadata and over the names, dtypes, shapes and bytes of tensors."""
    sha256 = hashlib.sha256(json.dumps([metadata, layout(tensors)], sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()


def layout(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return dtype and shape of every tensor, by name."""
    return {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}


def parse_progress(text: str, iterations: int) -> Progress:
    """Return the progress in a JSON text. Raises an error if a value is missing or impossible."""
    values = json.loads(text)
    progress = Progress(**values)
    for name, default in asdict(Progress(warming_up=False)).items():
        value = values[name]
        if type(value) is not type(default) or not (type(value) is list or is_number(value)):
            raise ValueError(f"{name} is {value!r}")
    if progress.iteration > iterations:
        raise ValueError(f"it is at iteration {progress.iteration} of {iterations}")
    if any(tuple(row) != COLUMNS or not all(map(is_number, row.values())) for row in progress.rows):
        raise ValueError("its rows are not those of metrics.csv")
    return progress


def is_number(value: float) -> bool:
    """Return whether a number is finite and not negative."""
    return 0 <= value < math.inf
