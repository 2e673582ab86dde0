"""Several networks on the same batches, in either precision, and what is said of how they were measured."""

import json
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

import analysis
from analysis.running.networks import default_batch_size, room
from models import build
from models.checkpoints import loading
from models.data import cifar10
from tests.helpers import (
    SMALL,
    blobs,
    files_in,
    own,
    randomize_norms,
    read_table,
    run,
    save,
    succeed,
    watching,
    write_images,
)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Return checkpoints of two networks of different depth, with two normalisations."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    return [
        save(folder / f"{name}.safetensors", randomize_norms(build(name)), preset)
        for name, preset in (("resnet-8", "[0,1]"), ("plain-14", "imagenet"))
    ]


@pytest.fixture
def line(networks, images, out):
    return f"responses --checkpoint {networks[0]} {networks[1]} --data {images} --out {out} --format svg"


@pytest.fixture
def own_line(images, out):
    return f"responses --data {images} --out {out} --format svg"


def frame_in(out):
    return read_table(out / "responses.csv")


def entry_of(out, name):
    return json.loads((out / "responses.json").read_text())[name]


def figure_text(path):
    """Return the text in an SVG file."""
    return " ".join(re.findall(r">([^<>]+)</(?:text|tspan)>", path.read_text()))


def cifar_pixels(line):
    """Return the images (40, 32, 32, 3) of a command line's --data, as they are read."""
    return cifar10.load(re.search(r"--data (\S+)", line)[1]).images


def test_networks_that_share_batches_get_the_numbers_that_each_gets_alone(line, networks, out):
    printed = succeed(f"{line} --batch-size 6 --images 15 --verbose").out
    pixels = cifar_pixels(line)[np.linspace(0, 39, 15).astype(int)]
    frame = frame_in(out)
    for path in networks:
        checkpoint = loading.load(path)
        alone = analysis.measure(checkpoint.model, checkpoint.preprocessing(pixels).split(6))
        ours = frame[frame["network"] == path.stem]
        assert ours["std"].tolist() == pytest.approx(alone["std"].tolist(), rel=1e-6)
        assert set(ours["images"]) == {15}
    assert printed.count(": measured folded\n") == 2
    assert entry_of(out, "plain-14")["method"] == "folded"


def test_each_image_is_decoded_once_for_all_networks(tmp_path, out):
    """Apart from the sample by which networks are recognised, which has 64 images of this size."""
    images = [np.kron(image, np.ones((2, 2, 1), np.uint8)) for image in blobs(70)]  # 64 x 64
    folder = write_images(tmp_path / "photographs", images)
    options = own(tmp_path, SMALL, names=("a", "b", "c"))
    decoded = Counter()

    def watch(event, args):
        if event == "open" and str(args[0]).endswith(".png"):
            decoded[str(args[0])] += 1

    with watching(watch):
        succeed(f"responses {options} --data {folder} --out {out} --format svg")
    assert len(decoded) == 70
    assert sum(decoded.values()) <= 70 + 64 + 1  # the first one says how large they are


def test_why_a_network_was_not_folded_is_said(own_line, tmp_path):
    options = own(tmp_path, SMALL.replace("2d(4)", "2d(4, track_running_stats=False)"))
    line = f"{own_line} {options} --batch-size 5"
    assert "measured hooks" not in succeed(line).out
    assert "own: measured hooks: 1 has no running statistics\n" in succeed(f"{line} --verbose").out


RAISES = """
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        if CONDITION:
            raise KeyError("pixels")
        return super().forward(x)

def net():
    return Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
"""


@pytest.mark.parametrize("condition", ["True", "len(x) == 5"])
def test_a_network_that_does_not_run_is_one_line(condition, own_line, tmp_path, out):
    """When it is recognised, or when it is measured."""
    options = own(tmp_path, RAISES.replace("CONDITION", condition))
    error = run(f"{own_line} {options} --batch-size 5 --images 10").error
    said = "the network does not run on these images (KeyError: 'pixels'); --debug shows where"
    assert error == f"error: {tmp_path}/own.pth: {said}"
    assert files_in(out) == {}


def test_a_network_of_other_classes_has_no_accuracy(own_line, tmp_path):
    for classes in (10, 100):
        torch.save(build("resnet-8", classes=classes).state_dict(), tmp_path / f"c{classes}.pth")
    printed = succeed(
        f"{own_line} --checkpoint c10.pth c100.pth --normalize [0,1] --kind residual"
    ).out
    rows = [row for line in printed.splitlines() if (row := line.split())[1:2] == ["7"]]
    assert [row[2] == "-" for row in rows] == [False, True]


