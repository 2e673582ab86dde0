"""A run in its folder, on small made-up images: what it computes and writes, and interruptions."""

import copy
import csv
import json
import re
import resource
import signal
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from models import closed_form
from models.checkpoints.loading import load
from models.data.preprocessing import mean_image
from models.training import batches, loop
from models.training.loop import Stopped, Training, run
from models.training.recipe import CapturedStep, Recipe, new_network, recompute_statistics
from models.training.state import COLUMNS, locked
from tests.helpers import assert_same_run as assert_same
from tests.helpers import made_up

SMALL = Recipe("residual", 8, iterations=12, batch=32, snapshots=5)
TRAIN, TEST = made_up(100), made_up(20, "test")


def go(folder, recipe=SMALL, stop=lambda: 0):
    return run(recipe, TRAIN, TEST, folder, stop)


def stop_after(iterations):
    asked = iter(range(1, 10_000))
    return lambda: signal.SIGTERM if next(asked) == iterations else 0


def interrupted(folder, recipe=SMALL, after=1):
    with pytest.raises(Stopped, match=f"stopped by SIGTERM: {re.escape(str(folder))} keeps "):
        go(folder, recipe, stop_after(after))


def killed(folder, at):
    """Run until iteration `at`, which is not saved."""
    asked = iter(range(1, 100))

    def kill():
        raise MemoryError("as sudden as kill -9")

    with pytest.raises(MemoryError):
        go(folder, stop=lambda: kill() if next(asked) == at else 0)


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def snapshot_of(folder, iteration=12):
    return load(folder / "snapshots" / f"iteration-{iteration:07}.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    go(folder)
    return folder


@pytest.fixture
def training(tmp_path):
    return Training(SMALL, TRAIN, TEST, tmp_path)


@pytest.fixture
def short_warm_up(monkeypatch):
    """Warm up 8 layers, in windows of three iterations."""
    monkeypatch.setattr("models.training.recipe.WARM_UP_DEPTH", 8)
    monkeypatch.setattr("models.training.recipe.WARM_UP_WINDOW", 3)
    return lambda error: monkeypatch.setattr("models.training.recipe.WARM_UP_ERROR", error)


# What a run computes


def test_warm_up_ends_when_the_training_error_is_below_80_percent(tmp_path, short_warm_up):
    training = Training(replace(SMALL, batch=10, iterations=1000), TRAIN, TEST, tmp_path)
    wrong = [10, 10, 10, 8, 8, 8, 8, 8, 7, 10, 10, 10]  # of 10; exactly 80 % is not below 80 %
    training.step = lambda x, y: torch.tensor([1.0, wrong[training.progress.iteration]])
    rates = []
    for _ in wrong:
        training.iterate()
        rates.append(round(training.optimizer.param_groups[0]["lr"].item(), 6))
    assert rates == [0.01] * 9 + [0.1] * 3


def test_only_deep_networks_warm_up_unasked(tmp_path):
    asked = {depth: replace(SMALL, depth=depth) for depth in (8, 104, 110)}
    warming_up = [Training(r, TRAIN, TEST, tmp_path).progress.warming_up for r in asked.values()]
    assert warming_up == [False, False, True]
    assert Training(replace(SMALL, warm_up=True), TRAIN, TEST, tmp_path).progress.warming_up


def test_a_snapshot_names_the_learning_rate_of_the_step_before(tmp_path, short_warm_up):
    short_warm_up(101)  # % : ends after one window
    go(tmp_path, replace(SMALL, iterations=24, snapshots=9))  # every third iteration
    cards = [snapshot_of(tmp_path, iteration).card["training"] for iteration in (0, 3, 6)]
    assert [card["current_lr"] for card in cards] == pytest.approx([0.01, 0.01, 0.1])


def test_rows_of_metrics(finished):
    rows = rows_of(finished)
    assert tuple(rows[0]) == COLUMNS
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]  # 12 * 32 = 3.84 * 100
    assert [row["iteration"] for row in rows] == [4, 7, 10, 12]
    assert [row["lr"] for row in rows] == [0.1, 0.01, 0.001, 0.001]
    mean = closed_form(snapshot_of(finished).model)["std"].mean()
    assert rows[-1]["mean_std"] == pytest.approx(mean, abs=1e-6)


