"""The command: what it reads of a run, what is printed and written, and what is refused."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import analysis
from analysis.dynamics import rates_of
from analysis.measuring.frame import COLUMNS
from models import build, closed_form
from models.checkpoints import loading
from models.data import cifar10, probe
from models.data.preprocessing import PRESETS
from models.files import sha256
from models.training import loop as training
from models.training.recipe import Recipe
from tests.helpers import (
    EPOCHS,
    RATES,
    RECIPE,
    files_in,
    made_up,
    read_table,
    run,
    snapshot_path,
    succeed,
    write_run,
    write_snapshot,
)

SVG = "--format svg"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / RECIPE.label)


@pytest.fixture
def folder(made, tmp_path):
    """Return a copy of a run of three snapshots and two epochs, to be changed."""
    return shutil.copytree(made, tmp_path / made.name)


def frame_in(out):
    return read_table(out / "dynamics.csv")


def iterations_in(out):
    return frame_in(out)["iteration"].drop_duplicates().tolist()


def leave(folder, *iterations):
    """Leave only these snapshots in the folder of a run."""
    for iteration in set(RATES) - set(iterations):
        snapshot_path(folder, iteration).unlink()


def change_card(path, old, new):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        card = file.metadata()["card"]
    assert old in card
    save_file(tensors, path, metadata={"card": card.replace(old, new)})


# What is measured, printed and written


def test_every_snapshot_by_the_closed_form(folder, out):
    printed = succeed(f"dynamics {folder} --out {out} {SVG}").out.splitlines()
    frame = frame_in(out)
    assert list(frame.columns)[: 2 + len(COLUMNS)] == ["iteration", "lr", *COLUMNS]
    rates = frame.drop_duplicates("iteration").set_index("iteration")["lr"]
    assert rates.to_dict() == RATES
    assert set(frame["network"]) == {"resnet-8"}
    assert set(frame["source"]) == {"batchnorm"}
    assert printed[0] == f"{folder}: resnet-8, iteration 40 of 40, snapshots: 3"
    for line, (iteration, rate) in zip(printed[3:6], RATES.items(), strict=True):
        expected = closed_form(loading.load(snapshot_path(folder, iteration)).model)
        part = frame[frame["iteration"] == iteration]
        for column in ("std", "within", "between"):
            assert part[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-12)
        std = expected["std"]
        numbers = [f"{value:.4f}" for value in (std.mean(), std.min(), std.max())]
        assert line.split() == [str(iteration), f"{rate:g}", *numbers]
    figure = (out / "dynamics.svg").read_text()
    assert all(f">lr = {rate}</text>" in figure for rate in ("0.1", "0.01", "0.001"))
    assert list(files_in(out)) == ["dynamics.csv", "dynamics.json", "dynamics.svg"]
    assert sorted(printed[7:]) == [f"wrote {out / name}" for name in files_in(out)]


def test_where_the_numbers_come_from(folder, out):
    succeed(f"dynamics {folder} --out {out} {SVG}")
    document = json.loads((out / "dynamics.json").read_text())
    names = [f"iteration-{iteration:07}" for iteration in RATES]
    assert list(document) == [*names, "metrics.csv"]
    entry = document["iteration-0000020"]["checkpoint"]
    assert entry["sha256"] == sha256(snapshot_path(folder, 20))
    assert entry["card"]["training"]["iteration"] == 20
    path = folder / "metrics.csv"
    assert document["metrics.csv"] == {"path": str(path), "sha256": sha256(path)}


def test_a_page_to_look_at(folder, out):
    printed = succeed(f"dynamics {folder} --out {out} {SVG} --html").out
    assert printed.endswith(f"wrote {out}/dynamics.html\n")
    page = (out / "dynamics.html").read_text()
    assert "<title>Layer responses of resnet-8 through training</title>" in page
    assert page.count('<tr data-network="0">') == 3 * 7  # every layer of every snapshot
    assert "<summary>iteration-0000020</summary>" in page


def test_measured_on_images(folder, images, out):
    """But for iteration 0, when BN has recorded nothing."""
    warned = succeed(f"dynamics --source hooks {folder} --data {images} --out {out} {SVG}").err
    assert "iteration 0 is left out: BN has recorded nothing yet" in warned
    frame = frame_in(out)
    assert iterations_in(out) == [20, 40]
    assert set(frame["source"]) == {"hooks"}
    assert set(frame["images"]) == {40}
    network = loading.load(snapshot_path(folder, 40)).model
    expected = analysis.measure(network, [PRESETS["imagenet"](cifar10.load(images).images)])["std"]
    found = frame[frame["iteration"] == 40]["std"].tolist()
    assert found == pytest.approx(expected.tolist(), rel=1e-6)
    document = json.loads((out / "dynamics.json").read_text())
    assert document["iteration-0000040"]["data"]["images"] == 40
    note = "fine line: closed form from BN's tensors, not measured on images"
    assert note in (out / "dynamics.svg").read_text()


def test_snapshots_on_the_probe_set(folder, out):
    leave(folder, 40)
    succeed(f"dynamics {folder} --source hooks --data probe --out {out} {SVG}")
    assert set(frame_in(out)["images"]) == {len(probe.load())}
    figure = (out / "dynamics.svg").read_text()
    assert all(line in figure for line in probe.load().note.splitlines())


def test_a_run_that_went_on_elsewhere(folder, out):
    """Its config.json has the last device and precision, the earlier snapshots have theirs."""
    config = asdict(RECIPE) | {"device": "cuda", "precision": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    succeed(f"dynamics {folder} --out {out} {SVG}")


def test_snapshots_of_version_0_1(folder, out):
    """Warm-up was no choice then."""
    for iteration in RATES:
        change_card(snapshot_path(folder, iteration), ', "warm_up": false', "")
    succeed(f"dynamics {folder} --out {out} {SVG}")
    assert iterations_in(out) == list(RATES)


@pytest.mark.parametrize("metrics", [EPOCHS.splitlines()[0], None])
def test_a_run_that_has_just_begun(metrics, folder, out):
    """One snapshot, no epoch."""
    leave(folder, 0)
    (folder / "metrics.csv").unlink()
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    printed = succeed(f"dynamics {folder} --out {out} {SVG}").out
    assert f"{folder}: resnet-8, iteration 0 of 40, snapshots: 1\n" in printed
    assert iterations_in(out) == [0]


@pytest.mark.integration
def test_a_run_of_the_trainer(tmp_path, out):
    """What models.train writes is read here: its last epoch has the mean std of its last snapshot."""
    recipe = Recipe("plain", 8, iterations=2, batch=8, snapshots=3)
    training.run(recipe, made_up(64), made_up(64, "test"), tmp_path / recipe.label)
    succeed(f"dynamics {tmp_path / recipe.label} --out {out} {SVG}")
    frame = frame_in(out)
    assert iterations_in(out) == [0, 1, 2]
    assert set(frame["kind"]) == {"plain"}
    last = read_table(tmp_path / recipe.label / "metrics.csv").iloc[-1]
    mean = frame[frame["iteration"] == 2]["std"].mean()
    assert mean == pytest.approx(last["mean_std"], abs=1e-6)


def test_the_same_command_writes_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        succeed(f"dynamics {folder} --out {tmp_path / name} {SVG} --html")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


def test_the_steps_of_the_learning_rate():
    steps = rates_of(Recipe("residual", 20), [(0, 0.1), (8000, 0.1)])
    assert steps == [(0, 0.1), (32_000, 0.01), (48_000, 0.001)]
    assert rates_of(Recipe("residual", 20, iterations=1), []) == [(0, 0.1)]
    deep = Recipe(
        "residual", 110, iterations=4000
    )  # which warms up, for all that is known to the end
    assert rates_of(deep, [(0, 0.01)]) == [(0, 0.01), (3000, 0.001)]
    steps = rates_of(deep, [(0, 0.01), (391, 0.1), (2500, 0.01)])
    assert steps[:3] == [(0, 0.01), (391, 0.1), (2000, 0.01)]


# Bad input: one line that says what, where and what to do, status 2, and nothing is written


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def edited(**facts):
    return write("config.json", json.dumps(asdict(RECIPE) | facts))


def card(**facts):
    return lambda folder: write_snapshot(folder, 20, **facts)


def twice(folder):
    shutil.copy(snapshot_path(folder, 20), snapshot_path(folder, 30))


def truncated(folder):
    path = snapshot_path(folder, 20)
    path.write_bytes(path.read_bytes()[:1000])


def without_card(folder):
    save_file(build("resnet-8").state_dict(), snapshot_path(folder, 30))


def other_tensors(folder):
    """Write a card that says resnet-8 of a deeper network."""
    change_card(write_snapshot(folder, 20, name="resnet-14"), '"resnet-14"', '"resnet-8"')


CONFIG = "error: {folder}/config.json: damaged ("
METRICS = "error: {folder}/metrics.csv: damaged ("
SNAPSHOT = "error: {folder}/snapshots/iteration-00000"
BAD = {
    "no such folder": (shutil.rmtree, "error: {folder}: no such folder; a run is a folder that"),
    "no run": (lambda f: (f / "config.json").unlink(), "error: {folder}: no config.json in it"),
    "no snapshots": (leave, "error: {folder}/snapshots: no snapshots; python -m models.train "),
    "truncated config": (write("config.json", '{"kind": '), CONFIG),
    "config that is a list": (write("config.json", "[]"), CONFIG),
    "config of deep nesting": (write("config.json", "[" * 100_000), CONFIG),
    "config of other fields": (edited(momentun=0.9), "argument 'momentun'); restore it"),
    "a seed of the trainer's largest": (  # no damage: the snapshots are of another run
        edited(seed=2**64 - 1),
        f"00.safetensors: a snapshot of another run: seed is 0 in its card and {2**64 - 1} in config",
    ),
    "a seed larger than that": (edited(seed=2**64), CONFIG + f"seed is {2**64})"),
    "very many iterations": (edited(iterations=10**30), CONFIG + "iterations is 1000"),
    "a list for a number": (edited(iterations=[8]), CONFIG + "iterations is [8])"),
    "another kind": (edited(kind="<script>"), CONFIG + "it says kind '<script>'"),
    "no learning rate": (edited(lr=float("nan")), CONFIG + "lr is nan)"),
    "config that someone edited": (
        edited(iterations=80),
        SNAPSHOT + "00.safetensors: a snapshot of another run: iterations is 40 in its card and 80",
    ),
    "no column": (write("metrics.csv", "iteration,lr\n391,0.1\n"), METRICS + "no column mean_std)"),
    "a word": (write("metrics.csv", EPOCHS.replace("1.25", "high")), METRICS + "could not convert"),
    "a gap": (write("metrics.csv", EPOCHS.replace("1.25", "")), METRICS + "the iterations do not"),
    "gigantic": (write("metrics.csv", EPOCHS.replace("1.25", "1e308")), METRICS),
    "other order": (write("metrics.csv", EPOCHS.replace("30", "15")), METRICS + "the iterations"),
    "no metrics": (write("metrics.csv", ""), METRICS + "No columns to parse from file"),
    "binary metrics": (lambda f: (f / "metrics.csv").write_bytes(b"\xff\xfe\x00"), METRICS),
    "truncated snapshot": (
        truncated,
        SNAPSHOT + "20.safetensors: damaged or truncated safetensors",
    ),
    "no card": (without_card, SNAPSHOT + "30.safetensors: no snapshot: its card does not say "),
    "no iteration": (card(iteration="20"), SNAPSHOT + "20.safetensors: no snapshot: its card does"),
    "before the first": (card(iteration=-1), SNAPSHOT + "20.safetensors: damaged: its card says"),
    "no rate": (card(current_lr=None), SNAPSHOT + "20.safetensors: no snapshot: its card does not"),
    "rate of NaN": (card(current_lr=float("nan")), "20.safetensors: damaged: its card says"),
    "another network": (
        card(recipe=replace(RECIPE, kind="plain")),
        SNAPSHOT
        + "20.safetensors: a snapshot of another run: kind is plain in its card and residual",
    ),
    "another network's tensors": (
        other_tensors,
        SNAPSHOT + "20.safetensors: it holds resnet-14, and config.json says resnet-8",
    ),
    "one iteration twice": (twice, SNAPSHOT + "30.safetensors: of iteration 20, as is iteration-"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, folder, out):
    spoil, message = BAD[name]
    spoil(folder)
    out.mkdir()
    (out / "dynamics.csv").write_text("from an earlier run")
    assert message.format(folder=folder) in run(f"dynamics {folder} --out {out}").error
    assert files_in(out) == {"dynamics.csv": b"from an earlier run"}


def test_nothing_to_measure_yet(folder, images, out):
    leave(folder, 0)
    error = run(f"dynamics {folder} --source hooks --data {images} --out {out}").error
    assert error.startswith(f"error: {folder}/snapshots: only iteration 0")
    assert files_in(out) == {}


def test_no_images_to_measure_on(folder, out):
    error = run(f"dynamics {folder} --source hooks --data nowhere --out {out}").error
    assert error.startswith("error: nowhere: no such file or folder; --data takes")
    assert files_in(out) == {}


def test_one_source_at_a_time(folder):
    error = run(f"dynamics --source hooks batchnorm {folder}").error
    assert "unrecognized arguments" in error
