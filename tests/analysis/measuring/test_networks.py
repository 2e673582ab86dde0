"""Several networks on the same batches, in either precision, and what is said of how they were
measured.
"""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import analysis
from analysis.measuring.networks import BLOCK_IMAGES, default_batch_size, room
from analysis.responses import main
from models import build
from models.checkpoints import loading
from models.data import cifar10, probe
from models.data import folder as images
from models.data.preprocessing import PRESETS
from tests.models.checkpoints.test_recognition import blobs


@pytest.fixture
def files(tmp_path):
    """Checkpoints of two networks, with BN tensors of their own and two normalisations."""
    paths = []
    for name, preset in (("resnet-8", "[0,1]"), ("plain-14", "imagenet")):
        network = build(name)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias)
        paths.append(tmp_path / f"{name}.safetensors")
        loading.save(paths[-1], network, PRESETS[preset], crop_padding="none", training={})
    return paths


@pytest.fixture
def cifar(tmp_path):
    """Twenty images of 32x32 pixels in a class folder, and as they are read: (20, 32, 32, 3)."""
    folder = tmp_path / "cifar" / "cat"
    folder.mkdir(parents=True)
    for i, image in enumerate(blobs(20, seed=0)):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder.parent, blobs(20, seed=0)


def run(*words):
    return main([str(word) for word in words])


def test_evenly_spaced_images_are_of_all_classes(tmp_path):
    """Class folders are sorted: the first images are all of one class."""
    for name in ("cat", "dog", "frog"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(blobs(4, seed=0)):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    folder = images.ImageFolder.open(tmp_path)
    some = folder.some(4)
    assert [str(file.relative_to(tmp_path)) for file in some.files] == [
        "cat/0.png",
        "cat/3.png",
        "dog/3.png",
        "frog/3.png",
    ]
    assert some.labels.tolist() == [0, 0, 1, 2]
    assert folder.some(99).files == folder.files
    data = cifar10.load(tmp_path)
    assert np.array_equal(data.some(4).images, data.images[[0, 3, 7, 11]])
    assert np.array_equal(data.some(4).labels, data.labels[[0, 3, 7, 11]])


def test_of_the_probe_set_blocks_are_measured_on_all_images():
    """A part of it has other statistics."""
    data = probe.load()
    assert np.array_equal(data.some(BLOCK_IMAGES).images, data.images)


def test_networks_that_share_batches_get_the_numbers_that_each_gets_alone(
    files, cifar, tmp_path, capsys
):
    folder, pixels = cifar
    words = ("--checkpoint", *files, "--data", folder, "--out", tmp_path / "out", "--format", "svg")
    assert run(*words, "--batch-size", 6, "--images", 15, "--verbose") == 0
    frame = pd.read_csv(tmp_path / "out" / "responses.csv")
    for path in files:
        checkpoint = loading.load(path)
        batches = checkpoint.preprocessing(pixels[np.linspace(0, 19, 15).astype(int)]).split(6)
        alone = analysis.measure(checkpoint.model, batches)
        ours = frame[frame["network"] == path.stem]
        assert ours["std"].tolist() == pytest.approx(alone["std"].tolist(), rel=1e-6)
        assert set(ours["images"]) == {15}
    assert capsys.readouterr().out.count(": measured folded\n") == 2
    assert (
        json.loads((tmp_path / "out" / "responses.json").read_text())["plain-14"]["path"]
        == "folded"
    )


def test_each_image_is_decoded_once_for_all_networks(tmp_path, monkeypatch):
    for i, pixels in enumerate(blobs(70, seed=0)):
        (tmp_path / "photographs").mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((40, 40)).save(tmp_path / "photographs" / f"{i:02}.png")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef small():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
    )
    for name in ("a", "b", "c"):
        small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        torch.save(small.state_dict(), tmp_path / f"{name}.pth")
    decoded = []
    decode = images.ImageFolder.decode
    monkeypatch.setattr(
        images.ImageFolder, "decode", lambda self, file: decoded.append(file) or decode(self, file)
    )
    monkeypatch.setattr(
        images.ImageFolder, "sample", lambda self, count: np.zeros((2, 224, 224, 3), np.uint8)
    )
    words = [
        "--checkpoint",
        *(tmp_path / f"{name}.pth" for name in "abc"),
        "--model",
        f"{tmp_path / 'mine.py'}:small",
    ]
    assert (
        run(*words, "--data", tmp_path / "photographs", "--out", tmp_path / "out", "--images", 66)
        == 0
    )
    chosen = np.linspace(0, 69, 66).astype(int)
    once = [sorted((tmp_path / "photographs").iterdir())[i] for i in chosen]
    assert sorted(decoded) == once


