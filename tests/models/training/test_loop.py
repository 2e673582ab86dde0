"""A run in its folder, on small made-up images: what it computes and writes, and that it can be
killed.
"""

import copy
import csv
import errno
import fcntl
import io
import json
import re
import resource
import signal
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tqdm import tqdm

from models import closed_form
from models.checkpoints.loading import load
from models.data import cifar10
from models.data.preprocessing import mean_image, per_pixel
from models.training.loop import STATISTICS_IMAGES, Stretch, Training, run
from models.training.recipe import (
    CROP,
    STATISTICS,
    CapturedStep,
    Fault,
    Recipe,
    batch_indices,
    new_network,
    recompute_statistics,
)

SMALL = Recipe("residual", 8, iterations=12, batch=32, snapshots=5)


def made_up(count, split="train", seed=0):
    random = np.random.default_rng([seed, count])
    images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return cifar10.Cifar10(
        images, random.integers(0, 10, count), split, Path("nowhere"), "made up", "", ""
    )


TRAIN, TEST = made_up(100), made_up(20, "test")


def go(folder, recipe=SMALL, stop=lambda: 0):
    return run(recipe, TRAIN, TEST, folder, stop)


def stop_after(iterations, number=signal.SIGTERM):
    asked = iter(range(1, 10_000))
    return lambda: number if next(asked) == iterations else 0


def kill():
    raise MemoryError("as sudden as kill -9")


def results(folder):
    """Everything a run leaves, but for times: tensors by file, and the rows of metrics.csv."""
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.safetensors"))
    tensors = {str(file): load(folder / file).model.state_dict() for file in files}
    return tensors, (folder / "metrics.csv").read_text()


def assert_same(one, other):
    tensors, rows = results(one)
    others, other_rows = results(other)
    assert rows == other_rows
    assert tensors.keys() == others.keys()
    for file, state in tensors.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, others[file][name]), (file, name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    go(folder)
    return folder


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_warm_up_ends_when_the_training_error_is_below_80_percent(tmp_path, monkeypatch):
    monkeypatch.setattr("models.training.recipe.WARM_UP_DEPTH", 8)
    monkeypatch.setattr("models.training.loop.WARM_UP_WINDOW", 3)
    training = Training(replace(SMALL, batch=10, iterations=1000), TRAIN, TEST, tmp_path)
    wrong = [
        10,
        10,
        10,
        8,
        8,
        8,
        8,
        8,
        7,
        10,
        10,
        10,
    ]  # of 10 images each; exactly 80 % is not below 80 %
    training.step = lambda x, y: torch.tensor([1.0, wrong[training.progress.iteration]])
    rates = []
    for _ in wrong:
        training.iterate()
        rates.append(round(training.optimizer.param_groups[0]["lr"].item(), 6))
    assert rates == [0.01] * 9 + [0.1] * 3


def test_a_warm_up_that_ends_at_a_snapshot(tmp_path, monkeypatch):
    """The learning rate that is told of is that of the step before, not of the next."""
    monkeypatch.setattr("models.training.recipe.WARM_UP_DEPTH", 8)
    for name, value in (("WINDOW", 3), ("ERROR", 101)):
        monkeypatch.setattr(f"models.training.loop.WARM_UP_{name}", value)
    go(tmp_path, replace(SMALL, iterations=24, snapshots=9))  # every third iteration
    cards = [load(file).card["training"] for file in sorted((tmp_path / "snapshots").iterdir())]
    rates = {card["iteration"]: card["current_lr"] for card in cards}
    assert rates.items() >= {0: 0.01, 3: 0.01, 6: 0.1}.items()
    training = Training(SMALL, TRAIN, TEST, tmp_path / "other")
    training.progress.iteration, training.saved = 3, 0
    with torch.no_grad():
        training.network.fc.weight[0, 0] = torch.nan
    with pytest.raises(
        Fault, match=r"not all weights are finite at iteration 2, learning rate 0\.01; "
    ):
        training.save()


def test_only_deep_networks_warm_up_unasked(tmp_path):
    warming_up = {
        depth: Training(replace(SMALL, depth=depth), TRAIN, TEST, tmp_path).progress.warming_up
        for depth in (8, 104, 110)
    }
    assert warming_up == {8: False, 104: False, 110: True}
    assert Training(replace(SMALL, warm_up=True), TRAIN, TEST, tmp_path).progress.warming_up


def test_batches_are_normalised_augmented_and_labelled(tmp_path):
    training = Training(SMALL, TRAIN, TEST, tmp_path)
    x, y = training.batch()
    indices = batch_indices(SMALL, 100, 0)
    assert np.array_equal(y, TRAIN.labels[indices])
    plain = per_pixel(mean_image(TRAIN.images))(TRAIN.images[indices])
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))  # with zeros, after the normalisation
    for image, whole in zip(x, padded, strict=True):
        cuts = [whole[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(image, cut) or torch.equal(image, cut.flip(2)) for cut in cuts)
    assert torch.equal(x, training.augmented(indices, CROP, 0)[0])
    others = [training.augmented(indices, CROP, 1), training.augmented(indices, STATISTICS, 0)]
    training.recipe = replace(SMALL, seed=1)
    others.append(training.augmented(indices, CROP, 0))
    assert not any(torch.equal(x, other) for other, _ in others)


def test_rows_of_metrics(finished):
    rows = rows_of(finished)
    assert list(rows[0]) == [
        "epoch",
        "iteration",
        "loss",
        "train_error",
        "test_error",
        "lr",
        "mean_std",
    ]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]  # 12 * 32 = 3.84 * 100
    assert [row["iteration"] for row in rows] == [4, 7, 10, 12]
    assert [row["lr"] for row in rows] == [0.1, 0.01, 0.001, 0.001]
    snapshot = load(finished / "snapshots" / "iteration-0000012.safetensors")
    assert rows[-1]["mean_std"] == pytest.approx(
        closed_form(snapshot.model)["std"].mean(), abs=1e-6
    )


