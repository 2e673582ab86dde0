"""The command: what it reads of a training, what is printed and written, and what is refused."""

import json
import re
import shutil
from dataclasses import asdict, replace
from html import unescape

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import analysis
from analysis import Recorder
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
    fitting,
    made_up,
    own,
    randomize_norms,
    read_table,
    run,
    save,
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


def steps_in(out):
    return frame_in(out)["step"].drop_duplicates().tolist()


def leave(folder, *iterations):
    """Leave only these snapshots in the folder of a run."""
    for iteration in set(RATES) - set(iterations):
        snapshot_path(folder, iteration).unlink()


def write_untrained(folder):
    """Write the snapshot before the first iteration, in which BN has recorded nothing."""
    card = asdict(RECIPE) | {"iteration": 0, "current_lr": 0.1}
    save(snapshot_path(folder, 0), build("resnet-8"), padding="zero", **card)


def change_card(path, old, new):
    """Change the text of a card; version 0.1 wrote no digest into it."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        card = file.metadata()["card"]
    assert old in card
    card = re.sub(r', "sha256": "\w+"', "", card.replace(old, new))
    save_file(tensors, path, metadata={"card": card})


# What is measured, printed and written


def test_every_snapshot_by_the_closed_form(folder, out):
    printed = succeed(f"dynamics {folder} --out {out} {SVG}").out.splitlines()
    frame = frame_in(out)
    assert list(frame.columns)[: 2 + len(COLUMNS)] == ["step", "lr", *COLUMNS]
    rates = frame.drop_duplicates("step").set_index("step")["lr"]
    assert rates.to_dict() == RATES
    assert set(frame["network"]) == {"resnet-8"}
    assert set(frame["source"]) == {"batchnorm"}
    assert printed[0] == "checkpoints: 3, last step: 40 of 40"
    for line, (iteration, rate) in zip(printed[6:9], RATES.items(), strict=True):
        expected = closed_form(loading.load(snapshot_path(folder, iteration)).model)
        part = frame[frame["step"] == iteration]
        for column in ("std", "within", "between"):
            assert part[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-12)
        std = expected["std"]
        numbers = [f"{value:.4f}" for value in (std.mean(), std.min(), std.max())]
        assert line.split() == [str(iteration), f"{rate:g}", *numbers]
    figure = (out / "dynamics.svg").read_text()
    assert all(f">lr = {rate}</text>" in figure for rate in ("0.1", "0.01", "0.001"))
    assert list(files_in(out)) == ["dynamics.csv", "dynamics.json", "dynamics.svg"]
    assert sorted(printed[10:]) == [f"wrote {out / name}" for name in files_in(out)]


def test_where_the_numbers_come_from(folder, out):
    succeed(f"dynamics {folder} --out {out} {SVG}")
    document = json.loads((out / "dynamics.json").read_text())
    assert list(document) == [*(f"step {step}" for step in RATES), "metrics.csv"]
    entry = document["step 20"]["checkpoint"]
    assert entry["sha256"] == sha256(snapshot_path(folder, 20))
    assert entry["card"]["training"]["iteration"] == 20
    path = folder / "metrics.csv"
    assert document["metrics.csv"] == {"path": str(path), "sha256": sha256(path)}


def test_a_page_to_look_at(folder, out):
    printed = succeed(f"dynamics {folder} --out {out} {SVG} --html").out
    assert printed.endswith(f"wrote {out}/dynamics.html\n")
    page = (out / "dynamics.html").read_text()
    assert "<title>Layer responses of resnet-8 through training</title>" in page
    assert page.count(">layer3.0.conv2<") == 3  # snapshots
    assert "<summary>step 20</summary>" in page


def test_measured_on_images(folder, images, out):
    """But for step 0, when BN has recorded nothing."""
    write_untrained(folder)
    warned = succeed(f"dynamics --source hooks {folder} --data {images} --out {out} {SVG}").err
    assert "step 0 is left out: BN has recorded nothing yet" in warned
    frame = frame_in(out)
    assert steps_in(out) == [20, 40]
    assert set(frame["source"]) == {"hooks"}
    assert set(frame["images"]) == {40}
    network = loading.load(snapshot_path(folder, 40)).model
    expected = analysis.measure(network, [PRESETS["imagenet"](cifar10.load(images).images)])["std"]
    found = frame[frame["step"] == 40]["std"].tolist()
    assert found == pytest.approx(expected.tolist(), rel=1e-6)
    document = json.loads((out / "dynamics.json").read_text())
    assert document["step 40"]["data"]["images"] == 40
    note = "fine line: closed form from BN's tensors, not measured on images"
    assert note in (out / "dynamics.svg").read_text()


def test_snapshots_on_the_probe_set(folder, out):
    leave(folder, 40)
    succeed(f"dynamics {folder} --source hooks --data probe --out {out} {SVG}")
    assert set(frame_in(out)["images"]) == {len(probe.load())}
    words = re.sub("<[^>]*>", " ", (out / "dynamics.svg").read_text()).split()
    digest = sha256(snapshot_path(folder, 40))
    assert unescape(" ".join(words)).count(" ".join(probe.load().note_for([digest]).split())) == 1


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
    assert steps_in(out) == list(RATES)


@pytest.mark.parametrize("metrics", [EPOCHS.splitlines()[0], None])
def test_a_run_that_has_just_begun(metrics, folder, out):
    """One snapshot, no epoch."""
    leave(folder, 0)
    (folder / "metrics.csv").unlink()
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    printed = succeed(f"dynamics {folder} --out {out} {SVG}").out
    assert "checkpoints: 1, last step: 0 of 40\n" in printed
    assert steps_in(out) == [0]


@pytest.mark.integration
def test_a_run_of_the_trainer(tmp_path, out):
    """What models.train writes is read here: its last epoch has the mean std of its last snapshot."""
    recipe = Recipe("plain", 8, iterations=2, batch=8, snapshots=3)
    training.run(recipe, made_up(64), made_up(64, "test"), tmp_path / recipe.label)
    succeed(f"dynamics {tmp_path / recipe.label} --out {out} {SVG}")
    frame = frame_in(out)
    assert steps_in(out) == [0, 1, 2]
    assert set(frame["kind"]) == {"plain"}
    last = read_table(tmp_path / recipe.label / "metrics.csv").iloc[-1]
    mean = frame[frame["step"] == 2]["std"].mean()
    assert mean == pytest.approx(last["mean_std"], abs=1e-6)


def test_the_same_command_writes_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        succeed(f"dynamics {folder} --out {tmp_path / name} {SVG} --html")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


# The checkpoints of any training


def checkpoint(path, seed, *, name="resnet-8", **facts):
    """Write a checkpoint as other people's scripts do: without a card. Return its network."""
    network = fitting(name)
    torch.manual_seed(seed)
    randomize_norms(network)
    torch.save({"model": network.state_dict(), **facts}, path)
    return network


