"""What several tests build: images, networks, checkpoints, runs of a training, and commands run in this process."""

import contextlib
import importlib
import io
import json
import pickle
import re
import shlex
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from models import build
from models.checkpoints import loading
from models.checkpoints.custom import build_from
from models.data import cifar10
from models.data.preprocessing import PRESETS
from models.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
SETUP = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)  # the README's two commands
AKAMASTER = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}

# Commands


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error(self):
        """The one line that says what was wrong. Everything about an error of the user is checked here."""
        lines = [line for line in self.err.splitlines() if "error: " in line]
        assert self.status == 2, self.err
        assert len(lines) == 1, self.err
        assert self.err.endswith(lines[0] + "\n")
        assert "Traceback" not in self.err
        return lines[0]


def main_of(command):
    package = "models" if command in ("train", "summary") else "analysis"
    return importlib.import_module(f"{package}.{command}").main


def run(line, *words):
    """Run a command line such as "responses --depth 20" in this process. `words` follow as they are."""
    command, *options = shlex.split(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main_of(command)([*options, *map(str, words)])
        except SystemExit as end:  # argparse's
            status = end.code
    return Outcome(status, out.getvalue(), err.getvalue())


def succeed(line, *words):
    """Run a command line that must succeed. Return what it printed."""
    outcome = run(line, *words)
    assert outcome.status == 0, outcome.err
    return outcome


def readme_command(words):
    """Return the command of the README or of docs/ that begins so, as a line for `run`."""
    [line] = re.findall(rf"^python -m analysis\.({words}.*)$", PAGES, re.MULTILINE)
    return line


def files_in(folder):
    """Return the content of every file that is not hidden, by name."""
    files = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in files}


def read_table(path):
    """Return a CSV file that a command has written."""
    return pd.read_csv(path)


# Images


def blobs(count, seed=0):
    """Return smooth coloured images (N, 32, 32, 3), uint8, bright in the middle as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator) * 0.5
    coarse += torch.randn(count, 1, 1, 1, generator=generator)
    fine = F.interpolate(coarse, size=32, mode="bicubic") + torch.hann_window(32)[:, None] * 0.8
    return (torch.sigmoid(fine) * 255).byte().permute(0, 2, 3, 1).numpy()


def write_images(folder, images, classes=("cat",)):
    """Write images as PNG files into class folders, in turn. Return the folder."""
    for i, image in enumerate(images):
        path = folder / classes[i % len(classes)] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def as_image(form="png", mode="RGB", size=(32, 32), **options):
    """Return an image file as bytes."""
    buffer = io.BytesIO()
    pixels = np.arange(size[0] * size[1] * 4, dtype=np.uint8).reshape(size[1], size[0], 4)
    Image.fromarray(pixels).convert("RGB").convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def as_parquet(cells=None, labels=(0, 1)):
    """Return a parquet shard in the hub's layout as bytes."""
    cells = [{"bytes": as_image(), "path": "a.png"}] * 2 if cells is None else cells
    return pd.DataFrame({"img": cells, "label": labels}).to_parquet()


def as_batch(data=None, labels=None):
    """Return a batch of the official python version as bytes."""
    data = np.zeros((2, 3072), np.uint8) if data is None else data
    labels = [3, 4] if labels is None else labels
    return pickle.dumps({b"data": data, b"labels": labels}, 3)


def as_archive(*members, mode="w:gz"):
    """Return a tar archive of (name, content) as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def made_up(count, split="train"):
    """Return CIFAR-10 images of random pixels."""
    random = np.random.default_rng([0, count])
    images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, count)
    return cifar10.Cifar10(images, labels, split, Path("nowhere"), "made up", "", "")


# Networks


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def randomize_norms(network):
    """Give every BN its own gamma and beta, so that the response differs from the convolution's output."""
    for norm in norms(network):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return network.eval()


def record(network, x):
    """Let BN record the statistics of x, as in a training."""
    for norm in norms(network):
        nn.init.uniform_(norm.weight, 0.2, 1)
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        network.train()(x)
    return network.eval()


def fitting(name, preset="imagenet", images=None):
    """Return a network whose BN statistics are those of the images."""
    torch.manual_seed(1)
    return record(build(name), PRESETS[preset](blobs(40) if images is None else images))


def save(path, network, preset="imagenet", padding="none", **training):
    """Write a network as a checkpoint with a card. Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    loading.save(path, network, PRESETS[preset], crop_padding=padding, training=training)
    return path


SMALL = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
"""


def own(folder, source=SMALL, names=("own",), name="net"):
    """Write a user's own network: the module that builds it, and checkpoints. Return the options for it."""
    (folder / "mine.py").write_text(source)
    builder = f"{folder / 'mine.py'}:{name}"
    for stem in names:
        torch.save(build_from(builder).state_dict(), folder / f"{stem}.pth")
    paths = " ".join(str(folder / f"{stem}.pth") for stem in names)
    return f"--checkpoint {paths} --model {builder} --normalize [0,1]"


# Frames and runs


def frame(**columns):
    """Return a frame of three layers, as version 0.1 wrote it. `columns` replace some of its columns."""
    place = {"network": "a", "kind": "other", "depth": None, "layer": [1, 2, 3], "name": "c"}
    place |= {"norm": "b", "stage": 1, "channels": 4, "height": 8, "width": 8}
    numbers = {"images": 2, "count": 512, "mean": 0.0, "std": 5.0, "within": 3.0, "between": 4.0}
    return pd.DataFrame(place | numbers | {"source": "hooks"}).assign(**columns)


RECIPE = Recipe("residual", 8, iterations=40, snapshots=3)
RATES = {0: 0.1, 20: 0.1, 40: 0.001}  # learning rate by iteration of the snapshots
EPOCHS = "epoch,iteration,lr,mean_std\n1,15,0.1,1.5\n2,30,0.01,1.25\n"


def snapshot_path(folder, iteration):
    return folder / "snapshots" / f"iteration-{iteration:07}.safetensors"


def write_snapshot(folder, number, recipe=RECIPE, name=None, **facts):
    """Write the snapshot of an iteration, with a card in which `facts` are changed. Return its path."""
    network = fitting(name or recipe.network, images=blobs(20))
    torch.manual_seed(number)
    randomize_norms(network)
    card = asdict(recipe) | {"iteration": number, "current_lr": RATES[number]} | facts
    return save(snapshot_path(folder, number), network, padding="zero", **card)


def write_run(folder, iterations=tuple(RATES)):
    """Write a run as models.train leaves it: config.json, metrics.csv and snapshots. Return the folder."""
    for iteration in iterations:
        write_snapshot(folder, iteration)
    (folder / "config.json").write_text(json.dumps(asdict(RECIPE)))
    (folder / "metrics.csv").write_text(EPOCHS)
    return folder


def assert_same_run(one, other):
    """Assert that two runs left the same tensors and the same metrics, bit for bit."""
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    files = [
        sorted(path.relative_to(run) for path in run.rglob("*.safetensors")) for run in (one, other)
    ]
    assert files[0] == files[1] != []
    for file in files[0]:
        states = [load_file(run / file) for run in (one, other)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# What happens to files


class Audit:
    """Calls `self.watch(event, args)` for everything that Python's audit hooks tell, while it is set."""

    watch = None


def _audit(event, args):
    if Audit.watch is not None:
        Audit.watch(event, args)


sys.addaudithook(_audit)


@contextlib.contextmanager
def watching(watch):
    """Call watch(event, args) for every audit event in the block, such as "open"."""
    Audit.watch = watch
    try:
        yield
    finally:
        Audit.watch = None