def test_test_error_is_that_of_the_network_in_evaluation_mode(tmp_path, monkeypatch):
    monkeypatch.setattr("models.training.loop.TEST_BATCH", 7)
    training = Training(SMALL, TRAIN, TEST, tmp_path)
    training.network.layer3[0].bn2.running_mean.normal_()  # not what a batch's statistics are
    with torch.no_grad():
        right = (
            copy.deepcopy(training.network).eval()(training.preprocessing(TEST.images)).argmax(1)
        )
    wrong = torch.arange(20) < 5
    training.test = training.test[0], torch.where(wrong, (right + 1) % 10, right)
    assert training.test_error(SMALL) == 25
    assert training.network.training


def test_rows_are_means_over_their_epoch(tmp_path):
    training = Training(replace(SMALL, iterations=7), TRAIN, TEST, tmp_path)
    results = [(1.0, 8), (2.0, 16), (3.0, 0), (4.0, 32), (1.0, 16), (1.0, 16), (4.0, 32)]
    training.step = lambda x, y: torch.tensor(results[training.progress.iteration])
    for _ in results:
        training.iterate()
    rows = rows_of(tmp_path)
    assert [row["loss"] for row in rows] == [2.5, 2.0]
    assert [row["train_error"] for row in rows] == pytest.approx([43.75, 100 * 64 / 96], abs=1e-5)
    assert re.fullmatch(
        r"loss 2, train_error 66\.67, test_error [\d.]+, images/s [\d.e+]+", training.shown
    )


