"""The paper's recipe: everything that decides a training run, and one iteration of it.

    from models.training.recipe import Recipe, new_network, new_optimizer, new_step
    recipe = Recipe("residual", 20)
    network = new_network(recipe)
    step = new_step(network, new_optimizer(network, recipe), recipe)  # step(images, labels)

Source: He et al., CVPR 2016, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    import torch
    from torch import Tensor

    from models.resnet import ResNet

    # (N, 3, 32, 32), (N,) -> (2,): the mean loss, and how many images were classified wrongly
    Step = Callable[[Tensor, Tensor], Tensor]

DECAY = ("weights", "weights+gamma", "all")  # which parameters decay
WARM_UP_DEPTH = 110  # networks from this depth on always warm up, at a tenth of the learning rate,
WARM_UP_ERROR = 80  # until the training error, %, is below this
WARM_UP_WINDOW = 100  # over this many iterations


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run.

    kind: `residual` or `plain`.
    depth: layers with weights, 6n + 2.
    iterations: training length, in batches.
    decay: the parameters that decay, one of `DECAY`.
    snapshots: how many networks are kept on the way.
    warm_up: start at a tenth of the learning rate; deep networks do so in any case.
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
    lr: float = (
        0.1  # per 128-image batch; a tenth after 1/2 of the iterations, a hundredth after 3/4
    )
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warm_up: bool = False

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
        """Return the learning rate of an iteration, counted from 0."""
        drops = (2 * iteration >= self.iterations) + (4 * iteration >= 3 * self.iterations)
        return self.lr / (1, 10, 100)[max(drops, warming_up)]

    def snapshot_iterations(self) -> set[int]:
        """Return after which iterations a network is kept: the last, the first, evenly between."""
        return {round(iteration) for iteration in np.linspace(self.iterations, 0, self.snapshots)}


def new_network(recipe: Recipe) -> ResNet:
    """Return the network before its first iteration, without using torch's global random state."""
    import torch

    from models.resnet import Config, ResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = ResNet(Config(recipe.kind, recipe.depth))
    return network.to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def decay_groups(network: ResNet, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the parameters that decay and those that do not, as an optimizer takes them."""
    norms = [name for name, module in network.named_modules() if hasattr(module, "running_var")]
    betas, gammas = [f"{norm}.bias" for norm in norms], [f"{norm}.weight" for norm in norms]
    spared = {"weights": {*betas, *gammas}, "weights+gamma": {*betas}, "all": set()}[recipe.decay]
    named = dict(network.named_parameters())
    decaying = [parameter for name, parameter in named.items() if name not in spared]
    others = [parameter for name, parameter in named.items() if name in spared]
    return [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def new_optimizer(network: ResNet, recipe: Recipe) -> torch.optim.SGD:
    """Return SGD whose momentum exists from the start, as zeros.

    Its learning rate is a tensor, so that a captured CUDA graph reads the current value.
    """
    import torch

    groups, lr = decay_groups(network, recipe), torch.tensor(recipe.lr, device=recipe.device)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, fused=True)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def autocast(recipe: Recipe) -> torch.autocast:
    """Return the context in which a network computes in the precision of a recipe."""
    import torch

    reduced = recipe.precision == "bfloat16"
    return torch.autocast(recipe.device, dtype=torch.bfloat16, enabled=reduced, cache_enabled=False)


def new_step(network: ResNet, optimizer: torch.optim.SGD, recipe: Recipe) -> Step:
    """Return one iteration of training as a function of images and labels."""
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
    """Compile every block inside the context, which fuses BN, addition and ReLU on a GPU.

    All blocks of one shape share a compilation, so a deep network takes no longer than a shallow
    one. On CPUs this does not help: a bfloat16 step of plain-56 took 1.5 times as long.
    """
    import torch

    from models.resnet import BasicBlock

    torch.compiler.reset()  # torch limits how often it compiles one function, over all networks
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class CapturedStep:
    """A step captured as one CUDA graph: the GPU need not wait for Python to start each kernel.

    tensors: everything that a step changes; the trial steps before the capture are undone.
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


def recompute_statistics(
    network: ResNet, x: Tensor, after_layer: Callable[[], None] = lambda: None
) -> None:
    """Set BN's statistics to those of one batch, in one pass; each layer's depend on those before.

    The pass uses torch's default memory format: on a CPU, BN then sums in double precision. In
    channels_last it sums in single precision, which changes a variance over 10,000 images by up to
    0.6 % (resnet-20).

    x: images (N, 3, H, W).
    after_layer: called after every BN.
    """
    import torch

    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda *_: after_layer()) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the weight of the new statistics
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with torch.no_grad():
        network.train()(x.contiguous())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for norm, hook in zip(norms, hooks, strict=True):
        norm.momentum = 0.1  # torch's default, as in training
        hook.remove()
