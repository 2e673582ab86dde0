"""A network in training: from the last state in its folder to the end, and what it writes on the
way.

A run's folder holds config.json, state.pt, metrics.csv, snapshots/ and the finished network, whose
BN statistics are those of one batch of 10,000 augmented training images. The state is the
iteration, the network and its momentum (and sums for the next row of metrics.csv), so an
interrupted run ends with the same tensors, bit for bit, as one that was not: on the same CPU, with
as many threads and the same versions. It may go on elsewhere; the card says where it did.
"""

from __future__ import annotations

import csv
import fcntl
import functools
import hashlib
import io
import json
import math
import pickle
import platform
import re
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from models.batchnorm import closed_form
from models.checkpoints import loading
from models.data.cifar10 import Cifar10
from models.data.preprocessing import augment, mean_image, per_pixel
from models.files import LEFT, remove_left, replacing
from models.training.recipe import (
    CROP,
    STATISTICS,
    WARM_UP_ERROR,
    WARM_UP_WINDOW,
    CapturedStep,
    Fault,
    Recipe,
    autocast,
    batch_indices,
    compiled_blocks,
    new_network,
    new_optimizer,
    new_step,
    permutation,
    recompute_statistics,
)

CONFIG, STATE, METRICS = "config.json", "state.pt", "metrics.csv"
ANYWHERE = ("device", "precision")  # of a recipe: a run may go on with others
COLUMNS = (
    "epoch",
    "iteration",
    "loss",
    "train_error",
    "test_error",
    "lr",
    "mean_std",
)  # errors in %
LOOK_EVERY = 50  # iterations between looks at a GPU's losses; each look waits for the GPU
SAVE_EVERY = 120  # seconds
COMPILER = ("torch._dynamo", "torch._inductor")  # where the classes of torch.compile's errors are
STATISTICS_IMAGES = 10_000  # in the one batch that BN's final statistics come from
TEST_BATCH = 1_000  # images


@dataclass
class Stretch:
    """Iterations that one machine trained."""

    first: int
    machine: str
    seconds: float  # that the run had taken before


@dataclass
class Progress:
    """How far a run is, with what the next row of metrics.csv and the end of the warm-up are
    computed from.
    """

    warming_up: bool
    iteration: int = 0
    warm_up_wrong: int = 0  # images in this window of WARM_UP_WINDOW iterations
    batches: int = 0  # since the last row
    loss: float = 0.0  # sum over them
    wrong: int = 0  # images in them
    seconds: float = (
        0.0  # training and evaluating, without the time between an interruption and going on
    )
    rows: list[dict[str, float]] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)


