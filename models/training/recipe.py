"""The paper's recipe: all that decides a training run, and one iteration of it.

    from models.training.recipe import Recipe, new_network, new_optimizer, new_step
    recipe = Recipe("residual", 20)
    network = new_network(recipe)
    step = new_step(network, new_optimizer(network, recipe), recipe)  # step(images, labels)

He et al., CVPR 2016, section 4.2. A random choice depends on the seed and the iteration (or epoch)
alone. Permutations of the training images follow each other without a gap: every batch is full, and
one that straddles two epochs counts for the earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it: functions import it
    import torch
    from torch import Tensor

    from models.resnet import ResNet

    Step = Callable[
        [Tensor, Tensor], Tensor
    ]  # (N, 3, 32, 32), (N,) -> (2,): the loss, and how many were wrong

DECAY = ("weights", "weights+gamma", "all")
WARM_UP_DEPTH = (
    110  # from this depth on, or when asked to, training starts at a tenth of the learning rate ...
)
WARM_UP_ERROR = 80  # ... until the training error, %, is below this ...
WARM_UP_WINDOW = 100  # ... over so many iterations
PERMUTATION, CROP, STATISTICS = range(3)  # what randomness is for


class Fault(Exception):
    """What ends the command: one line for stderr, and the exit status (2 for bad input)."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Recipe:
    """All that decides a run. iterations: of `batch` images. decay: one of `DECAY`. snapshots: how
    many are kept.
    """

    kind: str
    depth: int
    iterations: int = 64_000
    decay: str = "weights"
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    snapshots: int = 9
    batch: int = 128
    lr: float = 0.1  # per 128-image batch; a tenth from 1/2 of the iterations, a hundredth from 3/4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warm_up: bool = False  # below WARM_UP_DEPTH; from there on it goes without saying

    @property
    def warms_up(self) -> bool:
        """Whether training starts at a tenth of the learning rate."""
        return self.warm_up or self.depth >= WARM_UP_DEPTH

    @property
    def label(self) -> str:
        """The name of the run and of its folder."""
        decay = "" if self.decay == "weights" else f"-{self.decay}"
        warm_up = "-warm-up" if self.warm_up else ""
        return f"{self.network}{decay}{warm_up}-{self.iterations}-seed{self.seed}"

    @property
    def network(self) -> str:
        from models.resnet import network_name

        return network_name(self.kind, self.depth)

    def learning_rate(self, iteration: int, warming_up: bool) -> float:
        """The learning rate of an iteration, counted from 0."""
        drops = (2 * iteration >= self.iterations) + (4 * iteration >= 3 * self.iterations)
        return self.lr / (1, 10, 100)[max(drops, warming_up)]

    def snapshot_iterations(self) -> set[int]:
        """After how many iterations a snapshot is taken: `snapshots` of them, last, first and
        evenly between.
        """
        return {round(iteration) for iteration in np.linspace(self.iterations, 0, self.snapshots)}


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the training images in an epoch, counted from 0."""
    return np.random.default_rng([seed, PERMUTATION, epoch]).permutation(size)


def batch_indices(
    recipe: Recipe,
    size: int,
    iteration: int,
    order: Callable[[int, int, int], np.ndarray] = permutation,
) -> np.ndarray:
    """Which of `size` images are in a batch: a slice of the permutations, one behind another."""
    start = iteration * recipe.batch
    first, last = start // size, (start + recipe.batch - 1) // size
    stream = np.concatenate([order(size, recipe.seed, epoch) for epoch in range(first, last + 1)])
    return stream[start - first * size :][: recipe.batch]


def new_network(recipe: Recipe) -> ResNet:
    """The network before its first iteration. Torch's global random state is left as it was."""
    import torch

    from models.resnet import Config, ResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = ResNet(Config(recipe.kind, recipe.depth))
    return network.to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def decay_groups(network: ResNet, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters that are decayed, and those that are not: none, BN's betas, or its gammas and
    betas.
    """
    norms = [name for name, module in network.named_modules() if hasattr(module, "running_var")]
    betas, gammas = [f"{norm}.bias" for norm in norms], [f"{norm}.weight" for norm in norms]
    spared = {"weights": {*betas, *gammas}, "weights+gamma": {*betas}, "all": set()}[recipe.decay]
    named = dict(network.named_parameters())
    return [
        {
            "params": [p for name, p in named.items() if name not in spared],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for name, p in named.items() if name in spared], "weight_decay": 0.0},
    ]


def new_optimizer(network: ResNet, recipe: Recipe) -> torch.optim.SGD:
    """SGD. Its momentum is there from the start, as zeros, and its learning rate is a tensor, which
    a graph reads.
    """
    import torch

    lr = torch.tensor(recipe.lr, device=recipe.device)
    optimizer = torch.optim.SGD(
        decay_groups(network, recipe), lr=lr, momentum=recipe.momentum, fused=True
    )
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def autocast(recipe: Recipe) -> torch.autocast:
    import torch

    reduced = recipe.precision == "bfloat16"
    return torch.autocast(recipe.device, dtype=torch.bfloat16, enabled=reduced, cache_enabled=False)


def new_step(network: ResNet, optimizer: torch.optim.SGD, recipe: Recipe) -> Step:
    """One iteration of training, as a function of images and labels."""
    import torch
    import torch.nn.functional as F

    def step(x: Tensor, y: Tensor) -> Tensor:
        with autocast(recipe):
            logits = network(x).float()  # (N, 10)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return torch.stack([loss.detach(), (logits.argmax(1) != y).sum()])

    return step


@contextmanager
def compiled_blocks(network: ResNet) -> Iterator[None]:
    """Inside the block each residual or plain block is compiled: BN, addition and ReLU become few
    kernels on a GPU.

    One compilation serves all blocks of a shape, so deep networks take no longer than shallow ones.
    """
    import torch

    from models.resnet import BasicBlock

    torch.compiler.reset()  # what earlier networks needed counts towards the most that torch compiles of one function
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class CapturedStep:
    """A step as one CUDA graph: a GPU need not wait for Python to start each of its many small
    kernels.

    tensors: all that a step changes; the trial steps before the capture leave them as they were.
    """

    def __init__(self, step: Step, x: Tensor, y: Tensor, tensors: list[Tensor]) -> None:
        import torch

        self.x, self.y = x.clone(), y.clone()
        before = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(self.x, self.y)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step(self.x, self.y)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.result.clone()


def recompute_statistics(network: ResNet, x: Tensor) -> None:
    """Make BN's statistics those of one batch (N, 3, H, W) in one pass, each layer's behind the
    layers before it.

    In torch's default memory format: there BN sums in double precision on a CPU, in channels_last
    in single, which costs a variance over 10,000 images up to 0.6 % (resnet-20).
    """
    import torch

    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # of the new statistics
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with torch.no_grad():
        network.train()(x.contiguous())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for norm in norms:
        norm.momentum = 0.1  # as it was
