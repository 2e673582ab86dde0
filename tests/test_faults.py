"""What goes wrong around a run: kill -9, full disks, vanishing files, Ctrl-C.

Downloads that break off are in tests/models/data/test_cifar10.py.

A run of all faults writes what came of each to tests/FAULTS.md.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from models import build, train
from models.files import LEFT
from tests.helpers import (
    ROOT,
    SMALL,
    Audit,
    assert_same_run,
    blobs,
    files_in,
    made_up,
    own,
    run,
    save,
    watching,
    write_images,
)

DOCUMENT = ROOT / "tests" / "FAULTS.md"
HEAD = "# Faults\n\nWritten by `python -m pytest tests/test_faults.py`. Killed: by kill -9.\n\n"
FAULTS, OUTCOMES = {}, {}  # by name: what lets it happen, and what came of it
TRAIN = (
    "train --depth 8 --kind residual --iterations 4 --snapshots 3 --device cpu --precision float32"
)
TRAIN += " --out runs"
RUN = Path("runs/resnet-8-4-seed0")
FORMULA = "responses --checkpoint a.safetensors --source batchnorm --format svg --out out"
HOOKS = "responses --checkpoint a.safetensors --data cifar --format svg --out out"
COMPARE = "compare a.safetensors b.safetensors --source batchnorm --format svg --out out"

# Processes are forked from one that has imported everything. One thread: sums in the same order, and a fork is safe.
FORKED = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "seaborn", "plots.fig7", "plots.compare", "plots.decomposition"]
FORKED.set_forkserver_preload(["tests.test_faults", *PRELOADED, "analysis.paper", "PIL.features"])
DATA = made_up(100), made_up(20, "test")
CHILD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def fault(name=None, slow=False):
    """Add a fault: the function lets it happen in a folder, checks what came of it and says so."""

    def add(function):
        key = name or function.__name__.replace("_", " ")
        FAULTS[key] = pytest.param(key, function, id=key, marks=[pytest.mark.slow] * slow)
        return function

    return add


# Commands, in this process and in others


def execute(line):
    """Run a command line in this process, a training on images that are made up. Return its outcome."""
    images = mock.patch.object(train, "load_data", return_value=DATA)
    always = mock.patch("models.training.loop.SAVE_EVERY", 0)  # the state, after every iteration
    with images, always:
        return run(line)


def succeed(line):
    outcome = execute(line)
    assert outcome.status == 0, outcome.err


def only_line(outcome, status, *words):
    """Return the one line on stderr of a command that ended as it should, but for warnings."""
    lines = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    assert outcome.status == status, lines
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines
    return f"`{lines[0]}`"


def work(folder, line, kill_at):
    """Run a command in a process of its own, which kills itself at its n-th renaming of a file, from 0."""
    os.chdir(folder)
    torch.set_num_threads(1)
    seen, rename = itertools.count(), os.replace
    die = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    os.replace = lambda *names: rename(*names) if next(seen) != kill_at else die()
    if line == "save":
        for number in itertools.cycle((0, 1)):
            save_one(Path("saved.safetensors"), number, "resnet-110")
    outcome = execute(line)
    (folder / "stderr").write_text(outcome.err)
    sys.exit(outcome.status)


def start(folder, line, kill_at=None):
    with mock.patch.dict(os.environ, CHILD):
        process = FORKED.Process(target=work, args=(folder, line, kill_at))
        process.start()
    return process


def wait(process, status=0):
    process.join()
    assert process.exitcode == status


def kill_sometime(chance, folder, line):
    """Kill a command at a random moment; once more, and sooner, if it was over before."""
    longest = 1.0  # seconds
    while True:
        process = start(folder, line)
        time.sleep(chance.uniform(0, longest))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return
        longest /= 2


@functools.cache
def network(name, number):
    torch.manual_seed(number)
    return build(name)


def save_one(path, number, name="resnet-8"):
    save(path, network(name, number), "[0,1]", number=number)


def lay_out(folder):
    """Write two networks and twelve images."""
    for number, name in enumerate("ab"):
        save_one(folder / f"{name}.safetensors", number)
    write_images(folder / "cifar", blobs(12))


# kill -9


@fault(slow=True)
def killed_while_training(folder):
    """At the renaming of a file, and at a random moment after that."""
    chance = random.Random(0)
    (folder / "whole").mkdir()
    wait(start(folder / "whole", TRAIN))
    for number in (0, 2, 5):
        place = folder / str(number)
        place.mkdir()
        wait(start(place, TRAIN, kill_at=number), -signal.SIGKILL)
        kill_sometime(chance, place, TRAIN)
        wait(start(place, TRAIN))
        assert_same_run(place / RUN, folder / "whole" / RUN)
        assert not list(place.rglob(".*"))
    return "the same command goes on, to the tensors and metrics of an undisturbed run, bit for bit"


@fault()
def killed_while_writing_a_checkpoint(folder):
    """While two are written in turn: as soon as there is a temporary file, and a moment after that."""
    saved, contents = folder / "saved.safetensors", []
    for number in range(2):
        save_one(saved, number, "resnet-110")
        contents.append(saved.read_bytes())
    for pause in (0, 0.03, 0.08):
        process, limit = start(folder, "save"), time.monotonic() + 60
        while not (begun := any(folder.glob(".*"))) and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(pause)
        process.kill()
        wait(process, -signal.SIGKILL)
        assert begun
        assert saved.read_bytes() in contents
        assert set(folder.glob(".*")) == set(folder.glob(LEFT))  # which the next run removes
        for left in folder.glob(".*"):
            left.unlink()
    return "the file is one of the two that were written in turn, whole"


def kill_while_measuring(line, folder):
    """At random moments and at the renaming of each file, upon what another run has left."""
    chance = random.Random(0)
    lay_out(folder)
    wait(start(folder, line.replace("--out out", "--out new")))
    swapped = (
        line.replace("b.safe", "c.safe").replace("a.safe", "b.safe").replace("c.safe", "a.safe")
    )
    wait(start(folder, swapped))
    old, new = files_in(folder / "out"), files_in(folder / "new")
    assert old.keys() == new.keys()
    assert old != new
    for number in range(4):
        if number % 2:
            kill_sometime(chance, folder, line)
        else:
            wait(start(folder, line, kill_at=number), -signal.SIGKILL)
        found = files_in(folder / "out")
        assert found.keys() == new.keys()
        assert all(content in (old[name], new[name]) for name, content in found.items())
    wait(start(folder, line))
    assert files_in(folder / "out") == new
    return "every file is whole, the earlier or the new one; the next run writes all of them"


fault("killed in a measurement", slow=True)(functools.partial(kill_while_measuring, HOOKS))
fault("killed in a comparison", slow=True)(functools.partial(kill_while_measuring, COMPARE))


# Disks


@contextlib.contextmanager
def mounted(place, options):
    """Mount a file system in memory. Skip the test if this process may not."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@fault()
