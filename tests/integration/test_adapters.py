"""Short trainings by other packages: the curve while they train is that of their checkpoints."""

import hashlib
import re

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from analysis import Recorder
from analysis.running.steps import find_snapshots
from models import build, closed_form
from models.data import cifar10
from models.data.preprocessing import PRESETS
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # other packages warn of matters of their own
]
STEPS, EVERY, BATCH = 20, 5, 16
PAGE = (ROOT / "docs" / "training.md").read_text()
BLOCKS = dict(re.findall(r"^## ([^\n]+)$[^#]*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
PACKAGES = {
    "In your own loop": "torch",
    "TensorBoard": "tensorboard",
    "Weights & Biases": "wandb",
    "Lightning": "lightning",
    "Hugging Face Trainer": "transformers",
}


class Network(nn.Module):
    """A ResNet-20 as transformers' Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.net = build("resnet-20")

    def forward(self, images, labels):
        logits = self.net(images)
        return F.cross_entropy(logits, labels), logits


@pytest.fixture(scope="module")
def real(shared_cifar10):
    """Real images and their labels, one dict each."""
    data = cifar10.load(shared_cifar10)
    images = PRESETS["imagenet"](data.images[: STEPS * BATCH])
    labels = data.labels[: STEPS * BATCH].tolist()
    return [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def assert_same_curve(recorder, folder):
    """The recorder's table is the closed form of the checkpoints in a folder, to 1e-6."""
    snapshots, skipped = find_snapshots([folder])
    assert not skipped
    assert [snapshot.step for snapshot in snapshots] == list(range(EVERY, STEPS + 1, EVERY))
    frame = recorder.frame()
    for snapshot in snapshots:
        recorded = frame[frame["step"] == snapshot.step].reset_index(drop=True)
        computed = closed_form(snapshot.file.tensors)
        assert recorded["name"].tolist() == computed["name"].tolist()
        assert (recorded["std"] / computed["std"] - 1).abs().max() < 1e-6
    assert frame.groupby("step")["std"].mean().nunique() == len(snapshots)  # it changes


def means(recorder):
    """The mean over layers at every recorded step."""
    return pytest.approx(recorder.frame().groupby("step")["std"].mean().tolist())


def test_a_plain_loop(real, tmp_path):
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = Recorder(model, every=EVERY)
    for step, batch in enumerate(DataLoader(real, BATCH), start=1):
        loss, _ = model(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recorder.record(step):
            torch.save({"model": model.state_dict(), "step": step}, tmp_path / f"{step}.pth")
    assert_same_curve(recorder, tmp_path)


def test_lightning(real, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from analysis.adapters.lightning import RecorderCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Network()

        def training_step(self, batch, index):
            return self.net(**batch)[0]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    callback, folder = RecorderCallback(every=EVERY), tmp_path / "checkpoints"
    lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1),
        callbacks=[callback, ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=EVERY)],
    ).fit(Module(), DataLoader(real, BATCH // 2))
    assert_same_curve(callback.recorder, folder)
    logged = pd.read_csv(next(tmp_path.rglob("metrics.csv")))
    assert logged["step"].tolist() == [*range(EVERY, STEPS + 1, EVERY)]
    assert logged["response_std/mean"].tolist() == means(callback.recorder)


@pytest.fixture
def train(real, tmp_path):
    """Train by transformers' Trainer with a callback made of it. Returns the trainer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def run(make_callback):
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            save_steps=EVERY,
            logging_steps=1,
            learning_rate=0.01,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = transformers.Trainer(Network(), arguments, train_dataset=real)
        make_callback(trainer)
        trainer.train()
        return trainer

    return run


def test_transformers(train, tmp_path):
    from analysis.adapters.huggingface import RecorderCallback

    callbacks = []

    def add(trainer):
        callbacks.append(RecorderCallback(trainer, every=EVERY))
        trainer.add_callback(callbacks[0])

    logs = train(add).state.log_history
    [callback] = callbacks
    assert_same_curve(callback.recorder, tmp_path)
    recorded = [line for line in logs if "response_std/mean" in line]
    assert [line["step"] for line in recorded] == [*range(EVERY, STEPS + 1, EVERY)]
    assert [line["response_std/mean"] for line in recorded] == means(callback.recorder)
    losses = [line["loss"] for line in logs if "loss" in line]
    assert losses == [line["loss"] for line in train(id).state.log_history if "loss" in line]
    assert len(losses) == STEPS


@pytest.mark.parametrize("title", BLOCKS)
def test_the_blocks_of_the_page_run_when_pasted(title, tmp_path, monkeypatch):
    pytest.importorskip(PACKAGES[title])
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = {"__name__": "__main__"}
    exec(BLOCKS[title], names)
    assert {"recorder", "callback"} & set(names)
    made = {"TensorBoard": "logs/events*", "Weights & Biases": "wandb/offline-run-*"}
    assert list(tmp_path.glob(made.get(title, "dynamics.csv")))


def test_wandb_gets_the_numbers_and_a_figure(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = {}
    before, finish, _ = BLOCKS["Weights & Biases"].partition("run.finish()")
    exec(before, names)
    summary, frame = dict(names["run"].summary), names["recorder"].frame()
    exec(finish, names)
    last = frame[frame["step"] == 10]
    logged = [summary[f"response_std/{name}"] for name in last["name"]]
    assert logged == last["std"].tolist()
    [figure] = tmp_path.glob("wandb/offline-run-*/files/media/images/*.png")
    assert summary["responses"]["sha256"] == hashlib.sha256(figure.read_bytes()).hexdigest()


def test_tensorboard_gets_the_numbers_and_a_figure(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    names = {}
    exec(BLOCKS["TensorBoard"], names)
    events = accumulators.EventAccumulator(str(tmp_path / "logs")).Reload()
    written = events.Scalars("response_std/mean")
    assert [event.step for event in written] == [5, 10]
    assert [event.value for event in written] == means(names["recorder"])
    assert events.Tags()["images"] == ["responses"]
