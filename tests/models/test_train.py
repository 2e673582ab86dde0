"""The trainer, on small made-up images: what it computes, that it can be killed, what it says when it cannot go on."""

import copy
import csv
import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import build, cifar10, closed_form, train
from models.checkpoints import load
from models.preprocess import mean_image, per_pixel
from models.recipe import (
    CROP,
    STATISTICS,
    CapturedStep,
    Fault,
    Recipe,
    batch_indices,
    new_network,
    new_optimizer,
    new_step,
    recompute_statistics,
)
from models.training import WARM_UP_DEPTH, WARM_UP_ERROR, Training, run

ROOT = Path(__file__).parents[2]
SMALL = Recipe("residual", 8, iterations=12, batch=32, snapshots=5)


def made_up(count, split="train", seed=0):
    random = np.random.default_rng([seed, count])
    images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return cifar10.Cifar10(images, random.integers(0, 10, count), split, Path("nowhere"), "made up", "", "")


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


# The recipe


@pytest.mark.parametrize(
    ("iteration", "lr"), [(0, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01), (48_000, 0.001), (63_999, 0.001)]
)
def test_learning_rate_drops_at_a_half_and_three_quarters(iteration, lr):
    recipe = Recipe("residual", 20)
    assert recipe.learning_rate(iteration, warming_up=False) == pytest.approx(lr)
    assert recipe.learning_rate(iteration, warming_up=True) == pytest.approx(min(lr, 0.01))


def test_recipe_is_the_paper_s():
    recipe = Recipe("plain", 56)
    assert (recipe.iterations, recipe.batch, recipe.lr, recipe.momentum) == (64_000, 128, 0.1, 0.9)
    assert (recipe.weight_decay, recipe.decay, WARM_UP_DEPTH, WARM_UP_ERROR) == (1e-4, "weights", 110, 80)


def test_warm_up_ends_when_the_training_error_is_below_80_percent(tmp_path, monkeypatch):
    monkeypatch.setattr("models.training.WARM_UP_DEPTH", 8)
    monkeypatch.setattr("models.training.WARM_UP_WINDOW", 3)
    training = Training(replace(SMALL, batch=10, iterations=1000), TRAIN, TEST, tmp_path)
    wrong = [10, 10, 10, 8, 8, 8, 8, 8, 7, 10, 10, 10]  # of 10 images each; exactly 80 % is not below 80 %
    training.step = lambda x, y: torch.tensor([1.0, wrong[training.progress.iteration]])
    rates = []
    for _ in wrong:
        training.iterate()
        rates.append(round(training.optimizer.param_groups[0]["lr"].item(), 6))
    assert rates == [0.01] * 9 + [0.1] * 3


def test_only_deep_networks_warm_up(tmp_path):
    warming_up = {
        depth: Training(replace(SMALL, depth=depth), TRAIN, TEST, tmp_path).progress.warming_up
        for depth in (8, 104, 110)
    }
    assert warming_up == {8: False, 104: False, 110: True}


@pytest.mark.parametrize(
    ("decay", "spared"),
    [("weights", {"weight", "bias"}), ("weights+gamma", {"bias"}), ("all", set())],
)
def test_decay_says_which_parameters_decay(decay, spared):
    recipe = replace(SMALL, decay=decay)
    network = new_network(recipe)
    groups = new_optimizer(network, recipe).param_groups
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        module, leaf = name.rsplit(".", 1)
        expected = 0.0 if ".bn" in f".{module}" and leaf in spared else 1e-4
        assert found.pop(id(parameter)) == expected, name
    assert not found


def test_step_is_sgd_with_momentum_and_decay():
    recipe = replace(SMALL, momentum=0.9, weight_decay=0.5, lr=0.1)
    network = new_network(recipe)
    reference = copy.deepcopy(network)
    step = new_step(network, new_optimizer(network, recipe), recipe)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    momentum = {name: 0 for name, _ in reference.named_parameters()}
    for _ in range(3):
        loss, wrong = step(x, y)
        logits = reference(x)
        expected = torch.nn.functional.cross_entropy(logits, y)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert wrong.item() == (logits.argmax(1) != y).sum().item()
        reference.zero_grad()
        expected.backward()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                decay = 0.0 if "bn" in name else 0.5
                momentum[name] = 0.9 * momentum[name] + parameter.grad + decay * parameter
                parameter -= 0.1 * momentum[name]
    for (name, ours), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("size", "epochs"), [(100, 8), (10, 80)])  # a batch may be larger than the data