def test_rows_are_means_over_their_epoch(tmp_path):
    training = Training(replace(SMALL, iterations=7), TRAIN, TEST, tmp_path)
    results = [(1.0, 8), (2.0, 16), (3.0, 0), (4.0, 32), (1.0, 16), (1.0, 16), (4.0, 32)]
    training.step = lambda x, y: torch.tensor(results[training.progress.iteration])
    for _ in results:
        training.iterate()
    rows = rows_of(tmp_path)
    assert [row["loss"] for row in rows] == [2.5, 2.0]
    assert [row["train_error"] for row in rows] == pytest.approx([43.75, 100 * 64 / 96], abs=1e-5)
    shown = r"loss 2, train_error 66\.67, test_error [\d.]+, images/s [\d.e+]+"
    assert re.fullmatch(shown, training.numbers)


def test_test_error_is_that_of_the_network_in_evaluation_mode(training, monkeypatch):
    monkeypatch.setattr(batches, "TEST_BATCH", 7)
    training.network.layer3[0].bn2.running_mean.normal_()  # not what a batch's statistics are
    images, between = training.data.preprocessing(TEST.images), mock.Mock()
    with torch.no_grad():
        right = copy.deepcopy(training.network).eval()(images).argmax(1)
    labels = torch.where(torch.arange(20) < 5, (right + 1) % 10, right)
    training.data.test = training.data.test[0], labels
    assert training.test_error(SMALL, between) == 25
    assert between.call_count == 3
    assert training.network.training


def test_snapshots_are_the_network_at_their_iteration(finished):
    names = [file.name for file in sorted((finished / "snapshots").iterdir())]
    assert names == [f"iteration-{i:07}.safetensors" for i in (0, 3, 6, 9, 12)]
    snapshots = [snapshot_of(finished, iteration) for iteration in (0, 3, 6, 9, 12)]
    counts = [snapshot.model.bn1.num_batches_tracked.item() for snapshot in snapshots]
    assert counts == [0, 3, 6, 9, 12]
    assert [snapshot.card["training"]["iteration"] for snapshot in snapshots] == counts
    rates = [snapshot.card["training"]["current_lr"] for snapshot in snapshots]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.001])
    fresh, first = new_network(SMALL).state_dict(), snapshots[0].model.state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in fresh.items())


def test_finished_network_and_its_card(finished):
    network, last = load(finished / "resnet-8.safetensors"), snapshot_of(finished)
    expected = copy.deepcopy(last.model)
    training = Training(SMALL, TRAIN, TEST, finished.parent / "other")
    recompute_statistics(expected, training.data.statistics_batch())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(network.model.state_dict()[name], tensor), name
    assert network.crop_padding == "zero"
    assert torch.equal(network.preprocessing.mean, mean_image(TRAIN.images))
    card = network.card["training"]
    wanted = {"decay": "weights", "iterations": 12, "seed": 0, "precision": "float32", "lr": 0.1}
    wanted["bn_statistics"] = "one batch of 100 augmented training images"
    assert card.items() >= wanted.items()
    assert card["versions"]["torch"] == torch.__version__
    assert card["images_per_s"] > 0
    with torch.no_grad():
        logits = network.model(network.preprocessing(TEST.images))
    error = 100 * np.mean(logits.argmax(1).numpy() != TEST.labels)
    assert card["test_error"] == pytest.approx(error, abs=0.01)
    mean = closed_form(network.model)["std"].mean()
    assert card["mean_std"] == pytest.approx(mean, abs=1e-5)


@pytest.mark.real
@pytest.mark.slow
def test_learns_from_real_images(real_test, tmp_path):
    some, others = (
        replace(real_test, images=real_test.images[part], labels=real_test.labels[part])
        for part in (slice(2000), slice(2000, 2500))
    )
    run(replace(SMALL, iterations=32, batch=64), some, others, tmp_path)
    [row] = rows_of(tmp_path)
    assert row["loss"] < 2.25  # ln 10 = 2.30
    assert row["test_error"] < 85  # 90 by chance


# What it says


def test_what_a_run_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.training.display.LINE_EVERY", 0)
    interrupted(tmp_path, after=5)
    go(tmp_path)
    said = capsys.readouterr()
    label, first, second = SMALL.label, *said.out.splitlines()
    where = (
        rf"of 12, .+, {torch.get_num_threads()} threads, float32, torch .+; 100 train images, .+"
    )
    assert re.fullmatch(rf"{label}: starts at iteration 0 {where}; {tmp_path}", first)
    assert re.fullmatch(rf"{label}: resumed at iteration 5 {where}; {tmp_path}", second)
    lines = said.err.splitlines()
    numbers = r"loss [\d.]+, train_error [\d.]+, test_error [\d.]+, images/s [\d.]+"
    assert any(re.fullmatch(rf"{label}: 8 of 12, {numbers}", line) for line in lines)
    assert lines[-8:] == [f"{label}, final statistics and test: {i} of 8" for i in range(1, 9)]


