"""Recognise from BN's statistics which network a checkpoint is, and how its images were prepared.

BN recorded the mean and variance of its input over augmented training images. Whoever repeats the
training's preprocessing and forward pass finds them again, and nobody else. Misfits measured on the
five shipped networks and two public ones (resnet-20 and -56,
https://github.com/akamaster/pytorch_resnet_cifar10), with 1,024 test images for the preprocessing
and 256 for the network:

    preprocessing  right 0.03 to 0.04; another padding 0.10 and more; another preset 0.22 and more
    network        right 0.01 to 0.02; with average pooling in its shortcuts 0.05 and more;
                   option A with its zeros elsewhere 0.29 and more; the other kind 1.1 and more

In the deepest network a few images make most of the variance, and 256 others do not repeat it: the
shipped resnet-110 has a misfit of 0.36, with zeros elsewhere 0.83, and 4.4 as a plain network. Tests
hold bounds of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from models.data.preprocessing import PADDINGS, Preprocessing, augment
from models.messages import does_not_run, is_out_of_memory
from models.resnet import config_of

STEM_SAMPLE, SAMPLE = 1024, 256  # images for the first convolution, and for whole forward passes
GOOD, FITS = 0.06, 0.15  # misfits: below the first a good fit, below the second a rough one
FAR = 3.0  # times a recorded variance, or a third of it: no photographs alone make that difference
CLEAR = 0.5  # of the next best misfit: below this the best is not the best by chance

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Match(Generic[Candidate]):
    """The candidate that fits best.

    best: the candidate. misfit: 0 is perfect. others: labels and misfits of the rest, best first.
    """

    best: Candidate
    misfit: float
    others: list[tuple[str, float]]

    @property
    def fits(self) -> bool:
        """Return whether the misfit is below `FITS`."""
        return self.misfit < FITS

    @property
    def good(self) -> bool:
        """Return whether the misfit is one of the right candidate."""
        return self.misfit < GOOD

    @property
    def clear(self) -> bool:
        """Return whether the best is much better than the next; NaN is worse than any number."""
        following = self.others[0][1] if self.others else math.nan
        return self.misfit < (math.inf if math.isnan(following) else CLEAR * following)

    def describe(self) -> str:
        """Return words such as `misfit 0.05, next best 0.23 (cifar10, black padding)`."""
        if not self.others:
            return f"misfit {self.misfit:.2f}"
        label, misfit = self.others[0]
        return f"misfit {self.misfit:.2f}, next best {misfit:.2f} ({label})"


def best_of(candidates: list[tuple[Candidate, str, float]]) -> Match[Candidate]:
    """Return the match among candidates, each with its label and misfit; NaN fits worst."""
    (best, _, misfit), *others = sorted(
        candidates, key=lambda candidate: (math.isnan(candidate[2]), candidate[2])
    )
    return Match(best, misfit, [(label, misfit) for _, label, misfit in others])


def sample(images: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` images, evenly spaced: data sets are often sorted by class."""
    chosen: np.ndarray = images[
        np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    ]
    return chosen


@torch.no_grad()
def match_preprocessing(
    model: nn.Module,
    images: np.ndarray,
    candidates: list[Preprocessing],
    paddings: tuple[str, ...] = PADDINGS,
) -> Match[tuple[Preprocessing, str]]:
    """Return the normalisation and padding under which the first BN gets what it recorded.

    model: a network in evaluation mode. images: (N, H, W, 3), uint8.
    The misfit is the mean over channels of |log(variance / recorded variance)|, plus that of
    |mean - recorded mean| in recorded standard deviations.
    """
    some = sample(images, STEM_SAMPLE)
    tried = []
    for normalise in candidates:
        for padding in paddings:
            norm, x = first_norm(model, augment(some, normalise, padding, seeded()))
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)  # (N, C, H, W) -> (C,)
            deviation = (norm.running_var + norm.eps).sqrt()
            offset = ((mean - norm.running_mean).abs() / deviation).mean()
            misfit = float(log_ratio(variance, norm.running_var).mean() + offset)
            tried.append(((normalise, padding), f"{normalise.name}, {padding} padding", misfit))
    return best_of(tried)


