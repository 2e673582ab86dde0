"""Which convolution feeds which BN, proven by data flow, and the moments of what BN makes of it.

    >>> import torch
    >>> from models import build
    >>> network = build("resnet-8").eval()
    >>> with torch.no_grad(), recording(network) as record:
    ...     logits = network(torch.randn(2, 3, 32, 32))
    ...     record.end_pass()
    >>> [(layer.name, layer.norm) for layer in record.layers][:2], record.unpaired
    ([('conv1', 'bn1'), ('layer1.0.conv1', 'layer1.0.bn1')], [])

A pair is a BN whose input IS the convolution's output: the same tensor in the same version, so
nothing was written into it in between (only what is written through `.data`, NumPy or DLPack leaves
no trace). Every call of a BN is a layer of its own. Each response is reduced inside the hook,
before an in-place ReLU can overwrite it; nothing is stored. The hooks run before those that the
user put on the same module: they see what the modules themselves put out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from analysis.measuring.moments import Moments
from analysis.measuring.threads import Shared

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
AFFINE = (
    "weight",
    "bias",
    "running_mean",
    "running_var",
)  # a module with these four vectors is a norm
EPSILONS = (
    1e-5,
    1e-3,
    0.0,
)  # of norms that do not say theirs: DETR's frozen one, TensorFlow's, maskrcnn-benchmark's
EAGER = Shared(
    lambda: torch.compiler.set_stance("force_eager")
)  # the stance is the whole process's
TOLERANCE = (
    1e-4  # in largest responses: how far a norm's output may be from the formula by rounding
)
SHOWN = 12  # modules that a message lists


@dataclass
class Layer:
    """One call of a convolution and its BN: qualified names, the size of the first response, and
    the moments so far.
    """

    name: str
    norm: str
    height: int
    width: int
    moments: Moments


@dataclass
class Call:
    """One call of a convolution, and the BNs that have taken in its output."""

    name: str
    norms: list[nn.Module] = field(default_factory=list)


@dataclass
class Recording:
    """The layers of a network in forward order, as they were met in the passes so far.

    unpaired: the names of the convolutions with an output that went into no BN unchanged, in
    forward order.
    """

    names: dict[nn.Module, str]  # qualified, without the parts that wrappers put in
    kernel_size: tuple[int, int] = (3, 3)
    grouped: bool = True
    layers: list[Layer] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    batch: int = 0  # passes finished
    passing: list[Layer] = field(
        default_factory=list
    )  # met in this pass, which counts when it is over
    calls: list[Call] = field(default_factory=list)  # of convolutions in this pass
    outputs: MutableMapping[Tensor, tuple[Call, int]] = field(
        default_factory=WeakTensorKeyDictionary
    )  # and versions
    epsilons: dict[nn.Module, float] = field(
        default_factory=dict
    )  # of norms that are not torch's own
    seen: dict[nn.Module, None] = field(
        default_factory=dict
    )  # convolutions and norms met, for messages
    thread: int = field(
        default_factory=get_ident
    )  # whose passes these are: what others run does not count

    def after_conv(self, conv: nn.Conv2d, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: remember the output of a convolution that is asked for."""
        if get_ident() != self.thread:
            return
        self.seen[conv] = None
        if not self.is_asked_for(conv):
            return
        call = Call(self.names[conv])
        self.calls.append(call)
        if isinstance(output, Tensor):
            if output.is_inference():
                raise ValueError(
                    f"{call.name} runs in torch.inference_mode, where a change in place leaves no trace: "
                    "use torch.no_grad in its place"
                )
            self.outputs[output] = call, output._version

    def after_norm(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook: a layer, where the input is a convolution's output as it was."""
        if get_ident() != self.thread:
            return
        self.seen[norm] = None
        x = next(iter((*args, *kwargs.values())), None)
        if not isinstance(x, Tensor) or x not in self.outputs:
            return
        call, version = self.outputs[x]
        inside = [inner for inner in norm.modules() if inner is not norm]
        if x._version != version or any(
            inner in call.norms for inner in inside
        ):  # its inner BN did the work
            return
        call.norms.append(norm)
        # any other may carry an activation, or be frozen; and hooks of all modules run before this
        # one
        known = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and "forward" not in vars(norm)
        if x.numel() and not (known and not hooks_of_all._global_forward_hooks):
            if norm not in self.epsilons:
                self.epsilons[norm] = find_epsilon(self.names[norm], norm, x, output)
            output = normalise(norm, x, self.epsilons[norm])
        self.add(call.name, self.names[norm], output.detach())

    def add(self, name: str, norm: str, response: Tensor) -> None:
        """Take in the response (N, C, H, W) of the next layer of this pass."""
        none = response.new_zeros(
            response.shape[1], dtype=torch.float64
        )  # of a head that found nothing on these images
        moments = Moments.of(response) if response.numel() else Moments(0, none, none)
        if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.m2).all()):
            raise ValueError(
                f"NaN or infinity in the response of layer {len(self.passing) + 1} ({name}) in batch {self.batch + 1}: "
                "look at the weights and at the images"
            )
        if self.batch:
            layer = self.layers[len(self.passing)] if len(self.passing) < len(self.layers) else None
            if layer is None or (layer.name, layer.norm) != (name, norm):
                raise self.other_path(f"{name} -> {norm} ran")
        self.passing.append(Layer(name, norm, response.shape[2], response.shape[3], moments))

    def end_pass(self) -> None:
        """A forward pass over a batch is over, and counts: one call of the network, or as many as
        its user makes.
        """
        missed = [call.name for call in self.calls if not call.norms]
        if not (self.layers or self.passing):
            kernel = "x".join(map(str, self.kernel_size)) + ("" if self.grouped else " ungrouped")
            raise ValueError(
                f"no {kernel} convolution whose output goes unchanged into a BN; the network ran {self.list_seen()}"
            )
        if self.batch == 0:
            self.layers = self.passing.copy()
        elif len(self.passing) < len(self.layers):
            raise self.other_path(f"{self.layers[len(self.passing)].name} did not run")
        else:
            pairs = zip(self.layers, self.passing, strict=True)
            merged = [
                layer.moments.merge(new.moments) for layer, new in pairs
            ]  # all of them, before any is set
            for layer, moments in zip(self.layers, merged, strict=True):
                layer.moments = moments
        self.unpaired = list(dict.fromkeys(self.unpaired + missed))
        self.batch += 1
        self.drop_pass()

    def drop_pass(self) -> None:
        """Forget what was met since the last pass that is over."""
        self.passing.clear()
        self.calls.clear()
        self.outputs.clear()

    @property
    def unseen(self) -> list[str]:
        """The convolutions that are asked for and of which hooks saw no call: they see modules that
        are called.
        """
        return [
            name
            for module, name in self.names.items()
            if isinstance(module, nn.Conv2d)
            and self.is_asked_for(module)
            and module not in self.seen
        ]

    def is_asked_for(self, conv: nn.Conv2d) -> bool:
        return conv.kernel_size == self.kernel_size and (conv.groups == 1 or self.grouped)

    def other_path(self, what: str) -> ValueError:
        return ValueError(
            f"batch {self.batch + 1} takes another path through the network than the first: {what}; "
            "all batches of a measurement must run the same layers"
        )

    def list_seen(self) -> str:
        """The convolutions and norms that ran, such as `conv1 (Conv2d 7x7), bn1 (BatchNorm2d)`, and
        what to look at.
        """
        if not self.seen:
            return "no convolution and no BN that hooks could see: they see modules that are called, not functions"
        described = [
            f"{self.names[module]} ({describe(module)})".lstrip()
            for module in list(self.seen)[:SHOWN]
        ]
        more = f" and {len(self.seen) - SHOWN} more" if len(self.seen) > SHOWN else ""
        return (
            f"{', '.join(described)}{more}: look at the kernels, and at what comes between the two"
        )