# Interruptions


@pytest.mark.parametrize("iterations", [(1,), (4,), (5, 2, 1), (11,), (12,), (13,)])
def test_interrupted_run_ends_with_the_same_tensors(finished, tmp_path, iterations):
    for count in iterations:
        interrupted(tmp_path, after=count)
    go(tmp_path)
    assert_same(tmp_path, finished)


@pytest.mark.parametrize("killed_after", [2, 5, 9])  # a row, a snapshot or both are ahead
def test_killed_between_two_saves_it_repeats_what_was_lost(finished, tmp_path, killed_after):
    interrupted(tmp_path, after=1)
    killed(tmp_path, killed_after - 1)
    go(tmp_path)
    assert_same(tmp_path, finished)


def test_state_is_saved_along_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0)
    killed(tmp_path, 5)
    assert Training(SMALL, TRAIN, TEST, tmp_path).progress.iteration == 4


@pytest.mark.parametrize(("error", "ends"), [(101, 3), (0, 12)])  # %: one window, or never
def test_warm_up_and_its_window_survive_an_interruption(tmp_path, short_warm_up, error, ends):
    short_warm_up(error)
    recipe = replace(SMALL, iterations=24, snapshots=2)
    go(tmp_path / "whole", recipe)
    rates = {row["iteration"]: row["lr"] for row in rows_of(tmp_path / "whole")}
    assert rates.items() >= {4: 0.1 if ends < 4 else 0.01, 7: 0.1 if ends < 7 else 0.01}.items()
    for count in (2, 3):
        interrupted(tmp_path / "parts", recipe, count)
    go(tmp_path / "parts", recipe)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    card = load(tmp_path / "whole" / "resnet-8.safetensors").card["training"]
    assert (card["warm_up"], card["warmed_up"]) == (False, True)  # a deep network, not asked to


def test_a_run_may_continue_elsewhere_and_the_card_says_so(tmp_path):
    interrupted(tmp_path, after=5)
    training = Training(replace(SMALL, precision="bfloat16"), TRAIN, TEST, tmp_path)
    training.save()  # a machine that trains nothing is not named
    training = Training(SMALL, TRAIN, TEST, tmp_path)
    assert len(training.progress.machines) == 1
    go(tmp_path, replace(SMALL, precision="bfloat16"))
    card = load(tmp_path / "resnet-8.safetensors").card["training"]
    here = f"{torch.get_num_threads()} threads, {{}}, torch {re.escape(torch.__version__)}"
    first, then = (f"[^;]+, {here.format(name)}" for name in ("float32", "bfloat16"))
    assert re.fullmatch(f"{first}; from iteration 5 on {then}", card["device_name"])
    assert card["precision"] == "bfloat16"


def test_metrics_never_tell_of_iterations_that_are_lost(tmp_path):
    interrupted(tmp_path, after=5)
    (tmp_path / "metrics.csv").write_text("a row of an iteration that was lost")
    interrupted(tmp_path, after=1)
    assert [row["iteration"] for row in rows_of(tmp_path)] == [4]


# GPUs, with stand-ins for what only a GPU has


def test_capturing_a_step_changes_nothing(monkeypatch, training):
    calls = []
    before = {name: tensor.clone() for name, tensor in training.tensors().items()}

    @contextmanager
    def graph(_):
        assert calls == ["step"] * 3  # the trial steps were taken, and undone
        assert all(torch.equal(tensor, before[name]) for name, tensor in training.tensors().items())
        yield

    def step(x, y):
        calls.append("step")
        return training.step(x, y)

    stream, replay = mock.Mock(), mock.Mock(replay=lambda: calls.append("replay"))
    for name, stand_in in (("Stream", stream), ("current_stream", stream), ("graph", graph)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: replay)
    captured = CapturedStep(step, *training.data.batch(0), list(training.tensors().values()))
    x, y = training.data.batch(1)
    first = captured(x, y)
    assert calls[-1] == "replay"
    assert torch.equal(captured.x, x)
    assert torch.equal(captured.y, y)
    captured.result.zero_()  # as the next replay overwrites it
    assert first[0] > 0


