"""Images made by optimisation, so that networks respond to them as to CIFAR-10's test set.

    spectrum = Spectrum(test_images)
    goals = [Goal(network, preprocessing, measurement), ...]  # measured on the test set
    waves = spectrum.waves(dead_leaves(test_images, count=5400, seed=0))
    synthesis = Synthesis(goals, spectrum, waves[:900], rounds=12, seed=0)
    for loss in synthesis.go_on():  # a step takes one network and one part of the images
        ...
    many = np.concatenate([spectrum.pixels(waves), spectrum.pixels(synthesis.waves)])  # (6300, …)
    images = many[choose(goals, many, count=900, seed=0)]

For every channel of every layer, the mean m and variance v over the images are compared with m0 and
v0 over the test set. The loss of one network is the mean over layers of

    mean_c((m - m0)^2 / v0 + log(v / v0)^2),

times the network's weight. Images are changed first and then chosen, together with unchanged ones,
so that they fit as a set: what is rare is as frequent as in the test set. The less images are
changed, the better they suit other networks.

A step changes the waves of images (their Fourier transform), in units of the power that each wave
has in the test set. So coarse and fine structure, grey and colours change as much as photographs
differ in them, and no network is fooled by fine noise that photographs do not have. The statistics
are those of all images; what the images outside the current part gave is remembered from their last
step. Images are flipped at random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from analysis.measuring.result import Measurement
from models.data.preprocessing import Preprocessing

PART = 64  # images per step
LEARNING_RATE = 0.02  # of Adam, in units of a wave's power; falls to 0 along a cosine
OUTSIDE = 100.0  # weight of the mean square of values below black or above white
FLOOR = 1e-4  # of a layer's mean variance, added to every variance for dead channels
EXCHANGES = 20  # tries to exchange each chosen image for another
AMONG, TRIED = 420, 16  # candidates for an exchange, and how many of these are tried


class Spectrum:
    """The mean image of a data set, and how strong each wave is in it.

    root: (H, W // 2 + 1, 3, 3), for each wave the Cholesky factor of the three colours' covariance.
    """

    def __init__(self, images: np.ndarray) -> None:
        """images: (N, H, W, 3), uint8."""
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        self.mean = x.mean(0)
        self.root = roots(torch.fft.rfft2(x.sub_(self.mean), norm="ortho"))

    def render(self, waves: Tensor) -> Tensor:
        """Return the images (n, 3, H, W), 1 for white, of waves (n, 3, H, W // 2 + 1, 2).

        A wave of 1 has its usual power.
        """
        mean, root = self.mean.to(waves.device), self.root.to(waves.device)
        coloured = torch.einsum("hwcd,ndhw->nchw", root, torch.view_as_complex(waves))
        return torch.fft.irfft2(coloured, s=mean.shape[1:], norm="ortho").add(mean)  # type: ignore[no-any-return]

    @torch.no_grad()
    def pixels(self, waves: Tensor) -> np.ndarray:
        """Return the images of waves as (n, H, W, 3), uint8."""
        images = (self.render(waves).clamp(0, 1) * 255).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def waves(self, images: np.ndarray) -> Tensor:
        """Return the waves (n, 3, H, W // 2 + 1, 2) of images (n, H, W, 3).

        Each wave is scaled to its usual power over all images.
        """
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        waves = torch.fft.rfft2(x - x.mean(0), norm="ortho")
        return torch.view_as_real(
            torch.einsum("hwcd,ndhw->nchw", torch.linalg.inv(roots(waves)), waves)
        ).contiguous()


def roots(waves: Tensor) -> Tensor:
    """Return Cholesky factors of the colours' covariances: (H, W, 3, 3).

    waves: (n, 3, H, W), complex.
    """
    covariance = torch.einsum("nchw,ndhw->hwcd", waves, waves.conj()) / len(waves)
    return torch.linalg.cholesky(covariance + 1e-9 * torch.eye(3))  # type: ignore[no-any-return]


class Statistics(NamedTuple):
    """The wanted statistics of the responses: (channels,), all layers one after the other."""

    means: Tensor
    variances: Tensor
    floor: Tensor
    weights: Tensor

    def distance(self, means: Tensor, squares: Tensor) -> Tensor:
        """Return how far means, and means of squares, (..., channels), are from the wanted ones."""
        wanted = self.variances + self.floor
        ratio = ((squares - means.square()).clamp_min(0) + self.floor) / wanted
        return (self.weights * ((means - self.means).square() / wanted + ratio.log().square())).sum(
            -1
        )


class Goal:
    """A network and the statistics of its responses to the test set."""

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        result: Measurement,
        weight: float = 1.0,
    ) -> None:
        """weight: of this network's distance relative to the other networks'."""
        device = next(model.parameters()).device
        self.normalise = preprocessing
        moments = [layer.moments for layer in result.layers]
        variances = [(m.m2 / m.count).to(device, torch.float32) for m in moments]
        self.statistics = Statistics(
            torch.cat([m.mean.to(device, torch.float32) for m in moments]),
            torch.cat(variances),
            torch.cat([FLOOR * v.mean().expand(len(v)) for v in variances]),
            torch.cat([torch.full_like(v, weight / (len(v) * len(variances))) for v in variances]),
        )
        self.responses: list[Tensor] = []  # of the forward pass that runs
        self.model = fused(
            model, [(layer.name, layer.norm) for layer in result.layers], self.responses
        )
        self.known: dict[
            int, list[Tensor]
        ] = {}  # sums over each part of the images, when it was last seen

    def respond(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return each channel's means over the pixels, and those of squares: (n, channels) each.

        images: (n, 3, H, W), 1 for white.
        """
        self.responses.clear()
        self.model(self.normalise.scaled(images).contiguous(memory_format=torch.channels_last))
        means = [x.mean((2, 3)) for x in self.responses]
        squares = [x.square().mean((2, 3)) for x in self.responses]
        return torch.cat(means, 1), torch.cat(squares, 1)

    def loss(self, part: int, images: Tensor, count: int) -> Tensor:
        """Return how far `count` images are from the goal.

        images: the given part of them, (n, 3, H, W), 1 for white; the other parts are remembered.
        """
        sums = [values.sum(0) for values in self.respond(images)]
        self.known[part] = [values.detach() for values in sums]
        for other, known in self.known.items():
            if other != part:
                sums = [ours + theirs for ours, theirs in zip(sums, known, strict=True)]
        means, squares = sums
        return self.statistics.distance(means / count, squares / count)


def fused(model: nn.Module, pairs: list[tuple[str, str]], responses: list[Tensor]) -> nn.Module:
    """Return a copy of a network in evaluation mode with each BN folded into its convolution.

    Each folded convolution appends its output to `responses`.
    """
    twin: Any = copy.deepcopy(model).eval().requires_grad_(False)
    for conv, norm in pairs:
        folded = fuse_conv_bn_eval(
            twin.get_submodule(conv), twin.get_submodule(norm)
        ).requires_grad_(False)
        folded.register_forward_hook(lambda module, args, output: responses.append(output))
        twin.set_submodule(conv, folded)
        twin.set_submodule(norm, nn.Identity())
    return twin.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


@torch.no_grad()
def choose(goals: list[Goal], images: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the numbers (count,) of images that together are as near to the goals as possible.

    images: (N, H, W, 3), uint8.

    One of the chosen images is taken away. The images along which the distance would fall most
    steeply are tried, and the best one takes its place if that brings the whole set nearer.
    """
    wanted = Statistics(
        *(torch.cat(values) for values in zip(*(goal.statistics for goal in goals), strict=True))
    )
    device = wanted.means.device
    parts = [
        part.to(device)
        for part in torch.split(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, PART)
    ]
    seen = [
        torch.cat([torch.stack(goal.respond(part)) for part in parts], 1) for goal in goals
    ]  # (2, N, channels)
    features = torch.cat(seen, 2)
    del seen
    random = np.random.default_rng(seed)
    chosen = torch.from_numpy(random.permutation(len(images))[:count]).to(device)
    free = torch.ones(len(images), dtype=torch.bool, device=device)
    free[chosen] = False
    sums = features[:, chosen].sum(1)  # (2, channels)
    nearest = math.inf
    for _ in range(EXCHANGES * count if len(images) > count else 0):
        place = random.integers(count)
        left = sums - features[:, chosen[place]]
        first = int(random.integers(1 - AMONG, len(images)))  # every image is among as many
        some = slice(max(0, first), first + AMONG)
        slopes = torch.func.grad(lambda means_squares: wanted.distance(*means_squares))(
            left / count
        )
        gain = (
            torch.where(free[some], 0.0, -math.inf)
            - features[0, some] @ slopes[0]
            - features[1, some] @ slopes[1]
        )
        tried = some.start + gain.topk(min(TRIED, int(free[some].sum()))).indices
        if not len(tried):
            continue
        new = left[:, None] + features[:, tried]
        distances = wanted.distance(*(new / count))
        best = int(distances.argmin())
        if distances[best] < nearest:
            nearest, sums = float(distances[best]), new[:, best]
            free[chosen[place]], free[tried[best]] = True, False
            chosen[place] = tried[best]
    return chosen.cpu().numpy()


class Synthesis:
    """Images in the making. In every round each network sees each part of the images once."""

    def __init__(
        self, goals: list[Goal], spectrum: Spectrum, waves: Tensor, rounds: int, seed: int
    ) -> None:
        """waves: of the first images, (n, 3, H, W // 2 + 1, 2), see `Spectrum`."""
        device = goals[0].statistics.means.device
        self.goals, self.spectrum, self.seed = goals, spectrum, seed
        self.parts = [part.clone().to(device).requires_grad_() for part in torch.split(waves, PART)]
        self.optimizer = torch.optim.Adam(self.parts, lr=LEARNING_RATE, betas=(0.9, 0.99))
        self.step, self.steps = 0, rounds * len(goals) * len(self.parts)
        self.count = len(waves)

    def go_on(self) -> Iterator[float]:
        """Take the remaining steps, and yield the loss of each."""
        if self.step == 0:
            self.look()
        while self.step < self.steps:
            goal, part = divmod(self.step % (len(self.goals) * len(self.parts)), len(self.parts))
            waves = self.parts[part]
            images = self.spectrum.render(waves)
            cost = OUTSIDE * (images - images.clamp(0, 1)).square().mean() + unusual(waves)
            loss = self.goals[goal].loss(part, self.flip(images.clamp(0, 1)), self.count)
            self.optimizer.zero_grad()
            (loss + cost).backward()  # type: ignore[no-untyped-call]
            for group in self.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * self.step / self.steps)) / 2
            self.optimizer.step()
            self.step += 1
            yield loss.item()

    def flip(self, images: Tensor) -> Tensor:
        """Mirror about half of the images: the same ones for the same step and seed."""
        generator = torch.Generator().manual_seed(self.seed * self.steps + self.step)
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        return torch.where(chosen.to(images.device), images.flip(-1), images)

    @torch.no_grad()
    def look(self) -> None:
        """Let every network see every part once, so that statistics are of all images."""
        for goal in self.goals:
            for part, waves in enumerate(self.parts):
                goal.loss(part, self.spectrum.render(waves).clamp(0, 1), self.count)

    @property
    def waves(self) -> Tensor:
        """The waves of the images as they are now."""
        return torch.cat([part.detach().cpu() for part in self.parts])

    def state(self) -> dict[str, Any]:
        """Return all that is needed to continue, as tensors and numbers."""
        known = [goal.known for goal in self.goals]
        return {
            "step": self.step,
            "parts": self.parts,
            "optimizer": self.optimizer.state_dict(),
            "known": known,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.step = state["step"]
        with torch.no_grad():
            for part, kept in zip(self.parts, state["parts"], strict=True):
                part.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        for goal, known in zip(self.goals, state["known"], strict=True):
            goal.known = known


def unusual(waves: Tensor) -> Tensor:
    """Return the mean square of log(mean power of each wave / its power in the test set)."""
    return torch.view_as_complex(waves).abs().square().mean(0).log().square().mean()