def test_files_in_the_order_of_the_numbers_in_their_names(tmp_path, out):
    networks = {step: checkpoint(tmp_path / f"epoch{step}.pth", step) for step in (1, 10, 2)}
    words = " ".join(f"epoch{step}.pth" for step in networks)
    printed = succeed(f"dynamics {words} --out {out} {SVG}").out
    assert "checkpoints: 3, last step: 10\n" in printed
    frame = frame_in(out)
    assert steps_in(out) == [1, 2, 10]
    assert frame["lr"].isna().all()
    for step, network in networks.items():
        expected = closed_form(network)["std"].tolist()
        assert frame[frame["step"] == step]["std"].tolist() == pytest.approx(expected, rel=1e-6)
    figure = (out / "dynamics.svg").read_text()
    assert ">step</text>" in figure
    assert "lr = " not in figure


def test_only_the_kind_is_unknown(tmp_path, out):
    """Residual networks and plain ones have the same tensors."""
    checkpoint(tmp_path / "a.pth", 0, name="plain-8", step=2)
    printed = succeed(f"dynamics a.pth --out {out} {SVG}").out
    assert "step 2: network resnet-8 (assumed)\n" in printed
    assert set(frame_in(out)["kind"]) == {"residual"}


def test_kinds_that_the_images_tell_apart(tmp_path, images, out):
    for step, name in enumerate(("resnet-8", "plain-8")):
        torch.save(fitting(name).state_dict(), tmp_path / f"net_{step}.pth")
    line = f"dynamics net_0.pth net_1.pth --source hooks --data {images} --out {out}"
    message = "error: net_0.pth: some checkpoints are taken for resnet-8, some for plain-8; --model"
    assert run(line).error.startswith(message)
    assert files_in(out) == {}


