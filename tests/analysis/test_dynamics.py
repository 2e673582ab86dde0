"""The command: what it reads of a run, what is printed and written, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import analysis
from analysis.dynamics import find_steps, main
from analysis.measuring.frame import COLUMNS
from models import build, closed_form
from models.checkpoints import loading
from models.data import cifar10, probe
from models.data.preprocessing import PRESETS
from models.files import sha256
from models.training import loop as training
from models.training.recipe import Recipe
from tests.analysis.cli.test_items import cifar  # noqa: F401 (a fixture)
from tests.conftest import ROOT
from tests.models.checkpoints.test_recognition import blobs, record

RECIPE = Recipe("residual", 8, iterations=40, snapshots=3)
RATES = {0: 0.1, 20: 0.1, 40: 0.001}  # of the steps that led to the snapshots
EPOCHS = "epoch,iteration,loss,train_error,test_error,lr,mean_std\n1,15,2.0,90,90,0.1,1.5\n2,30,1.9,80,80,0.01,1.25\n"


def execute(*words):
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def snapshot(folder, number, recipe=RECIPE, network=None, **facts):
    """A snapshot with BN tensors of its own, in a run's folder."""
    torch.manual_seed(number)
    network = record(build(network or recipe.network), PRESETS["imagenet"](blobs(20, seed=0)))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    card = asdict(recipe) | {"iteration": number, "current_lr": RATES[number]} | facts
    path = folder / "snapshots" / f"iteration-{number:07}.safetensors"
    loading.save(path, network, PRESETS["imagenet"], crop_padding="zero", training=card)
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A run of three snapshots and two epochs, as models.train leaves it."""
    folder = tmp_path_factory.mktemp("runs") / RECIPE.label
    for iteration in RATES:
        snapshot(folder, iteration)
    (folder / "config.json").write_text(json.dumps(asdict(RECIPE)))
    (folder / "metrics.csv").write_text(EPOCHS)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(made, tmp_path / "runs" / made.name)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def formula(folder, iteration):
    return closed_form(
        loading.load(folder / "snapshots" / f"iteration-{iteration:07}.safetensors").model
    )


def test_snapshots_on_the_probe_set(folder, out):
    for iteration in (0, 20):
        (folder / "snapshots" / f"iteration-{iteration:07}.safetensors").unlink()
    assert (
        execute(folder, "--source", "hooks", "--data", "probe", "--out", out, "--format", "svg")
        == 0
    )
    assert set(pd.read_csv(out / "dynamics.csv")["images"]) == {len(probe.load())}
    assert all(
        line in (out / "dynamics.svg").read_text() for line in probe.load().note.splitlines()
    )


def test_a_run_that_went_on_elsewhere(folder, out):
    """Its config.json has the last device and precision, the earlier snapshots theirs."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"device": "cuda", "precision": "bfloat16"})
    )
    assert execute(folder, "--out", out) == 0


