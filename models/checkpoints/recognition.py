"""What the BN statistics of a checkpoint tell about it: the preprocessing it was trained with, and
the network it is.

BN recorded the mean and variance of its input over augmented training images. Whoever repeats the
training's preprocessing and forward pass finds them again; whoever does not is far off. Misfits
measured on two public checkpoints (resnet-20 and -56,
https://github.com/akamaster/pytorch_resnet_cifar10), with 1,024 test images for the preprocessing
and 256 for the network:

    preprocessing       right 0.03 and 0.04; the same with another padding 0.45 and more; any other 0.22 and more
    network             right 0.01; option A with its zeros elsewhere 0.29 and 0.77; the plain network 2.1 and 4.2

In deep networks few images can make most of the variance, and 256 others do not repeat it: the
shipped resnet-110 has a misfit of 0.36; when it was interrupted after 16,958 iterations it had
2.68, and with its zeros elsewhere 2.02. What the predictions tell about an image shows the right
one then: 1.97 nats and more of the five shipped networks, at most 0.4 of the same tensors in a
wrong one (log 10 = 2.3 is all there is to tell).

`python -m pytest tests/models/checkpoints/test_recognition.py` holds bounds of these.
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

STEM_SAMPLE, SAMPLE = (
    1024,
    256,
)  # images for the first convolution alone and for a whole forward pass
FITS = 0.15  # a misfit below this is a fit
FAR = 3.0  # times a recorded variance, or a third of it: no photographs alone make that difference
CLEAR = 0.5  # of the next best misfit: below this the best is not the best by chance
TELLS = 0.5  # nats: what predictions tell about an image, where the network may be the right one

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Match(Generic[Candidate]):
    """The candidate that fits best, its misfit (0 is perfect), and the others' misfits by label,
    best first.

    by: what told that it is the best, in words, where the misfit did not.
    """

    best: Candidate
    misfit: float
    others: list[tuple[str, float]]
    by: str = ""

    @property
    def fits(self) -> bool:
        return self.misfit < FITS

    @property
    def clear(self) -> bool:
        """Whether the best is much better than the next; NaN is worse than any number."""
        _, following = self.others[0]
        return bool(self.by) or self.misfit < (
            math.inf if math.isnan(following) else CLEAR * following
        )

    def describe(self) -> str:
        """`misfit 0.05, next best 0.23 (cifar10, black padding)`."""
        if not self.others:
            return f"misfit {self.misfit:.2f}"
        label, misfit = self.others[0]
        if self.by:
            return f"misfit {self.misfit:.2f}, another's {misfit:.2f} ({label}); {self.by}"
        return f"misfit {self.misfit:.2f}, next best {misfit:.2f} ({label})"


def best_of(candidates: list[tuple[Candidate, str, float]]) -> Match[Candidate]:
    """The match among candidates, each with its label and misfit; NaN, from damaged weights, fits
    worst.
    """
    (best, _, misfit), *others = sorted(
        candidates, key=lambda candidate: (math.isnan(candidate[2]), candidate[2])
    )
    return Match(best, misfit, [(label, misfit) for _, label, misfit in others])


def sample(images: np.ndarray, count: int) -> np.ndarray:
    """At most `count` images, evenly spaced: data sets are often sorted by class."""
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
    """The normalisation and padding under which the first BN gets what it recorded, for a network
    in evaluation mode.

    images: (N, H, W, 3) uint8. The misfit is the mean over channels of |log(variance / recorded
    variance)|, plus that of |mean - recorded mean| in recorded standard deviations.
    """
    some = sample(images, STEM_SAMPLE)
    tried = []
    for normalise in candidates:
        for padding in paddings:
            norm, x = first_norm(model, augment(some, normalise, padding, seeded()))
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)  # (N, C, H, W) -> (C,)
            spread = log_ratio(variance, norm.running_var).mean()
            offset = (
                (mean - norm.running_mean).abs() / (norm.running_var + norm.eps).sqrt()
            ).mean()
            tried.append(
                (
                    (normalise, padding),
                    f"{normalise.name}, {padding} padding",
                    float(spread + offset),
                )
            )
    return best_of(tried)


@torch.no_grad()
def stem_variance(model: nn.Module, images: np.ndarray, normalise: Preprocessing) -> float:
    """The variance that the first BN gets, over the one it recorded, both averaged over channels; 1
    if it has none.

    images: (N, H, W, 3) uint8, for a network in evaluation mode. Crops of random sizes change it
    little: it tells images of another scale.
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
    """The BN that runs first, and its input (N, C, H, W) for images x. NothingRecorded where the
    network has none.
    """
    reached: list[tuple[nn.Module, Tensor]] = []

    def stop(norm: nn.Module, x: Tensor) -> None:
        reached.append((norm, x))
        raise Reached

    handles = before_norms(model, stop)
    try:
        run(model, x)
    except Reached:
        return reached[0]
    finally:
        for handle in handles:
            handle.remove()
    raise NothingRecorded(
        "no BN with recorded statistics ran in this network, so its preprocessing cannot be recognised: say --normalize"
    )


