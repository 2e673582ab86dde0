"""Several processes: torchrun starts them, and together they measure what one measures alone."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from PIL import Image

from analysis.running.processes import count_processes, joined, part_of, rank
from models import build
from models.data.folder import ImageFolder
from tests.helpers import (
    ROOT,
    SMALL,
    blobs,
    files_in,
    own,
    randomize_norms,
    read_table,
    save,
    succeed,
    write_images,
)

FATAL = """
import os, signal
from models import build

def net():
    network = build("resnet-8")
    if os.environ.get("RANK") == "1":
        network.register_forward_pre_hook(lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    return network
"""


def torchrun(processes, line):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "analysis.responses", *line.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "check": False, "timeout": 600}
    return subprocess.run(command, env=environment, **options)


def errors_of(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture
def line(tmp_path):
    """Return options for two networks on 21 images: no number of processes divides them."""
    write_images(tmp_path / "cifar", blobs(21))
    for name in ("resnet-8", "plain-8"):
        save(tmp_path / f"{name}.safetensors", randomize_norms(build(name)), "[0,1]")
    names = "resnet-8.safetensors plain-8.safetensors"
    return f"--checkpoint {names} --data cifar --format svg --batch-size 4"


@pytest.mark.parametrize(("total", "processes"), [(21, 4), (2, 4), (0, 2), (8, 2), (50_000, 7)])
def test_every_image_is_one_processs(total, processes, monkeypatch):
    for name, value in (("ADDR", "here"), ("PORT", "1")):
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    parts = []
    for number in range(processes):
        monkeypatch.setenv("RANK", str(number))
        parts += range(*part_of(total))
        assert (rank(), count_processes()) == (number, processes)
    assert parts == list(range(total))


def test_without_torchrun_there_is_one(monkeypatch):
    for name in ("MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # a cluster's, without torchrun
    with joined("cpu"):
        assert (rank(), count_processes(), part_of(5)) == (0, 1, (0, 5))
        assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_measure_what_one_does(line, tmp_path):
    """The first one writes and prints. With fewer images than processes one measures nothing."""
    for images in ("21", "1"):
        succeed(f"responses {line} --images {images} --out one")
        done = torchrun(2, f"{line} --images {images} --out two")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == len(files_in(tmp_path / "two"))
        assert done.stdout.count("resnet-8: network") == 1
        for name in ("responses.csv", "claims.csv"):
            one, two = (read_table(tmp_path / folder / name) for folder in ("one", "two"))
            pd.testing.assert_frame_equal(one, two, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.process
def test_a_bad_file_in_one_processs_part_is_the_reason_of_all(tmp_path, out):
    """Only the second process meets it, outside the sample of 64 that both look at. The first one says so."""
    options = own(tmp_path, SMALL)
    (tmp_path / "photographs").mkdir()
    for i, image in enumerate(blobs(128)):
        Image.fromarray(image).resize((40, 40)).save(tmp_path / "photographs" / f"{i:03}.png")
    opened = ImageFolder.open(tmp_path / "photographs")
    opened.sample(64)
    bad = next(path for path in opened.files[64:] if path not in opened.digests)
    bad.write_bytes(bad.read_bytes()[:200])
    done = torchrun(2, f"{options} --data photographs --out {out}")
    assert done.returncode != 0
    [line] = errors_of(done)
    assert line.startswith(
        f"error: process 1 of 2: photographs/{bad.name}: damaged, too large or no"
    )
    assert files_in(out) == {}


@pytest.mark.slow
@pytest.mark.process
def test_a_process_that_dies_ends_the_run_with_its_reason(line, tmp_path, out):
    done = torchrun(2, f"{line} {own(tmp_path, FATAL)} --out {out}")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert files_in(out) == {}


@pytest.mark.slow
@pytest.mark.process
def test_bad_input_that_all_meet_is_said_once(out):
    done = torchrun(2, f"--depth 9 --out {out}")
    assert done.returncode != 0
    [line] = errors_of(done)
    assert line.startswith("error: --depth 9: no CIFAR-10 network has 9 layers")
