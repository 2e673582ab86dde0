"""The fast path: every BN folded into its convolution, on a copy of the network, so that ITS output
is the response.

    folded = fold(model, record, batch, run)  # after the first batch; NotFolded says why it would not be right
    output = folded(batch)  # Doubt: this batch is not for the folded network
    folded.hand_over()  # its moments into record.layers

In evaluation mode BN is an affine map: conv followed by BN is one convolution of weights w * g and
bias beta + (b - mean) * g, with g = gamma / sqrt(var + eps). It saves BN's pass over memory, and
lets the copy run in the layout that is fastest. It is right only where the convolution's output
goes nowhere but into its BN: some images run through both networks, all that is computed from the
output is watched, and responses and outputs are compared. In every later batch each BN still checks
that its input is its convolution's output, unchanged, and the same modules must run; images of
another size are compared anew (analysis.measuring.measurement). In doubt the plain hooks
(analysis.measuring.pairs) measure instead, or say what is wrong.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from analysis.measuring.batches import device_of, tensors_in
from analysis.measuring.moments import FAR, TINY, Moments, sums
from analysis.measuring.pairs import (
    Layer,
    Recording,
    is_norm,
    is_wrapper,
    qualified_names,
    recording,
)
from models.messages import is_out_of_memory

FEW = 4  # images of the first batch by which both networks are compared
TOLERANCE = 1e-3  # in largest values and in stds: rounding makes 1e-5 in 110 layers
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
Run = Callable[[nn.Module, Any], Any]


class NotFolded(Exception):
    """Why the plain hooks are taken, in words."""


class Doubt(Exception):
    """Why a batch is not for the folded network, in words."""


@dataclass
class Pair:
    """A convolution and its BN, which calls `respond` in place of what it did. position: in the
    layers, if measured.
    """

    name: str
    conv: nn.Conv2d
    norm: nn.Module
    position: int | None = None
    output: tuple[Tensor, int] | None = (
        None  # of the convolution, with its version, until BN has taken it in
    )

    def after_conv(self, conv: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the folded convolution."""
        if self.output is not None:
            raise Doubt(f"{self.name} was called twice")
        self.output = output, output._version


def modules_in(pairs: list[Pair]) -> set[nn.Module]:
    return {module for pair in pairs for module in (pair.conv, pair.norm)}