def test_losses_are_looked_at_in_groups_on_a_gpu(tmp_path):
    one, other = (Training(SMALL, TRAIN, TEST, tmp_path) for _ in range(2))
    for i in range(9):
        for training in (one, other):
            training.pending.append(torch.tensor([0.1 * i, i]))
            training.progress.iteration += 1
        one.look()
    other.look()
    assert replace(one.progress, seconds=0) == replace(other.progress, seconds=0)
    assert one.progress.batches == 9
    other.pending = [torch.tensor([1.0, 0]), torch.tensor([torch.nan, 0])]
    other.progress.iteration = 11
    with pytest.raises(FloatingPointError, match=r"the loss is nan at iteration 10, learning rate"):
        other.look()


def test_a_gpu_for_which_nothing_can_be_compiled(training, monkeypatch):
    monkeypatch.setattr("models.training.recipe.compiled_blocks", nullcontext)
    of_the_compiler = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    for error, kind, words in (
        (of_the_compiler("no C compiler"), ValueError, r"\(no C compiler\).*--device cpu trains"),
        (RuntimeError("CUDA error"), RuntimeError, "^CUDA error$"),
    ):
        capture = mock.Mock(side_effect=error)
        monkeypatch.setattr("models.training.recipe.CapturedStep", capture)
        with pytest.raises(kind, match=words):
            training.captured()


# Faults


def test_a_diverging_run_keeps_the_last_good_state(tmp_path):
    recipe = replace(SMALL, lr=1e30)
    said = (
        rf"^{re.escape(str(tmp_path))}: diverged: the loss is (nan|inf) at iteration \d+, learning "
        r"rate 1e\+30; state\.safetensors keeps the last good state \(iteration 0\); the same "
        r"command would diverge again: choose another --seed, or --warm-up$"
    )
    with pytest.raises(FloatingPointError, match=said):
        go(tmp_path, recipe)
    with pytest.raises(FloatingPointError, match=r"choose another --seed$"):
        go(tmp_path / "warm", replace(recipe, warm_up=True))
    training = Training(recipe, TRAIN, TEST, tmp_path)
    assert training.progress.iteration == 0
    assert all(tensor.isfinite().all() for tensor in training.tensors().values())
    assert not (tmp_path / "resnet-8.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(training, tmp_path):
    training.save()
    before = (tmp_path / "state.safetensors").read_bytes()
    training.iterate()
    with torch.no_grad():
        training.network.fc.weight[3, 5] = torch.inf
    said = r"diverged: not all weights are finite at iteration 0, learning rate 0\.1; "
    for write in (training.save, training.snapshot, lambda: training.close_epoch(1, 0.1, print)):
        with pytest.raises(FloatingPointError, match=said):
            write()
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert not (tmp_path / "snapshots").exists()
    assert rows_of(tmp_path) == []


@contextmanager
def full_disk(size):
    """Let no file grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_what_was_saved(finished, tmp_path):
    interrupted(tmp_path, after=5)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    said = rf"^{re.escape(str(tmp_path))}: cannot write: .*File too large.*; what was saved is "
    with full_disk(100_000), pytest.raises(OSError, match=said):
        go(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()} == before
    go(tmp_path)
    assert_same(tmp_path, finished)


def test_a_folder_begun_on_other_images(tmp_path):
    interrupted(tmp_path)
    others = replace(TRAIN, images=255 - TRAIN.images)
    with pytest.raises(ValueError, match="begun on other training images"):
        run(SMALL, others, TEST, tmp_path)


def test_a_state_of_another_length(tmp_path):
    interrupted(tmp_path, after=5)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"damaged \(it is at iteration 5 of 4\); remove it"):
        go(tmp_path, replace(SMALL, iterations=4))


def test_a_state_of_the_old_form_is_refused(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"whatever")
    said = r"state\.pt: a state of version 0\.1, which cannot continue; remove it to train from the"
    with pytest.raises(ValueError, match=said):
        go(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"kind": "residual"'])
def test_a_damaged_configuration(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: damaged; choose another --out"):
        go(tmp_path)


def test_a_folder_of_another_configuration(finished):
    before = (finished / "metrics.csv").read_bytes()
    said = "a run of another configuration: batch is 32 there and 64 here, lr is 0.1 there and 1 h"
    with pytest.raises(ValueError, match=said):
        go(finished, replace(SMALL, batch=64, lr=1, precision="bfloat16"))
    assert (finished / "metrics.csv").read_bytes() == before
    assert json.loads((finished / "config.json").read_text())["precision"] == "float32"


def test_two_trainers_on_one_folder(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match="another trainer is at work here; choose another --out"),
    ):
        go(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    go(tmp_path, replace(SMALL, iterations=1, snapshots=0))  # free again