class Training:
    """A network in training: from the last state in its folder, or from the beginning where there
    is none.
    """

    def __init__(self, recipe: Recipe, train: Cifar10, test: Cifar10, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.train, self.test = (
            (
                torch.as_tensor(split.images, device=recipe.device),
                torch.as_tensor(split.labels, device=recipe.device),
            )
            for split in (train, test)
        )  # (N, 32, 32, 3) uint8 and (N,)
        self.digest = hashlib.sha256(
            train.images.tobytes() + np.asarray(train.labels).tobytes()
        ).hexdigest()
        self.preprocessing = per_pixel(mean_image(train.images))
        mean, std = (
            self.preprocessing.mean.to(recipe.device),
            self.preprocessing.std.to(recipe.device),
        )
        self.normalise = replace(self.preprocessing, mean=mean, std=std)  # on the device
        self.order = functools.lru_cache(maxsize=2)(permutation)
        self.network = new_network(recipe)
        self.optimizer = new_optimizer(self.network, recipe)
        self.progress = Progress(warming_up=recipe.warms_up)
        self.restore()
        self.step = new_step(self.network, self.optimizer, recipe)
        if recipe.device == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = False  # float32 means float32
            self.step = self.captured()
        self.pending: list[Tensor] = []  # what steps gave since the last look
        self.shown = ""  # in the progress bar
        self.clock = self.saved_at = time.perf_counter()

    def captured(self) -> CapturedStep:
        """The step as one CUDA graph of compiled blocks. Fault where they cannot be compiled."""
        try:
            with compiled_blocks(self.network):
                return CapturedStep(self.step, *self.batch(), list(self.tensors().values()))
        except (RuntimeError, ImportError) as error:
            if not type(error).__module__.startswith(COMPILER):
                raise
            needs = "torch.compile needs Triton and a C compiler; --device cpu trains without them"
            raise Fault(
                f"the network cannot be compiled for this GPU ({error}): {needs}", 2
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """All that a step changes, by name."""
        named = self.network.named_parameters()
        momentum = {
            f"momentum.{name}": self.optimizer.state[p]["momentum_buffer"] for name, p in named
        }
        return self.network.state_dict() | momentum

    def batch(self) -> tuple[Tensor, Tensor]:
        """The images (N, 3, 32, 32) and labels (N,) of the next iteration."""
        iteration = self.progress.iteration
        indices = batch_indices(self.recipe, len(self.train[0]), iteration, self.order)
        return self.augmented(indices, CROP, iteration)

    def augmented(self, indices: np.ndarray, purpose: int, index: int) -> tuple[Tensor, Tensor]:
        state = np.random.SeedSequence([self.recipe.seed, purpose, index]).generate_state(1)
        generator = torch.Generator(self.recipe.device).manual_seed(int(state[0]))
        where = torch.from_numpy(indices).to(self.recipe.device)
        return augment(self.train[0][where], self.normalise, "zero", generator), self.train[1][
            where
        ]

    def advance(self, stop: Callable[[], int]) -> None:
        """Train to the last iteration, or until `stop` gives the number of a signal."""
        recipe, progress, stretches = self.recipe, self.progress, self.progress.stretches
        snapshots = recipe.snapshot_iterations()
        while stretches and stretches[-1].first == progress.iteration:  # it trained nothing
            stretches.pop()
        last = stretches[-1].machine if stretches else ""
        if progress.iteration < recipe.iterations and machine(recipe) != last:
            stretches.append(Stretch(progress.iteration, machine(recipe), progress.seconds))
        self.save()
        with tqdm(
            total=recipe.iterations, initial=progress.iteration, desc=recipe.label, disable=None
        ) as bar:
            while True:
                if progress.iteration in snapshots:
                    self.snapshot()
                if progress.iteration == recipe.iterations:
                    break
                self.iterate()
                bar.set_postfix_str(self.shown, refresh=False)
                bar.update()
                self.heed(stop)
                if time.perf_counter() - self.saved_at > SAVE_EVERY:
                    self.save()
        self.save()

    def iterate(self) -> None:
        """One iteration, and what is due after it."""
        recipe, progress, size = self.recipe, self.progress, len(self.train[0])
        if progress.iteration and progress.iteration % WARM_UP_WINDOW == 0:
            error = 100 * progress.warm_up_wrong / (WARM_UP_WINDOW * recipe.batch)
            progress.warming_up &= error >= WARM_UP_ERROR
            progress.warm_up_wrong = 0
        lr = recipe.learning_rate(progress.iteration, progress.warming_up)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)
        self.pending.append(self.step(*self.batch()))
        epoch = progress.iteration * recipe.batch // size
        progress.iteration += 1
        if recipe.device == "cpu" or progress.iteration % LOOK_EVERY == 0:
            self.look()
        if (
            progress.iteration * recipe.batch // size > epoch
            or progress.iteration == recipe.iterations
        ):
            self.close_epoch(epoch + 1, lr)

    def look(self) -> None:
        """Take in what the steps since the last look gave. Fault where a loss is no number."""
        progress = self.progress
        results = torch.stack(self.pending).tolist() if self.pending else []  # one wait for the GPU
        for iteration, (loss, wrong) in enumerate(results, start=progress.iteration - len(results)):
            if not math.isfinite(loss):
                raise self.diverged(f"the loss is {loss}", iteration)
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
            self.shown = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        self.pending.clear()

    def diverged(self, what: str, iteration: int) -> Fault:
        lr = self.recipe.learning_rate(iteration, self.progress.warming_up)
        kept = f"{STATE} keeps the last good state (iteration {self.saved})"
        advice = f"the same command ends alike: take another --seed{'' if self.recipe.warms_up else ', or --warm-up'}"
        what = f"diverged: {what} at iteration {iteration}, learning rate {lr:g}; stopped, {kept}"
        return Fault(f"{self.folder}: {what}; {advice}")

    def means(self) -> dict[str, float]:
        """The mean loss, and the training error in %, since the last row."""
        images = self.progress.batches * self.recipe.batch
        return {
            "loss": self.progress.loss / self.progress.batches,
            "train_error": 100 * self.progress.wrong / images,
        }

    def speed(self) -> float:
        """Images/s over the whole run so far, with the evaluations."""
        return self.progress.iteration * self.recipe.batch / self.progress.seconds

    def close_epoch(self, epoch: int, lr: float) -> None:
        """Evaluate, and add a row to metrics.csv."""
        self.check()
        progress = self.progress
        row = {"epoch": epoch, "iteration": progress.iteration, **self.means()}
        row |= {"test_error": self.test_error(self.recipe), "lr": lr, "mean_std": self.mean_std()}
        progress.rows.append({name: round(number, 6) for name, number in row.items()})
        progress.batches, progress.loss, progress.wrong = 0, 0.0, 0
        self.write_rows()

    def test_error(self, recipe: Recipe) -> float:
        """In %, on all test images."""
        self.network.eval()
        wrong = torch.zeros((), dtype=torch.int64, device=recipe.device)
        with torch.no_grad(), autocast(recipe):
            for start in range(0, len(self.test[0]), TEST_BATCH):
                images, labels = (tensor[start : start + TEST_BATCH] for tensor in self.test)
                x = self.normalise(images).contiguous(memory_format=torch.channels_last)
                wrong += (self.network(x).argmax(1) != labels).sum()
        self.network.train()
        return 100 * wrong.item() / len(self.test[0])

    def mean_std(self) -> float:
        """Of the responses, over the layers, in closed form."""
        state = self.network.state_dict()
        vectors = {
            name: tensor for name, tensor in state.items() if tensor.ndim == 1
        }  # BN's, and a bias
        together = torch.cat(list(vectors.values())).cpu()  # one wait for the GPU
        parts = torch.split(together, [len(vector) for vector in vectors.values()])
        return float(closed_form(state | dict(zip(vectors, parts, strict=True)))["std"].mean())

    def write_rows(self) -> None:
        with (
            replacing(self.folder / METRICS) as temporary,
            open(temporary, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.progress.rows)

    def check(self) -> None:
        """Fault where a loss up to here is no number, or the network is none that may be kept."""
        self.look()
        if not all(tensor.isfinite().all() for tensor in self.tensors().values()):
            raise self.diverged("not all weights are finite", self.progress.iteration - 1)

    def save(self) -> None:
        """Write the state, whole or not at all. Fault, and the old state stays, where a number in
        it is not finite.
        """
        self.check()
        content = io.BytesIO()  # torch.save tells no full disk from another fault, a file does
        torch.save(
            {"progress": asdict(self.progress), "tensors": self.tensors(), "data": self.digest},
            content,
        )
        with replacing(self.folder / STATE) as temporary:
            temporary.write_bytes(content.getbuffer())
        self.write_rows()
        self.saved, self.saved_at = self.progress.iteration, time.perf_counter()

    def restore(self) -> None:
        """Go back to the state in the folder, where there is one."""
        path = self.folder / STATE
        if not path.exists():
            return
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
            state = torch.load(path, map_location=self.recipe.device, weights_only=True)
            progress, tensors, digest = (
                Progress(**state["progress"]),
                state["tensors"],
                state["data"],
            )
            progress.stretches = [Stretch(**stretch) for stretch in state["progress"]["stretches"]]
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
        except (
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            raise Fault(
                f"{path}: damaged or of an older version; remove it to train from the beginning", 2
            ) from error
        if digest != self.digest:
            raise Fault(
                f"{path}: begun on other images, or in another order; choose another --out", 2
            )
        self.progress = progress

    def heed(self, stop: Callable[[], int]) -> None:
        """Save and end the command where a signal came."""
        if number := stop():
            if self.saved < self.progress.iteration:
                self.save()
            raise stopped(number, f"{self.folder} keeps iteration {self.progress.iteration}")

    def write_network(self, path: Path, **facts: Any) -> None:
        card = asdict(self.recipe) | {"iteration": self.progress.iteration} | facts
        loading.save(path, self.network, self.preprocessing, crop_padding="zero", training=card)

    def snapshot(self) -> None:
        self.check()
        iteration = self.progress.iteration
        lr = self.recipe.learning_rate(
            max(iteration - 1, 0), self.progress.warming_up
        )  # of the step that led here
        path = self.folder / "snapshots" / f"iteration-{iteration:07}.safetensors"
        self.write_network(path, current_lr=lr, bn_statistics="moving averages")

    def trained_on(self) -> str:
        """The machines, each with its images/s: `NVIDIA H100, …, 11849 images/s; from iteration
        44,475 on AMD …`.
        """
        progress, parts = self.progress, []
        end = Stretch(progress.iteration, "", progress.seconds)
        for stretch, following in pairwise([*progress.stretches, end]):
            where = f"from iteration {stretch.first:,} on " if stretch.first else ""
            images = (following.first - stretch.first) * self.recipe.batch
            speed = images / (following.seconds - stretch.seconds)
            parts.append(f"{where}{stretch.machine}, {speed:.0f} images/s")
        return "; ".join(parts)

    def finish(self, stop: Callable[[], int]) -> str:
        """Recompute BN's statistics, test, and write the finished network with its card. What came
        out, in words.
        """
        recipe = self.recipe
        shuffled = np.random.default_rng([recipe.seed, STATISTICS]).permutation(len(self.train[0]))
        x, _ = self.augmented(shuffled[:STATISTICS_IMAGES], STATISTICS, 0)
        recompute_statistics(self.network, x)
        error = self.test_error(
            replace(recipe, precision="float32")
        )  # as those who use the network will
        self.heed(stop)
        self.write_network(
            self.folder / f"{recipe.network}.safetensors",
            recipe="He et al., CVPR 2016, section 4.2",
            warmed_up=recipe.warms_up,
            bn_statistics=f"one batch of {len(x):,} augmented training images",
            test_error=round(error, 2),
            mean_std=round(self.mean_std(), 6),
            seconds=round(self.progress.seconds),
            images_per_s=round(self.speed()),
            device_name=self.trained_on(),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        )
        return (
            f"test error {error:.2f} %, mean std {self.mean_std():.3f}, {self.speed():.0f} images/s"
        )


def machine(recipe: Recipe) -> str:
    """The GPU, or the processor and how many threads of it torch uses; the precision; and torch's
    version.
    """
    how = f"{recipe.precision}, torch {torch.__version__}"
    if recipe.device == "cuda":
        return f"{torch.cuda.get_device_name()}, {how}"
    info = Path("/proc/cpuinfo")  # only Linux has it
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{[*names, platform.machine()][0]}, {torch.get_num_threads()} threads, {how}"


def stopped(number: int, kept: str) -> Fault:
    return Fault(
        f"stopped by {signal.Signals(number).name}: {kept}; the same command goes on from there",
        128 + number,
    )


def run(
    recipe: Recipe, train: Cifar10, test: Cifar10, folder: Path, stop: Callable[[], int] = lambda: 0
) -> str:
    """Train one network in its folder, to the end. What came out, in words.

    stop: asked after every iteration; the number of a signal ends the run. Raises Fault where the
    folder is not free for this recipe, cannot be written, or the training diverges.
    """
    try:
        with locked(folder):
            check_folder(recipe, folder)
            with replacing(folder / CONFIG) as temporary:
                temporary.write_text(json.dumps(asdict(recipe), indent=1) + "\n")
            training = Training(recipe, train, test, folder)
            training.advance(stop)
            return training.finish(stop)
    except (OSError, SafetensorError) as error:
        advice = "what was saved before is intact; make room or allow writing, and the same command goes on from there"
        raise Fault(f"{folder}: cannot write: {error}; {advice}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made where there is none, and remove what killed trainers have left
    in it.

    Fault where another trainer holds it, or a file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise Fault(
            f"{folder}: cannot be made: {error.strerror}; choose another --out", 2
        ) from error
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Fault(
                f"{folder}: another trainer is at work here; choose another --out", 2
            ) from error
        except OSError as error:
            raise Fault(
                f"{folder}: cannot be locked: {error.strerror}; choose an --out on another disk", 2
            ) from error
        remove_left(folder.rglob(LEFT))
        yield


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Fault where the folder is one of another configuration."""
    path = folder / CONFIG
    if not path.exists():
        return
    try:
        there: dict[str, Any] = {"warm_up": False} | json.loads(
            path.read_text()
        )  # runs of before it was a choice
    except (ValueError, TypeError) as error:
        raise Fault(f"{path}: damaged; choose another --out, or remove the folder", 2) from error
    here = asdict(recipe)
    names = [
        name for name in here | there if name not in ANYWHERE and here.get(name) != there.get(name)
    ]
    if names:
        differences = ", ".join(
            f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names
        )
        raise Fault(
            f"{folder}: a run of another configuration: {differences}; choose another --out", 2
        )