def test_every_image_once_per_epoch_and_every_batch_full(size, epochs):
    batches = [batch_indices(SMALL, size, iteration) for iteration in range(25)]
    assert {len(batch) for batch in batches} == {32}
    orders = np.concatenate(batches).reshape(epochs, size)
    assert (np.sort(orders) == np.arange(size)).all()
    assert len({tuple(order) for order in orders}) == epochs
    assert not np.array_equal(batches[0], batch_indices(replace(SMALL, seed=1), size, 0))


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


def test_initial_network_depends_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = new_network(replace(SMALL, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    reference = build("resnet-8")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), reference.parameters(), strict=True))


def test_bn_statistics_are_those_of_the_batch():
    network = new_network(SMALL)
    for name, buffer in network.named_buffers():
        if "num" not in name:
            buffer.fill_(7.0)  # what was there before must not matter
    x = torch.randn(600, 3, 32, 32) + 1
    reference, expected = copy.deepcopy(network).double().train(), {}

    def keep(name):
        def hook(module, inputs):
            values = inputs[0].transpose(0, 1).flatten(1)  # (C, N H W)
            expected[f"{name}.running_mean"] = values.mean(1)
            expected[f"{name}.running_var"] = values.var(1)

        return hook

    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        reference(x.double())
    recompute_statistics(network, x.contiguous(memory_format=torch.channels_last))
    found = {name: buffer for name, buffer in network.named_buffers() if "num" not in name}
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        torch.testing.assert_close(buffer.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert {module.momentum for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.1}


# What a run leaves


def test_rows_of_metrics(finished):
    rows = rows_of(finished)
    assert list(rows[0]) == ["epoch", "iteration", "loss", "train_error", "test_error", "lr", "mean_std"]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]  # 12 * 32 = 3.84 * 100
    assert [row["iteration"] for row in rows] == [4, 7, 10, 12]
    assert [row["lr"] for row in rows] == [0.1, 0.01, 0.001, 0.001]
    snapshot = load(finished / "snapshots" / "iteration-0000012.safetensors")
    assert rows[-1]["mean_std"] == pytest.approx(closed_form(snapshot.model)["std"].mean(), abs=1e-6)


def test_test_error_is_that_of_the_network_in_evaluation_mode(tmp_path, monkeypatch):
    monkeypatch.setattr("models.training.TEST_BATCH", 7)
    training = Training(SMALL, TRAIN, TEST, tmp_path)
    training.network.layer3[0].bn2.running_mean.normal_()  # not what a batch's statistics are
    with torch.no_grad():
        right = copy.deepcopy(training.network).eval()(training.preprocessing(TEST.images)).argmax(1)
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
    assert re.fullmatch(r"loss 2, train_error 66\.67, test_error [\d.]+, images/s [\d.e+]+", training.shown)


@pytest.mark.parametrize(
    ("count", "iterations"), [(0, set()), (1, {64_000}), (2, {0, 64_000}), (5, {0, 16_000, 32_000, 48_000, 64_000})]
)
def test_snapshots_are_evenly_spaced_from_first_to_last(count, iterations):
    assert Recipe("residual", 20, snapshots=count).snapshot_iterations() == iterations


