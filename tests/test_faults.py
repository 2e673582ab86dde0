"""What goes wrong around a run: kill -9, full disks, vanishing files, broken downloads, want of
memory, Ctrl-C.

`python -m tests.test_faults` runs every fault, with more rounds than the tests, and writes what
came of each to tests/FAULTS.md.
"""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from PIL import Image

from analysis import benchmark, compare, dynamics, responses
from models import build, train
from models.checkpoints import loading
from models.data import cifar10
from models.data.preprocessing import PRESETS
from models.files import LEFT
from tests.analysis.measuring.test_networks import short_of_memory
from tests.conftest import ROOT
from tests.models.checkpoints.test_recognition import blobs
from tests.models.data.test_cifar10 import served
from tests.models.training.test_loop import TEST, TRAIN, assert_same

FAULTS = {}
DOCUMENT = ROOT / "tests" / "FAULTS.md"
MAINS = {
    module.__name__: module.main for module in (responses, compare, dynamics, benchmark, train)
}
SMALL_RUN = (
    "--depth",
    8,
    "--kind",
    "residual",
    "--iterations",
    4,
    "--snapshots",
    3,
    "--device",
    "cpu",
)
SMALL_RUN += ("--precision", "float32", "--out", "runs")
LARGE = "resnet-110"  # its file takes long to write
RUN = "runs/resnet-8-4-seed0"
RESPONSES, COMPARE, TRAINER = "analysis.responses", "analysis.compare", "models.train"
HOOKS = (RESPONSES, "--checkpoint", "a.safetensors", "--data", "cifar", "--format", "svg")
CLOSED_FORM = (
    RESPONSES,
    "--checkpoint",
    "a.safetensors",
    "--source",
    "batchnorm",
    "--format",
    "svg",
)
COMPARED = (COMPARE, "a.safetensors", "b.safetensors", "--source", "batchnorm", "--format", "svg")
START = multiprocessing.get_context("forkserver")
PRELOADED = (
    "torch._dynamo",
    "plots.fig7",
    "plots.compare",
    "plots.decomposition",
    "analysis.measuring.blocks",
)
START.set_forkserver_preload(
    ["tests.test_faults", *PRELOADED, "analysis.paper", "models.zoo", "PIL.features"]
)
CHILD = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}  # one thread: sums in the same order, and a fork is safe


def fault(rounds=1, quick=1, name=None):
    """The function lets something happen in a folder, checks what came of it and says so in
    deterministic words.

    rounds: so many for the table, quick: so many in the tests.
    """

    def add(function):
        FAULTS[name or function.__name__.replace("_", " ")] = (function, rounds, quick)
        return function

    return add


# Commands, in this process and in others


def execute(command, *words):
    """Run a command in this process: its exit status and the lines on stderr."""
    shown = io.StringIO()
    made_up = mock.patch.object(train, "load_data", return_value=(TRAIN, TEST))
    always = mock.patch(
        "models.training.loop.SAVE_EVERY", 0
    )  # a state is saved after every iteration
    with (
        contextlib.redirect_stderr(shown),
        contextlib.redirect_stdout(io.StringIO()),
        made_up,
        always,
    ):
        try:
            status = MAINS[command]([str(word) for word in words])
        except SystemExit as end:
            status = end.code
    return status, [
        line for line in shown.getvalue().splitlines() if not line.startswith("warning: ")
    ]


