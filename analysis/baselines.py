"""The methods that the benchmark compares: this toolkit's, and what people write without it.

    stds = METHODS["float64 sums"](model, names, batches)  # of these BNs' outputs, in that order

A method runs a network in evaluation mode over batches (n, 3, H, W) and returns the std of each
layer's response over all of them. The plain forward pass returns nothing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from analysis.measuring.batches import device_of, run
from analysis.measuring.eval_mode import evaluation
from analysis.measuring.measurement import PRECISIONS, measuring

Batches = Iterable[Tensor]
Method = Callable[[nn.Module, list[str], Batches], list[float]]
PLAIN, PLAIN_BFLOAT16 = "plain forward", "plain forward, bfloat16"


def plain_forward(precision: str) -> Method:
    """Return a method that only runs the forward pass, without TF32."""

    def method(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
        device, reduced = device_of(model).type, precision != "float32"
        with evaluation(model), torch.autocast(device, PRECISIONS[precision], reduced):
            for x in batches:
                run(model, x)
        return []

    return method


def toolkit(precision: str) -> Method:
    """Return this toolkit's method in a precision."""

    def method(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
        with measuring(model, precision=precision) as meter:
            for x in batches:
                meter.add(x)
        return [layer.moments.std for layer in meter.result().layers]

    return method


@contextmanager
def hooked(
    model: nn.Module, names: list[str], take: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Call `take` with a BN's name and its output, in every forward pass, without gradients."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            take(name, output)

        return hook

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            stack.enter_context(module.register_forward_hook(hook_of(name)))
        stack.enter_context(torch.no_grad())
        yield


def channel_calls(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
    """Average `mean` and `var` of every channel over batches, as timm's hook functions do."""
    means, squares, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), 0

    def take(name: str, y: Tensor) -> None:
        mean = y.mean((0, 2, 3))  # (N, C, H, W) -> (C,)
        means[name] += len(y) * mean.mean().item()
        squares[name] += len(y) * (y.var((0, 2, 3)).mean() + (mean**2).mean()).item()

    with hooked(model, names, take):
        for x in batches:
            run(model, x)
            count += len(x)
    return [math.sqrt(squares[name] / count - (means[name] / count) ** 2) for name in names]


def float64_sums(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
    """Convert every response to float64, and sum it and its squares."""
    device = device_of(model)
    sums = {name: torch.zeros(3, dtype=torch.float64, device=device) for name in names}

    def take(name: str, y: Tensor) -> None:
        y = y.double()
        count = torch.tensor(float(y.numel()), device=device)
        sums[name] += torch.stack((count, y.sum(), y.square().sum()))

    with hooked(model, names, take):
        for x in batches:
            run(model, x)
    return [std_of(*sums[name].tolist()) for name in names]


def std_of(count: float, total: float, squares: float) -> float:
    """Return the population std of values from their count, sum and sum of squares."""
    return math.sqrt(squares / count - (total / count) ** 2)


def store(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
    """Keep every response to the end."""
    stored: dict[str, list[Tensor]] = {name: [] for name in names}
    with hooked(model, names, lambda name, y: stored[name].append(y)):
        for x in batches:
            run(model, x)
    return [torch.cat(stored.pop(name)).std(correction=0).item() for name in names]


def trace(model: nn.Module, names: list[str], batches: Batches) -> list[float]:
    """Trace every tensor of each batch by torchlens (2.36), and sum the responses in float64."""
    torchlens: Any = importlib.import_module("torchlens")
    sums = {name: [0.0, 0.0, 0.0] for name in names}
    for x in batches:
        with torch.no_grad():
            log = torchlens.trace(model, x.to(device_of(model)))
        for name in names:
            y = log.modules[name].out.double()
            parts = y.numel(), y.sum().item(), y.square().sum().item()
            sums[name] = [total + part for total, part in zip(sums[name], parts, strict=True)]
    return [std_of(*sums[name]) for name in names]


def two_pass(model: nn.Module, names: list[str], batches: Callable[[], Batches]) -> list[float]:
    """Compute the reference in float64: first the mean, then the squared differences from it."""
    totals, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    m2 = dict.fromkeys(names, 0.0)

    def take_mean(name: str, y: Tensor) -> None:
        count[name] += y.numel()
        totals[name] += y.double().sum().item()

    def take_square(name: str, y: Tensor) -> None:
        m2[name] += (y.double() - totals[name] / count[name]).square().sum().item()

    for take in (take_mean, take_square):
        with hooked(model, names, take):
            for x in batches():
                run(model, x)
    return [math.sqrt(m2[name] / count[name]) for name in names]


METHODS: dict[str, Method] = {
    PLAIN: plain_forward("float32"),
    PLAIN_BFLOAT16: plain_forward("bfloat16"),
    "this toolkit, float32": toolkit("float32"),
    "this toolkit, bfloat16": toolkit("bfloat16"),
    "mean and var per channel": channel_calls,
    "float64 sums": float64_sums,
    "store, then std": store,
    "torchlens": trace,
}
