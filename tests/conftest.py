"""Where the real input lies, and a cache folder and a network that belong to the tests alone."""

import signal
from pathlib import Path

import pytest
import torch

from models.data import cifar10

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # what a shell starts in the background ignores Ctrl-C

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
AKAMASTER = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}


def existing(path):
    if not path.exists():
        pytest.skip(f"real input is not here: {path} does not exist")
    return path


@pytest.fixture(scope="session")
def shared_cifar10():
    return existing(SHARED / "cifar10")


@pytest.fixture(scope="session")
def akamaster():
    """The two public checkpoints by depth."""
    folder = existing(SHARED / "checkpoints" / "akamaster")
    return {depth: existing(folder / name) for depth, name in AKAMASTER.items()}


@pytest.fixture(scope="session")
def real_test(shared_cifar10):
    """The 10,000 real test images."""
    return cifar10.load(shared_cifar10)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def surroundings(session_cache, monkeypatch, tmp_path):
    """No user's data is found, nothing is downloaded, and every test starts from the same random
    numbers.
    """
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(session_cache))
    monkeypatch.delenv("CIFAR10", raising=False)
    monkeypatch.setattr(cifar10, "SOURCES", {"test": (), "train": ()})
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