def test_snapshots_are_the_network_at_their_iteration(finished):
    files = sorted((finished / "snapshots").iterdir())
    assert [file.name for file in files] == [f"iteration-{i:07}.safetensors" for i in (0, 3, 6, 9, 12)]
    snapshots = [load(file) for file in files]
    assert [snapshot.card["training"]["iteration"] for snapshot in snapshots] == [0, 3, 6, 9, 12]
    rates = [snapshot.card["training"]["current_lr"] for snapshot in snapshots]  # of the step that led there
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.001])
    counts = [snapshot.model.bn1.num_batches_tracked.item() for snapshot in snapshots]
    assert counts == [0, 3, 6, 9, 12]
    fresh = new_network(SMALL).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in snapshots[0].model.state_dict().items())


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
    expected = {"decay": "weights", "iterations": 12, "seed": 0, "device": "cpu", "precision": "float32", "lr": 0.1}
    assert card.items() >= (expected | {"bn_statistics": "one batch of 100 augmented training images"}).items()
    assert card["versions"]["torch"] == torch.__version__
    assert re.search(r"\d threads", card["device_name"])
    assert card["images_per_s"] > 0
    with torch.no_grad():
        logits = network.model(network.preprocessing(TEST.images))
    assert card["test_error"] == pytest.approx(100 * np.mean(logits.argmax(1).numpy() != TEST.labels), abs=0.01)
    assert card["mean_std"] == pytest.approx(closed_form(network.model)["std"].mean(), abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_convolutions(precision):
    recipe, seen = replace(SMALL, precision=precision), []
    network = new_network(recipe)
    network.layer3[0].conv2.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss, _ = new_step(network, new_optimizer(network, recipe), recipe)(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert seen == [getattr(torch, precision)]
    assert loss.dtype == torch.float32


def test_learns_from_real_images(real_test, tmp_path):
    some, others = (
        replace(real_test, images=real_test.images[part], labels=real_test.labels[part])
        for part in (slice(2000), slice(2000, 2500))
    )
    run(replace(SMALL, iterations=32, batch=64), some, others, tmp_path)
    [row] = rows_of(tmp_path)
    assert row["loss"] < 2.25  # ln 10 = 2.30
    assert row["test_error"] < 85  # 90 by chance


# Killed and resumed


@pytest.mark.parametrize("iterations", [(1,), (4,), (5, 2, 1), (11,), (12,)])
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
    with pytest.raises(MemoryError):  # after a row, a snapshot, or both, were written that no state knows of
        go(tmp_path, stop=lambda: kill() if next(asked) == killed_after else 0)
    go(tmp_path)
    assert_same(tmp_path, finished)


def test_state_is_saved_along_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("models.training.SAVE_EVERY", 0)
    asked = iter(range(1, 100))
    with pytest.raises(MemoryError):
        go(tmp_path, stop=lambda: kill() if next(asked) == 5 else 0)
    assert torch.load(tmp_path / "state.pt")["progress"]["iteration"] == 4


@pytest.mark.parametrize(("error", "ends"), [(101, 4), (60, 12)])  # %: after the first window, or never
def test_warm_up_and_its_window_survive_an_interruption(tmp_path, monkeypatch, error, ends):
    for name, value in (("DEPTH", 8), ("WINDOW", 4), ("ERROR", error)):
        monkeypatch.setattr(f"models.training.WARM_UP_{name}", value)
    recipe = replace(SMALL, iterations=24, snapshots=2)
    go(tmp_path / "whole", recipe)
    lrs = {row["iteration"]: row["lr"] for row in rows_of(tmp_path / "whole")}
    assert lrs.items() >= {4: 0.01, 7: 0.1 if ends < 7 else 0.01}.items()
    for count in (2, 4):
        with pytest.raises(Fault):
            go(tmp_path / "parts", recipe, stop_after(count))
    go(tmp_path / "parts", recipe)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_metrics_never_tell_of_iterations_that_are_lost(tmp_path):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(5))
    (tmp_path / "metrics.csv").write_text("a row of an iteration that was lost")
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    assert [row["iteration"] for row in rows_of(tmp_path)] == [4]


COMMAND = ["--depth", "8", "--kind", "residual", "--iterations", "16", "--snapshots", "9", "--device", "cpu"]
COMMAND += ["--precision", "float32"]
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from models import cifar10, train, training
def data(split):
    arrays = np.load(sys.argv[1])
    return cifar10.Cifar10(arrays[split], arrays[split + "_labels"], split, Path("nowhere"), "made up", "", "")
train.load_data = lambda path: (data("train"), data("test"))
training.SAVE_EVERY = float(sys.argv[2])
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What COMMAND leaves if nothing interrupts it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", lambda path: (TRAIN, TEST))
        assert train.main([*COMMAND, "--out", str(folder)]) == 0
    return folder


@contextmanager
def process(folder, save_every):
    """The command in a process of its own, past its second iteration."""
    arrays = {"train": TRAIN.images, "train_labels": TRAIN.labels, "test": TEST.images, "test_labels": TEST.labels}
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data.npz", **arrays)
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        SCRIPT,
        folder / "data.npz",
        str(save_every),
        *COMMAND,
        "--out",
        folder,
    ]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(3000):
            if list(folder.glob("*/snapshots/iteration-0000002.safetensors")) or trainer.poll() is not None:
                break
            time.sleep(0.01)
        yield trainer
    finally:
        trainer.kill()
        trainer.communicate()


