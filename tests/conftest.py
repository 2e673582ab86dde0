"""Where the real input lies, and a cache folder and a network that belong to the tests alone."""

import signal

import pytest
import torch

from models.data import cifar10
from models.data.formats import CLASSES
from tests.helpers import AKAMASTER, ROOT, SHARED, blobs, fitting, save, write_images

__all__ = ["ROOT", "SHARED"]

# A shell starts what runs in the background with Ctrl-C ignored, and then no test could send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def existing(path):
    if not path.exists():
        pytest.skip(f"real input is not here: {path} does not exist")
    return path


@pytest.fixture(scope="session")
def shared_cifar10():
    """Return the folder of the real CIFAR-10."""
    return existing(SHARED / "cifar10")


@pytest.fixture(scope="session")
def akamaster():
    """Return the two public checkpoints by depth."""
    folder = existing(SHARED / "checkpoints" / "akamaster")
    return {depth: existing(folder / name) for depth, name in AKAMASTER.items()}


@pytest.fixture(scope="session")
def real_test(shared_cifar10):
    """Return the 10,000 real test images."""
    return cifar10.load(shared_cifar10)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Return a folder of forty images in class folders."""
    return write_images(tmp_path_factory.mktemp("images"), blobs(40), CLASSES)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Return checkpoints of small networks by name, with cards and BN statistics that fit `images`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    names = ("resnet-8", "plain-8", "resnet-14")
    return {name: save(folder / f"{name}.safetensors", fitting(name), seed=1) for name in names}


@pytest.fixture
def out(tmp_path):
    """Return a folder for the results of a command, which makes it."""
    return tmp_path / "out"


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def surroundings(session_cache, monkeypatch, tmp_path):
    """Find no data of the user's, download nothing, and start every test from the same random numbers."""
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(session_cache))
    monkeypatch.delenv("CIFAR10", raising=False)
    monkeypatch.setattr(cifar10, "SOURCES", {"test": (), "train": ()})
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