def test_why_a_network_was_not_folded_is_said(cifar, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)\n"
        "    def forward(self, x):\n"
        "        return self.bn(self.conv(x).clone())\n"
    )
    state = {"conv.weight": torch.randn(4, 3, 3, 3), "conv.bias": torch.randn(4)}
    state |= {
        f"bn.{name}": torch.full((4,), 2.0)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    torch.save(state, tmp_path / "a.pth")
    words = (
        "--checkpoint",
        tmp_path / "a.pth",
        "--model",
        f"{tmp_path / 'mine.py'}:Net",
        "--data",
        cifar[0],
    )
    options = ("--normalize", "[0,1]", "--batch-size", 5, "--out", tmp_path / "out")
    assert run(*words, *options) == 0
    assert "measured" not in capsys.readouterr().out
    assert run(*words, *options, "--verbose") == 0
    assert (
        "a: measured hooks: the output of conv is copied or cast before its BN\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "fails", ["True", "len(x) == 5"]
)  # when it is recognised, when it is measured
def test_a_network_that_does_not_run_is_one_line(cifar, tmp_path, capsys, fails):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        f"        if {fails}:\n"
        "            raise KeyError('pixels')\n"
        "        return super().forward(x)\n"
        "def net():\n"
        "    return Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
    )
    torch.save(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict(),
        tmp_path / "a.pth",
    )
    words = (
        "--checkpoint",
        tmp_path / "a.pth",
        "--model",
        f"{tmp_path / 'mine.py'}:net",
        "--data",
        cifar[0],
    )
    assert run(*words, "--batch-size", 5, "--images", 10, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path}/a.pth: the network does not run on these images (KeyError: 'pixels'); --debug shows where"
    )
    assert not list((tmp_path / "out").glob("*"))


def test_a_network_of_other_classes_has_no_accuracy(cifar, tmp_path, capsys):
    for classes in (10, 100):
        network = build("resnet-8", classes=classes)
        torch.save(network.state_dict(), tmp_path / f"c{classes}.pth")
    words = (
        "--checkpoint",
        *(f"c{count}={tmp_path / f'c{count}.pth'}" for count in (10, 100)),
        "--data",
        cifar[0],
    )
    assert run(*words, "--normalize", "[0,1]", "--out", tmp_path / "out") == 0
    rows = {row[0]: row for line in capsys.readouterr().out.splitlines() if (row := line.split())}
    assert rows["c10"][2] != "-"
    assert rows["c100"][1:3] == ["7", "-"]