@pytest.mark.parametrize("save_every", [0, 1000])
def test_kill_9(whole, tmp_path, monkeypatch, save_every):
    with process(tmp_path / "out", save_every) as trainer:
        trainer.kill()
        assert trainer.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("out/*/resnet-8.safetensors"))
    monkeypatch.setattr(train, "load_data", lambda path: (TRAIN, TEST))
    assert train.main([*COMMAND, "--out", str(tmp_path / "out")]) == 0
    assert_same(tmp_path / "out" / "resnet-8-16-seed0", whole / "resnet-8-16-seed0")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_end_with_the_usual_status(whole, tmp_path, monkeypatch, number, status):
    out = tmp_path / "out"
    with process(out, 1000) as trainer:
        trainer.send_signal(number)
        _, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == status
    folder = out / "resnet-8-16-seed0"
    said = re.fullmatch(
        rf"models\.train: stopped by {number.name}: {re.escape(str(folder))} keeps iteration (\d+); "
        "the same command goes on from there\n",
        errors,
    )
    assert said is not None, errors
    assert torch.load(folder / "state.pt")["progress"]["iteration"] == int(said[1]) > 0
    monkeypatch.setattr(train, "load_data", lambda path: (TRAIN, TEST))
    assert train.main([*COMMAND, "--out", str(out)]) == 0
    assert_same(folder, whole / "resnet-8-16-seed0")


def test_a_second_signal_does_not_wait_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with train.signals() as stop:
        assert stop() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


# The command


@pytest.fixture
def made_up_data(monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda path: (TRAIN, TEST))


def test_default_is_fig_7():
    assert [recipe.label for recipe in train.recipes(train.parse([]))] == [
        "resnet-20-64000-seed0",
        "plain-20-64000-seed0",
        "resnet-56-64000-seed0",
        "plain-56-64000-seed0",
        "resnet-110-64000-seed0",
    ]
    [plain] = train.recipes(train.parse(["--depth", "110", "--kind", "plain"]))
    assert plain.network == "plain-110"


