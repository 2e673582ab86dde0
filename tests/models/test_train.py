"""The command: which networks it trains, how it is interrupted, and what it says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from models import train
from models.training.recipe import Recipe
from tests.helpers import ROOT, assert_same_run, made_up, run, succeed, write_images

TRAIN, TEST = made_up(100), made_up(20, "test")
SMALL = "--device cpu --precision float32 --depth 8 --kind residual --iterations 16 --snapshots 9"
LABEL = "resnet-8-16-seed0"
SCRIPT = """
import sys
import numpy as np
from models import train
from models.data import cifar10
from models.training import loop
def split(name):
    arrays = np.load(sys.argv[1])
    return cifar10.Cifar10(arrays[name], arrays[name + "_labels"], name, "", "made up", "", "")
train.load_data = lambda path: (split("train"), split("test"))
loop.SAVE_EVERY = float(sys.argv[2])
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.fixture
def made_up_data(monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda path: (TRAIN, TEST))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the small run leaves if nothing interrupts it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", lambda path: (TRAIN, TEST))
        succeed(f"train {SMALL} --out {folder}")
    return folder / LABEL


def labels(words):
    return [recipe.label for recipe in train.make_recipes(train.parse(words.split()))]


def test_default_is_fig_7():
    networks = "resnet-20", "plain-20", "resnet-56", "plain-56", "resnet-110"
    assert labels("") == [f"{network}-64000-seed0" for network in networks]
    assert labels("--depth 110 --kind plain") == ["plain-110-64000-seed0"]


def test_a_deep_network_warms_up_in_any_case():
    asked = labels("--depth 56 110 --kind residual --warm-up")
    assert asked == ["resnet-56-warm-up-64000-seed0", "resnet-110-64000-seed0"]


def test_several_networks_and_finished_ones_are_skipped(made_up_data, tmp_path):
    line = f"train --depth 8 --iterations 1 --snapshots 0 --decay all --out {tmp_path} --seed"
    names = ["resnet-8", "plain-8"]
    files = [tmp_path / f"{name}-all-1-seed0" / f"{name}.safetensors" for name in names]
    first = succeed(f"{line} 0").out.splitlines()
    outcome = r"test error \d+\.\d\d %, mean std \d\.\d{3}, \d+ images/s"
    for line_out, name, file in zip(first[1::2], names, files, strict=True):
        assert re.fullmatch(rf"{name}-all-1-seed0: {outcome} \({file}\)", line_out)
    times = [file.stat().st_mtime_ns for file in files]
    second = succeed(f"{line} 0 1").out.splitlines()
    said = [f"{file.parent.name}: finished before, skipped ({file})" for file in files]
    assert second[:2] == said
    assert second[2].startswith("resnet-8-all-1-seed1: starts at iteration 0 of 1")
    assert times == [file.stat().st_mtime_ns for file in files]


