"""The ways of measuring that are compared: this toolkit's, and what people write without it.

    stds = WAYS["float64 sums"](model, names, batches)  # of the responses of the BNs called so, in that order

A way runs a network in evaluation mode over batches (n, 3, H, W) and returns the std of each
layer's response over all of them; the plain forward pass returns nothing.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from analysis.measuring.batches import device_of, run
from analysis.measuring.evaluation import evaluation
from analysis.measuring.measurement import PRECISIONS, measuring

Batches = Iterable[Tensor]
Way = Callable[[nn.Module, list[str], Batches], list[float]]
PLAIN, PLAIN_BFLOAT16 = "plain forward", "plain forward, bfloat16"


def plain_forward(precision: str) -> Way:
    """Nothing but the forward pass, as people write it, without TF32."""

    def way(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
        with (
            evaluation(model),
            torch.autocast(device_of(model).type, PRECISIONS[precision], precision != "float32"),
        ):
            for x in batches:
                run(model, x)
        return []

    return way


def toolkit(precision: str) -> Way:
    def way(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
        with measuring(model, precision=precision) as meter:
            for x in batches:
                meter.add(x)
        return [layer.moments.std for layer in meter.result().layers]

    return way


@contextmanager
def taking(
    model: nn.Module, names: list[str], take: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Call `take` with a BN's name and its output, in every forward pass."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            take(name, output)

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook_of(name)))
        yield


def channel_calls(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
    """`mean` and `var` of every channel and batch, as timm's hook functions call them, averaged
    over the batches.
    """
    squares = dict.fromkeys(names, 0.0)
    means, count = dict.fromkeys(names, 0.0), 0

    def take(name: str, y: Tensor) -> None:
        mean = y.mean((0, 2, 3))  # (N, C, H, W) -> (C,)
        means[name] += len(y) * mean.mean().item()
        squares[name] += len(y) * (y.var((0, 2, 3)).mean() + (mean**2).mean()).item()

    with taking(model, names, take), torch.no_grad():
        for x in batches:
            run(model, x)
            count += len(x)
    return [math.sqrt(squares[name] / count - (means[name] / count) ** 2) for name in names]


def float64_sums(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
    """Every response is converted to float64, and summed with its squares."""
    totals = {name: torch.zeros(3, dtype=torch.float64, device=device_of(model)) for name in names}

    def take(name: str, y: Tensor) -> None:
        y = y.double()
        totals[name] += torch.stack(
            (torch.tensor(float(y.numel()), device=y.device), y.sum(), y.square().sum())
        )

    with taking(model, names, take), torch.no_grad():
        for x in batches:
            run(model, x)
    stds = []
    for name in names:
        count, total, squares = totals[name].tolist()
        stds.append(math.sqrt(squares / count - (total / count) ** 2))
    return stds


def store(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
    """Every response is kept till the end."""
    stored: dict[str, list[Tensor]] = {name: [] for name in names}
    with taking(model, names, lambda name, y: stored[name].append(y)), torch.no_grad():
        for x in batches:
            run(model, x)
    return [torch.cat(stored.pop(name)).std(correction=0).item() for name in names]


def trace(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
    """A trace of every tensor by torchlens (2.36), batch by batch, and sums in float64 of the
    responses in it.
    """
    torchlens: Any = importlib.import_module("torchlens")
    totals = {name: [0.0, 0.0, 0.0] for name in names}
    for x in batches:
        with torch.no_grad():
            log = torchlens.trace(model, x.to(device_of(model)))
        for name in names:
            y = log.modules[name].out.double()
            for index, value in enumerate((y.numel(), y.sum().item(), y.square().sum().item())):
                totals[name][index] += value
    return [
        math.sqrt(squares / count - (total / count) ** 2)
        for count, total, squares in totals.values()
    ]


def two_pass(model: nn.Module, names: list[str], batches: Callable[[], Batches]) -> list[float]:
    """The reference: the mean of all values in a first pass, the squares of their differences from
    it in a second.
    """
    means, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    m2 = dict.fromkeys(names, 0.0)

    def take_mean(name: str, y: Tensor) -> None:
        count[name] += y.numel()
        means[name] += y.double().sum().item()

    def take_square(name: str, y: Tensor) -> None:
        m2[name] += (y.double() - means[name] / count[name]).square().sum().item()

    for take in (take_mean, take_square):
        with taking(model, names, take), torch.no_grad():
            for x in batches():
                run(model, x)
    return [math.sqrt(m2[name] / count[name]) for name in names]


WAYS: dict[str, Way] = {
    PLAIN: plain_forward("float32"),
    PLAIN_BFLOAT16: plain_forward("bfloat16"),
    "this toolkit, float32": toolkit("float32"),
    "this toolkit, bfloat16": toolkit("bfloat16"),
    "mean and var per channel": channel_calls,
    "float64 sums": float64_sums,
    "store, then std": store,
    "torchlens": trace,
}