def test_several_networks_and_finished_ones_are_skipped(made_up_data, tmp_path, capsys):
    several = ["--depth", "8", "--iterations", "1", "--snapshots", "0", "--decay", "all", "--out", str(tmp_path)]
    assert train.main([*several, "--seed", "0"]) == 0
    labels = ["resnet-8-all-1-seed0", "plain-8-all-1-seed0"]
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == labels
    finished = {label: (tmp_path / label / f"{label[:-12]}.safetensors").stat().st_mtime_ns for label in labels}
    assert train.main([*several, "--seed", "0", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{labels[0]}: finished before, skipped ({tmp_path / labels[0] / 'resnet-8.safetensors'})"
    assert lines[1] == f"{labels[1]}: finished before, skipped ({tmp_path / labels[1] / 'plain-8.safetensors'})"
    outcome = r"test error \d+\.\d\d %, mean std \d\.\d{3}, \d+ images/s"
    assert re.fullmatch(rf"resnet-8-all-1-seed1: {outcome} \(.*/resnet-8\.safetensors\)", lines[2])
    assert re.fullmatch(rf"plain-8-all-1-seed1: {outcome} \(.*/plain-8\.safetensors\)", lines[3])
    assert finished == {label: (tmp_path / label / f"{label[:-12]}.safetensors").stat().st_mtime_ns for label in labels}


def test_a_signal_between_two_networks_ends_the_command(made_up_data, tmp_path, capsys, monkeypatch):
    def run(recipe, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return "test error"

    monkeypatch.setattr("models.training.run", run)
    assert train.main(["--depth", "8", "--out", str(tmp_path)]) == 143
    said = f"models.train: stopped by SIGTERM: {tmp_path}/resnet-8-64000-seed0 is finished; the same command goes on "
    assert capsys.readouterr().err == said + "from there\n"


def test_help_does_not_wait_for_torch():
    code = "import sys; from models import train; train.parse([]); print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("avx512", "amx", "chosen"), [(0, 0, "float32"), (1, 0, "bfloat16"), (0, 1, "bfloat16")])
def test_precision_auto_is_bfloat16_where_it_is_native(monkeypatch, avx512, amx, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert train.choose_precision("auto", "cpu") == chosen
    assert train.choose_precision("float32", "cpu") == "float32"
    assert train.choose_precision("bfloat16", "cpu") == "bfloat16"


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
    """As on a GPU, where each look waits: what comes out of a group is what comes out of single looks."""
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


# Faults


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--depth", "20", "9"],
            "--depth 9: no CIFAR-10 network has 9 layers: a depth is 6n + 2; the nearest are 8 and 14",
        ),
        (["--iterations", "0"], "--iterations 0: must be 1 or more"),
        (["--snapshots", "-1"], "--snapshots -1: must be 0 or more"),
        (["--seed", "1", "-2"], "--seed -2: must be 0 or more"),
        (
            ["--device", "gpu"],
            "--device gpu: unknown; one of auto, cpu, cuda (CUDA_VISIBLE_DEVICES says which GPU)",
        ),
        (["--data", "nowhere"], "nowhere: no such file or folder; --data takes a folder or an archive of CIFAR-10"),
    ],
)
def test_bad_input_is_one_line_and_2(tmp_path, capsys, arguments, said):
    assert train.main(["--out", str(tmp_path / "runs"), *arguments]) == 2
    assert capsys.readouterr().err == f"models.train: {said}\n"
    assert not (tmp_path / "runs").exists()


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main(["--device", "cuda"]) == 2
    said = "models.train: --device cuda: torch finds no GPU here; --device cpu trains without one\n"
    assert capsys.readouterr().err == said
    assert train.choose_device("auto") == "cpu"


def test_incomplete_data(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / split / "cat" / "1.png")
    assert train.main([*COMMAND, "--data", str(tmp_path), "--out", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err == (
        "models.train: training needs all of CIFAR-10: 1 train images, incomplete: 49,999 of 50,000 are missing "
        f"(folders of images, {tmp_path})\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_diverging_run_keeps_the_last_good_state(tmp_path):
    recipe = replace(SMALL, lr=1e30)
    with pytest.raises(Fault) as caught:
        go(tmp_path, recipe)
    said = re.fullmatch(
        rf"{re.escape(str(tmp_path))}: diverged: the loss is (nan|inf) at iteration (\d+), learning rate 1e\+30; "
        r"stopped, state\.pt keeps the last good state \(iteration 0\)",
        str(caught.value),
    )
    assert said is not None, caught.value
    assert caught.value.status == 1
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
    with pytest.raises(Fault, match=r"diverged: not all weights are finite at iteration 0, learning rate 0\.1; "):
        training.save()
    assert (tmp_path / "state.pt").read_bytes() == before


@contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("what", ["state", "network"])
def test_a_full_disk_leaves_what_was_saved(finished, tmp_path, monkeypatch, what):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(5))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    with full_disk(100_000), monkeypatch.context() as patch:
        if what == "network":
            patch.setattr(Training, "save", lambda self: None)
        with pytest.raises(Fault) as caught:
            go(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}: cannot write: ")
    assert "File too large" in said
    assert said.endswith("; what was saved before is intact; make room, and the same command goes on from there")
    assert caught.value.status == 1
    after = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    metrics = tmp_path / "metrics.csv"
    assert {**after, metrics: b""} == {**before, metrics: b""}
    go(tmp_path)
    assert_same(tmp_path, finished)


def test_out_is_a_file(made_up_data, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert train.main([*COMMAND, "--out", str(tmp_path / "file")]) == 1
    assert re.fullmatch(
        r"models\.train: .*file/resnet-8-16-seed0: cannot write: .*Not a directory.*\n", capsys.readouterr().err
    )


def test_a_folder_of_another_configuration(made_up_data, whole, capsys):
    said = (
        f"models.train: {whole}/resnet-8-16-seed0: a run of another configuration: precision is float32 there and "
        "bfloat16 here, snapshots is 9 there and 3 here; choose another --out\n"
    )
    before = results(whole / "resnet-8-16-seed0")[1]
    assert train.main([*COMMAND, "--out", str(whole), "--snapshots", "3", "--precision", "bfloat16"]) == 2
    assert capsys.readouterr().err == said
    assert results(whole / "resnet-8-16-seed0")[1] == before
    with pytest.raises(Fault, match="batch is 128 there and 32 here"):
        go(whole / "resnet-8-16-seed0")


def test_a_folder_begun_on_other_images(tmp_path):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    with pytest.raises(Fault, match="begun on other images, or in another order; choose another --out") as caught:
        run(SMALL, made_up(100, seed=1), TEST, tmp_path)
    assert caught.value.status == 2


@pytest.mark.parametrize("name", ["config.json", "state.pt"])
def test_damaged_files_are_named(tmp_path, name):
    with pytest.raises(Fault):
        go(tmp_path, stop=stop_after(1))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(Fault, match=rf"{name}: damaged; ") as caught:
        go(tmp_path)
    assert caught.value.status == 2


def test_two_trainers_on_one_folder(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Fault, match="another trainer is at work here; choose another --out") as caught:
            go(tmp_path)
    assert caught.value.status == 2
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    go(tmp_path, replace(SMALL, iterations=1, snapshots=0))  # free again


def test_debug_shows_where_a_fault_comes_from():
    with pytest.raises(Fault, match="--iterations 0"):
        train.main(["--iterations", "0", "--debug"])


def test_interrupted_before_the_training(monkeypatch, capsys):
    def load(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_data", load)
    assert train.main(["--depth", "8"]) == 130
    assert capsys.readouterr().err == "models.train: stopped by SIGINT\n"