@pytest.mark.parametrize(
    ("avx512", "amx", "chosen"), [(0, 0, "float32"), (1, 0, "bfloat16"), (0, 1, "bfloat16")]
)
def test_precision_auto_is_bfloat16_if_the_device_has_it(monkeypatch, avx512, amx, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert train.choose_precision("auto", "cpu") == chosen
    assert train.choose_precision("float32", "cpu") == "float32"
    assert train.choose_precision("bfloat16", "cpu") == "bfloat16"


@pytest.mark.process
def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from models import train; train.parse([]); print({'torch'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Interruptions


@contextmanager
def process(folder, save_every, *, errors=subprocess.PIPE):
    """Run the command in a process of its own, past its second iteration."""
    splits = {"train": TRAIN.images, "train_labels": TRAIN.labels}
    splits |= {"test": TEST.images, "test_labels": TEST.labels}
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data.npz", **splits)
    words = [folder / "data.npz", str(save_every), *SMALL.split(), "--out", folder]
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *words]
    trainer = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, text=True
    )
    second = folder / LABEL / "snapshots" / "iteration-0000002.safetensors"
    try:
        for _ in range(6000):
            if second.exists() or trainer.poll() is not None:
                break
            time.sleep(0.01)
        yield trainer
    finally:
        trainer.kill()
        trainer.communicate()


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("save_every", [0, 1000])
def test_kill_9(whole, made_up_data, tmp_path, save_every):
    out = tmp_path / "out"
    with process(out, save_every) as trainer:
        trainer.kill()
        assert trainer.wait() == -signal.SIGKILL
    assert not (out / LABEL / "resnet-8.safetensors").exists()
    succeed(f"train {SMALL} --out {out}")
    assert_same_run(out / LABEL, whole)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_the_usual_status(
    whole, made_up_data, tmp_path, number, status
):
    out = tmp_path / "out"
    with process(out, 1000) as trainer:
        trainer.send_signal(number)
        _, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == status
    kept = rf"{re.escape(str(out / LABEL))} keeps iteration (\d+); the same command continues"
    said = re.fullmatch(rf"stopped by {number.name}: {kept} from there\n", errors)
    assert said is not None, errors
    resumed = succeed(f"train {SMALL} --out {out}").out.splitlines()[0]
    assert resumed.startswith(f"{LABEL}: resumed at iteration {said[1]} of 16, ")
    assert_same_run(out / LABEL, whole)


def test_a_second_signal_does_not_wait_and_handlers_are_restored():
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    with train.deferred_signals() as stop:
        assert stop() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(number) for number in numbers]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.deferred_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop() == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_between_two_networks_ends_the_command(made_up_data, tmp_path, monkeypatch):
    def end(self, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return "test error"

    monkeypatch.setattr("models.training.loop.Training.finish", end)
    outcome = run(f"train --depth 8 --iterations 1 --snapshots 0 --device cpu --out {tmp_path}")
    assert outcome.status == 143
    said = (
        f"stopped by SIGTERM: {tmp_path}/resnet-8-1-seed0 is finished; the same command continues"
    )
    assert outcome.err == f"{said} from there\n"


@pytest.mark.parametrize("debug", ["", "--debug"])
def test_ctrl_c_while_the_data_are_read(tmp_path, monkeypatch, debug):
    def load(path, split):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("models.data.cifar10.load", load)
    outcome = run(f"train {SMALL} {debug} --out {tmp_path}/out")
    kept = "what was saved stays, and the same command continues from there"
    assert (outcome.status, outcome.err) == (130, f"interrupted: {kept}\n")
    assert not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--depth 20 9",
            "--depth 9: no CIFAR-10 network has 9 layers: a depth is 6n + 2; the nearest are 8 and",
        ),
        ("--iterations 0", "--iterations 0: must be 1 to "),
        ("--snapshots -1", "--snapshots -1: must be 0 to "),
        ("--seed 1 -2", "--seed -2: must be 0 to "),
        (f"--seed {2**64}", f"--seed {2**64}: must be 0 to {2**64 - 1}"),
        ("--data nowhere", "nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_2(tmp_path, words, said):
    outcome = run(f"train --out {tmp_path}/runs {words}")
    assert outcome.error.startswith(f"error: {said}")
    assert not (tmp_path / "runs").exists()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = "error: --device cuda: torch finds no GPU; --device cpu trains without one"
    assert run("train --device cuda").error == said
    assert train.choose_device("auto") == "cpu"


def test_incomplete_data(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, TEST.images[:1])
    error = run(f"train {SMALL} --data {tmp_path} --out {tmp_path}/runs").error
    said = "error: training needs all of CIFAR-10: 1 train images, incomplete: 49,999 of 50,000 are"
    assert error.startswith(said)
    assert not (tmp_path / "runs").exists()


def test_another_configuration_is_told_before_anything_is_trained(made_up_data, tmp_path):
    folder = tmp_path / "plain-8-16-seed0"
    folder.mkdir()
    recipe = replace(Recipe("plain", 8), iterations=16, snapshots=3)
    (folder / "config.json").write_text(json.dumps(asdict(recipe)))
    error = run(f"train {SMALL} --out {tmp_path} --kind residual plain").error
    said = "a run of another configuration: snapshots is 3 there and 9 here; choose another --out"
    assert error == f"error: {folder}: {said}"
    assert not (tmp_path / LABEL).exists()


def test_out_is_a_file_with_a_hostile_name(made_up_data, tmp_path):
    path = tmp_path / "a\n\x1b[2Jb"
    path.write_text("not a folder")
    outcome = run(f"train {SMALL} --out", path)
    assert outcome.status == 1
    line = rf"error: {re.escape(str(tmp_path))}/a \\x1b\[2Jb/{LABEL}: cannot write: .*Not a direc.*"
    assert re.fullmatch(line + "\n", outcome.err)


def test_want_of_memory_is_one_line_and_2(made_up_data, monkeypatch, tmp_path):
    def advance(self, stop):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr("models.training.loop.Training.advance", advance)
    error = run(f"train {SMALL} --out {tmp_path}").error
    assert error.startswith("error: out of memory: choose another device or end other programs; ")
    assert error.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB)")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="--iterations 0"):
        train.main(["--iterations", "0", "--debug"])


@pytest.mark.process
@pytest.mark.slow
def test_output_that_cannot_be_printed_ends_no_run(whole, tmp_path):
    with open("/dev/full", "w") as full, process(tmp_path, 1000, errors=full) as trainer:
        assert trainer.wait(120) == 0
    assert_same_run(tmp_path / LABEL, whole)