def test_a_network_of_zeros_is_measured_and_computed(own_line, tmp_path):
    network = build("resnet-8")
    for name, parameter in network.named_parameters():
        if "bn" in name:
            torch.nn.init.zeros_(parameter)
    save(tmp_path / "a.safetensors", network, "[0,1]")
    options = "--checkpoint a.safetensors --source hooks batchnorm --precision bfloat16"
    printed = succeed(f"{own_line} {options}").out
    formula = "  resnet-8: mean 0.0 %, largest 0.0 % in layer 1 (conv1), 7 layers of 7\n"
    assert formula in printed
    assert "0.00 % from float32 in the mean over layers, 0.00 % in layer 1" in printed


UNPAIRED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.rest = nn.Sequential(*[nn.Conv2d(4, 4, 3) for _ in range(5)])

    def forward(self, x):
        return self.rest(self.bn(self.first(x)))
"""


def test_convolutions_that_are_not_measured_are_named(own_line, tmp_path, out):
    printed = succeed(f"{own_line} {own(tmp_path, UNPAIRED, name='Net')}").out
    inner = "its output goes into convolution, not unchanged into a BN"
    assert f"own: not measured, {inner}: rest.0, rest.1, rest.2 and 1 more\n" in printed
    assert "own: not measured, its output goes into no BN: rest.4\n" in printed
    reasons = {f"rest.{i}": inner for i in range(4)} | {"rest.4": "its output goes into no BN"}
    assert entry_of(out, "own")["unpaired"] == reasons
    note = "own: without 5 layers that could not be measured: rest.0, rest.1, rest.2 and 2 more"
    assert note in figure_text(out / "fig7.svg")


def test_bfloat16_comes_with_its_error(own_line, networks, out):
    line = f"{own_line} --checkpoint {networks[0]} --batch-size 5"
    printed = succeed(f"{line} --precision bfloat16").out
    checkpoint, pixels = loading.load(networks[0]), cifar_pixels(line)
    sizes = [5, 5, 5, 1, 5, 5, 5, 5, 4]  # rounding hangs on the batches, 16 images come first
    batches = checkpoint.preprocessing(pixels).split(sizes)
    exact, rounded = (
        analysis.measure(checkpoint.model, batches, precision=precision)["std"]
        for precision in ("float32", "bfloat16")
    )
    relative = (rounded / exact - 1).abs()
    pattern = (
        r"std in bfloat16 is (\S+) % from float32 in the mean over layers, (\S+) % in layer (\d) "
    )
    found = re.search(pattern, printed)
    expected = [100 * relative.mean(), 100 * relative.max()]
    assert [float(found[1]), float(found[2])] == pytest.approx(expected, abs=0.03)
    assert int(found[3]) == relative.argmax() + 1
    assert entry_of(out, "resnet-8")["precision"] == "bfloat16"
    rounding = entry_of(out, "resnet-8")["rounding"]
    assert rounding["largest"] == pytest.approx(relative.max(), rel=0.2)
    succeed(line)
    assert "rounding" not in entry_of(out, "resnet-8")


# Memory


def test_batch_sizes(monkeypatch):
    sizes = {"cpu": 2 * 2**20, "cuda": 2**30}
    monkeypatch.setattr("analysis.running.networks.room", sizes.get)
    assert [default_batch_size(side, "cpu") for side in (8, 32, 64, 224)] == [512, 32, 8, 8]
    assert [default_batch_size(side, "cuda") for side in (32, 224)] == [1024, 334]


def test_the_room_is_that_of_the_cores_in_use():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = room("cpu")
    torch.set_num_threads(threads)
    assert room("cpu") == threads * one


@pytest.fixture
def short_of_memory(monkeypatch):
    """Return a function that says how many images fit: a convolution in the middle raises for more.

    It does not for more than 12, so that the 40 by which networks are recognised fit.
    """
    forward = torch.nn.Conv2d.forward

    def limit(most):
        def limited(self, x):
            if self.weight.shape[:2] == (64, 32) and most < len(x) <= 12:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(self, x)

        monkeypatch.setattr(torch.nn.Conv2d, "forward", limited)

    return limit


def test_batches_that_do_not_fit_are_halved_and_no_image_counts_twice(line, out, short_of_memory):
    succeed(f"{line} --batch-size 12")
    whole = [read_table(out / name) for name in ("responses.csv", "claims.csv")]
    short_of_memory(5)
    said = succeed(f"{line} --batch-size 12").err
    for name in ("resnet-8", "plain-14"):
        for size in (12, 6):
            assert (
                f"{name}: out of memory at {size} images at a time, going on with {size // 2}\n"
                in said
            )
    parts = [read_table(out / name) for name in ("responses.csv", "claims.csv")]
    for one, other in zip(whole, parts, strict=True):
        pd.testing.assert_frame_equal(one, other, rtol=1e-6)


def test_one_image_that_does_not_fit_is_one_line_and_2(line, networks, out, short_of_memory):
    short_of_memory(0)
    outcome = run(f"{line} --batch-size 2")
    assert outcome.error.startswith(f"error: {networks[0]}: out of memory: take another device, ")
    assert files_in(out) == {}
