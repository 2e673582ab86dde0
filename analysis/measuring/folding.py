"""The fast path: BN folded into its convolution on the live network, inside a batch only.

In evaluation mode BN is an affine map: a convolution followed by BN is one convolution of weights
w * g and bias beta + (b - mean) * g, with g = gamma / sqrt(var + eps). Its output is the response,
and BN's pass over memory is saved. That is right only if the convolution's output goes into its BN
and nowhere else, which the first batch of every image size proves (analysis.measuring.pairs).
Later batches check it again: BN's input must be the convolution's output, unchanged, and no other
operation may compute with that. Everything else stays live. In doubt, plain hooks measure.

Folded weights are made anew if a tensor that they depend on was replaced or written to. Only what
is written in place through `.data`, NumPy or DLPack leaves no trace.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._mode_utils import no_dispatch

from analysis.measuring.eval_mode import replace_forward, restoring
from analysis.measuring.flow import Call, Doubt, why_unpaired
from analysis.measuring.moments import FAR, TINY, Moments
from analysis.measuring.pairs import Recording

FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Pair:
    """A convolution with its BN folded into it, in one forward pass after another.

    `convolve` and `respond` run as the `forward` of the convolution and of its BN.
    """

    def __init__(
        self, call: Call, record: Recording, rough: list[Moments], channels_last: bool
    ) -> None:
        self.conv, self.norm = cast(nn.Conv2d, call.conv), cast(nn.BatchNorm2d, call.norms[0])
        self.call, self.record, self.rough = call, record, rough
        self.norm_name = record.names[self.norm]
        self.format = torch.channels_last if channels_last else torch.preserve_format
        self.shift: Tensor | None = None  # (C, 1, 1), a mean that is subtracted before sums
        self.folded: tuple[Tensor | None, ...] = ()  # the tensors that `weight` was made of
        self.versions: list[Any] = []
        self.output: tuple[Tensor, int] | None = None  # until BN takes it in

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        conv, norm = self.conv, self.norm
        own = norm.weight, norm.bias, norm.running_mean, norm.running_var
        return conv.weight, conv.bias, *own

    def refresh(self) -> None:
        """Fold again if one of the six tensors is another, or was written to or replaced."""
        tensors = self.tensors
        versions: list[Any] = [self.norm.eps]
        versions += [None if t is None else (t._version, t.data_ptr()) for t in tensors]
        if versions == self.versions and all(map(operator.is_, tensors, self.folded)):
            return
        self.versions, self.folded = versions, tensors
        weight, bias, scale, shift, mean, var = (
            None if t is None else t.detach().double() for t in tensors
        )
        assert weight is not None  # checked in why_not
        assert mean is not None
        assert var is not None
        gain = (var + self.norm.eps).rsqrt()  # (C,)
        gain = gain if scale is None else gain * scale
        offset = (-mean if bias is None else bias - mean) * gain
        offset = offset if shift is None else offset + shift
        folded = weight * gain[:, None, None, None]  # (C, C_in, kH, kW)
        self.weight = folded.to(self.conv.weight).contiguous(memory_format=self.format)
        self.bias = offset.to(self.conv.weight)

    def convolve(self, input: Tensor) -> Tensor:
        """Return the response to the convolution's input."""
        if self.output is not None:
            raise Doubt(f"{self.call.name} was called twice")
        if hasattr(input, "_folded"):
            raise Doubt(f"the output of {input._folded} goes into a convolution")
        with no_dispatch():
            input = input.contiguous(memory_format=self.format)
            y: Tensor = self.conv._conv_forward(input, self.weight, self.bias)
        y._folded = self.call.name  # type: ignore[attr-defined]
        self.output = y, y._version
        return y

    def respond(self, input: Tensor) -> Tensor:
        """Take in the response, and return what BN and its submodules make of it."""
        y, version = self.output or (None, 0)
        if input is not y or input._version != version:
            raise Doubt(f"what comes into the BN of {self.call.name} is not its output")
        self.output = None
        with no_dispatch():
            if self.call.asked:
                self.add(input)
            response = input.detach()  # another tensor: whoever uses the first one is in doubt
        for child in self.norm.children():
            response = child(response)
        return response

    def add(self, response: Tensor) -> None:
        """Reduce the response (N, C, H, W), less the shift."""
        moments = Moments.empty(response.shape[1], response.device)
        if response.numel():
            x = response if self.shift is None else response - self.shift
            moments = Moments.rough(x, self.record.first_of(response))
        self.rough.append(moments)
        if self.shift is not None:
            means = moments.means + self.shift.flatten().double()
            moments = Moments(moments.counts, means * (moments.counts > 0), moments.m2s)
        self.record.keep(self.call, self.norm_name, response, moments)


