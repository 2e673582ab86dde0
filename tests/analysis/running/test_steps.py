"""Checkpoints of any training in order, and what cannot be put in order."""

import pytest
import torch
from safetensors.torch import save_file

from analysis.running.steps import find_snapshots
from models import build, closed_form
from models.checkpoints import loading
from models.data.preprocessing import PRESETS

STATE = {"conv1.weight": torch.zeros(4, 3, 3, 3), "bn1.running_var": torch.ones(4)}


def save(path, state=STATE, **facts):
    """A checkpoint as training scripts write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, **facts}, path)
    return path


def steps(*items, **options):
    """Every step by the path below the first item."""
    snapshots, skipped = find_snapshots(items, **options)
    assert not skipped
    folder = items[0] if items[0].is_dir() else items[0].parent
    return {str(snapshot.path.relative_to(folder)): snapshot.step for snapshot in snapshots}


@pytest.mark.parametrize("key", ["step", "global_step", "iteration", "epoch"])
def test_the_step_in_the_file_gives_the_order(key, tmp_path):
    save(tmp_path / "a_1.pth", **{key: 20})
    save(tmp_path / "b_2.pth", **{key: 3})
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".b_2-0123abcd.pth").touch()  # a temporary file
    assert list(steps(tmp_path).items()) == [("b_2.pth", 3), ("a_1.pth", 20)]


def test_the_optimizer_steps_win_over_the_epochs(tmp_path):
    assert steps(save(tmp_path / "a.ckpt", epoch=1, global_step=390)) == {"a.ckpt": 390}


def test_our_own_card_says_its_iteration(tmp_path):
    path = tmp_path / "finished.safetensors"
    network, facts = build("resnet-8"), {"iteration": 400}
    loading.save(path, network, PRESETS["[0,1]"], crop_padding="none", training=facts)
    assert steps(path) == {"finished.safetensors": 400}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("epoch=3-step=100.ckpt", 100),
        ("epoch=3-val_loss=0.25.ckpt", 3),
        ("model_10.pth", 10),
        ("resnet20_10.pth", 10),
        ("checkpoint-7.pth.tar", 7),
    ],
)
def test_else_the_number_in_the_name(name, step, tmp_path):
    save(tmp_path / name)
    assert steps(tmp_path) == {name: step}


def test_folders_of_transformers(tmp_path):
    for step in (1000, 500):
        folder = tmp_path / f"checkpoint-{step}"
        save(folder / "optimizer.pt")
        save_file(STATE, folder / "model.safetensors")
    assert steps(tmp_path) == {f"checkpoint-{step}/model.safetensors": step for step in (500, 1000)}
    assert steps(tmp_path / "checkpoint-500") == {"model.safetensors": 500}


def test_tensors_of_safetensors_files_keep_an_order(tmp_path):
    """Their order tells which layers there are."""
    model = build("resnet-20")
    save_file(model.state_dict(), tmp_path / "net_1.safetensors")
    [snapshot], _ = find_snapshots([tmp_path])
    names = closed_form(snapshot.file.tensors)["name"].tolist()
    assert names == closed_form(model)["name"].tolist()


def test_a_regex_finds_the_step_in_other_names(tmp_path):
    save(tmp_path / "net-20-7k.pth", epoch=1)
    assert steps(tmp_path, step_regex=r"(\d+)k") == {"net-20-7k.pth": 7}


def test_a_half_written_file_is_skipped_and_said(tmp_path):
    save(tmp_path / "a_1.pth")
    whole = save(tmp_path / "b_2.pth").read_bytes()
    (tmp_path / "b_2.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c_3.safetensors").touch()
    snapshots, skipped = find_snapshots([tmp_path])
    assert [snapshot.step for snapshot in snapshots] == [1]
    assert [line.partition(": ")[0] for line in skipped] == [
        str(tmp_path / name) for name in ("b_2.pth", "c_3.safetensors")
    ]
    assert all(line.endswith("; skipped") for line in skipped)


def test_two_networks_are_refused(tmp_path):
    save(tmp_path / "a_1.pth")
    save(tmp_path / "b_2.pth", STATE | {"conv1.weight": torch.zeros(8, 3, 3, 3)})
    with pytest.raises(
        ValueError, match=r"b_2.pth: another network than in .*a_1.pth: conv1.weight"
    ):
        find_snapshots([tmp_path])


def test_one_step_twice_is_refused(tmp_path):
    save(tmp_path / "a.pth", step=5)
    save(tmp_path / "b.pth", step=5)
    with pytest.raises(ValueError, match=r"b.pth: step 5, as .*a.pth; leave one out"):
        find_snapshots([tmp_path])


def test_steps_of_two_kinds_are_refused(tmp_path):
    """Epoch 5 need not come before step 10."""
    save(tmp_path / "a.pth", epoch=5)
    save(tmp_path / "b.pth", step=10)
    with pytest.raises(ValueError, match=r"b.pth: its step is from step in the file, that of "):
        find_snapshots([tmp_path])


@pytest.mark.parametrize("name", ["last.ckpt", "resnet20.pth", "net-20-7.pth"])
def test_an_unknown_step_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}: its step is unknown.*--step-regex"):
        find_snapshots([save(tmp_path / name)])


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in it; a checkpoint is"):
        find_snapshots([tmp_path])
    (tmp_path / "a_1.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a_1\.pth: not a checkpoint"):
        find_snapshots([tmp_path])
    with pytest.raises(FileNotFoundError):
        find_snapshots([tmp_path / "missing.pth"])
