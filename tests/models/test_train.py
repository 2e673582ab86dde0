"""The command: which networks it trains, how it is interrupted, what it says when it cannot go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from models import messages, train
from models.files import uninterrupted
from models.training.recipe import Fault, Recipe
from tests.helpers import ROOT
from tests.models.training.test_loop import TEST, TRAIN, assert_same, go, results

COMMAND = [
    "--depth",
    "8",
    "--kind",
    "residual",
    "--iterations",
    "16",
    "--snapshots",
    "9",
    "--device",
    "cpu",
]
COMMAND += ["--precision", "float32"]
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from models import train
from models.data import cifar10
from models.training import loop as training
def data(split):
    arrays = np.load(sys.argv[1])
    return cifar10.Cifar10(arrays[split], arrays[split + "_labels"], split, Path("nowhere"), "made up", "", "")
train.load_data = lambda path: (data("train"), data("test"))
training.SAVE_EVERY = float(sys.argv[2])
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What COMMAND leaves if nothing interrupts it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", lambda path: (TRAIN, TEST))
        assert train.main([*COMMAND, "--out", str(folder)]) == 0
    return folder


@contextmanager
def process(folder, save_every):
    """The command in a process of its own, past its second iteration."""
    arrays = {
        "train": TRAIN.images,
        "train_labels": TRAIN.labels,
        "test": TEST.images,
        "test_labels": TEST.labels,
    }
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data.npz", **arrays)
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        SCRIPT,
        folder / "data.npz",
        str(save_every),
        *COMMAND,
        "--out",
        folder,
    ]
    trainer = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(3000):
            if (
                list(folder.glob("*/snapshots/iteration-0000002.safetensors"))
                or trainer.poll() is not None
            ):
                break
            time.sleep(0.01)
        yield trainer
    finally:
        trainer.kill()
        trainer.communicate()


@pytest.mark.parametrize("save_every", [0, 1000])
def test_kill_9(whole, tmp_path, monkeypatch, save_every):
    with process(tmp_path / "out", save_every) as trainer:
        trainer.kill()
        assert trainer.wait() == -signal.SIGKILL
    assert list(tmp_path.glob("out/*/snapshots/iteration-0000002.safetensors"))
    assert not list(tmp_path.glob("out/*/resnet-8.safetensors"))
    monkeypatch.setattr(train, "load_data", lambda path: (TRAIN, TEST))
    assert train.main([*COMMAND, "--out", str(tmp_path / "out")]) == 0
    assert_same(tmp_path / "out" / "resnet-8-16-seed0", whole / "resnet-8-16-seed0")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_end_with_the_usual_status(whole, tmp_path, monkeypatch, number, status):
    out = tmp_path / "out"
    with process(out, 1000) as trainer:
        trainer.send_signal(number)
        _, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == status
    folder = out / "resnet-8-16-seed0"
    said = re.fullmatch(
        rf"models\.train: stopped by {number.name}: {re.escape(str(folder))} keeps iteration (\d+); "
        "the same command goes on from there\n",
        errors,
    )
    assert said is not None, errors
    assert torch.load(folder / "state.pt")["progress"]["iteration"] == int(said[1]) > 0
    monkeypatch.setattr(train, "load_data", lambda path: (TRAIN, TEST))
    assert train.main([*COMMAND, "--out", str(out)]) == 0
    assert_same(folder, whole / "resnet-8-16-seed0")


def test_a_second_signal_does_not_wait_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with train.signals() as stop:
        assert stop() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert caught.value.args == (signal.SIGINT,)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_says_what_is_kept(
    made_up_data, tmp_path, monkeypatch, capsys, number, status
):
    def run(*args):
        for _ in range(2):
            os.kill(os.getpid(), number)

    monkeypatch.setattr("models.training.loop.run", run)
    assert train.main([*COMMAND, "--out", str(tmp_path)]) == status
    said = f"stopped by {number.name} at once: what was saved stays, and the same command goes on from there"
    assert capsys.readouterr().err == f"models.train: {said}\n"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_data_are_read_says_what_is_kept(
    tmp_path, monkeypatch, capsys, number, status, debug
):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        "models.data.cifar10.load", lambda path, split: os.kill(os.getpid(), number)
    )
    assert train.main([*COMMAND, *debug, "--out", str(tmp_path / "out")]) == status
    said = f"stopped by {number.name} at once: what was saved stays, and the same command goes on from there"
    assert capsys.readouterr().err == f"models.train: {said}\n"
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_signal_stays_ignored():
    """A script's Ctrl-C is not for what it put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop() == 0
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
        messages.answer_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_configuration_is_told_before_anything_is_trained(
    made_up_data, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "plain-8-16-seed0"
    folder.mkdir()
    recipe = replace(Recipe("plain", 8), iterations=16, snapshots=3)
    (folder / "config.json").write_text(json.dumps(asdict(recipe)))
    monkeypatch.setattr(
        "models.training.loop.run", mock.Mock(side_effect=AssertionError("it trains"))
    )
    words = [
        "--depth",
        "8",
        "--kind",
        "residual",
        "plain",
        "--iterations",
        "16",
        "--out",
        str(tmp_path),
    ]
    assert train.main(words) == 2
    line = f"models.train: {folder}: a run of another configuration: snapshots is 3 there and 9 here; choose another "
    assert capsys.readouterr().err == line + "--out\n"


@pytest.fixture
def made_up_data(monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda path: (TRAIN, TEST))


def test_default_is_fig_7():
    assert [recipe.label for recipe in train.recipes(train.parse([]))] == [
        "resnet-20-64000-seed0",
        "plain-20-64000-seed0",
        "resnet-56-64000-seed0",
        "plain-56-64000-seed0",
        "resnet-110-64000-seed0",
    ]
    [plain] = train.recipes(train.parse(["--depth", "110", "--kind", "plain"]))
    assert plain.network == "plain-110"
    asked = train.recipes(train.parse(["--depth", "56", "110", "--kind", "residual", "--warm-up"]))
    assert [recipe.label for recipe in asked] == [
        "resnet-56-warm-up-64000-seed0",
        "resnet-110-64000-seed0",
    ]
    assert [recipe.warm_up for recipe in asked] == [True, False]  # 110 layers warm up anyway


def test_several_networks_and_finished_ones_are_skipped(made_up_data, tmp_path, capsys):
    several = [
        "--depth",
        "8",
        "--iterations",
        "1",
        "--snapshots",
        "0",
        "--decay",
        "all",
        "--out",
        str(tmp_path),
    ]
    assert train.main([*several, "--seed", "0"]) == 0
    labels = ["resnet-8-all-1-seed0", "plain-8-all-1-seed0"]
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == labels
    finished = {
        label: (tmp_path / label / f"{label[:-12]}.safetensors").stat().st_mtime_ns
        for label in labels
    }
    assert train.main([*several, "--seed", "0", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == f"{labels[0]}: finished before, skipped ({tmp_path / labels[0] / 'resnet-8.safetensors'})"
    )
    assert (
        lines[1]
        == f"{labels[1]}: finished before, skipped ({tmp_path / labels[1] / 'plain-8.safetensors'})"
    )
    outcome = r"test error \d+\.\d\d %, mean std \d\.\d{3}, \d+ images/s"
    assert re.fullmatch(rf"resnet-8-all-1-seed1: {outcome} \(.*/resnet-8\.safetensors\)", lines[2])
    assert re.fullmatch(rf"plain-8-all-1-seed1: {outcome} \(.*/plain-8\.safetensors\)", lines[3])
    assert finished == {
        label: (tmp_path / label / f"{label[:-12]}.safetensors").stat().st_mtime_ns
        for label in labels
    }


def test_a_signal_between_two_networks_ends_the_command(
    made_up_data, tmp_path, capsys, monkeypatch
):
    def run(recipe, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return "test error"

    monkeypatch.setattr("models.training.loop.run", run)
    assert train.main(["--depth", "8", "--out", str(tmp_path)]) == 143
    said = f"models.train: stopped by SIGTERM: {tmp_path}/resnet-8-64000-seed0 is finished; the same command goes on "
    assert capsys.readouterr().err == said + "from there\n"


def test_help_does_not_wait_for_torch():
    code = "import sys; from models import train; train.parse([]); print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("avx512", "amx", "chosen"), [(0, 0, "float32"), (1, 0, "bfloat16"), (0, 1, "bfloat16")]
)
def test_precision_auto_is_bfloat16_where_it_is_native(monkeypatch, avx512, amx, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert train.choose_precision("auto", "cpu") == chosen
    assert train.choose_precision("float32", "cpu") == "float32"
    assert train.choose_precision("bfloat16", "cpu") == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--depth", "20", "9"],
            "--depth 9: no CIFAR-10 network has 9 layers: a depth is 6n + 2; the nearest are 8 and 14",
        ),
        (["--iterations", "0"], "--iterations 0: must be 1 or more"),
        (["--snapshots", "-1"], "--snapshots -1: must be 0 or more"),
        (["--seed", "1", "-2"], "--seed -2: must be 0 or more"),
        (
            ["--seed", str(2**64)],
            "--seed 18446744073709551616: must be 18446744073709551615 or less",
        ),
        (
            ["--device", "gpu"],
            "--device gpu: unknown; one of auto, cpu, cuda (CUDA_VISIBLE_DEVICES says which GPU)",
        ),
        (
            ["--data", "nowhere"],
            "nowhere: no such file or folder; --data takes a folder or an archive of CIFAR-10",
        ),
    ],
)
def test_bad_input_is_one_line_and_2(tmp_path, capsys, arguments, said):
    assert train.main(["--out", str(tmp_path / "runs"), *arguments]) == 2
    assert capsys.readouterr().err == f"models.train: {said}\n"
    assert not (tmp_path / "runs").exists()


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main(["--device", "cuda"]) == 2
    said = "models.train: --device cuda: torch finds no GPU here; --device cpu trains without one\n"
    assert capsys.readouterr().err == said
    assert train.choose_device("auto") == "cpu"