class Folding:
    """The pairs of a network that can be folded, by the size of the images.

    reasons: why a layer cannot, by name. rough: moments of the layers in this pass, not checked.
    """

    def __init__(self, record: Recording, channels_last: bool) -> None:
        self.record, self.channels_last = record, channels_last
        self.proven: dict[Hashable, list[Pair]] = {}
        self.pairs: dict[tuple[nn.Module, nn.Module], Pair] = {}
        self.reasons: dict[str, str] = {}
        self.rough: list[Moments] = []

    def prove(self, size: Hashable) -> None:
        """Find the pairs in a pass that plain hooks have recorded."""
        names = self.record.names
        layers = {
            id(call): layer for call, layer in self.record.passing if not why_unpaired(call, names)
        }
        self.proven[size] = []
        for call in self.record.calls:
            if reason := why_not(call, self.record):
                if id(call) in layers:
                    self.reasons.setdefault(call.name, reason)
                continue
            assert call.conv is not None  # says why_not
            key = call.conv, call.norms[0]
            if key not in self.pairs:
                self.pairs[key] = Pair(call, self.record, self.rough, self.channels_last)
                if id(call) in layers:
                    self.pairs[key].shift = shift_of(layers[id(call)].moments)
            self.proven[size].append(self.pairs[key])

    def ready(self, size: Hashable) -> list[Pair]:
        """Return the pairs to fold in the next batch, with weights as the network has them now."""
        pairs = []
        for pair in self.proven.get(size, []):
            if reason := obstacle(pair.call, self.record.names):
                self.reasons.setdefault(pair.call.name, reason)
            else:
                pair.refresh()
                pairs.append(pair)
        return pairs

    def folded(self, pairs: Sequence[Pair]) -> AbstractContextManager[None]:
        """Return a context in which the pairs run folded."""
        return restoring(partial(self.replace, pairs))

    def replace(self, pairs: Sequence[Pair], stack: ExitStack) -> None:
        stack.callback(self.record.folded.clear)
        self.rough.clear()
        for pair in pairs:
            self.record.folded |= {pair.conv, pair.norm}
            stack.callback(setattr, pair, "output", None)
            replace_forward(pair.conv, pair.convolve, stack)
            replace_forward(pair.norm, pair.respond, stack)

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raise Doubt unless the pass that is over is sound."""
        if waiting := [pair.call.name for pair in pairs if pair.output is not None]:
            raise Doubt(f"the output of {waiting[0]} went into no BN")
        if not self.rough:
            return
        moments = Moments.cat(self.rough)
        if not (moments.means.isfinite().all() and moments.m2s.isfinite().all()):
            raise Doubt("NaN or infinity in a response")
        channels = [part.means.shape[1] for part in self.rough]
        parts = (moments.counts * moments.means.square(), moments.m2s, moments.counts)
        sums = torch.stack([part.sum(0) for part in parts])  # (3, channels of all layers)
        off, spread, count = torch.stack(
            [part.sum(1) for part in torch.split(sums, channels, 1)], 1
        )
        if (off > FAR * spread).any():
            raise Doubt("means far from zero that were near it in the first batch")
        if ((spread > 0) & (spread < TINY * count)).any():
            raise Doubt("responses so small that float32 does not hold their squares")


def shift_of(moments: Moments) -> Tensor | None:
    """Return a layer's means (C, 1, 1) if they are so large that float32 would lose its variance."""
    off = (moments.counts * moments.means.square()).sum()
    if off <= FAR / 4 * moments.m2s.sum():  # / 4: not in doubt at once
        return None
    return moments.mean.float()[:, None, None]


def why_not(call: Call, record: Recording) -> str:
    """Return why the convolution of a call cannot be folded, in words; empty if it can."""
    if len(call.norms) != 1 or call.uses or not call.explained:
        return f"the output of {call.name} does not go into one BN and nowhere else"
    for module in (call.conv, call.norms[0]):
        if module is not None and record.ran[module] > 1:
            return f"{record.names[module]} is called {record.ran[module]} times"
    if not call.same:
        return f"the output of {call.name} is copied or cast before its BN"
    if call.changes_type:
        return f"the BN of {call.name} changes the type"
    return obstacle(call, record.names)


def obstacle(call: Call, names: dict[nn.Module, str]) -> str:
    """Return what about the modules of a call speaks against folding them; empty if nothing."""
    conv, norm = cast(Any, call.conv), cast(Any, call.norms[0])
    if any(getattr(hooks_of_all, f"_global{kind}") for kind in HOOKS):
        return "there are hooks of all modules"
    for module in (conv, norm):
        if "forward" in vars(module):
            return f"{names[module]} has a forward of its own"
        if any(getattr(module, kind) for kind in HOOKS):
            return f"{names[module]} has hooks of its own"
    if type(conv) is not nn.Conv2d:
        return f"{names[conv]} ({type(conv).__name__}) is no plain Conv2d"
    plain = type(norm).forward in FORWARDS and not norm._modules
    if not (plain or (isinstance(norm, nn.BatchNorm2d) and norm._modules and not call.direct)):
        return f"{names[norm]} ({type(norm).__name__}) is no plain BatchNorm2d"
    if norm.running_mean is None or norm.running_var is None:
        return f"{names[norm]} has no running statistics"
    if any(x.is_inference() for x in (conv.weight, norm.running_mean, norm.running_var)):
        return f"{names[norm]} was made in torch.inference_mode, where changes leave no trace"
    return ""
