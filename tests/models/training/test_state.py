"""The state: what is written comes back, and anything else is one line before anything is used."""

import hashlib
import json
import re
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save

from models.training.recipe import Recipe, new_network
from models.training.state import (
    COLUMNS,
    RESTART,
    Progress,
    checksum,
    locked,
    read_state,
    write_state,
)

ROW = dict(zip(COLUMNS, (1, 4, 2.5, 80.0, 90.0, 0.1, 0.7), strict=True))
PROGRESS = Progress(False, 5, 3, 1, 0.1 + 0.2, 31, 1.5, [ROW], ["a CPU", "from iteration 4 on b"])
IMAGES = hashlib.sha256(b"images").hexdigest()


def tensors():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    return {"conv.weight": channels_last, "bias": torch.ones(3000), "n": torch.tensor(7)}


@pytest.fixture
def path(tmp_path):
    write_state(tmp_path / "state.safetensors", PROGRESS, IMAGES, tensors())
    return tmp_path / "state.safetensors"


def read(path):
    return read_state(path, 12, IMAGES, tensors())


def forge(path, change=lambda values: None, **changed):
    """Write a state with a valid checksum, but another progress or other tensors."""
    values = asdict(PROGRESS)
    change(values)
    metadata = {"progress": json.dumps(values), "images": IMAGES}
    metadata["sha256"] = checksum(metadata, forged := tensors() | changed)
    contiguous = {name: t.contiguous() for name, t in forged.items() if t is not None}
    path.write_bytes(save(contiguous, metadata))


def test_what_is_written_comes_back(path):
    progress, found = read(path)
    assert progress == PROGRESS
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(iteration=99), "it is at iteration 99 of 12"),
        (lambda values: values.update(iteration=-1), "iteration is -1"),
        (lambda values: values.update(iteration=True), "iteration is True"),
        (lambda values: values.update(loss=float("nan")), "loss is nan"),
        (lambda values: values.update(seconds="1"), "seconds is '1'"),
        (lambda values: values.update(stretches=[]), "unexpected keyword argument 'stretches'"),
        (lambda values: values.pop("wrong"), "'wrong'"),
        (lambda values: values["rows"][0].pop("lr"), "its rows are not those of metrics.csv"),
        (lambda values: values["rows"][0].update(lr=None), "not supported between"),
    ],
)
def test_an_impossible_progress_is_damaged(path, change, message):
    forge(path, change)
    with pytest.raises(ValueError, match=r"state\.safetensors: damaged \(.*remove it") as caught:
        read(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"bias": torch.ones(1)},  # could be broadcast
        {"bias": torch.ones(3000, dtype=torch.float64)},
        {"conv.weight": torch.ones(3, 4, 3, 3)},
        {"more": torch.ones(1)},
    ],
)
def test_tensors_of_another_network_are_damaged(path, changed):
    forge(path, **changed)
    with pytest.raises(ValueError, match=r"its tensors are not those of this network\); remove it"):
        read(path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_state_cut_off_is_damaged(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"state\.safetensors: damaged \(.*remove it"):
        read(path)


def test_a_state_without_metadata_is_damaged(path):
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors().items()}))
    with pytest.raises(ValueError, match="damaged"):
        read(path)


def test_a_state_begun_on_other_images(path):
    with pytest.raises(ValueError, match=r"begun on other training images.*; choose another"):
        read_state(path, 12, "another digest", tensors())


@pytest.mark.fuzz
@pytest.mark.slow
def test_every_flipped_bit_of_a_real_state_is_noticed(tmp_path):
    """One flip per byte of the header and its metadata, one per 4 KiB of the tensors."""
    path, true = tmp_path / "state.safetensors", new_network(Recipe("residual", 8)).state_dict()
    write_state(path, PROGRESS, IMAGES, true)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(header), *range(header, len(content), 4096)]
    assert len(places) > 4000
    for number, place in enumerate(places):
        flipped = bytearray(content)
        flipped[place] ^= 1 << number % 8
        path.write_bytes(flipped)
        line = rf"{re.escape(str(path))}: damaged \(.*\); {RESTART}"
        try:
            progress, found = read_state(path, 12, IMAGES, true)
        except ValueError as error:
            if re.fullmatch(line, str(error)):
                continue
            raise
        assert place < header
        assert progress == PROGRESS
        assert all(torch.equal(found[name], tensor) for name, tensor in true.items())


def test_a_folder_is_held_by_one_trainer(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(ValueError, match=r"run: another trainer is at work here; choose another"),
        locked(tmp_path / "run"),
    ):
        pass
    left = tmp_path / "run" / ".state-0123abcd.safetensors"
    left.write_bytes(b"half a state")
    with locked(tmp_path / "run"):
        assert not left.exists()