def test_snapshots_are_the_network_at_their_iteration(finished):
    files = sorted((finished / "snapshots").iterdir())
    assert [file.name for file in files] == [
        f"iteration-{i:07}.safetensors" for i in (0, 3, 6, 9, 12)
    ]
    snapshots = [load(file) for file in files]
    assert [snapshot.card["training"]["iteration"] for snapshot in snapshots] == [0, 3, 6, 9, 12]
    rates = [
        snapshot.card["training"]["current_lr"] for snapshot in snapshots
    ]  # of the step that led there
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.001])
    counts = [snapshot.model.bn1.num_batches_tracked.item() for snapshot in snapshots]
    assert counts == [0, 3, 6, 9, 12]
    fresh = new_network(SMALL).state_dict()
    assert all(
        torch.equal(tensor, fresh[name]) for name, tensor in snapshots[0].model.state_dict().items()
    )


def test_finished_network_and_its_card(finished):
    network, last = (
        load(finished / "resnet-8.safetensors"),
        load(finished / "snapshots" / "iteration-0000012.safetensors"),
    )
    for name, parameter in network.model.named_parameters():
        assert torch.equal(parameter, last.model.get_parameter(name))
    assert not torch.equal(network.model.bn1.running_var, last.model.bn1.running_var)
    assert network.crop_padding == "zero"
    assert torch.equal(network.preprocessing.mean, mean_image(TRAIN.images))
    card = network.card["training"]
    expected = {
        "decay": "weights",
        "iterations": 12,
        "seed": 0,
        "device": "cpu",
        "precision": "float32",
        "lr": 0.1,
    }
    assert (
        card.items()
        >= (expected | {"bn_statistics": "one batch of 100 augmented training images"}).items()
    )
    assert card["versions"]["torch"] == torch.__version__
    assert card["images_per_s"] > 0
    how = f" threads, float32, torch {torch.__version__}, {card['images_per_s']} images/s"
    assert card["device_name"].endswith(how)
    with torch.no_grad():
        logits = network.model(network.preprocessing(TEST.images))
    assert card["test_error"] == pytest.approx(
        100 * np.mean(logits.argmax(1).numpy() != TEST.labels), abs=0.01
    )
    assert card["mean_std"] == pytest.approx(closed_form(network.model)["std"].mean(), abs=1e-5)


def test_final_statistics_are_those_of_one_augmented_batch(finished, tmp_path, monkeypatch):
    """In one pass, with each layer's behind the layers before it; of so many images, chosen by the
    seed.
    """
    assert STATISTICS_IMAGES == 10_000
    training = Training(SMALL, TRAIN, TEST, tmp_path)
    chosen = np.random.default_rng([0, STATISTICS]).permutation(100)
    for few in (100, 40):
        expected = load(finished / "snapshots" / "iteration-0000012.safetensors").model
        recompute_statistics(expected, training.augmented(chosen[:few], STATISTICS, 0)[0])
        monkeypatch.setattr("models.training.loop.STATISTICS_IMAGES", few)
        go(tmp_path / str(few))
        network = load(tmp_path / str(few) / "resnet-8.safetensors").model
        assert all(
            torch.equal(buffer, expected.get_buffer(name))
            for name, buffer in network.named_buffers()
        )