def run(model: nn.Module, x: Tensor) -> Any:
    """What a forward pass gives. ValueError for any error of the network's."""
    try:
        return model(x)
    except Exception as error:  # it may be anybody's code
        if isinstance(error, Reached) or is_out_of_memory(error):
            raise
        raise ValueError(does_not_run(error)) from error


def before_norms(model: nn.Module, call: Callable[[Any, Tensor], None]) -> list[Any]:
    """Hooks that call `call` with every module that holds statistics of its input, and this input
    (N, C, H, W).
    """

    def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor) and x.ndim == 4:  # not of vectors (N, C)
            call(norm, x)

    norms = [
        module for module in model.modules() if getattr(module, "running_var", None) is not None
    ]
    return [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms]


def match_network(
    models: list[nn.Module], images: np.ndarray, normalise: Preprocessing, padding: str
) -> Match[nn.Module]:
    """The network (of several with the same tensors) whose forward pass reproduces what every BN
    recorded.

    The misfit is the mean over BN layers of |log(variance / recorded variance)|, both averaged over
    channels. Where no misfit is a fit, it is the network whose predictions tell the images apart,
    if one alone does (`information`).
    """
    x = augment(sample(images, SAMPLE), normalise, padding, seeded())
    fits = [misfit_and_information(model, x) for model in models]
    tried = [(model, label(model), misfit) for model, (misfit, _) in zip(models, fits, strict=True)]
    match = best_of(tried)
    if match.fits or len(models) == 1:
        return match
    (most, which), (second, _), *_ = sorted(
        ((nats, i) for i, (_, nats) in enumerate(fits)), reverse=True
    )
    if most < TELLS or second > CLEAR * most:
        return match
    model, _, misfit = tried.pop(which)
    rest = best_of(tried)
    others = [(label(rest.best), rest.misfit), *rest.others]
    return Match(
        model,
        misfit,
        others,
        f"its predictions tell most of an image ({most:.2f} nats, next {second:.2f})",
    )


def label(model: nn.Module) -> str:
    """What tells a network from the others with its tensors."""
    config = config_of(model)
    if config is None:
        return type(model).__name__
    if config.images == "imagenet" and config.shortcut != "A":
        return f"stride on the {config.stride}"
    return "residual, zeros after" if config.padding == "after" else str(config.kind)


@torch.no_grad()
def misfit_and_information(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """How far the variances of BN's inputs are from the recorded ones, and what the predictions
    tell about an image.

    For a network in evaluation mode and images x (N, C, H, W).
    """
    assert not model.training
    misfits: list[Tensor] = []

    def compare_statistics(norm: Any, x: Tensor) -> None:
        variance = x.var(dim=(0, 2, 3), correction=0)  # (N, C, H, W) -> (C,)
        misfits.append(log_ratio(variance.mean(), norm.running_var.mean()))

    handles = before_norms(model, compare_statistics)
    try:
        output = run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.stack(misfits).mean()), information(output)


def information(output: Any) -> float:
    """The mutual information of an image and its predicted class, in nats, for logits (N, classes);
    0 of anything else.

    It is large where every image has a clear prediction, and not all the same one.
    """
    if not isinstance(output, Tensor) or output.ndim != 2 or not output.isfinite().all():
        return 0.0
    p = output.double().softmax(dim=1)
    of_all, of_one = (
        torch.special.entr(q).sum(dim=-1) for q in (p.mean(dim=0), p)
    )  # entropies: (), (N,)
    return float(of_all - of_one.mean())


def log_ratio(measured: Tensor, recorded: Tensor) -> Tensor:
    """|log(measured / recorded)|, finite also where a channel is dead."""
    tiny = torch.finfo(torch.float32).tiny
    return (measured.clamp_min(tiny) / recorded.clamp_min(tiny)).log().abs()


def seeded() -> torch.Generator:
    """The same random crops every time."""
    return torch.Generator().manual_seed(0)