def test_a_network_of_zeros_is_measured_and_computed(cifar, tmp_path, capsys):
    network = build("resnet-8")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(module.weight)
    loading.save(
        tmp_path / "a.safetensors", network, PRESETS["[0,1]"], crop_padding="none", training={}
    )
    words = (
        "--checkpoint",
        tmp_path / "a.safetensors",
        "--data",
        cifar[0],
        "--source",
        "hooks",
        "batchnorm",
    )
    assert run(*words, "--precision", "bfloat16", "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "  resnet-8: mean 0.0 %, largest 0.0 % in layer 1 (conv1), 7 layers of 7\n" in shown
    assert (
        "std in bfloat16 is 0.00 % from float32 in the mean over layers, 0.00 % in layer 1" in shown
    )


def test_convolutions_that_are_not_measured_are_named(cifar, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)\n"
        "        self.rest = nn.Sequential(*[nn.Conv2d(4, 4, 3) for _ in range(5)])\n"
        "    def forward(self, x):\n"
        "        return self.rest(self.bn(self.first(x)))\n"
    )
    state = {f"rest.{i}.weight": torch.randn(4, 4, 3, 3) for i in range(5)} | {
        "first.weight": torch.randn(4, 3, 3, 3)
    }
    state |= {
        f"{name}.bias": torch.randn(4) for name in ("first", *(f"rest.{i}" for i in range(5)))
    }
    state |= {
        f"bn.{name}": torch.full((4,), 2.0)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    torch.save(state, tmp_path / "a.pth")
    words = (
        "--checkpoint",
        tmp_path / "a.pth",
        "--model",
        f"{tmp_path / 'mine.py'}:Net",
        "--data",
        cifar[0],
    )
    assert run(*words, "--normalize", "[0,1]", "--out", tmp_path / "out") == 0
    assert (
        "a: not measured, no BN takes in their output: rest.0, rest.1, rest.2 and 2 more\n"
    ) in capsys.readouterr().out
    unpaired = json.loads((tmp_path / "out" / "responses.json").read_text())["a"]["unpaired"]
    assert unpaired == [f"rest.{i}" for i in range(5)]


def test_bfloat16_comes_with_its_error(files, cifar, tmp_path, capsys):
    folder, pixels = cifar
    words = (
        "--checkpoint",
        files[0],
        "--data",
        folder,
        "--out",
        tmp_path / "out",
        "--batch-size",
        5,
    )
    assert run(*words, "--precision", "bfloat16") == 0
    checkpoint = loading.load(files[0])
    exact, rounded = (
        analysis.measure(
            checkpoint.model, checkpoint.preprocessing(pixels).split(2), precision=precision
        )["std"]
        for precision in ("float32", "bfloat16")
    )
    relative = (rounded / exact - 1).abs()
    found = re.search(
        r"resnet-8: std in bfloat16 is (\S+) % from float32 in the mean over layers, (\S+) % in layer (\d) "
        r"\(20 images\)\n",
        capsys.readouterr().out,
    )
    assert [float(found[1]), float(found[2])] == pytest.approx(
        [100 * relative.mean(), 100 * relative.max()], abs=0.006
    )
    assert int(found[3]) == relative.argmax() + 1
    entry = json.loads((tmp_path / "out" / "responses.json").read_text())["resnet-8"]
    assert entry["precision"] == "bfloat16"
    assert entry["rounding"]["largest"] == pytest.approx(relative.max(), rel=1e-3)
    assert run(*words) == 0
    assert (
        json.loads((tmp_path / "out" / "responses.json").read_text())["resnet-8"]["rounding"]
        is None
    )


def test_batch_sizes(monkeypatch):
    monkeypatch.setattr(
        "analysis.measuring.networks.room", lambda device: {"cpu": 2 * 2**20, "cuda": 2**30}[device]
    )
    assert [default_batch_size(side, "cpu") for side in (8, 32, 64, 224)] == [512, 32, 8, 8]
    assert [default_batch_size(side, "cuda") for side in (32, 224)] == [1024, 334]


def test_the_room_is_that_of_the_cores_in_use():
    assert room("cpu") == torch.get_num_threads() * room_of_one()


def room_of_one():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return room("cpu")
    finally:
        torch.set_num_threads(threads)


def short_of_memory(most, monkeypatch):
    """No more than so many images fit: a convolution in the middle of the networks raises."""
    forward = torch.nn.Conv2d._conv_forward

    def limited(self, x, *weights):
        if self.weight.shape[:2] == (64, 32) and len(x) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x, *weights)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", limited)


def test_one_image_that_does_not_fit_is_one_line_and_2(files, cifar, tmp_path, monkeypatch, capsys):
    short_of_memory(0, monkeypatch)
    words = (
        "--checkpoint",
        files[0],
        "--data",
        cifar[0],
        "--out",
        tmp_path / "out",
        "--batch-size",
        2,
    )
    assert run(*words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: out of memory: take another device, fewer images at a time, a sm"
    )
    assert list((tmp_path / "out").iterdir()) == []
