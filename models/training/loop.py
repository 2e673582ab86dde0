"""A network in training: from the state in its folder to the last iteration, and what it writes.

The folder of a run holds config.json, state.safetensors, metrics.csv, snapshots/ and the finished
network, whose BN statistics are those of one batch of 10,000 augmented training images. On the same
CPU, threads and versions, an interrupted run ends with the same tensors, bit for bit, as one that
was not interrupted. It may also continue on another machine or in another precision; the card of
the finished network then names both.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.batchnorm import closed_form
from models.checkpoints import loading
from models.data.cifar10 import Cifar10
from models.files import replacing
from models.training import recipe as recipes
from models.training import state as states
from models.training.batches import TEST_BATCH, Batches
from models.training.display import Display, say
from models.training.recipe import Recipe
from models.training.state import OLD_STATE, RESTART, STATE, Progress, locked, machine

CONFIG, METRICS = "config.json", "metrics.csv"
ANYWHERE = ("device", "precision")  # the fields of a recipe that may change when a run continues
LOOK_EVERY = 50  # iterations between two looks at a GPU's losses; each look waits for the GPU
SAVE_EVERY = 120  # seconds
COMPILER = ("torch._dynamo", "torch._inductor")  # modules of torch.compile's errors


class Stopped(Exception):
    """A signal ended the run."""

    def __init__(self, number: int, kept: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}: {kept}; the same command continues from there")
        self.signal_number = number


class Training:
    """A network in training, from the state in its folder or, if there is none, from the beginning.

    recipe: of the run.
    train, test: CIFAR-10's two splits.
    folder: of the run; it must be locked.
    """

    def __init__(self, recipe: Recipe, train: Cifar10, test: Cifar10, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.data = Batches(recipe, train, test)
        self.network = recipes.new_network(recipe)
        self.optimizer = recipes.new_optimizer(self.network, recipe)
        self.progress = Progress(warming_up=recipe.warms_up)
        self.restore()
        self.saved = self.progress.iteration
        self.machine = machine(recipe)
        self.step = recipes.new_step(self.network, self.optimizer, recipe)
        if recipe.device == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = False  # float32 means float32
            self.step = self.captured()
        self.pending: list[Tensor] = []  # results of the steps since the last look
        self.numbers = ""  # to show beside the number of iterations
        self.clock = self.saved_at = time.perf_counter()

    def captured(self) -> recipes.CapturedStep:
        """Return the step as one CUDA graph of compiled blocks."""
        tensors = list(self.tensors().values())
        try:
            with recipes.compiled_blocks(self.network):
                return recipes.CapturedStep(self.step, *self.data.batch(0), tensors)
        except (RuntimeError, ImportError) as error:
            if not type(error).__module__.startswith(COMPILER):
                raise
            needs = "torch.compile needs Triton and a C compiler; --device cpu trains without them"
            raise ValueError(f"cannot compile for this GPU ({error}): {needs}") from error

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a step changes, by name."""
        tensors: dict[str, Tensor] = self.network.state_dict()
        for name, parameter in self.network.named_parameters():
            tensors[f"momentum.{name}"] = self.optimizer.state[parameter]["momentum_buffer"]
        return tensors

    def advance(self, stop: Callable[[], int]) -> None:
        """Train to the last iteration. Raises Stopped if `stop` returns the number of a signal."""
        recipe, progress = self.recipe, self.progress
        snapshots = recipe.snapshot_iterations()
        self.save()
        display = Display(recipe.label, recipe.iterations, progress.iteration)
        with display.bar:
            while True:
                if progress.iteration in snapshots:
                    self.snapshot()
                if progress.iteration == recipe.iterations:
                    break
                self.iterate(display.remind)
                display.advance(self.numbers)
                self.heed(stop)
                if time.perf_counter() - self.saved_at > SAVE_EVERY:
                    self.save()
        self.save()

    def iterate(self, between: Callable[[], None] = lambda: None) -> None:
        """Train one iteration, and evaluate if it completes an epoch.

        between: called between the batches of the evaluation.
        """
        recipe, progress, size = self.recipe, self.progress, self.data.size
        if progress.iteration and progress.iteration % recipes.WARM_UP_WINDOW == 0:
            error = 100 * progress.warm_up_wrong / (recipes.WARM_UP_WINDOW * recipe.batch)
            progress.warming_up &= error >= recipes.WARM_UP_ERROR
            progress.warm_up_wrong = 0
        lr = recipe.learning_rate(progress.iteration, progress.warming_up)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)
        self.pending.append(self.step(*self.data.batch(progress.iteration)))
        epoch = progress.iteration * recipe.batch // size
        progress.iteration += 1
        if recipe.device == "cpu" or progress.iteration % LOOK_EVERY == 0:
            self.look()
        complete = progress.iteration * recipe.batch // size > epoch
        if complete or progress.iteration == recipe.iterations:
            self.close_epoch(epoch + 1, lr, between)

    def look(self) -> None:
        """Add up the results of the steps since the last look."""
        progress = self.progress
        results = torch.stack(self.pending).tolist() if self.pending else []  # waits for the GPU
        for iteration, (loss, wrong) in enumerate(results, start=progress.iteration - len(results)):
            if not math.isfinite(loss):
                raise self.diverged(f"the loss is {loss}", iteration)
            progress.note_machine(self.machine, iteration)
            progress.batches += 1
            progress.loss += loss
            progress.wrong += int(wrong)
            progress.warm_up_wrong += int(wrong)
        now = time.perf_counter()
        progress.seconds += now - self.clock
        self.clock = now
        if self.pending:
            tested = {"test_error": progress.rows[-1]["test_error"]} if progress.rows else {}
            numbers = self.means() | tested | {"images/s": self.speed()}
            self.numbers = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        self.pending.clear()

    def diverged(self, what: str, iteration: int) -> FloatingPointError:
        """Return the error that says at which iteration training failed, and what to do."""
        lr = self.recipe.learning_rate(iteration, self.progress.warming_up)
        other = "--seed" if self.recipe.warms_up else "--seed, or --warm-up"
        where = f"{what} at iteration {iteration}, learning rate {lr:g}"
        kept = f"{STATE} keeps the last good state (iteration {self.saved})"
        advice = f"the same command would diverge again: choose another {other}"
        return FloatingPointError(f"{self.folder}: diverged: {where}; {kept}; {advice}")

    def means(self) -> dict[str, float]:
        """Return the mean loss, and the training error in %, since the last row."""
        loss, batches = self.progress.loss, self.progress.batches
        error = 100 * self.progress.wrong / (batches * self.recipe.batch)
        return {"loss": loss / batches, "train_error": error}

    def speed(self) -> float:
        """Return images/s over the whole run so far, evaluations included."""
        return self.progress.iteration * self.recipe.batch / self.progress.seconds

    def close_epoch(self, epoch: int, lr: float, between: Callable[[], None]) -> None:
        """Evaluate, and add a row to metrics.csv."""
        self.check()
        progress = self.progress
        row = {"epoch": epoch, "iteration": progress.iteration, **self.means()}
        row["test_error"] = self.test_error(self.recipe, between)
        row |= {"lr": lr, "mean_std": self.mean_std()}
        progress.rows.append({name: round(number, 6) for name, number in row.items()})
        progress.batches, progress.loss, progress.wrong = 0, 0.0, 0
        self.write_rows()

    def test_error(self, recipe: Recipe, between: Callable[[], None] = lambda: None) -> float:
        """Return the error on all test images, in %, in the precision of a recipe."""
        self.network.eval()
        wrong = torch.zeros((), dtype=torch.int64, device=recipe.device)
        with torch.no_grad(), recipes.autocast(recipe):
            for x, labels in self.data.test_batches():
                wrong += (self.network(x).argmax(1) != labels).sum()
                between()
        self.network.train()
        return 100 * wrong.item() / len(self.data.test[0])

    def mean_std(self) -> float:
        """Return the mean over layers of the std of the response, in closed form."""
        return float(closed_form(self.network)["std"].mean())

    def write_rows(self) -> None:
        with replacing(self.folder / METRICS) as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, states.COLUMNS)
            writer.writeheader()
            writer.writerows(self.progress.rows)

    def check(self) -> None:
        """Raise FloatingPointError if a loss or a tensor so far is not finite."""
        self.look()
        if not all(tensor.isfinite().all() for tensor in self.tensors().values()):
            raise self.diverged("not all weights are finite", self.progress.iteration - 1)

    def save(self) -> None:
        """Write the state. If a tensor is not finite, the old state stays."""
        self.check()
        states.write_state(self.folder / STATE, self.progress, self.data.digest, self.tensors())
        self.write_rows()
        self.saved, self.saved_at = self.progress.iteration, time.perf_counter()

    def restore(self) -> None:
        """Go back to the state in the folder, if there is one."""
        path, own = self.folder / STATE, self.tensors()
        if path.exists():
            known = self.recipe.iterations, self.data.digest, own
            self.progress, saved = states.read_state(path, *known)
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        elif (old := self.folder / OLD_STATE).exists():
            raise ValueError(f"{old}: a state of version 0.1, which cannot continue; {RESTART}")

    def heed(self, stop: Callable[[], int]) -> None:
        """Save and raise Stopped if a signal came."""
        if number := stop():
            if self.saved < self.progress.iteration:
                self.save()
            raise Stopped(number, f"{self.folder} keeps iteration {self.progress.iteration}")

    def write_network(self, path: Path, **facts: Any) -> None:
        card = asdict(self.recipe) | {"iteration": self.progress.iteration} | facts
        inputs = self.data.preprocessing
        loading.save(path, self.network, inputs, crop_padding="zero", training=card)

    def snapshot(self) -> None:
        """Keep the network as it is, with the learning rate of the step that led here."""
        self.check()
        iteration = self.progress.iteration
        lr = self.recipe.learning_rate(max(iteration - 1, 0), self.progress.warming_up)
        path = self.folder / "snapshots" / f"iteration-{iteration:07}.safetensors"
        self.write_network(path, current_lr=lr, bn_statistics="moving averages")

    def finish(self, stop: Callable[[], int]) -> str:
        """Recompute BN's statistics, test in float32, and write the network. Return a summary."""
        recipe, x = self.recipe, self.data.statistics_batch()
        norms = [m for m in self.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        total = len(norms) + math.ceil(len(self.data.test[0]) / TEST_BATCH)
        display = Display(f"{recipe.label}, final statistics and test", total)
        with display.bar:
            recipes.recompute_statistics(self.network, x, display.advance)
            error = self.test_error(replace(recipe, precision="float32"), display.advance)
        self.heed(stop)
        versions = {module.__name__: module.__version__ for module in (torch, np)}
        self.write_network(
            self.folder / f"{recipe.network}.safetensors",
            recipe="He et al., CVPR 2016, section 4.2",
            warmed_up=recipe.warms_up,
            bn_statistics=f"one batch of {len(x):,} augmented training images",
            test_error=round(error, 2),
            mean_std=round(self.mean_std(), 6),
            seconds=round(self.progress.seconds),
            images_per_s=round(self.speed()),
            device_name="; ".join(self.progress.machines),
            versions={"python": platform.python_version(), **versions},
        )
        std, speed = self.mean_std(), self.speed()
        return f"test error {error:.2f} %, mean std {std:.3f}, {speed:.0f} images/s"


def run(
    recipe: Recipe, train: Cifar10, test: Cifar10, folder: Path, stop: Callable[[], int] = lambda: 0
) -> str:
    """Train one network in its folder, to the end, and return a summary of the result.

    recipe: of the run.
    train, test: CIFAR-10's two splits.
    folder: of the run; it is made if it does not exist.
    stop: called after every iteration; a signal's number ends the run.

    Raises ValueError if the folder cannot be used for this recipe, OSError if it cannot be written,
    FloatingPointError if the training diverges, Stopped after a signal.
    """
    try:
        with locked(folder):
            check_folder(recipe, folder)
            with replacing(folder / CONFIG) as temporary:
                temporary.write_text(json.dumps(asdict(recipe), indent=1) + "\n")
            training = Training(recipe, train, test, folder)
            done = training.progress.iteration
            begin = f"resumed at iteration {done:,}" if done else "starts at iteration 0"
            where = f"of {recipe.iterations:,}, {training.machine}; {train.describe()}; {folder}"
            say(f"{recipe.label}: {begin} {where}")
            training.advance(stop)
            return training.finish(stop)
    except OSError as error:
        advice = "what was saved is intact: make room or allow writing, then repeat the command"
        raise OSError(f"{folder}: cannot write: {error}; {advice}") from error


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Raise ValueError if the folder holds a run with another configuration."""
    path, here = folder / CONFIG, asdict(recipe)
    if not path.exists():
        return
    try:
        there: dict[str, Any] = {**json.loads(path.read_text())}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged; choose another --out, or remove the folder") from error
    differences = ", ".join(
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in here | there
        if name not in ANYWHERE and here.get(name) != there.get(name)
    )
    if differences:
        message = f"{folder}: a run of another configuration: {differences}; choose another --out"
        raise ValueError(message)