def test_a_network_of_the_users(tmp_path, out):
    """The closed form needs nobody to say what it is; --model gives it a name."""
    options = own(tmp_path, names=("net_1", "net_2")).split("--model ")[1].split()[0]
    for model, name in (("", "network"), (f"--model {options}", "Sequential")):
        succeed(f"dynamics net_1.pth net_2.pth {model} --out {out} {SVG}")
        assert set(frame_in(out)["network"]) == {name}


def test_a_folder_with_two_networks(tmp_path, out):
    (tmp_path / "all").mkdir()
    for step, name in ((1, "resnet-8"), (2, "resnet-14")):
        checkpoint(tmp_path / "all" / f"step{step}.pth", step, name=name)
    error = run(f"dynamics all --out {out}").error
    assert error.startswith("error: all/step2.pth: another network than in all/step1.pth: ")
    assert files_in(out) == {}


def test_folders_of_transformers(tmp_path, out):
    """All files have the same name."""
    for step in (5, 10):
        path = tmp_path / "all" / f"checkpoint-{step}" / "pytorch_model.bin"
        path.parent.mkdir(parents=True)
        checkpoint(path, step)
    succeed(f"dynamics all --out {out} {SVG}")
    document = json.loads((out / "dynamics.json").read_text())
    paths = {step: entry["checkpoint"]["path"] for step, entry in document.items()}
    assert paths == {f"step {step}": f"all/checkpoint-{step}/pytorch_model.bin" for step in (5, 10)}


@pytest.mark.parametrize("damage", ["truncated", "NaN"])
def test_a_snapshot_that_cannot_be_read_is_skipped_and_said(damage, folder, out):
    """A running training may be writing it."""
    path = write_snapshot(folder, 20, current_lr=float("nan") if damage == "NaN" else 0.1)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    warned = succeed(f"dynamics {folder} --out {out} {SVG}").err
    assert warned.startswith(f"warning: {path}: damaged")
    assert warned.endswith("; skipped\n")
    assert steps_in(out) == [0, 40]


def test_a_snapshot_without_a_learning_rate(folder, out):
    write_snapshot(folder, 20, current_lr=None)
    succeed(f"dynamics {folder} --out {out} {SVG}")
    missing = frame_in(out)["lr"].isna()
    assert set(frame_in(out)["step"][missing]) == {20}


# What a Recorder saved


@pytest.fixture
def recorded(tmp_path):
    """Return a dynamics.csv of two steps."""
    network = build("resnet-8")
    recorder = Recorder(network, every=10)
    for step in (10, 20):
        randomize_norms(network)
        recorder.record(step)
    recorder.save(tmp_path / "dynamics.csv")
    return tmp_path / "dynamics.csv"


def test_what_a_recorder_saved(recorded, out):
    succeed(f"dynamics {recorded} --out {out} {SVG}")
    assert (out / "dynamics.csv").read_bytes() == recorded.read_bytes()
    document = json.loads((out / "dynamics.json").read_text())
    assert document == {"dynamics.csv": {"path": str(recorded), "sha256": sha256(recorded)}}
    assert "ResNet-8" in (out / "dynamics.svg").read_text()


def test_what_the_command_wrote_is_drawn_again(folder, tmp_path):
    succeed(f"dynamics {folder} --out once {SVG}")
    succeed(f"dynamics once/dynamics.csv --out twice {SVG}")
    written = [tmp_path / name / "dynamics.csv" for name in ("once", "twice")]
    assert written[0].read_bytes() == written[1].read_bytes()