def describe(module: nn.Module) -> str:
    """The class of a convolution or norm, and its kernel and groups."""
    words = type(module).__name__
    if isinstance(module, nn.Conv2d):
        words += " " + "x".join(map(str, module.kernel_size))
        words += f", {module.groups} groups" if module.groups > 1 else ""
    return words


@contextmanager
def recording(
    model: nn.Module, kernel_size: int | tuple[int, int] = (3, 3), *, grouped: bool = True
) -> Iterator[Recording]:
    """Record the responses of every forward pass inside the block; hooks are removed at its end,
    whatever happens.

    Say `end_pass` after each pass: only the caller knows, as networks call themselves too. grouped:
    whether convolutions of several groups (depthwise ones too) are in. Inside the block compiled
    modules run eagerly and DataParallel and DistributedDataParallel on one device, so that hooks
    see every call.
    """
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"kernel_size must be one or two positive integers, such as 3 or (3, 3), not {kernel_size!r}"
        )
    names = qualified_names(model)
    for module, name in names.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the network'} is a torch.jit module, and hooks see nothing of what runs inside it: "
                "measure the network that it was made from"
            )
    record = Recording(names, size, grouped)
    with reachable(names), ExitStack() as hooks:
        for module in names:
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(record.after_conv, prepend=True))
            elif is_norm(module):
                hooks.enter_context(
                    module.register_forward_hook(record.after_norm, prepend=True, with_kwargs=True)
                )
        yield record