def test_every_snapshot_by_the_closed_form(folder, out, capsys):
    assert execute(folder, "--out", out) == 0
    frame = pd.read_csv(out / "dynamics.csv")
    assert list(frame.columns) == ["iteration", "lr", *COLUMNS]
    assert frame.drop_duplicates("iteration")[["iteration", "lr"]].to_numpy().tolist() == [
        list(p) for p in RATES.items()
    ]
    assert set(frame["network"]) == {"resnet-8"}
    assert set(frame["source"]) == {"batchnorm"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{folder}: resnet-8, iteration 40 of 40, snapshots: 3"
    for line, (iteration, rate) in zip(printed[3:6], RATES.items(), strict=True):
        expected = formula(folder, iteration)
        part = frame[frame["iteration"] == iteration]
        for column in ("std", "within", "between"):
            assert part[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-12)
        std = expected["std"]
        assert line.split() == [
            str(iteration),
            f"{rate:g}",
            *(f"{x:.4f}" for x in (std.mean(), std.min(), std.max())),
        ]
    names = ["dynamics.csv", "dynamics.json", "dynamics.pdf", "dynamics.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(printed[7:]) == [f"wrote {out / name}" for name in names]


def test_the_figure_shows_snapshots_epochs_and_rates(folder, out, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        "analysis.dynamics.as_images",
        lambda name, figure, formats: shown.setdefault(name, figure) and {},
    )
    assert execute(folder, "--out", out) == 0
    upper, lower, _ = shown["dynamics"].axes
    assert upper.collections[0].get_array().shape == (7, 3)
    fine, points = lower.lines[:2]
    means = [formula(folder, iteration)["std"].mean() for iteration in RATES]
    assert points.get_ydata().tolist() == pytest.approx(means)
    assert fine.get_xdata().tolist() == [0, 15, 20, 30, 40]
    assert fine.get_ydata().tolist() == pytest.approx([means[0], 1.5, means[1], 1.25, means[2]])
    assert [line.get_xdata()[0] for line in lower.lines[2:]] == [20, 30]
    assert [text.get_text() for text in lower.texts] == ["lr = 0.1", "lr = 0.01", "lr = 0.001"]


def test_snapshots_of_before_warm_up_was_a_choice(folder, out):
    for path in (folder / "snapshots").iterdir():
        change_card(path, ', "warm_up": false', "")
    assert execute(folder, "--out", out) == 0
    assert sorted(set(pd.read_csv(out / "dynamics.csv")["iteration"])) == list(RATES)


def test_where_the_numbers_come_from(folder, out):
    assert execute(folder, "--out", out) == 0
    document = json.loads((out / "dynamics.json").read_text())
    assert list(document) == [
        "iteration-0000000",
        "iteration-0000020",
        "iteration-0000040",
        "metrics.csv",
    ]
    path = folder / "snapshots" / "iteration-0000020.safetensors"
    assert document["iteration-0000020"]["checkpoint"]["sha256"] == sha256(path)
    assert document["iteration-0000020"]["checkpoint"]["card"]["training"]["iteration"] == 20
    assert document["metrics.csv"] == {
        "path": str(folder / "metrics.csv"),
        "sha256": sha256(folder / "metrics.csv"),
    }


def test_a_page_to_look_at(folder, out, capsys):
    assert execute(folder, "--out", out, "--html") == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}/dynamics.html\n")
    page = (out / "dynamics.html").read_text()
    assert "<title>Layer responses of resnet-8 through training</title>" in page
    assert page.count('<tr data-network="0">') == 3 * 7  # every layer of every snapshot
    assert "<summary>iteration-0000020</summary>" in page


def test_measured_on_images(folder, cifar, out, capsys):  # noqa: F811
    """But for iteration 0, where BN has recorded nothing."""
    assert (
        execute("--source", "hooks", folder, "--data", cifar, "--out", out, "--format", "svg") == 0
    )
    shown = capsys.readouterr()
    assert (
        "iteration 0 is left out: BN has recorded nothing yet (--source batchnorm shows it)\n"
        in shown.err
    )
    frame = pd.read_csv(out / "dynamics.csv")
    assert frame["iteration"].drop_duplicates().tolist() == [20, 40]
    assert set(frame["source"]) == {"hooks"}
    assert set(frame["images"]) == {20}
    network = loading.load(folder / "snapshots" / "iteration-0000040.safetensors").model
    expected = analysis.measure(network, [PRESETS["imagenet"](cifar10.load(cifar).images)])["std"]
    assert frame[frame["iteration"] == 40]["std"].tolist() == pytest.approx(
        expected.tolist(), rel=1e-6
    )
    document = json.loads((out / "dynamics.json").read_text())
    assert document["iteration-0000040"]["data"]["images"] == 20
    assert (
        "fine line: closed form from BN's tensors, not measured on images"
        in (out / "dynamics.svg").read_text()
    )


def test_a_run_that_has_just_begun(folder, out, capsys):
    """One snapshot, no epoch."""
    for iteration in (20, 40):
        (folder / "snapshots" / f"iteration-{iteration:07}.safetensors").unlink()
    for metrics in (EPOCHS.splitlines()[0], None):
        (folder / "metrics.csv").unlink() if metrics is None else (
            folder / "metrics.csv"
        ).write_text(metrics)
        assert execute(folder, "--out", out) == 0
        assert f"{folder}: resnet-8, iteration 0 of 40, snapshots: 1\n" in capsys.readouterr().out
    assert set(pd.read_csv(out / "dynamics.csv")["iteration"]) == {0}


def test_a_real_run(shared_cifar10, tmp_path, out):
    """What models.train writes is what is read here: its last epoch has the mean std of its last
    snapshot.
    """
    recipe = Recipe("plain", 8, iterations=2, batch=8, snapshots=3)
    parts = [
        replace(part, images=part.images[:64], labels=part.labels[:64])
        for part in (cifar10.load(shared_cifar10, split) for split in ("train", "test"))
    ]
    training.run(recipe, *parts, tmp_path / recipe.label)
    assert execute(tmp_path / recipe.label, "--out", out) == 0
    frame = pd.read_csv(out / "dynamics.csv")
    assert frame["iteration"].drop_duplicates().tolist() == [0, 1, 2]
    assert set(frame["kind"]) == {"plain"}
    last = pd.read_csv(tmp_path / recipe.label / "metrics.csv").iloc[-1]
    assert frame[frame["iteration"] == 2]["std"].mean() == pytest.approx(last["mean_std"], abs=1e-6)


def test_the_same_command_writes_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        assert (
            execute(folder, "--out", tmp_path / name, "--format", "svg", "pdf", "png", "--html")
            == 0
        )
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        f"dynamics.{suffix}" for suffix in ("csv", "json", "svg", "pdf", "png", "html")
    }
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_steps_of_the_learning_rate():
    assert find_steps(Recipe("residual", 20), [(0, 0.1), (8000, 0.1)]) == [
        (0, 0.1),
        (32_000, 0.01),
        (48_000, 0.001),
    ]
    assert find_steps(Recipe("residual", 20, iterations=1), []) == [(0, 0.1)]
    deep = Recipe("residual", 110, iterations=4000)
    assert find_steps(deep, [(0, 0.01)]) == [
        (0, 0.01),
        (3000, 0.001),
    ]  # for all that is known it warms up to the end
    assert find_steps(deep, [(0, 0.01), (391, 0.1), (2500, 0.01)])[:3] == [
        (0, 0.01),
        (391, 0.1),
        (2000, 0.01),
    ]