def a_full_disk_under_results(folder):
    lay_out(folder)
    with mounted(folder / "out", "size=400k") as out:
        succeed(FORMULA)
        earlier, disk = files_in(out), os.statvfs(out)
        (out / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 20_000))
        outcome = execute(f"{FORMULA} --no-paper")
        (out / "filler").unlink()
        assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier
    return f"the earlier results stay; {only_line(outcome, 2, 'out: ', 'No space left')}"


@fault()
def a_full_disk_under_a_training(folder):
    with mounted(folder / "runs", "size=8m"):
        filler = folder / "runs" / "filler"
        filler.write_bytes(bytes(13 * 2**19))  # what is left is enough for the first files
        line = only_line(execute(TRAIN), 1, "No space left on device")
        filler.unlink()
        succeed(TRAIN)
        assert (folder / RUN / "resnet-8.safetensors").exists()
    return f"once there is room, the same command goes on; {line}"


@fault()
def a_read_only_folder_for_results(folder):
    lay_out(folder)
    with mounted(folder / "out", "ro"):
        return only_line(execute(COMPARE), 2, "name a folder that can be written")


@fault()
def a_read_only_folder_for_a_training(folder):
    with mounted(folder / "runs", "ro"):
        return only_line(execute(TRAIN), 1, "Read-only file system")


# Files that vanish


def vanish(name, line, words, folder):
    """Remove a file just before Python opens it to read."""
    lay_out(folder)
    options = own(folder, SMALL)
    images = [Image.fromarray(image).resize((40, 40)) for image in blobs(70)]
    (folder / "photographs").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "photographs" / f"{number:02}.png")
    succeed(FORMULA.replace("--out out", "--out old"))

    def watch(event, args):
        if event == "open" and str(args[0]).endswith(name) and (folder / name).exists():
            Audit.watch = None
            (folder / name).unlink()

    with watching(watch):
        outcome = execute(line.replace("OWN", options))
    assert files_in(folder / "out") == {}
    said = only_line(outcome, 2, f"error: {name}: ", words)
    assert "damaged" not in said
    return said


