"""Residual additions of any network, found by data flow and measured while batches run.

    with recording_additions(model) as record, torch.no_grad():
        for batch in batches:
            model(batch)
            record.end_pass()
    frame = additions_frame(record.additions, network="resnet-56", images=1000)

`analysis.measure_branches` does this and more in one call. The first pass finds the additions (the
rules are in `analysis.additions.dataflow`). Later passes only measure, and check that the same
additions run in the same modules. Operands are reduced as they are added, before an in-place
operation overwrites them; nothing is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from analysis.additions.dataflow import POINTWISE, Flow, Residual
from analysis.additions.moments import Addition, AdditionMoments, moments_of
from analysis.measuring.batches import tensors_in
from analysis.measuring.eval_mode import qualified_names, reach

SUMS = ("add", "add_", "sub", "sub_", "addcmul", "addcmul_")
SHOWN = 8  # kinds of other sums that a message lists
Site = tuple[str, int]  # a sum: its module, and how many sums ran there before it in this pass


@dataclass
class Sum:
    """A sum of two tensors of one shape: its operands as they are added."""

    first: Tensor
    second: Tensor
    factors: tuple[Tensor, ...]  # that the second operand was computed from

    @classmethod
    def of(cls, operation: str, args: Any, kwargs: Mapping[str, Any]) -> Sum | None:
        """Return the sum that an operation of `SUMS` computes, or None if shapes differ."""
        first, *factors = args[: 3 if "addcmul" in operation else 2]
        if not all(isinstance(x, Tensor) and x.is_floating_point() for x in (first, *factors)):
            return None
        shapes = [factor.shape for factor in factors]
        broadcast: Any = torch.broadcast_shapes  # untyped, and slow: not for one shape
        shape = shapes[0] if len(shapes) == 1 else broadcast(*shapes)
        if first.shape != shape or first.dim() < 2 or not first.numel():
            return None
        second = factors[0] * factors[1] if len(factors) > 1 else factors[0]
        scale = kwargs.get("alpha", kwargs.get("value", 1)) * (-1 if "sub" in operation else 1)
        return cls(first, second if scale == 1 else second * scale, tuple(factors))


class AdditionRecord(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The residual additions of a network, in the order of its forward pass.

    additions: what was measured in the passes that are over.
    others: every other sum of two data-dependent tensors of one shape in the first pass, as
        {(module, reason): how often}. A missed addition is among these.
    mask: set before a pass, the positions that count: (N, T) bool.
    replace: if set, later passes measure nothing; it returns what stands for an addition, by its
        position and operands, or None for the sum itself.
    """

    def __init__(self, names: dict[nn.Module, str], positions: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.positions = names, positions
        self.replace: Callable[[int, Sum], Tensor | None] | None = None
        self.additions: list[Addition] = []
        self.others: Counter[tuple[str, str]] = Counter()
        self.mask: Tensor | None = None
        self.passes = self.images = 0
        self.sites: dict[Site, int] = {}  # of the additions -> their position
        self.counts: Counter[str] = Counter()  # of sums, in the modules that have additions
        self.hooks: dict[str, list[RemovableHandle]] = {}  # by module
        self.drop_pass()

    def drop_pass(self) -> None:
        """Forget what ran since the last pass that is over."""
        self.flow = Flow()
        self.stack: list[str] = []  # the modules that run
        self.batch = 0  # images of this pass
        self.ran: Counter[str] = Counter()  # sums so far, by module
        self.found: list[tuple[Addition, Site, Residual, int]] = []
        self.refused: list[tuple[str, str, int]] = []  # module, reason, value
        self.passing: list[AdditionMoments] = []
        self.returned: dict[int, list[str]] = {}  # value -> the modules that returned it

    def enter(self, name: str, inputs: Any) -> None:
        """Pre-hook of every module."""
        if not self.stack:
            tensors = list(tensors_in(inputs))
            self.batch = len(tensors[0]) if tensors and tensors[0].dim() else 0
            if not self.passes:
                self.flow.add_inputs(tensors)
        self.stack.append(name)

    def leave(self, output: Any) -> None:
        """Forward hook of every module."""
        name = self.stack.pop()
        if self.passes:
            return
        for tensor in tensors_in(output):
            self.returned.setdefault(self.flow.of(tensor), []).append(name)
        if not self.stack:
            self.flow.add_outputs(tensors_in(output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.stack:  # not the network
            return func(*args, **kwargs)
        operation, module = func._schema.name.partition("::")[2], self.stack[-1]
        operands = Sum.of(operation, args, kwargs) if operation in SUMS else None
        if self.passes:
            replaced = None
            if operands is not None:
                replaced = self.sum_again((module, self.ran[module]), operands)
                self.ran[module] += 1
            if replaced is None:
                return func(*args, **kwargs)
            return args[0].copy_(replaced) if operation.endswith("_") else replaced.clone()
        inputs = list(tensors_in((args, kwargs)))
        if operation == "convolution" and args[1].shape[2:].numel() == 1:
            operation = POINTWISE
        verdict = self.judge(operation, operands, inputs)
        moments = self.moments(verdict, operands, module)
        output = func(*args, **kwargs)
        value = self.flow.record(operation, inputs, list(tensors_in(output)), module)
        if isinstance(verdict, str) and verdict and value is not None:
            self.refused.append((module, verdict, value))
        elif isinstance(verdict, Residual) and moments is not None and value is not None:
            stream = self.flow.nodes[verdict.stream].streams
            self.flow.nodes[value].streams = *stream, verdict.stream
            self.found.append((moments, (module, self.ran[module]), verdict, value))
        self.ran[module] += operands is not None
        return output

    def judge(self, operation: str, operands: Sum | None, inputs: list[Tensor]) -> Residual | str:
        """Return the residual addition that an operation is, why a sum is none, or ''."""
        if operands is None:
            return self.flow.hidden_sum(operation, inputs)
        first, *factors = map(self.flow.of, (operands.first, *operands.factors))
        second = max(factors, key=lambda i: (self.flow.nodes[i].data, i))
        verdict = self.flow.judge(first, second)
        both = all(self.flow.nodes[i].data for i in (first, second))
        return verdict if isinstance(verdict, Residual) or both else ""

    def moments(
        self, verdict: Residual | str, operands: Sum | None, module: str
    ) -> Addition | None:
        """Measure an addition that was found."""
        if operands is None or not isinstance(verdict, Residual):
            return None
        swapped = self.flow.of(operands.first) == verdict.branch
        values = [self.flow.nodes[i] for i in verdict.way]
        matrices = [v.operation for v in values if v.weighted and "norm" not in v.operation]
        maps = operands.first.dim() > 2 and (not matrices or "conv" in matrices[-1])
        addition = Addition(
            module,
            self.branch_name(verdict, module),
            self.flow.branch_kind(verdict.way),
            verdict.shortcut,
            tuple(operands.first.shape[1:]),
            sum(value.weighted for value in values),
            1 if maps else -1,
            swapped,
        )
        return replace(addition, moments=self.reduce(addition, operands))

    def branch_name(self, residual: Residual, module: str) -> str:
        """Return the outermost module inside the adding one whose output is the branch.

        If a function computed the branch, return the module of its last matrix or norm.
        """
        inside = [n for n in self.returned.get(residual.branch, ()) if n.startswith(module)]
        if inside:
            return min(inside, key=lambda name: name.count("."))
        return next(
            self.flow.nodes[i].module for i in reversed(residual.way) if self.flow.nodes[i].weighted
        )

    def reduce(self, addition: Addition, operands: Sum) -> AdditionMoments:
        stream, branch = operands.first, operands.second
        if addition.swapped:
            stream, branch = branch, stream
        channels = addition.channels if self.positions else None
        return moments_of(stream, branch, self.batch, self.images, self.mask, channels)

    def sum_again(self, site: Site, operands: Sum) -> Tensor | None:
        """Measure a sum of a later pass, if it is an addition, or return what stands for it."""
        position = self.sites.get(site)
        if position is None:
            return None
        if self.replace is not None:
            return self.replace(position, operands)
        addition = self.additions[position]
        if position != len(self.passing) or operands.first.dim() != len(addition.shape) + 1:
            raise self.other_path(addition.name)
        self.passing.append(self.reduce(addition, operands))
        return None

    def end_pass(self) -> None:
        """Take in a forward pass that is over: one call of the network, or several.

        Raises ValueError if other additions ran than in the first pass, or for NaN or infinity.
        """
        if not self.passes:
            self.take_found()
        elif len(self.passing) < len(self.additions):
            raise self.other_path(self.additions[len(self.passing)].name)
        elif moved := [name for name, count in self.counts.items() if self.ran[name] != count]:
            raise self.other_path(moved[0])
        for addition, moments in zip(self.additions, self.passing, strict=True):
            check_finite(addition, moments)
        self.additions = [
            replace(addition, moments=addition.moments.merge(moments))
            for addition, moments in zip(self.additions, self.passing, strict=True)
        ]
        self.passes += 1
        self.images += self.batch
        self.drop_pass()

    def take_found(self) -> None:
        """Keep what is residual now that all uses of all values are known."""
        refused = [(name, why) for name, why, value in self.refused if self.flow.is_used(value)]
        streams = {residual.stream for _, _, residual, _ in self.found}
        codes = {r.stream for _, _, r, _ in self.found if r.branch in streams}
        for addition, site, residual, value in self.found:
            if residual.stream in codes:  # as in DETR, which adds position codes again and again
                refused.append((addition.name, "a code that is added to streams"))
                continue
            if residual.shortcut == "projection" and self.flow.used_outside(residual, value):
                refused.append((addition.name, "the branch is used outside, too"))
                continue
            self.sites[site] = len(self.additions)
            self.passing.append(addition.moments)
            self.additions.append(replace(addition, moments=AdditionMoments()))
        self.others = Counter(refused)
        summing = {name for name, count in self.ran.items() if count}
        for name in self.hooks.keys() - {"", *summing}:
            for handle in self.hooks[name]:
                handle.remove()
        self.counts = Counter({site[0]: self.ran[site[0]] for site in self.sites})

    def other_path(self, name: str) -> ValueError:
        return ValueError(
            f"batch {self.passes + 1} takes another path through the network than the first: the "
            f"sums in {name or 'the network'} are others; all batches must run the same additions"
        )

    def list_others(self) -> str:
        """Describe the sums that are no residual additions, with their reasons."""
        if not self.others:
            return "no sum of two tensors of one shape that depend on the input"
        lines = [f"{n or 'the network'}: {why} ({k}x)" for (n, why), k in self.others.items()]
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        return f"its sums are: {', '.join(lines[:SHOWN])}{more}"


def check_finite(addition: Addition, moments: AdditionMoments) -> None:
    if not moments.sums.isfinite().all():
        raise ValueError(
            f"NaN or infinity in the addition of {addition.branch or 'the network'}: look at the "
            "weights and at the input"
        )


@contextmanager
def recording_additions(model: nn.Module, *, positions: bool = False) -> Iterator[AdditionRecord]:
    """Record the residual additions of every forward pass inside the block.

    Say `record.end_pass()` after each pass, or `record.drop_pass()` if it failed. Other hooks on
    the model may run in the same passes. Inside the block compiled modules run eagerly,
    DataParallel on one device, and nn.TransformerEncoder without its fused fast path.

    positions: also measure norms and angles of the vectors at each position.
    """
    names = qualified_names(model)
    record = AdditionRecord(names, positions)

    def enter(module: nn.Module, args: Any, kwargs: Any, *, name: str) -> None:
        record.enter(name, (args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        record.leave(output)

    with ExitStack() as stack:
        reach(names, stack)
        # the fused nn.TransformerEncoder shows no addition
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        for module, name in names.items():
            before = partial(enter, name=name)
            handles = [
                module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                module.register_forward_hook(leave),
            ]
            record.hooks.setdefault(name, []).extend(handles)
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(record)
        yield record