def test_the_progress_bar(tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("models.training.loop.tqdm", Bar)
    for stop in (stop_after(5), lambda: 0):
        with suppress(Fault):
            go(tmp_path, stop=stop)
    assert [(bar.desc, bar.total, bar.initial, bar.n) for bar in bars] == [
        ("resnet-8-12-seed0", 12, 0, 5),
        ("resnet-8-12-seed0", 12, 5, 12),
    ]
    assert re.fullmatch(
        r"loss [\d.]+, train_error [\d.]+, test_error [\d.]+, images/s [\d.]+", bars[1].postfix
    )


def test_learns_from_real_images(real_test, tmp_path):
    some, others = (
        replace(real_test, images=real_test.images[part], labels=real_test.labels[part])
        for part in (slice(2000), slice(2000, 2500))
    )
    run(replace(SMALL, iterations=32, batch=64), some, others, tmp_path)
    [row] = rows_of(tmp_path)
    assert row["loss"] < 2.25  # ln 10 = 2.30
    assert row["test_error"] < 85  # 90 by chance


@pytest.mark.parametrize("iterations", [(1,), (4,), (5, 2, 1), (11,), (12,), (13,)])
def test_interrupted_run_ends_with_the_same_tensors(finished, tmp_path, iterations):
    for count in iterations:
        with pytest.raises(Fault, match="stopped by SIGTERM"):
            go(tmp_path, stop=stop_after(count))
    go(tmp_path)
    assert_same(tmp_path, finished)


@pytest.mark.parametrize("killed_after", [2, 5, 9])
def test_killed_between_two_saves_it_repeats_what_was_lost(finished, tmp_path, killed_after):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    asked = iter(range(2, 100))
    with pytest.raises(
        MemoryError
    ):  # after a row, a snapshot, or both, were written that no state knows of
        go(tmp_path, stop=lambda: kill() if next(asked) == killed_after else 0)
    go(tmp_path)
    assert_same(tmp_path, finished)


def test_state_is_saved_along_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("models.training.loop.SAVE_EVERY", 0)
    asked = iter(range(1, 100))
    with pytest.raises(MemoryError):
        go(tmp_path, stop=lambda: kill() if next(asked) == 5 else 0)
    assert torch.load(tmp_path / "state.pt")["progress"]["iteration"] == 4


@pytest.mark.parametrize(
    ("error", "ends"), [(101, 4), (60, 12)]
)  # %: after the first window, or never
def test_warm_up_and_its_window_survive_an_interruption(tmp_path, monkeypatch, error, ends):
    monkeypatch.setattr("models.training.recipe.WARM_UP_DEPTH", 8)
    for name, value in (("WINDOW", 4), ("ERROR", error)):
        monkeypatch.setattr(f"models.training.loop.WARM_UP_{name}", value)
    recipe = replace(SMALL, iterations=24, snapshots=2)
    go(tmp_path / "whole", recipe)
    lrs = {row["iteration"]: row["lr"] for row in rows_of(tmp_path / "whole")}
    assert lrs.items() >= {4: 0.01, 7: 0.1 if ends < 7 else 0.01}.items()
    for count in (2, 4):
        with pytest.raises(Fault):
            go(tmp_path / "parts", recipe, stop_after(count))
    go(tmp_path / "parts", recipe)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    card = load(tmp_path / "whole" / "resnet-8.safetensors").card["training"]
    assert (card["warm_up"], card["warmed_up"]) == (False, True)  # a deep network, not asked to


def test_a_run_may_go_on_elsewhere_and_the_card_says_so(tmp_path):
    with pytest.raises(Fault, match="stopped by SIGTERM"):
        go(tmp_path, stop=stop_after(5))
    training = Training(SMALL, TRAIN, TEST, tmp_path)
    training.progress.stretches.append(Stretch(5, "another, where it trained nothing", 0.0))
    training.save()
    state = torch.load(tmp_path / "state.pt")
    state["progress"]["seconds"] = 10.0
    torch.save(state, tmp_path / "state.pt")
    go(tmp_path, replace(SMALL, precision="bfloat16"))
    card = load(tmp_path / "resnet-8.safetensors").card["training"]
    torch_here = f"torch {re.escape(torch.__version__)}"
    first = rf"[^;]+ threads, float32, {torch_here}, (\d+) images/s"
    then = rf"from iteration 5 on [^;]+ threads, bfloat16, {torch_here}, (\d+) images/s"
    speeds = re.fullmatch(f"{first}; {then}", card["device_name"])
    assert speeds
    assert int(speeds[1]) == round(5 * SMALL.batch / 10)
    seconds = torch.load(tmp_path / "state.pt")["progress"]["seconds"]
    assert int(speeds[2]) == round(7 * SMALL.batch / (seconds - 10))
    assert card["precision"] == "bfloat16"


def test_metrics_never_tell_of_iterations_that_are_lost(tmp_path):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(5))
    (tmp_path / "metrics.csv").write_text("a row of an iteration that was lost")
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    assert [row["iteration"] for row in rows_of(tmp_path)] == [4]