VANISHING = {
    "a checkpoint": ("a.safetensors", HOOKS, ""),
    "an image of CIFAR-10": ("cifar/cat/07.png", HOOKS, ""),
    "a photograph": ("photographs/69.png", "responses OWN --data photographs --out out", ""),
    "a frame": ("old/responses.csv", "compare old/responses.csv resnet-20 --out out", ""),
}
for _name, _arguments in VANISHING.items():
    fault(f"{_name} vanishes")(functools.partial(vanish, *_arguments))


# Two at once


@fault(slow=True)
def several_commands_on_one_folder(folder):
    """Two of analysis.responses with other networks, and analysis.compare, at once."""
    lay_out(folder)
    lines = [FORMULA, FORMULA.replace("a.safe", "b.safe"), COMPARE]
    allowed = []
    for line in lines:
        wait(start(folder, line.replace("--out out", "--out alone")))
        allowed.append(files_in(folder / "alone"))
    for process in [start(folder, line) for line in lines]:
        wait(process)
    found = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert found.keys() == {name for files in allowed for name in files}
    assert all(any(files.get(name) == found[name] for files in allowed) for name in found)
    return "every file is whole, and of one of them; nothing else is there"


@fault()
def two_trainings_of_one_network(folder):
    ended = []

    def train_beside():
        process = start(folder, TRAIN)
        process.join()
        ended.append(process.exitcode)

    with before("torch.nn.Conv2d.forward", train_beside):
        succeed(TRAIN)
    said = (folder / "stderr").read_text()
    assert ended == [2]
    assert "another trainer is at work here" in said
    return f"the first goes on undisturbed; the second: `{said.strip()}`"


# Ctrl-C


@contextlib.contextmanager
def before(target, action):
    """Do something when the function of that name is called for the first time, just before it runs."""
    place, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(place)
    function, waiting = getattr(owner, name), [action]

    def late(*args, **options):
        if waiting:
            waiting.pop()()
        return function(*args, **options)

    with mock.patch.object(owner, name, late):
        yield


def interrupt():
    signal.raise_signal(signal.SIGINT)


MOMENTS = {
    "decoding": "PIL.Image.open",
    "measuring": "torch.nn.Conv2d.forward",
    "drawing": "matplotlib.figure.Figure.savefig",
    "writing": "os.fsync",
    "renaming": "os.replace",
}
INTERRUPTED = {
    HOOKS: tuple(MOMENTS),
    COMPARE: ("drawing", "writing", "renaming"),
    f"dynamics {RUN} --format svg --out out": ("drawing", "renaming"),
    "benchmark --networks resnet-8 --images 20 --out out": ("measuring",),
}


def interrupt_moments(line, folder):
    """All of the results or none are there afterwards, and no temporary file."""
    lay_out(folder)
    if "dynamics" in line:
        succeed(TRAIN)
    for moment in INTERRUPTED[line]:
        out = folder / moment
        with before(MOMENTS[moment], interrupt):
            outcome = execute(line.replace("--out out", f"--out {out}"))
        assert outcome.status == 130
        assert outcome.err.splitlines()[-1].startswith("interrupted")
        written = {path.suffix for path in out.iterdir()}
        assert written in ({".csv", ".json", ".svg"}, set())
        assert bool(written) == (moment in ("writing", "renaming"))
    return f"at {', '.join(INTERRUPTED[line])}: status 130, all of the results or none"


for _line in INTERRUPTED:
    fault(f"Ctrl-C in {_line.split()[0]}")(functools.partial(interrupt_moments, _line))


@fault("Ctrl-C in train")
def interrupt_a_training(folder):
    succeed(TRAIN.replace("--out runs", "--out whole"))
    with before("torch.nn.Conv2d.forward", interrupt):
        outcome = execute(TRAIN)
    line = only_line(outcome, 130, "stopped by SIGINT", "keeps iteration 1")
    succeed(TRAIN)
    assert_same_run(folder / RUN, folder / "whole" / RUN.name)
    return f"status 130 after the iteration, and the same command goes on; {line}"


# The tests and the document


@pytest.mark.parametrize(("name", "function"), FAULTS.values())
def test_a_fault_leaves_nothing_half_done(name, function, tmp_path):
    OUTCOMES[name] = function(tmp_path).replace(str(tmp_path), "...")


def test_the_document_is_written():
    if FAULTS.keys() <= OUTCOMES.keys():  # all of them have run, and none was skipped
        rows = (f"| {name} | {OUTCOMES[name]} |\n" for name in FAULTS)
        DOCUMENT.write_text(f"{HEAD}| fault | what came of it |\n| --- | --- |\n{''.join(rows)}")
    assert all(f"| {name} | " in DOCUMENT.read_text() for name in FAULTS)