def work(folder, command, words, kill_at):
    """In a process of its own: run a command. kill_at: kill -9 itself at its n-th renaming of a
    file, from 0.
    """
    os.chdir(folder)
    os.environ["LAYER_RESPONSES_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    seen, rename = itertools.count(), os.replace
    os.replace = lambda *names: (
        rename(*names) if next(seen) != kill_at else os.kill(os.getpid(), signal.SIGKILL)
    )
    if command == "save":
        for number in itertools.cycle((0, 1)):
            save_one(Path("saved.safetensors"), number, LARGE)
    status, lines = execute(command, *words)
    (folder / "stderr").write_text("\n".join(lines))
    sys.exit(status)


def start(folder, command, *words, kill_at=None):
    with mock.patch.dict(os.environ, CHILD):
        process = START.Process(target=work, args=(folder, command, words, kill_at))
        process.start()
    return process


def wait(process, status):
    process.join()
    assert process.exitcode == status


def to_the_end(folder, command, *words):
    wait(start(folder, command, *words), 0)


def kill_sometime(chance, folder, takes, command, *words):
    """kill -9 at a random moment; once more, and sooner, where the command was over before."""
    while True:
        process = start(folder, command, *words)
        time.sleep(chance.uniform(0, takes))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return
        takes /= 2


def timed(folder, command, *words):
    to_the_end(folder, COMPARE, "--help")  # the server that forks is at work
    before = time.monotonic()
    to_the_end(folder, command, *words)
    return time.monotonic() - before


def files_in(folder):
    """The files that are not hidden, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


@functools.cache
def network(name, number):
    torch.manual_seed(number)
    return build(name)


def save_one(path, number, name="resnet-8"):
    loading.save(
        path,
        network(name, number),
        PRESETS["[0,1]"],
        crop_padding="none",
        training={"number": number},
    )


def lay_out(folder):
    """Two networks and twelve images."""
    for number, name in enumerate("ab"):
        save_one(folder / f"{name}.safetensors", number)
    (folder / "cifar" / "cat").mkdir(parents=True)
    for number, image in enumerate(blobs(12, seed=0)):
        Image.fromarray(image).save(folder / "cifar" / "cat" / f"{number:02}.png")


@contextlib.contextmanager
def before(target, action):
    """Do something when the function of that name is called for the first time, just before it
    runs.
    """
    place, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(place)
    function, waiting = getattr(owner, name), [action]

    def late(*args, **options):
        if waiting:
            waiting.pop()()
        return function(*args, **options)

    with mock.patch.object(owner, name, late):
        yield


# kill -9


@fault(rounds=20)
def killed_while_training(folder, rounds):
    """Twice in a run: at the renaming of one of its files after another, and at a random moment
    after that.
    """
    chance = random.Random(0)
    (folder / "whole").mkdir()
    takes = timed(folder / "whole", TRAINER, *SMALL_RUN)
    for number in range(rounds):
        place = folder / str(number)
        place.mkdir()
        wait(start(place, TRAINER, *SMALL_RUN, kill_at=number), -signal.SIGKILL)
        kill_sometime(chance, place, takes, TRAINER, *SMALL_RUN)
        to_the_end(place, TRAINER, *SMALL_RUN)
        assert_same(place / RUN, folder / "whole" / RUN)
        assert not list(place.rglob(".*"))
    ends = "with the tensors and metrics of an undisturbed run, bit for bit, and no temporary file"
    return f"the same command goes on, and ends {ends}"


@fault(rounds=15, quick=2)
def killed_while_writing_a_checkpoint(folder, rounds):
    """While two are written in turn: as soon as a temporary file is there, and at random moments
    after that.
    """
    chance = random.Random(0)
    saved = folder / "saved.safetensors"
    contents = []
    for number in range(2):
        save_one(saved, number, LARGE)
        contents.append(saved.read_bytes())
    for number in range(rounds):
        process, limit = start(folder, "save"), time.monotonic() + 30
        while not (begun := any(folder.glob(".*"))) and time.monotonic() < limit:
            pass
        time.sleep(chance.uniform(0, 0.1) if number % 2 else 0)
        process.kill()
        wait(process, -signal.SIGKILL)
        assert begun
        assert saved.read_bytes() in contents
        assert set(folder.glob(".*")) == set(folder.glob(LEFT))  # which the next run removes
        for left in folder.glob(".*"):  # for the next round to wait for its own
            left.unlink()
    return "the file is one of the two that were written in turn, whole"


def kill_while_measuring(words, folder, rounds):
    """At random moments and at the renaming of each file, upon what another run has left."""
    chance = random.Random(0)
    lay_out(folder)
    swapped = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    takes = timed(folder, *words, "--out", "new")
    to_the_end(folder, *[swapped.get(word, word) for word in words], "--out", "out")
    old, new = files_in(folder / "out"), files_in(folder / "new")
    assert old.keys() == new.keys()
    assert old != new
    for number in range(rounds):
        if number % 2:
            kill_sometime(chance, folder, takes, *words, "--out", "out")
        else:
            wait(
                start(folder, *words, "--out", "out", kill_at=number // 2 % len(new)),
                -signal.SIGKILL,
            )
        found = files_in(folder / "out")
        assert found.keys() == new.keys()
        assert all(content in (old[name], new[name]) for name, content in found.items())
    to_the_end(folder, *words, "--out", "out")
    assert files_in(folder / "out") == new
    return "every file is whole, the earlier or the new one; the next run writes all of them"


for _name, _words in (("closed form", CLOSED_FORM), ("hooks", HOOKS), ("comparison", COMPARED)):
    fault(10, 2, f"killed in a measurement: {_name}")(
        functools.partial(kill_while_measuring, _words)
    )


# Disks and files


@contextlib.contextmanager
def mounted(place, options):
    """A file system of its own in memory; skips where this process may not mount one."""
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


def only_line(outcome, status, *words):
    """The one line on stderr of a command that ended as it should, as it stands in the table."""
    found, lines = outcome
    assert found == status, lines
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines
    return f"`{lines[0]}`"


@fault()
def full_disk_under_results(folder, rounds):
    lay_out(folder)
    with mounted(folder / "out", "size=400k") as out:
        assert execute(*CLOSED_FORM, "--out", "out")[0] == 0
        earlier = files_in(out)
        (out / "filler").write_bytes(
            bytes(os.statvfs(out).f_bavail * os.statvfs(out).f_frsize - 20_000)
        )
        line = only_line(
            execute(*CLOSED_FORM, "--no-paper", "--out", "out"),
            2,
            "out: ",
            "No space left",
            "make room",
        )
        (out / "filler").unlink()
        assert files_in(out) == earlier
        assert len(list(out.iterdir())) == len(earlier)
    return f"the earlier results stay; {line}"


@fault()
def full_disk_under_a_training(folder, rounds):
    with mounted(folder / "runs", "size=8m"):
        filler = folder / "runs" / "filler"
        filler.write_bytes(bytes(13 * 2**19))  # what is left is enough for the first files
        line = only_line(execute(TRAINER, *SMALL_RUN), 1, "No space left on device")
        filler.unlink()
        assert execute(TRAINER, *SMALL_RUN)[0] == 0
        assert (folder / RUN / "resnet-8.safetensors").exists()
    return f"when there is room, the same command goes on; {line}"


@fault()
def full_disk_under_the_cache(folder, rounds):
    lay_out(folder)
    with (
        mounted(folder / "cache", "size=4k"),
        mock.patch.dict(os.environ, {"LAYER_RESPONSES_CACHE": "cache"}),
    ):
        assert execute(*HOOKS, "--out", "out") == (0, [])
        assert [path for path in (folder / "cache").rglob("*") if path.is_file()] == []
    return "the images are decoded again in the next run, nothing is said"


@fault()
def read_only_folder_for_results(folder, rounds):
    lay_out(folder)
    with mounted(folder / "out", "ro"):
        return only_line(execute(*COMPARED, "--out", "out"), 2, "name a folder that can be written")


@fault()
def read_only_folder_for_a_training(folder, rounds):
    with mounted(folder / "runs", "ro"):
        return only_line(execute(TRAINER, *SMALL_RUN), 1, "Read-only file system", "allow writing")


VANISHING = {  # the function just before which a file vanishes, the file, the command and words of its line
    "checkpoint vanishes between two readings": (
        "analysis.cli.items.sample_of",
        "a.safetensors",
        HOOKS,
        "no such file",
    ),
    "checkpoint vanishes while it is read": (
        "models.checkpoints.loading.sha256",
        "a.safetensors",
        HOOKS,
        "again",
    ),
    "data file vanishes before it is decoded": (
        "models.data.formats.decode_images",
        "cifar/cat/07.png",
        HOOKS,
        "again",
    ),
    "image vanishes while its folder is measured": (
        "analysis.measuring.measurement.Measurement.add_part",
        "photographs/69.png",
        (
            RESPONSES,
            "--checkpoint",
            "a.pth",
            "--model",
            "mine.py:small",
            "--data",
            "photographs",
            "--batch-size",
            4,
        ),
        "again",
    ),
    "frame vanishes while it is compared": (
        "analysis.cli.entries.describe_frames",
        "old/responses.csv",
        (COMPARE, "old/responses.csv", "a.safetensors", "--source", "batchnorm"),
        "again",
    ),
}


def vanish(target, file, command, words, folder, rounds):
    lay_out(folder)
    if "mine.py:small" in command:
        lay_out_photographs(folder)
    if "old/responses.csv" in command:
        assert execute(*CLOSED_FORM, "--out", "old")[0] == 0
    with before(target, (folder / file).unlink):
        line = only_line(execute(*command, "--out", "out"), 2, f"error: {file}: ", words)
    assert "damaged" not in line
    assert files_in(folder / "out") == {}
    return line


def lay_out_photographs(folder):
    """With a network for them: more than are read ahead."""
    (folder / "mine.py").write_text(
        "from torch import nn\ndef small():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
    )
    torch.save(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict(),
        folder / "a.pth",
    )
    (folder / "photographs").mkdir()
    for number in range(70):
        Image.new("RGB", (40, 40)).save(folder / "photographs" / f"{number:02}.png")


for _name, _arguments in VANISHING.items():
    fault(name=_name)(functools.partial(vanish, *_arguments))


# Downloads


def download(path, why, folder, rounds):
    """For a measurement, from a server that has no CIFAR-10."""
    lay_out(folder)
    (folder / "served").mkdir()
    (folder / "served" / "test.parquet").write_bytes(random.Random(0).randbytes(100_000))
    cache = mock.patch.dict(os.environ, {"LAYER_RESPONSES_CACHE": str(folder / "cache")})
    with (
        served(folder / "served") as url,
        cache,
        mock.patch.dict(cifar10.SOURCES, {"test": (f"{url}/{path}",)}),
    ):
        status, lines = execute(
            *CLOSED_FORM, "--source", "hooks", "--data", "cifar10", "--out", "out"
        )
    line = only_line((status, lines[-1:]), 2, "error: no CIFAR-10 test images found", why)
    assert [path for path in (folder / "cache").rglob("*") if path.is_file()] == []
    return f"nothing is kept; {line.replace(url, 'http://127.0.0.1').replace(str(folder), '...')}"


fault(name="download that stops half way")(
    functools.partial(download, "half/test.parquet", "IncompleteRead")
)
fault(name="download of other bytes")(
    functools.partial(download, "test.parquet", "the download is not CIFAR-10")
)


# Two at once


@fault(rounds=6)
def several_processes_on_one_folder(folder, rounds):
    """Two of analysis.responses with other networks, and analysis.compare, at once."""
    lay_out(folder)
    commands = (CLOSED_FORM, [word.replace("a.safe", "b.safe") for word in CLOSED_FORM], COMPARED)
    for number, command in enumerate(commands):
        to_the_end(folder, *command, "--out", f"alone{number}")
    allowed = [files_in(folder / f"alone{number}") for number in range(len(commands))]
    for number in range(rounds):
        out = f"out{number}"
        for process in [start(folder, *command, "--out", out) for command in commands]:
            wait(process, 0)
        found = {path.name: path.read_bytes() for path in (folder / out).iterdir()}
        assert found.keys() == {name for files in allowed for name in files}
        assert all(
            content in [files.get(name) for files in allowed] for name, content in found.items()
        )
    return "every file is whole, and of one of them; nothing else is there"


@fault()
def two_trainings_of_one_network(folder, rounds):
    outcomes = []

    def train_beside():
        process = start(folder, TRAINER, *SMALL_RUN)
        process.join()
        outcomes.append((process.exitcode, (folder / "stderr").read_text().splitlines()))

    with before("models.training.loop.Training.iterate", train_beside):
        assert execute(TRAINER, *SMALL_RUN) == (0, [])
    return f"the first goes on undisturbed; the second: {only_line(*outcomes, 2, 'another trainer is at work here')}"


# Memory


@fault()
def out_of_memory_above_five_images(folder, rounds):
    lay_out(folder)
    assert execute(*HOOKS, "--out", "whole")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        short_of_memory(5, patch)
        status, lines = execute(*HOOKS, "--out", "parts")
    assert status == 0
    whole, parts = (pd.read_csv(Path(out, "responses.csv")) for out in ("whole", "parts"))
    pd.testing.assert_frame_equal(parts, whole, rtol=1e-6)
    return f"the numbers are those of all images, each once; `{'`, `'.join(dict.fromkeys(lines))}`"


@fault()
def out_of_memory_at_one_image(folder, rounds):
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        short_of_memory(0, patch)
        status, lines = execute(*HOOKS, "--out", "out")
    assert files_in(folder / "out") == {}
    return only_line((status, lines[-1:]), 2, "out of memory at one image")


# Ctrl-C


MOMENTS = {  # functions at whose beginning it comes
    "reading": "models.checkpoints.loading.read",
    "decoding": "models.data.formats.decode_images",
    "recognising": "models.checkpoints.loading.match_preprocessing",
    "measuring": "analysis.measuring.measurement.Measurement.add_part",
    "in a forward pass": "torch.nn.Conv2d.forward",
    "drawing": "matplotlib.figure.Figure.savefig",
    "writing": "models.files.os.fsync",
    "renaming": "models.files.os.replace",
}
LATE = ("drawing", "writing", "renaming")
INTERRUPTED = {
    RESPONSES: (tuple(MOMENTS), HOOKS[1:]),
    COMPARE: (
        tuple(MOMENTS),
        ("a.safetensors", "b.safetensors", "--data", "cifar", "--format", "svg"),
    ),
    "analysis.dynamics": (("reading", *LATE), (RUN, "--format", "svg")),
    "analysis.benchmark": (
        ("reading", "measuring", "in a forward pass"),
        ("--networks", "resnet-20", "--images", 20),
    ),
}


def interrupt():
    signal.raise_signal(signal.SIGINT)


def interrupt_moments(command, folder, rounds):
    """All of the results or none are there afterwards, and no temporary file."""
    moments, words = INTERRUPTED[command]
    lay_out(folder)
    if RUN in words:
        assert execute(TRAINER, *SMALL_RUN)[0] == 0
    if "cifar" in words:  # so that only "decoding" writes into a cache
        cifar10.load("cifar")
    for moment in moments[-rounds:]:
        out = folder / f"at {moment}"
        cache = {"LAYER_RESPONSES_CACHE": str(out / "cache")} if moment == "decoding" else {}
        with mock.patch.dict(os.environ, cache), before(MOMENTS[moment], interrupt):
            outcome = execute(command, *words, "--out", out)
        line = only_line(outcome, 130, "interrupted")
        written = {path.suffix for path in out.iterdir() if not path.name.startswith(".")}
        assert written == (
            {".csv", ".json", ".svg"} if moment in ("writing", "renaming") else set()
        )
        assert not list(out.glob(".*"))
    return f"at {', '.join(moments)}: status 130, all of the results or none; {line}"


IMPORTS = {  # words of the real commands, and modules at whose import it comes
    RESPONSES: (
        "--checkpoint a.safetensors --source batchnorm",
        "analysis.cli.items torch torch.nn.modules.conv pandas",
    ),
    COMPARE: (
        "a.safetensors b.safetensors --source batchnorm",
        "torch torch.nn.modules.conv pandas matplotlib.figure",
    ),
    "analysis.dynamics": ("nowhere", "analysis.cli.outputs torch torch.nn.modules.conv pandas"),
    "analysis.benchmark": (
        "--networks resnet-8",
        "analysis.measuring.networks pandas torch matplotlib.figure",
    ),
    "models.train": ("--depth 8", "models.training.recipe torch torch.nn.modules.conv numpy"),
    "models.resnet": (
        "resnet-8",
        "argparse torch torch.nn.modules.conv torch.nn.modules.batchnorm",
    ),
}
SITE = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            signal.raise_signal(int(os.environ["INTERRUPT_BY"]))
sys.meta_path.insert(0, Interrupt())
"""


def interrupt_imports(command, folder, rounds):
    lay_out(folder)
    modules = IMPORTS[command][1].split()
    for module in modules[:rounds]:
        assert signalled(command, module, signal.SIGINT, folder) == (130, "interrupted\n"), module
    return f"at {', '.join(modules)}: status 130, `interrupted`"


def signalled(command, module, number, folder):
    """Exit status and stderr of a command to which a signal comes at the import of a module."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    environment = os.environ | {"PYTHONPATH": f"{folder / 'site'}:{ROOT}"}
    environment |= {"INTERRUPT_AT": module, "INTERRUPT_BY": str(int(number))}
    run = [sys.executable, "-m", command, *IMPORTS[command][0].split()]
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    return done.returncode, done.stderr


for _command, (_moments, _) in INTERRUPTED.items():
    fault(len(_moments), 2, f"Ctrl-C in {_command}")(functools.partial(interrupt_moments, _command))
for _command in IMPORTS:
    fault(4, 1, f"Ctrl-C in imports of {_command}")(functools.partial(interrupt_imports, _command))


@fault(2, 1, f"SIGTERM in imports of {TRAINER}")
def end_imports(folder, rounds):
    modules = ("torch.nn.modules.conv", "torch")
    said = (
        "stopped by SIGTERM at once: what was saved stays, and the same command goes on from there"
    )
    for module in modules[:rounds]:
        assert signalled(TRAINER, module, signal.SIGTERM, folder) == (
            143,
            f"models.train: {said}\n",
        ), module
    return f"at {', '.join(modules)}: status 143, `{said}`"


@fault(3, 1, f"Ctrl-C in {TRAINER}")
def interrupt_a_training(folder, rounds):
    assert execute(TRAINER, *SMALL_RUN, "--out", "whole") == (0, [])
    moments = ("renaming", "writing", "in a forward pass")
    for number, moment in enumerate(moments[:rounds]):
        with before(MOMENTS[moment], interrupt):
            outcome = execute(TRAINER, *SMALL_RUN, "--out", str(number))
        line = only_line(outcome, 130, "stopped by SIGINT", "keeps iteration 1;")
        assert execute(TRAINER, *SMALL_RUN, "--out", str(number)) == (0, [])
        assert_same(folder / str(number) / Path(RUN).name, folder / "whole" / Path(RUN).name)
    return f"at {', '.join(moments)}: status 130 after the iteration, and the same command goes on; {line}"


MEASURE_ALONE = """
import argparse
from analysis import benchmark
from analysis.cli import outputs
job = benchmark.Job("resnet-110", 20_000, 128, None, "cpu", 1)
benchmark.run = lambda args: benchmark.peak_of(job, "plain forward", [])
raise SystemExit(outputs.finish(benchmark.run, argparse.Namespace(device="cpu", debug=False)))
"""


@fault(name="Ctrl-C in a process of analysis.benchmark")
def interrupt_a_process(folder, rounds):
    """It comes to all processes of a terminal, here to the one that measures first, and while that
    one begins.
    """
    command, environment = (
        [sys.executable, "-c", MEASURE_ALONE],
        os.environ | {"PYTHONPATH": str(ROOT)},
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (begun := children.read_text().split()):
        time.sleep(0.01)
    time.sleep(0.1)
    for number in map(int, begun):
        os.kill(number, signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=20)  # it waits for all processes: each has these pipes
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert said == ("", "interrupted: no file is half-written\n")
    assert process.returncode == 130
    return "status 130, `interrupted: no file is half-written`, no process is left"


# The tests and the table


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_nothing_half_done(name, tmp_path):
    function, _, quick = FAULTS[name]
    assert function(tmp_path, quick)


def test_the_table_is_complete():
    rows = [
        line.split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")
    ][2:]
    assert [(name.removeprefix("| "), int(rounds)) for name, rounds, *_ in rows] == [
        (name, rounds) for name, (_, rounds, _) in FAULTS.items()
    ]
    assert "not run" not in DOCUMENT.read_text()
    assert sum(rounds for name, (_, rounds, _) in FAULTS.items() if name.startswith("killed")) >= 50


def write_table():
    """Run every fault with all its rounds and write what came of it."""
    rows = []
    for name, (function, rounds, _) in FAULTS.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            cache = {"LAYER_RESPONSES_CACHE": str(Path(folder, "cache"))}
            with (
                mock.patch.dict(os.environ, cache),
                mock.patch.dict(cifar10.SOURCES, {"test": (), "train": ()}),
            ):
                try:
                    outcome = function(Path(folder), rounds)
                except pytest.skip.Exception as reason:
                    outcome = f"not run: {reason}"
        rows.append(f"| {name} | {rounds} | {outcome.replace(folder, '...')} |")
        print(rows[-1], flush=True)
    head = "# Faults\n\nMade by `python -m tests.test_faults`; killed: by kill -9.\n\n"
    head += "| fault | rounds | what came of it |\n| --- | --- | --- |\n"
    DOCUMENT.write_text(head + "\n".join(rows) + "\n")


if (
    __name__ == "__main__"
):  # imported, so that not every process that it starts runs this file once more
    subprocess.run(
        [sys.executable, "-c", "from tests.test_faults import write_table; write_table()"],
        check=True,
    )