@torch.no_grad()
def stem_variance(model: nn.Module, images: np.ndarray, normalise: Preprocessing) -> float:
    """Return the variance that the first BN gets over the one it recorded, or 1 if it has none.

    images: (N, H, W, 3), uint8, for a network in evaluation mode. Both are averaged over channels.
    Crops of random sizes change the ratio little: it shows images of another scale.
    """
    try:
        norm, x = first_norm(model, normalise(torch.as_tensor(images)))
    except NothingRecorded:
        return 1.0
    recorded = norm.running_var
    if (recorded == 1).all():  # as a new network has it
        return 1.0
    return float(x.var(dim=(0, 2, 3), correction=0).mean() / recorded.mean())


class Reached(Exception):
    """The forward pass has come as far as is needed."""


class NothingRecorded(ValueError):
    """No BN with recorded statistics ran."""


def first_norm(model: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    """Return the BN that runs first, and its input (N, C, H, W) for images x.

    Raises NothingRecorded if the network has none.
    """
    reached: list[tuple[nn.Module, Tensor]] = []

    def stop(norm: nn.Module, x: Tensor) -> None:
        reached.append((norm, x))
        raise Reached

    try:
        run_hooked(model, x, stop)
    except Reached:
        return reached[0]
    raise NothingRecorded(
        "no BN with recorded statistics ran in this network, so its preprocessing cannot be "
        "recognised: say --normalize"
    )


def run_hooked(model: nn.Module, x: Tensor, call: Callable[[Any, Tensor], None]) -> None:
    """Run a network, and call `call` with every BN that ran and its input (N, C, H, W).

    Raises ValueError for any error of the network's.
    """

    def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor) and x.ndim == 4:  # not of vectors (N, C)
            call(norm, x)

    norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None]
    handles = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms]
    try:
        model(x)
    except Exception as error:  # it may be anybody's code
        if isinstance(error, Reached) or is_out_of_memory(error):
            raise
        raise ValueError(does_not_run(error)) from error
    finally:
        for handle in handles:
            handle.remove()


def match_network(
    models: list[nn.Module], images: np.ndarray, normalise: Preprocessing, padding: str
) -> Match[nn.Module]:
    """Return which of several networks with the same tensors reproduces what every BN recorded.

    images: (N, H, W, 3), uint8. The misfit is the mean over BNs of
    |log(variance / recorded variance)|, both averaged over channels.
    """
    x = augment(sample(images, SAMPLE), normalise, padding, seeded())
    return best_of([(model, label(model), network_misfit(model, x)) for model in models])


def label(model: nn.Module) -> str:
    """Return what tells a network from the others with its tensors."""
    config = config_of(model)
    if config is None:
        return type(model).__name__
    if config.images == "imagenet" and config.shortcut in "BC":
        return f"stride on the {config.stride}"
    words = [config.kind]
    if config.kind == "residual":
        words += ["average pooling"] * (config.shortcut == "pool")
        words += ["zeros after"] * (config.padding == "after")
    return ", ".join(words)


@torch.no_grad()
def network_misfit(model: nn.Module, x: Tensor) -> float:
    """Return how far the variances of BN's inputs are from the recorded ones.

    model: a network in evaluation mode. x: images (N, C, H, W), normalised.
    """
    assert not model.training
    misfits: list[Tensor] = []

    def compare_statistics(norm: Any, x: Tensor) -> None:
        variance = x.var(dim=(0, 2, 3), correction=0)  # (N, C, H, W) -> (C,)
        misfits.append(log_ratio(variance.mean(), norm.running_var.mean()))

    run_hooked(model, x, compare_statistics)
    return float(torch.stack(misfits).mean()) if misfits else math.nan


def log_ratio(measured: Tensor, recorded: Tensor) -> Tensor:
    """Return |log(measured / recorded)|, finite also if a channel is dead."""
    tiny = torch.finfo(torch.float32).tiny
    return (measured.clamp_min(tiny) / recorded.clamp_min(tiny)).log().abs()


def seeded() -> torch.Generator:
    """Return a generator that makes the same random crops every time."""
    return torch.Generator().manual_seed(0)
