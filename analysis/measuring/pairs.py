"""Which convolution feeds which BN, proven by data flow, and the moments of what BN makes of it.

    >>> import torch
    >>> from models import build
    >>> network = build("resnet-8").eval()
    >>> record = Recording(network)
    >>> with torch.no_grad(), record.watching():
    ...     logits = network(torch.randn(2, 3, 32, 32))
    >>> record.end_pass()
    >>> [(layer.name, layer.norm) for layer in record.layers][:2], record.unpaired
    ([('conv1', 'bn1'), ('layer1.0.conv1', 'layer1.0.bn1')], {})

During a pass a dispatch mode follows the memory of every convolution's output through all
operations, and hooks say which module they run in. A pair is a BN whose input has the values of
the output, and nothing else computes with these. Views, copies and casts to another float type
leave them as they are. Every call of a BN is a layer of its own. Each response is reduced inside
the hook, before an in-place ReLU can overwrite it; nothing is stored.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._mode_utils import no_dispatch

from analysis.measuring.eval_mode import qualified_names, reach, restoring
from analysis.measuring.flow import Call, Flow, Frame, why_unpaired
from analysis.measuring.moments import Moments
from analysis.measuring.norms import explain, is_norm

SHOWN = 12  # modules that a message lists
UNKNOWN = "its input comes from a convolution that is no registered module"


@dataclass
class Layer:
    """One call of a convolution and its BN: qualified names, the height and width of the first
    response, and its moments.
    """

    name: str
    norm: str
    height: int
    width: int
    moments: Moments


class Recording:
    """The layers of a network in forward order, as they were met in the passes so far.

    unpaired: why the output of a convolution is in no layer, by name. unseen: convolutions that
    did not run as modules, and norms fed by such, by name. position: of the first image of the
    next pass; images: how many the pass has.
    """

    def __init__(
        self,
        model: nn.Module,
        kernel_size: int | tuple[int, int] = (3, 3),
        *,
        grouped: bool = True,
    ) -> None:
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(
                "kernel_size must be one or two positive integers, such as 3 or (3, 3), "
                f"not {kernel_size!r}"
            )
        self.names = qualified_names(model)
        self.kernel_size, self.grouped = size, grouped
        self.convs = {module for module in self.names if is_conv(module)}
        self.norms = {module for module in self.names if is_norm(module)}
        self.first: list[Layer] = []  # as the first pass met them
        self.totals: Moments | None = None  # of all layers side by side
        self.unpaired: dict[str, str] = {}
        self.strangers: dict[str, str] = {}  # norms whose convolution is unknown
        self.seen: dict[nn.Module, None] = {}  # convolutions and norms that ran
        self.passes = self.position = self.images = 0
        self.thread = get_ident()
        self.folded: set[nn.Module] = set()  # modules that others record in this pass
        self.proving = True  # whether pairs that are not asked for are looked at, too
        self.drop_pass()

    def drop_pass(self) -> None:
        """Forget what the last pass met."""
        self.passing: list[tuple[Call, Layer]] = []
        self.calls: list[Call] = []
        self.ran: Counter[nn.Module] = Counter()
        self.flow = Flow(self.kernel_size, bool(self.folded))

    def watching(self) -> AbstractContextManager[None]:
        """Return a context that records one forward pass; say `end_pass` after it.

        Inside it compiled modules run eagerly, and data-parallel ones on one device.
        """
        return restoring(self.watch)

    def watch(self, stack: ExitStack) -> None:
        self.drop_pass()
        reach(self.names, stack)
        for module in (self.convs | self.norms) - self.folded:
            handle = module.register_forward_pre_hook(self.before_module, prepend=True)
            stack.callback(handle.remove)
            after = module.register_forward_hook(self.after_module, prepend=True, with_kwargs=True)
            stack.callback(after.remove)
        stack.callback(register_module_forward_pre_hook(self.before_any_module).remove)
        stack.enter_context(self.flow)

    def before_module(self, module: nn.Module, args: Any) -> None:
        """Note that a convolution or norm begins to run."""
        if get_ident() == self.thread:
            self.flow.stack.append(Frame(module, module in self.convs))

    def before_any_module(self, module: nn.Module, args: Any) -> None:
        """Refuse to change a BN that flags and buffers of the network do not reach."""
        if get_ident() != self.thread:
            return
        if isinstance(module, _BatchNorm) and module not in self.names:
            name = f"a {type(module).__name__} that is not registered in the network"
            if module.training:
                raise ValueError(
                    f"{name} would change its statistics: keep modules in an nn.ModuleList or "
                    "nn.ModuleDict instead of a plain list or dict"
                )
            self.strangers[name] = "hooks and training flags do not reach it"

    def after_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Track a convolution's output, or take in a norm's response."""
        if get_ident() != self.thread:
            return
        while (frame := self.flow.stack.pop()).module is not module:
            pass  # its forward raised, and the network caught that
        self.seen[module] = None
        self.ran[module] += 1
        with no_dispatch():
            if frame.is_conv:
                self.after_conv(module, output)
            else:
                self.after_norm(frame, next(iter((*args, *kwargs.values())), None), output)

    def after_conv(self, conv: nn.Module, output: Any) -> None:
        call = Call(self.names[conv], conv, self.is_asked_for(conv))
        self.calls.append(call)
        if not isinstance(output, Tensor):
            return
        if output.is_inference():
            raise ValueError(
                f"{call.name} runs in torch.inference_mode, where a change in place leaves no "
                "trace: use torch.no_grad instead"
            )
        if output.dim() == 3:
            raise ValueError(
                f"{call.name} took in one image without a batch dimension: a batch of images is "
                "(N, C, H, W), and batches are a list of them"
            )
        output._measured_call = call  # type: ignore[attr-defined]
        self.flow.track(output, call)

    def after_norm(self, frame: Frame, x: Any, output: Any) -> None:
        norm = frame.module
        call = self.flow.find(x) if isinstance(x, Tensor) else None
        for other, operation in frame.uses:
            if other is not call:
                other.uses.append(operation)
        if call is None or call in frame.inner:  # a norm inside it did the work
            return
        call.norms.append(norm)
        for outer in self.flow.stack:
            outer.inner.append(call)
        if call.conv is None and call.asked:
            self.strangers[self.names[norm]] = UNKNOWN
        if call.conv is None or not (call.asked or self.proving):
            return
        name = self.names[norm]
        try:
            response, call.direct = explain(name, norm, x, output, frame.redo, frame.result)
        except ValueError:
            if call.asked:
                raise
            return
        call.same = getattr(x, "_measured_call", None) is call
        call.explained, call.changes_type = True, response.dtype != x.dtype
        if call.asked:
            self.add(call, name, response.detach())

    def add(self, call: Call, norm: str, response: Tensor) -> None:
        """Take in the response (N, C, H, W) of the next layer of this pass."""
        moments = Moments.empty(response.shape[1], response.device)
        if response.numel():  # a head may find nothing on some images
            moments = Moments.of(response, self.first_of(response))
        if not (moments.means.isfinite().all() and moments.m2s.isfinite().all()):
            raise ValueError(
                f"NaN or infinity in the response of layer {len(self.passing) + 1} ({call.name}) "
                f"in batch {self.passes + 1}: look at the weights and at the images"
            )
        self.keep(call, norm, response, moments)

    def keep(self, call: Call, norm: str, response: Tensor, moments: Moments) -> None:
        """Append a layer to this pass."""
        height, width = response.shape[2:]
        self.passing.append((call, Layer(call.name, norm, height, width, moments)))

    def first_of(self, response: Tensor) -> int | None:
        """Return the position of a response's first image; None if its rows are no images."""
        return self.position if len(response) == self.images else None

    def end_pass(self) -> None:
        """Count the pass that is over: one call of the network, or as many as its user makes."""
        layers = [layer for call, layer in self.passing if not why_unpaired(call, self.names)]
        missed = {c.name: r for c in self.calls if c.asked and (r := why_unpaired(c, self.names))}
        if self.passes == 0 and not layers:
            raise ValueError(self.nothing_found(missed))
        if self.passes:
            self.compare(layers)
        if self.totals is None:
            self.first, self.totals = layers, Moments.cat([layer.moments for layer in layers])
        else:
            self.totals = self.totals.merge(Moments.cat([layer.moments for layer in layers]))
        self.unpaired = {**missed, **self.unpaired}
        self.passes += 1

    def compare(self, layers: list[Layer]) -> None:
        """Raise ValueError unless these are the layers of the first pass."""
        ours, theirs = ([(x.name, x.norm) for x in some] for some in (self.first, layers))
        if ours == theirs:
            return
        other = [pair for n, pair in enumerate(theirs) if ours[n : n + 1] != [pair]]
        what = f"{ours[min(len(theirs), len(ours) - 1)][0]} did not run"
        if other:
            what = f"{other[0][0]} -> {other[0][1]} ran"
        raise ValueError(
            f"batch {self.passes + 1} takes another path through the network than the first: "
            f"{what}; all batches of a measurement must run the same layers"
        )

    @property
    def layers(self) -> list[Layer]:
        """The layers with the moments of all passes, on the CPU."""
        if self.totals is None:
            return []
        channels = [layer.moments.means.shape[1] for layer in self.first]
        parts = zip(self.first, self.totals.to("cpu").split(channels), strict=True)
        return [replace(layer, moments=moments) for layer, moments in parts]

    @property
    def unseen(self) -> dict[str, str]:
        """Why hooks did not see a convolution that is asked for, or the one before a norm."""
        missed = [conv for conv in self.names if conv in self.convs and conv not in self.seen]
        return {
            self.names[conv]: "it did not run as a module"
            for conv in missed
            if self.is_asked_for(conv)
        } | self.strangers

    def is_asked_for(self, conv: Any) -> bool:
        return conv.kernel_size == self.kernel_size and (conv.groups == 1 or self.grouped)

    def nothing_found(self, missed: dict[str, str]) -> str:
        """Return why there is nothing to measure, and what to look at."""
        if not self.norms and not self.strangers:
            return (
                "the network has no BN: analysis.measure_branches measures its residual additions"
            )
        kernel = "x".join(map(str, self.kernel_size)) + ("" if self.grouped else " ungrouped")
        words = f"no {kernel} convolution whose output goes unchanged into a BN and nowhere else"
        if missed or self.strangers:
            return f"{words}: {list_reasons({**missed, **self.strangers})}"
        if not self.seen:
            return (
                f"{words}: hooks saw no convolution and no BN, since they see modules, no functions"
            )
        ran = [f"{self.names[m]} ({describe(m)})".lstrip() for m in self.seen]
        more = f" and {len(ran) - SHOWN} more" if len(ran) > SHOWN else ""
        return f"{words}: the network ran {', '.join(ran[:SHOWN])}{more}; look at the kernels"


def list_reasons(reasons: dict[str, str], shown: int = 3) -> str:
    """Return the first names and reasons, and how many more there are.

    >>> list_reasons({"conv1": "it did not run"})
    'conv1 (it did not run)'
    """
    listed = ", ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:shown])
    return listed + (f" and {len(reasons) - shown} more" if len(reasons) > shown else "")


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and len(module.kernel_size) == 2 and not module.transposed


def describe(module: Any) -> str:
    """Return the class of a convolution or norm, with the kernel and groups."""
    words = type(module).__name__
    if is_conv(module):
        words += " " + "x".join(map(str, module.kernel_size))
        words += f", {module.groups} groups" if module.groups > 1 else ""
    return words