EDITS = {
    "no step": (r"\A", "row,"),
    "no std": (",std,", ",other,"),
    "half a step": (r"(?m)^20,", "20.5,"),
    "a step of words": (r"(?m)^20,", "last,"),
    "one step twice": (r"(?m)^20,", "10,"),
    "a word for a number": (",batchnorm", ",batchnorm,"),
    "a formula": (",resnet-8,", ",=1+1,"),
    "no rows": (r"\n.*", "\n"),
    "nothing": (r".*", ""),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_file_that_no_recorder_saved(name, recorded, out):
    pattern, new = EDITS[name]
    text = re.sub(pattern, new, recorded.read_text(), flags=re.DOTALL)
    assert text != recorded.read_text()
    recorded.write_text(text)
    error = run(f"dynamics {recorded} --out {out}").error
    assert error.startswith(f"error: {recorded}: not a frame that Recorder.save wrote: ")
    assert files_in(out) == {}


def test_no_such_file_and_one_too_many(recorded, out):
    assert run(f"dynamics nowhere.csv --out {out}").error.startswith("error: nowhere.csv: no such")
    error = run(f"dynamics {recorded} net.pth --out {out}").error
    assert error == "error: net.pth: a dynamics.csv is drawn by itself; leave the others out"


def test_the_steps_of_the_learning_rate():
    steps = rates_of(Recipe("residual", 20), [(0, 0.1), (8000, 0.1)])
    assert steps == [(0, 0.1), (32_000, 0.01), (48_000, 0.001)]
    assert rates_of(Recipe("residual", 20, iterations=1), []) == [(0, 0.1)]
    deep = Recipe("residual", 110, iterations=4000)  # warms up, as far as known to the end
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


def without_card(folder):
    save_file(build("resnet-8").state_dict(), snapshot_path(folder, 30))


def metrics(old, new):
    return write("metrics.csv", EPOCHS.replace(old, new))


PLAIN = replace(RECIPE, kind="plain")
METRICS = "error: {folder}/metrics.csv: damaged ("
SNAPSHOT = "error: {folder}/snapshots/iteration-00000"
ANOTHER = "20.safetensors: a snapshot of another run: "
BAD = {
    "no such folder": (shutil.rmtree, "error: {folder}: no such file; a checkpoint is"),
    "no config": (lambda f: (f / "config.json").unlink(), "error: {folder}: no checkpoint in it; "),
    "no snapshots": (leave, "error: {folder}/snapshots: no checkpoint in it; a checkpoint is"),
    "cut config": (write("config.json", "{"), "error: {folder}/config.json: damaged ("),
    "deep config": (write("config.json", "[" * 100_000), "error: {folder}/config.json: damaged ("),
    "other fields": (edited(momentun=0.9), "argument 'momentun'); restore it"),
    "other length": (
        edited(iterations=80),
        "00.safetensors: a snapshot of another run: iterations",
    ),
    "no number": (edited(iterations=[8]), "is 40 in its card and [8] in config.json; move it away"),
    "rate of NaN": (edited(lr=float("nan")), "lr is 0.1 in its card and nan in config.json"),
    "other kind": (card(recipe=PLAIN), SNAPSHOT + ANOTHER + "kind is plain in its card and res"),
    "no column": (metrics("mean_std", "std"), METRICS + "Usecols do not match columns"),
    "a word": (metrics("1.25", "high"), METRICS + "could not convert"),
    "a gap": (metrics("1.25", ""), METRICS + "the iterations do not ascend, or not all numbers"),
    "gigantic": (metrics("1.25", "1e308"), METRICS + "the iterations do not ascend, or not all"),
    "other order": (metrics("30", "15"), METRICS + "the iterations do not ascend"),
    "no metrics": (write("metrics.csv", ""), METRICS + "No columns to parse from file"),
    "endless line": (write("metrics.csv", "iteration," * 1000), METRICS + "its first line has"),
    "binary metrics": (lambda f: (f / "metrics.csv").write_bytes(b"\xff\xfe\x00"), METRICS),
    "no card": (without_card, SNAPSHOT + "30.safetensors: its step is from its name, that of "),
    "before the first": (card(iteration=-1), SNAPSHOT + "20.safetensors: its step is from its nam"),
    "one step twice": (twice, SNAPSHOT + "30.safetensors: step 20, as {folder}/snapshots/itera"),
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
    leave(folder)
    write_untrained(folder)
    error = run(f"dynamics {folder} --source hooks --data {images} --out {out}").error
    assert error.startswith(f"error: {snapshot_path(folder, 0)}: BN has recorded nothing yet")
    assert files_in(out) == {}