class Folded:
    """A copy of a network with folded pairs: runs batches, and adds up the responses of the layers
    asked for.

    Sums are taken of response - shift: a channel mean of the first batch, in layers whose means are
    far from zero. others: how often each convolution and norm that is not folded is called in a
    pass.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: list[Pair],
        others: Counter[nn.Module],
        layers: list[Layer],
        run: Run,
        channels_last: bool,
    ) -> None:
        self.model, self.pairs, self.others, self.layers, self.run = (
            model,
            pairs,
            others,
            layers,
            run,
        )
        self.channels = [len(layer.moments.mean) for layer in layers]
        self.shift = [shift_of(layer.moments) for layer in layers]
        self.sums: list[
            tuple[int, Tensor, Tensor]
        ] = []  # count, sum and sum of squares: of the layers in this pass
        self.totals: Tensor | None = None  # (3, channels of all layers): the same, of all passes
        self.called: Counter[nn.Module] = Counter()  # of the others, in this pass
        for pair in pairs:
            fold_pair(pair)
            pair.conv.register_forward_hook(pair.after_conv)
            vars(pair.norm)["forward"] = self.responder(pair)
        folded = modules_in(pairs)
        for module in model.modules():
            if module not in folded and (isinstance(module, nn.Conv2d) or is_norm(module)):
                module.register_forward_hook(
                    lambda module, args, output: self.called.update([module])
                )
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def responder(self, pair: Pair) -> Callable[[Tensor], Tensor]:
        """What a folded BN does: it reduces its input, if it is measured, and passes it on."""

        def respond(input: Tensor) -> Tensor:  # the name of nn.BatchNorm2d.forward's argument
            if (
                pair.output is None
                or input is not pair.output[0]
                or input._version != pair.output[1]
            ):
                raise Doubt(f"what comes into the BN of {pair.name} is not its output")
            pair.output = None
            if pair.position is not None:
                self.add(pair.position, input)
            return input

        return respond

    def add(self, position: int, response: Tensor) -> None:
        """Take in the response (N, C, H, W) of one layer."""
        if position != len(self.sums):
            raise Doubt("its layers run in another order")
        shift = self.shift[position]
        if shift is not None:
            response = response - shift
        self.sums.append((response.numel() // response.shape[1], *sums(response)))

    def __call__(self, batch: Any, read: Callable[[Any], Any] = lambda output: output) -> Any:
        """What `read` makes of the output for a batch; its responses are added.

        Raises Doubt, and adds nothing, where it cannot be sure, or an error comes that the network
        itself may not give. Want of memory adds nothing either.
        """
        self.sums.clear()
        self.called.clear()
        try:
            output = read(self.run(self.model, batch))
            self.end_pass()
        except Exception as error:
            if isinstance(error, Doubt) or is_out_of_memory(error):
                raise
            raise Doubt(
                f"a folded copy of it does not run ({type(error).__name__}: {error})"
            ) from error
        finally:
            for pair in self.pairs:
                pair.output = None
        return output

    def end_pass(self) -> None:
        """Add the sums of one pass to those of all, if all layers ran and the numbers are sound."""
        waiting = [pair.name for pair in self.pairs if pair.output is not None]
        if waiting or len(self.sums) < len(self.layers) or self.called != self.others:
            raise Doubt("it takes another path through the network")
        counts, total, squares = zip(*self.sums, strict=True)
        parts = torch.cat(total), torch.cat(squares)
        channels = torch.tensor(self.channels, device="cpu")
        count = torch.tensor(counts, device="cpu").repeat_interleave(
            channels
        )  # (channels of all layers,)
        totals = torch.stack((count.to(parts[0]), *parts))  # (3, channels of all layers)
        totals = totals if self.totals is None else self.totals + totals
        mean, variance = moments_of(totals)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise Doubt("NaN or infinity in a response")
        layer = (
            torch.arange(len(self.layers), device="cpu").repeat_interleave(channels).to(mean.device)
        )
        off, spread = (
            mean.new_zeros(len(self.layers)).index_add(0, layer, part)
            for part in (mean**2, variance)
        )
        if (off > FAR * spread).any():
            raise Doubt("means far from zero that were near it in the first batch")
        if ((spread > 0) & (spread < TINY * channels.to(spread))).any():
            raise Doubt("responses so small that float32 does not hold their squares")
        self.totals = totals

    def hand_over(self) -> None:
        """Merge what was added up into the layers' moments."""
        if self.totals is None:
            return
        parts = zip(
            *(
                torch.split(part, self.channels)
                for part in (self.totals[0], *moments_of(self.totals))
            ),
            strict=True,
        )
        for layer, shift, (counts, mean, variance) in zip(
            self.layers, self.shift, parts, strict=True
        ):
            if shift is not None:
                mean = mean + shift.double().flatten()
            count = int(counts[0].item())
            layer.moments = layer.moments.merge(Moments(count, mean, variance * count))
        self.totals = None


