"""Several processes: torchrun starts them for real, and what they measure together is what one
measures alone.
"""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from analysis.cli.items import SAMPLE
from analysis.measuring.processes import count_processes, joined, part_of, rank
from models import build
from models.checkpoints import loading
from models.data.folder import ImageFolder
from models.data.preprocessing import PRESETS
from tests.conftest import ROOT
from tests.models.checkpoints.test_recognition import blobs

NETWORK = """
import os, signal
from torch import nn
from models import build

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def fatal():
    network = build("resnet-8")
    if os.environ["RANK"] == "1":
        network.register_forward_pre_hook(lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    return network
"""


def torchrun(processes, *words):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["-m", "analysis.responses", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=600
    )


@pytest.fixture
def words(tmp_path):
    """Two networks of different depth, on 21 images: no number of processes divides them."""
    for i, image in enumerate(blobs(21, seed=0)):
        (tmp_path / "cifar" / "cat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "cifar" / "cat" / f"{i}.png")
    paths = []
    for name in ("resnet-8", "plain-8"):
        network = build(name)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        paths.append(tmp_path / f"{name}.safetensors")
        loading.save(paths[-1], network, PRESETS["[0,1]"], crop_padding="none", training={})
    return [
        "--checkpoint",
        *paths,
        "--data",
        tmp_path / "cifar",
        "--format",
        "svg",
        "--batch-size",
        4,
    ]


@pytest.mark.parametrize(("total", "processes"), [(21, 4), (2, 4), (0, 2), (8, 2), (50_000, 7)])
def test_every_image_is_one_processs(total, processes, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    parts = []
    for number in range(processes):
        monkeypatch.setenv("RANK", str(number))
        parts += range(*part_of(total))
        assert (rank(), count_processes()) == (number, processes)
    assert parts == list(range(total))


def test_without_torchrun_there_is_one(monkeypatch):
    for name in ("MASTER_ADDR", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # a cluster's, without torchrun
    with joined("cpu"):
        assert (rank(), count_processes(), part_of(5)) == (0, 1, (0, 5))
        assert not torch.distributed.is_initialized()


def test_two_and_four_processes_measure_what_one_does(words, tmp_path):
    frames, claims = [], []
    for processes in (1, 2, 4):
        run = torchrun(processes, *words, "--out", tmp_path / str(processes))
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("wrote ") == len(
            list((tmp_path / str(processes)).iterdir())
        )  # the first one's
        assert run.stdout.count("resnet-8: network") == 1
        frames.append(pd.read_csv(tmp_path / str(processes) / "responses.csv"))
        claims.append(pd.read_csv(tmp_path / str(processes) / "claims.csv"))
    assert set(frames[0]["images"]) == {21}
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], rtol=1e-6)
    assert (
        claims[1]["sentence"].tolist()
        == claims[2]["sentence"].tolist()
        == claims[0]["sentence"].tolist()
    )


def test_fewer_images_than_processes_and_bad_input_that_all_meet(words, tmp_path):
    run = torchrun(2, *words, "--images", 1, "--out", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert set(pd.read_csv(tmp_path / "out" / "responses.csv")["images"]) == {1}
    run = torchrun(2, "--depth", 9, "--out", tmp_path / "other")
    assert run.returncode != 0
    assert [line for line in run.stderr.splitlines() if line.startswith("error: ")] == [
        "error: --depth 9: no CIFAR-10 network has 9 layers: a depth is 6n + 2; the nearest are 8 and 14"
    ]


def test_a_bad_file_in_one_processs_part_is_the_reason_of_all(tmp_path):
    """Only the second process meets it (the sample that both look at leaves it out), and the first
    one says so.
    """
    (tmp_path / "mine.py").write_text(NETWORK)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(network.state_dict(), tmp_path / "small.pth")
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i, image in enumerate(blobs(2 * SAMPLE, seed=0)):
        Image.fromarray(image).resize((40, 40)).save(photographs / f"{i:03}.png")
    opened = ImageFolder.open(photographs)
    opened.sample(SAMPLE)
    bad = next(path for path in opened.files[SAMPLE:] if path not in opened.digests)
    bad.write_bytes(bad.read_bytes()[:200])
    words = [
        "--checkpoint",
        tmp_path / "small.pth",
        "--model",
        f"{tmp_path / 'mine.py'}:small",
        "--data",
        photographs,
    ]
    run = torchrun(2, *words, "--out", tmp_path / "out")
    assert run.returncode != 0
    [line] = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: process 1 of 2: {bad}: damaged, too large or no image")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_process_that_dies_ends_the_run_with_its_reason(words, tmp_path):
    (tmp_path / "mine.py").write_text(NETWORK)
    options = [
        "--model",
        f"{tmp_path / 'mine.py'}:fatal",
        "--normalize",
        "[0,1]",
        "--out",
        tmp_path / "out",
    ]
    run = torchrun(2, *words, *options)
    assert run.returncode != 0
    assert "SIGKILL" in run.stderr
    assert list((tmp_path / "out").iterdir()) == []