def is_wrapper(module: nn.Module) -> bool:
    """Whether it only passes on what its one child does: data-parallel, or made by torch.compile."""
    return isinstance(module, PARALLEL) or "_orig_mod" in module._modules


def qualified_names(
    module: nn.Module, name: str = "", names: dict[nn.Module, str] | None = None
) -> dict[nn.Module, str]:
    """Every module once, with its name as it would be without wrappers."""
    names = {} if names is None else names
    if module not in names:
        names[module] = name
        for part, child in module.named_children():
            qualified_names(
                child, name if is_wrapper(module) else f"{name}.{part}".lstrip("."), names
            )
    return names


@contextmanager
def reachable(modules: Iterable[nn.Module]) -> Iterator[None]:
    """See to it that every call of a module runs its hooks, in this thread."""
    with ExitStack() as stack:
        if (
            "torch._dynamo" in sys.modules
        ):  # else nothing is compiled, and to import it takes a second
            stack.enter_context(EAGER())
        own = [parallel.forward for parallel in PARALLEL]  # a class of the user's may do more
        for (
            module
        ) in modules:  # copies on other devices have hooks too; DDP waits for other processes
            if isinstance(module, PARALLEL) and type(module).forward in own:
                stack.enter_context(replacing_forward(module, module.module.__call__))
        yield


@contextmanager
def replacing_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block the module runs `forward`; then its own again, of its class or set on it."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


def is_norm(module: nn.Module) -> bool:
    """Whether it is a BN of torch's, or has the four tensors of one."""
    if isinstance(module, _BatchNorm):
        return True
    own = {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }
    if not all(name in own for name in AFFINE):
        return False
    if any(is_lazy(own[name]) for name in AFFINE):
        return True
    shapes = {own[name].shape for name in AFFINE}
    return len(shapes) == 1 and len(shapes.pop()) == 1


def normalise(norm: Any, x: Tensor, eps: float) -> Tensor:
    """What a norm's tensors make of x (N, C, H, W): (x - mean) / sqrt(var + eps) * weight + bias."""
    batch_statistics = norm.running_mean is None
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, batch_statistics, eps=eps
    )


def find_epsilon(name: str, norm: nn.Module, x: Tensor, output: Any) -> float:
    """The epsilon with which a norm's tensors explain its output: the one that it says, or one of
    the usual.

    The output is explained by the formula, or by the formula followed by the norm's submodules:
    timm's BatchNormAct2d carries its activation there. ValueError where it is not: what the
    response is cannot be told.
    """
    own = float(getattr(norm, "eps", EPSILONS[0]))
    candidates = (own,) if isinstance(norm, _BatchNorm) else (own, *EPSILONS)
    if isinstance(output, Tensor) and not output.isfinite().all():
        return candidates[0]  # the NaN or infinity will be reported
    for after in ([], list(norm.children())):
        misfits = {
            eps: misfit(run_all(after, normalise(norm, x, eps)), output) for eps in candidates
        }
        eps = min(candidates, key=misfits.__getitem__)
        if misfits[eps] <= max(TOLERANCE, 4 * torch.finfo(x.dtype).eps):
            return eps
    raise ValueError(
        f"{name} ({type(norm).__name__}) has the tensors of a BN, but its output is not what they make of its input, "
        "nor that after its submodules: put its activation into a submodule or behind it, or use nn.BatchNorm2d"
    )


def run_all(modules: list[nn.Module], y: Tensor) -> Any:
    """What the modules make of y one after another; None where they cannot."""
    try:
        for module in modules:
            y = module.forward(y)  # not module(y): no hook of the user's shall count this call
    except Exception:
        return None
    return y


def misfit(expected: Any, output: Any) -> float:
    """The largest difference, in largest expected values."""
    if not (
        isinstance(output, Tensor)
        and isinstance(expected, Tensor)
        and output.shape == expected.shape
    ):
        return float("inf")
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((output - expected).abs().max() / scale).item()