def moments_of(totals: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances (C,) from counts, sums and sums of squares: (3, C), float64."""
    count, total, squares = totals
    mean = total / count
    return mean, squares / count - mean.square()


def shift_of(moments: Moments) -> Tensor | None:
    """A layer's means (C, 1, 1), if they are so large that float32 would lose its variance beside
    them.
    """
    if (
        moments.mean.square() * moments.count
    ).sum() <= FAR / 4 * moments.m2.sum():  # / 4: not in doubt at once
        return None
    return moments.mean.float()[:, None, None]


def fold_pair(pair: Pair) -> None:
    """Put BN's scale and shift into the convolution's weight and bias, in float64."""
    conv, norm = pair.conv, cast(nn.BatchNorm2d, pair.norm)
    assert norm.running_mean is not None  # checked in why_not
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = (
        -norm.running_mean.double()
        if conv.bias is None
        else conv.bias.double() - norm.running_mean.double()
    )
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = conv.weight.double() * scale[:, None, None, None]  # (C, C_in, kH, kW)
    conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight), requires_grad=False)


def obstacle(model: nn.Module) -> str:
    """Why a network is not to be copied and folded, in words; empty where nothing speaks against
    it.
    """
    for module, name in qualified_names(model).items():
        if is_wrapper(module):
            return f"{type(module).__name__} around the network"
        if any(getattr(module, kind) for kind in HOOKS):
            return f"{name or 'the network'} has hooks of its own"
    if any(getattr(hooks_of_all, f"_global{kind}") for kind in HOOKS):
        return "there are hooks of all modules"
    return ""


def count_hooks(model: nn.Module) -> int:
    """Forward hooks on the network, ours too, and those of all modules."""
    own = sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)
    return own + sum(len(getattr(hooks_of_all, f"_global{kind}")) for kind in HOOKS)


def fold(model: nn.Module, record: Recording, batch: Any, run: Run) -> Folded:
    """A folded copy that gives the same responses and the same output as the network.

    record: of the first batch, still open. batch: the first one, or any other. Raises NotFolded
    where there is none.
    """
    device = device_of(model).type
    fastest = device == "cpu" or torch.is_autocast_enabled(
        device
    )  # on a GPU only in half precision
    with untouched(record), torch.autocast(device, enabled=False), torch.no_grad():
        try:
            twin = copy.deepcopy(model, {id(record): record})
            check_copy(model, twin)
            for module in twin.modules():
                for kind in HOOKS:
                    getattr(module, kind).clear()  # those of the record
            few = first_images(batch)
            with (
                watching(twin) as watched,
                recording(twin, record.kernel_size, grouped=record.grouped) as proof,
            ):
                expected = run(twin, few)
            pairs = watched.foldable(proof.passing)
            folded = Folded(
                twin, pairs, watched.others(pairs), proof.passing, run, channels_last=fastest
            )
            if steps(proof.passing) != steps(record.layers):
                raise NotFolded("a copy of it runs other layers")
            compare_networks(folded, few, expected)
        except (NotFolded, Doubt) as reason:
            raise NotFolded(str(reason)) from reason
        except Exception as error:
            raise NotFolded(
                f"a copy of it does not run ({type(error).__name__}: {error})"
            ) from error
    folded.layers, folded.shift = (
        record.layers,
        [shift_of(layer.moments) for layer in record.layers],
    )
    return folded


def check_copy(model: nn.Module, twin: nn.Module) -> None:
    """NotFolded unless the tensors of a copy are its own, of the same values: networks say how they
    are copied.
    """
    for of in (nn.Module.parameters, nn.Module.buffers):
        for ours, theirs in zip(of(model), of(twin), strict=True):
            if ours is theirs or not torch.equal(ours, theirs):
                raise NotFolded("a copy of it shares tensors with it, or has others")


def steps(layers: list[Layer]) -> list[tuple[str, str]]:
    return [(layer.name, layer.norm) for layer in layers]


def first_images(batch: Any) -> Any:
    """A few images of a batch, copied, where it is a tensor or begins with one; else all of it."""
    if isinstance(batch, Tensor):
        return batch[:FEW].clone()
    if isinstance(batch, tuple | list) and len(batch) in (1, 2) and isinstance(batch[0], Tensor):
        return batch[0][:FEW].clone()
    return batch


@contextmanager
def untouched(record: Recording) -> Iterator[None]:
    """Leave a record as it is, even if the copy calls modules of the network: a lambda in it may
    hold them.
    """
    try:
        yield
    finally:
        record.drop_pass()


@dataclass
class Watch:
    """Which convolution of any kernel feeds which norm, unchanged, and how often each is called in
    one pass.

    elsewhere: convolutions with an output that anything but a norm computes with, or changes in
    place.
    """

    names: dict[nn.Module, str]
    calls: Counter[nn.Module] = field(default_factory=Counter)
    fed: list[tuple[nn.Conv2d, nn.Module]] = field(default_factory=list)
    elsewhere: set[nn.Conv2d] = field(default_factory=set)
    outputs: MutableMapping[Tensor, nn.Conv2d] = field(default_factory=WeakTensorKeyDictionary)

    def before_operation(self, operation: str, args: Any) -> None:
        """Called with every operation on tensors, such as `aten::mul.Tensor`, and its arguments."""
        if "batch_norm" not in operation:
            self.elsewhere.update(self.outputs[x] for x in tensors_in(args) if x in self.outputs)

    def after_conv(self, conv: nn.Conv2d, args: Any, output: Any) -> None:
        """Forward hook of a convolution."""
        self.calls[conv] += 1
        if isinstance(output, Tensor):
            self.outputs[output] = conv

    def after_norm(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of a norm."""
        self.calls[norm] += 1
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor) and x in self.outputs:
            self.fed.append((self.outputs[x], norm))

    def foldable(self, layers: list[Layer]) -> list[Pair]:
        """The pairs that can be folded. Raises NotFolded where a layer that is measured is not
        among them.
        """
        positions = {(layer.name, layer.norm): position for position, layer in enumerate(layers)}
        pairs = []
        for conv, norm in self.fed:
            position = positions.get((self.names[conv], self.names[norm]))
            reason = self.why_not(conv, norm)
            if not reason:
                pairs.append(Pair(self.names[conv], conv, norm, position))
            elif position is not None:
                raise NotFolded(reason)
        return pairs

    def others(self, pairs: list[Pair]) -> Counter[nn.Module]:
        """The calls of what is in none of the pairs."""
        folded = modules_in(pairs)
        return Counter(
            {module: calls for module, calls in self.calls.items() if module not in folded}
        )

    def why_not(self, conv: nn.Conv2d, norm: Any) -> str:
        """Why a pair cannot be folded, in words; empty where it can."""
        for module in (conv, norm):
            if self.calls[module] > 1:
                return f"{self.names[module]} is called {self.calls[module]} times"
        if conv in self.elsewhere or [fed for fed, _ in self.fed].count(conv) > 1:
            return f"the output of {self.names[conv]} goes elsewhere too"
        for module, known in ((conv, (nn.Conv2d,)), (norm, (nn.BatchNorm2d, nn.SyncBatchNorm))):
            if type(module) not in known:
                return f"{self.names[module]} ({type(module).__name__}) is no plain {known[0].__name__}"
            if "forward" in vars(module):
                return f"{self.names[module]} has a forward of its own"
        return (
            "" if norm.running_mean is not None else f"{self.names[norm]} has no running statistics"
        )


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block every operation on tensors is shown to a watch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.before_operation(func.name(), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Watch one forward pass."""
    watch = Watch(qualified_names(model))
    with ExitStack() as stack:
        for module in watch.names:
            if isinstance(module, nn.Conv2d):
                stack.enter_context(module.register_forward_hook(watch.after_conv, prepend=True))
            elif is_norm(module):
                stack.enter_context(
                    module.register_forward_hook(watch.after_norm, prepend=True, with_kwargs=True)
                )
        stack.enter_context(Operations(watch))
        yield watch


def compare_networks(folded: Folded, batch: Any, expected: Any) -> None:
    """Raise NotFolded unless the folded network gives the same responses, in `folded.layers`, and
    the same output.
    """
    output = folded(batch)
    before = [layer.moments for layer in folded.layers]
    for layer in folded.layers:
        layer.moments = Moments(
            0, torch.zeros_like(layer.moments.mean), torch.zeros_like(layer.moments.m2)
        )
    folded.hand_over()
    for layer, moments in zip(folded.layers, before, strict=True):
        scale = moments.std + moments.mean.abs().max().item()
        differences = (
            (layer.moments.mean - moments.mean).abs().max().item(),
            abs(layer.moments.std - moments.std),
        )
        if not max(differences) <= TOLERANCE * scale:
            raise NotFolded(f"{layer.name} has another response when it is folded")
    pairs = list(zip(tensors_in(output), tensors_in(expected), strict=True))
    if not pairs:
        raise NotFolded("its output holds no tensors to compare")
    for ours, theirs in pairs:
        if (
            ours.shape != theirs.shape
            or not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
        ):
            raise NotFolded("it has another output when it is folded")