def test_help_is_quick():
    code = "import sys; from analysis.dynamics import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'pandas', 'matplotlib') if name in sys.modules])"
    words = [sys.executable, "-c", code]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("\n[]\n")
    assert "--source {hooks,batchnorm}" in shown


# Bad input: one line that says what, where and what to do, status 2, and nothing is written


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def edited(**facts):
    return write("config.json", json.dumps(asdict(RECIPE) | facts))


def twice(folder):
    snapshots = folder / "snapshots"
    shutil.copy(
        snapshots / "iteration-0000020.safetensors", snapshots / "iteration-0000030.safetensors"
    )


def truncated(folder):
    path = folder / "snapshots" / "iteration-0000020.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_card(folder):
    save_file(
        build("resnet-8").state_dict(), folder / "snapshots" / "iteration-0000030.safetensors"
    )


def other_tensors(folder):
    """A card that says resnet-8 of a deeper network."""
    change_card(snapshot(folder, 20, network="resnet-14"), '"resnet-14"', '"resnet-8"')


def change_card(path, old, new):
    with safe_open(path, "pt") as file:
        tensors, card = (
            {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            file.metadata()["card"],
        )
    assert old in card
    save_file(tensors, path, metadata={"card": card.replace(old, new)})


SNAPSHOT = "error: {folder}/snapshots/iteration-00000"
METRICS = "error: {folder}/metrics.csv: damaged ("
BAD = {
    "no such folder": (
        shutil.rmtree,
        "error: {folder}: no such folder; a run is a folder that python -m models.train makes, such as runs/resnet-20-",
    ),
    "no run": (
        lambda f: (f / "config.json").unlink(),
        "error: {folder}: no config.json in it; a run is a folder that",
    ),
    "no snapshots": (
        lambda f: shutil.rmtree(f / "snapshots"),
        "error: {folder}/snapshots: no snapshots; python -m models.train --snapshots 9 makes a run with some",
    ),
    "damaged config": (
        write("config.json", '{"kind": '),
        "error: {folder}/config.json: damaged (Expecting value: line 1 column 10 (char 9)); restore it: a snapshot's "
        "card holds the same values",
    ),
    "config that is a list": (write("config.json", "[]"), "error: {folder}/config.json: damaged ("),
    "config of other fields": (
        edited(momentun=0.9),
        "got an unexpected keyword argument 'momentun'); restore it",
    ),
    "a seed of the trainer's largest": (  # no damage: the snapshots are of another
        edited(seed=2**64 - 1),
        f"00.safetensors: a snapshot of another run: seed is 0 in its card and {2**64 - 1} in config.json; move",
    ),
    "a seed larger than that": (
        edited(seed=2**64),
        f"config.json: damaged (seed is {2**64}); restore it",
    ),
    "config that someone edited": (
        edited(iterations=80),
        SNAPSHOT
        + "00.safetensors: a snapshot of another run: iterations is 40 in its card and 80 in config.json; "
        "move it away",
    ),
    "metrics without a column": (
        write("metrics.csv", "epoch,iteration,lr\n1,391,0.1\n"),
        METRICS + "no column mean_std); move it away, and the snapshots are drawn without it",
    ),
    "metrics of words": (
        write("metrics.csv", EPOCHS.replace("1.25", "high")),
        METRICS + "could not convert string to",
    ),
    "metrics with a gap": (
        write("metrics.csv", EPOCHS.replace("1.25", "")),
        METRICS + "the iterations do not ascend, ",
    ),
    "metrics of other order": (
        write("metrics.csv", EPOCHS.replace("30", "15")),
        METRICS + "the iterations do not asc",
    ),
    "empty metrics": (write("metrics.csv", ""), METRICS + "No columns to parse from file"),
    "binary metrics": (lambda f: (f / "metrics.csv").write_bytes(b"\xff\xfe\x00"), METRICS),
    "damaged snapshot": (
        truncated,
        SNAPSHOT + "20.safetensors: damaged or truncated safetensors file",
    ),
    "snapshot without a card": (
        without_card,
        SNAPSHOT
        + "30.safetensors: no snapshot: its card does not say iteration and learning rate; move it away",
    ),
    "snapshot of no iteration": (
        lambda f: snapshot(f, 20, iteration="20"),
        SNAPSHOT
        + "20.safetensors: no snapshot: its card does not say iteration and learning rate; move it away",
    ),
    "snapshot of no learning rate": (
        lambda f: snapshot(f, 20, current_lr=None),
        SNAPSHOT
        + "20.safetensors: no snapshot: its card does not say iteration and learning rate; move it away",
    ),
    "another network": (
        lambda f: snapshot(f, 20, recipe=replace(RECIPE, kind="plain")),
        SNAPSHOT
        + "20.safetensors: a snapshot of another run: kind is plain in its card and residual in config.json",
    ),
    "another network's tensors": (
        other_tensors,
        SNAPSHOT
        + "20.safetensors: it holds resnet-14, and config.json says resnet-8; move it away",
    ),
    "one iteration twice": (
        twice,
        SNAPSHOT
        + "30.safetensors: of iteration 20, as is iteration-0000020.safetensors; move one of them away",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, folder, out, capsys):
    spoil, message = BAD[name]
    spoil(folder)
    out.mkdir()
    (out / "dynamics.csv").write_text("from an earlier run")
    assert execute(folder, "--out", out) == 2
    shown = capsys.readouterr().err
    assert message.format(folder=folder) in shown
    assert len(shown.splitlines()) == 1
    assert [path.name for path in out.iterdir()] == ["dynamics.csv"]
    assert (out / "dynamics.csv").read_text() == "from an earlier run"


def test_nothing_to_measure_yet(folder, cifar, out, capsys):  # noqa: F811
    for iteration in (20, 40):
        (folder / "snapshots" / f"iteration-{iteration:07}.safetensors").unlink()
    assert execute(folder, "--source", "hooks", "--data", cifar, "--out", out) == 2
    message = "only iteration 0, where BN has recorded nothing yet: --source batchnorm computes it; or wait for the next"
    assert f"error: {folder}/snapshots: {message} snapshot\n" == capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_no_images_to_measure_on(folder, tmp_path, out, capsys):
    assert execute(folder, "--source", "hooks", "--data", tmp_path / "nowhere", "--out", out) == 2
    assert re.search(
        "^error: .*nowhere: no such file or folder; --data takes",
        capsys.readouterr().err,
        re.MULTILINE,
    )
    assert list(out.iterdir()) == []


def test_one_source_at_a_time(folder, capsys):
    assert execute("--source", "hooks", "batchnorm", folder) == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_the_earlier_results(folder, out, monkeypatch, capsys):
    assert execute(folder, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (folder / "snapshots" / "iteration-0000020.safetensors").unlink()
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda *a, **o: (_ for _ in ()).throw(OSError(28, "full")),
    )
    assert execute(folder, "--out", out) == 2
    assert "error: " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