def test_capturing_a_step_changes_nothing(monkeypatch, tmp_path):
    """The order of things, on a CPU, with stand-ins for what only a GPU has."""

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        replay = lambda self: calls.append("replay")  # noqa: E731

    @contextmanager
    def graph(_):
        assert calls == ["step"] * 3  # the trial steps were taken, and undone
        assert all(torch.equal(tensor, before[name]) for name, tensor in training.tensors().items())
        yield

    training, calls = Training(SMALL, TRAIN, TEST, tmp_path), []
    before = {name: tensor.clone() for name, tensor in training.tensors().items()}

    def step(x, y):
        calls.append("step")
        return training.step(x, y)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    captured = CapturedStep(step, *training.batch(), list(training.tensors().values()))
    training.progress.iteration = 1
    x, y = training.batch()
    first = captured(x, y)
    assert calls[-1] == "replay"
    assert torch.equal(captured.x, x)
    assert torch.equal(captured.y, y)
    captured.result.zero_()  # as the next replay overwrites it
    assert first[0] > 0


def test_losses_are_looked_at_in_groups_on_a_gpu(tmp_path):
    """As on a GPU, where each look waits: what comes out of a group is what comes out of single
    looks.
    """
    one, other = (Training(SMALL, TRAIN, TEST, tmp_path) for _ in range(2))
    results = [torch.tensor([0.1 * i, i]) for i in range(9)]
    for result in results:
        for training in (one, other):
            training.pending.append(result)
            training.progress.iteration += 1
        one.look()
    other.look()
    assert replace(one.progress, seconds=0) == replace(other.progress, seconds=0)
    assert one.progress.batches == 9
    other.pending = [torch.tensor([1.0, 0]), torch.tensor([torch.nan, 0])]
    other.progress.iteration, other.saved = 11, 9
    with pytest.raises(Fault, match=r"the loss is nan at iteration 10, learning rate 0\.001; "):
        other.look()


def test_a_diverging_run_keeps_the_last_good_state(tmp_path):
    recipe = replace(SMALL, lr=1e30)
    with pytest.raises(Fault) as caught:
        go(tmp_path, recipe)
    said = re.fullmatch(
        rf"{re.escape(str(tmp_path))}: diverged: the loss is (nan|inf) at iteration (\d+), learning rate 1e\+30; "
        r"stopped, state\.pt keeps the last good state \(iteration 0\); the same command ends alike: take another "
        "--seed, or --warm-up",
        str(caught.value),
    )
    assert said is not None, caught.value
    assert caught.value.status == 1
    with pytest.raises(Fault, match=r"take another --seed$"):
        go(tmp_path / "warm", replace(recipe, warm_up=True))
    state = torch.load(tmp_path / "state.pt")
    assert state["progress"]["iteration"] == 0
    assert all(tensor.isfinite().all() for tensor in state["tensors"].values())
    assert not (tmp_path / "resnet-8.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    training = Training(SMALL, TRAIN, TEST, tmp_path)
    training.save()
    before = (tmp_path / "state.pt").read_bytes()
    training.iterate()
    with torch.no_grad():
        training.network.fc.weight[3, 5] = torch.inf
    for write in (training.save, training.snapshot, lambda: training.close_epoch(1, 0.1)):
        with pytest.raises(
            Fault,
            match=r"diverged: not all weights are finite at iteration 0, learning rate 0\.1; ",
        ):
            write()
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not (tmp_path / "snapshots").exists()
    assert rows_of(tmp_path) == []


def test_a_gpu_for_which_nothing_can_be_compiled(tmp_path, monkeypatch):
    training = Training(SMALL, TRAIN, TEST, tmp_path)
    monkeypatch.setattr("models.training.loop.compiled_blocks", nullcontext)
    of_the_compiler = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    error = of_the_compiler("Failed to find C compiler")
    monkeypatch.setattr("models.training.loop.CapturedStep", mock.Mock(side_effect=error))
    with pytest.raises(Fault) as caught:
        training.captured()
    assert str(caught.value) == (
        "the network cannot be compiled for this GPU (Failed to find C compiler): torch.compile needs Triton and a C "
        "compiler; --device cpu trains without them"
    )
    assert caught.value.status == 2
    monkeypatch.setattr(
        "models.training.loop.CapturedStep", mock.Mock(side_effect=RuntimeError("CUDA error"))
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        training.captured()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    )
    with pytest.raises(Fault) as caught:
        go(tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path}/run: cannot be locked: No locks available; choose an --out on another disk"
    )
    assert caught.value.status == 2


@contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("what", "stopped"), [("state", 5), ("snapshot", 5), ("network", 13)])
def test_a_full_disk_leaves_what_was_saved(finished, tmp_path, monkeypatch, what, stopped):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(stopped))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    with full_disk(100_000), monkeypatch.context() as patch:
        if what != "state":
            patch.setattr(Training, "save", lambda self: None)
        if what == "network":
            patch.setattr(Training, "snapshot", lambda self: None)
        with pytest.raises(Fault) as caught:
            go(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}: cannot write: ")
    assert "File too large" in said
    assert said.endswith(
        "; what was saved before is intact; make room or allow writing, and the same command goes on from there"
    )
    assert caught.value.status == 1
    after = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    metrics = tmp_path / "metrics.csv"
    assert {**after, metrics: b""} == {**before, metrics: b""}
    go(tmp_path)
    assert_same(tmp_path, finished)


def test_a_folder_begun_on_other_images(tmp_path):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    with pytest.raises(
        Fault, match="begun on other images, or in another order; choose another --out"
    ) as caught:
        run(SMALL, made_up(100, seed=1), TEST, tmp_path)
    assert caught.value.status == 2


def test_a_state_with_a_flipped_bit(tmp_path):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    path = tmp_path / "state.pt"
    content = bytearray(path.read_bytes())
    weight = torch.load(path)["tensors"]["fc.weight"].numpy().tobytes()
    content[content.index(weight) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        Fault,
        match=r"state\.pt: damaged or of an older version; remove it to train from the beginning",
    ):
        go(tmp_path)


@pytest.mark.parametrize(
    "change", [lambda tensors: tensors.popitem(), lambda tensors: tensors["bn1.bias"].resize_(3)]
)
def test_a_state_of_another_network(tmp_path, change):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    state = torch.load(tmp_path / "state.pt")
    change(state["tensors"])
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(Fault, match=r"state\.pt: damaged or of an older version; ") as caught:
        go(tmp_path)
    assert caught.value.status == 2


@pytest.mark.parametrize("name", ["config.json", "state.pt"])
def test_damaged_files_are_named(tmp_path, name):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(Fault, match=rf"{name}: damaged[^;]*; ") as caught:
        go(tmp_path)
    assert caught.value.status == 2


def test_a_configuration_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(Fault, match=r"config\.json: damaged; choose another --out") as caught:
        go(tmp_path)
    assert caught.value.status == 2


def test_a_run_begun_before_the_warm_up_was_a_choice_goes_on(tmp_path, finished):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(5))
    config = json.loads((tmp_path / "config.json").read_text())
    assert not config.pop("warm_up")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Fault, match="warm_up is False there and True here"):
        go(tmp_path, replace(SMALL, warm_up=True))
    go(tmp_path)
    assert_same(tmp_path, finished)


def test_a_state_of_an_older_version(tmp_path):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    state = torch.load(tmp_path / "state.pt")
    state["progress"]["machines"] = state["progress"].pop("stretches")
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(Fault, match=r"state\.pt: .* of an older version; remove it"):
        go(tmp_path)


def test_two_trainers_on_one_folder(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            Fault, match="another trainer is at work here; choose another --out"
        ) as caught:
            go(tmp_path)
    assert caught.value.status == 2
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    go(tmp_path, replace(SMALL, iterations=1, snapshots=0))  # free again