def test_incomplete_data(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / split / "cat" / "1.png")
    assert train.main([*COMMAND, "--data", str(tmp_path), "--out", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err == (
        "models.train: training needs all of CIFAR-10: 1 train images, incomplete: 49,999 of 50,000 are missing "
        f"(folders of images, {tmp_path})\n"
    )
    assert not (tmp_path / "runs").exists()


def test_out_is_a_file(made_up_data, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert train.main([*COMMAND, "--out", str(tmp_path / "file")]) == 2
    said = (
        f"{tmp_path}/file/resnet-8-16-seed0: cannot be made: Not a directory; choose another --out"
    )
    assert capsys.readouterr().err == f"models.train: {said}\n"


def test_a_message_is_one_line_whatever_the_names(made_up_data, tmp_path, capsys):
    (tmp_path / "a\n\x1b[2Jb").write_text("not a folder")
    assert train.main([*COMMAND, "--out", str(tmp_path / "a\n\x1b[2Jb")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"models.train: {tmp_path}/a \\x1b[2Jb/resnet-8-16-seed0: cannot be made"
    )
    assert said.count("\n") == 1


def test_a_folder_of_another_configuration(made_up_data, whole, capsys):
    said = (
        f"models.train: {whole}/resnet-8-16-seed0: a run of another configuration: snapshots is 9 there and 3 here; "
        "choose another --out\n"
    )
    before = results(whole / "resnet-8-16-seed0")[1]
    assert (
        train.main([*COMMAND, "--out", str(whole), "--snapshots", "3", "--precision", "bfloat16"])
        == 2
    )
    assert capsys.readouterr().err == said
    assert results(whole / "resnet-8-16-seed0")[1] == before
    with pytest.raises(Fault, match="batch is 128 there and 32 here"):
        go(whole / "resnet-8-16-seed0")


def test_debug_shows_where_a_fault_comes_from():
    with pytest.raises(Fault, match="--iterations 0"):
        train.main(["--iterations", "0", "--debug"])


def test_interrupted_before_the_training(monkeypatch, capsys):
    def load(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_data", load)
    assert train.main(["--depth", "8"]) == 130
    said = (
        "stopped by SIGINT at once: what was saved stays, and the same command goes on from there"
    )
    assert capsys.readouterr().err == f"models.train: {said}\n"


def test_want_of_memory_is_one_line_and_2(made_up_data, monkeypatch, tmp_path, capsys):
    def run(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr("models.training.loop.run", run)
    assert train.main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "models.train: out of memory: take another device, or end other programs; what was saved stays, and the same "
        "command goes on from there (CUDA out of memory. Tried to allocate 2.00 GiB)\n"
    )
