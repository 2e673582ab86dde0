"""Data flow through a forward pass, and which sums in it are residual additions.

Every operation's result is a value. It knows all values that it was computed from, its ancestors,
as the bits of an integer. Nothing is stored but these numbers. A sum of two tensors of one shape is
a residual addition in two cases:

identity: one operand, the stream, is an ancestor of the other, the branch, and a matrix, a
    convolution or a norm with weights lies in between. The stream may also be an earlier one, to
    which branches were added since: x + attention(x) + mlp(x).
projection: the operands' latest common ancestor, the fork, reaches exactly one of them, the
    shortcut, without an activation or a product of two data tensors; the way to the other one has
    weights, and nothing on it is used outside.

Not residual, and known from these rules: position embeddings, masks, biases, rotary embeddings,
LoRA and RepVGG (two ways without an activation), gates and HRNet's fusions (no such way), GELU's
polynomial and ConvNeXt V2's GRN (no weights on the branch), feature pyramids and Res2Net's splits
(used outside), the skip inside a state-space model (a vector scales the shortcut).

The rules are fooled by what has a residual block's shape without being meant as one: x + linear(x's
position code), linear(x) + mlp(x), and attention scores with a residual of their own. They do not
see a sum inside another operation: lerp, a stack that is summed up, the bias operand of addmm, a
fused add-and-norm kernel. The first three are reported (`HIDDEN`), the last cannot be noticed.
Two more are reported as sums: a branch without weights (EfficientFormer's pooling), and a branch
that is a part of a tensor of which the rest goes elsewhere (timm's DPN, half of a reversible
block).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

POINTWISE = "pointwise_conv"  # the name of a convolution with a kernel of one pixel
COPIES = re.compile("clone|contiguous|_to_copy|copy|alias|detach|native_dropout|expand|lift_fresh")
WEIGHTED = re.compile("conv|mm|linear|mv|embedding|norm|lstm|gru|rnn")
CURVED = re.compile(
    "elu|silu|mish|sigmoid|tanh|softmax|hard|softplus|softshrink|attention|exp|clamp|pow|erf|log|"
    "threshold|maximum|minimum|sqrt|reciprocal|lstm|gru|rnn"
)
PRODUCT = re.compile("mul|div|mm|mv|dot|conv|linear")
HIDDEN = {
    "lerp": "inside lerp",
    "addmm": "inside addmm",
    "baddbmm": "inside baddbmm",
    "sum": "a stack that is summed up",
}


@dataclass(slots=True)
class Value:
    """The result of one operation.

    module: the module that ran it.
    ancestors: bit i is set if it was computed from value i.
    data: whether it depends on the network's input.
    weighted: whether it is the result of a matrix, convolution or norm that has weights.
    curved: whether it is the result of an activation or a product of two data tensors.
    scaled: whether it is the product of a data tensor and a vector of constants.
    scalar: whether it is one number.
    streams: the earlier streams, if it is a stream plus branches.
    """

    operation: str
    module: str
    ancestors: int
    data: bool
    floating: bool
    weighted: bool
    curved: bool
    scaled: bool
    scalar: bool
    streams: tuple[int, ...] = ()


@dataclass(frozen=True)
class Residual:
    """A residual addition: the values of its stream and branch, and the one where they part."""

    shortcut: str  # identity or projection
    stream: int
    branch: int
    fork: int
    way: list[int]  # the values from the fork to the branch


@dataclass
class Flow:
    """All values of one forward pass in their order, and which tensor holds which of them."""

    nodes: list[Value] = field(default_factory=list)
    consumers: list[list[int]] = field(default_factory=list)
    storages: dict[int, StorageWeakRef] = field(default_factory=dict)  # kept: no address is reused
    latest: dict[int, int] = field(default_factory=dict)  # storage -> the value last written there
    views: dict[tuple[object, ...], int] = field(default_factory=dict)
    outputs: int = 0  # bit i is set if the network returns value i
    used: int = 0  # bit i is set if the output is value i or was computed from it

    def storage_of(self, tensor: Tensor) -> int:
        reference: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self.storages.setdefault(reference.cdata, reference)
        return int(reference.cdata)

    def view_of(self, tensor: Tensor) -> tuple[object, ...]:
        place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        return self.storage_of(tensor), *place

    def of(self, tensor: Tensor) -> int:
        """Return the value that a tensor holds; what was not seen before is a constant."""
        storage = self.storage_of(tensor)
        if storage not in self.latest:
            self.latest[storage] = self.add("constant", [], tensor, "")
        latest = self.latest[storage]
        return max(latest, self.views.get(self.view_of(tensor), latest))

    def add(self, operation: str, parents: Sequence[int], result: Tensor, module: str) -> int:
        """Append a value and return its number."""
        index, ancestors = len(self.nodes), 0
        for parent in parents:
            ancestors |= self.nodes[parent].ancestors | 1 << parent
            self.consumers[parent].append(index)
        data = [parent for parent in parents if self.nodes[parent].data]
        others = [self.nodes[parent] for parent in parents if not self.nodes[parent].data]
        constants = [value for value in others if value.floating]
        value = Value(
            operation,
            module,
            ancestors,
            data=bool(data),
            floating=result.is_floating_point(),
            weighted=bool(constants and WEIGHTED.search(operation)),
            curved=bool(CURVED.search(operation) or (len(data) > 1 and PRODUCT.search(operation))),
            scaled=operation in ("mul", "mul_") and not all(value.scalar for value in constants),
            scalar=result.numel() == 1,
        )
        self.nodes.append(value)
        self.consumers.append([])
        return index

    def add_inputs(self, tensors: Iterable[Tensor]) -> None:
        """Mark what comes into the network."""
        for tensor in tensors:
            self.nodes[self.of(tensor)].data = True

    def add_outputs(self, tensors: Iterable[Tensor]) -> None:
        """Mark what the network returns."""
        for value in map(self.of, tensors):
            self.outputs |= 1 << value
            self.used |= self.nodes[value].ancestors | 1 << value

    def record(
        self, operation: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], module: str
    ) -> int | None:
        """Add the results of an operation that ran, and return the number of the last new one.

        A copy or a full view of the first input is the same value; a part of it is a value of its
        own. All other outputs share one value, since some of them may not be used.
        """
        parents = list(dict.fromkeys(map(self.of, inputs)))
        storages = {self.storage_of(tensor) for tensor in inputs}
        shared = new = None
        for output in outputs:
            written = any(output is tensor for tensor in inputs)
            view = not written and self.storage_of(output) in storages
            copy = not written and COPIES.fullmatch(operation) is not None
            if (copy and output.shape == inputs[0].shape) or (
                view and output.numel() >= inputs[0].numel()
            ):
                self.place(output, self.of(inputs[0]), view)
            elif view:
                new = self.add(operation, parents, output, module)
                self.place(output, new, view)
            else:
                if shared is None:
                    shared = new = self.add(operation, parents, output, module)
                self.place(output, shared, view)
        return new

    def place(self, tensor: Tensor, value: int, view: bool) -> None:
        self.views[self.view_of(tensor)] = value
        if not view:
            self.latest[self.storage_of(tensor)] = value

    def comes_from(self, value: int, ancestor: int) -> bool:
        return bool(self.nodes[value].ancestors >> ancestor & 1)

    def between(self, start: int, end: int) -> list[int]:
        """Return the values on all ways from start to end, with the end and without the start."""
        found, rest = [], self.nodes[end].ancestors >> start + 1
        while rest:
            lowest = (rest & -rest).bit_length()
            if self.comes_from(start + lowest, start):
                found.append(start + lowest)
            rest &= rest - 1
        return [*found, end]

    def judge(self, first: int, second: int) -> Residual | str:
        """Return the residual addition that a sum of two values is, or why it is none."""
        for stream, branch in ((first, second), (second, first)):
            for start in (stream, *reversed(self.nodes[stream].streams)):
                if self.comes_from(branch, start) and self.nodes[start].floating:
                    way = self.between(start, branch)
                    if not any(self.nodes[i].weighted for i in way):
                        return "no weights on the branch"
                    return Residual("identity", stream, branch, start, way)
        fork = self.latest_common_ancestor(first, second)
        if fork is None:
            return "no common origin"
        ways = {value: self.between(fork, value) for value in (first, second)}
        straight = [v for v, way in ways.items() if not any(self.nodes[i].curved for i in way)]
        if len(straight) != 1:
            return f"{'two ways' if straight else 'no way'} without an activation"
        [stream] = straight
        branch = second if stream == first else first
        if not any(self.nodes[i].weighted for i in ways[branch]):
            return "no weights on the branch"
        shortcut = [self.nodes[i] for i in ways[stream]]
        if any(value.scaled for value in shortcut) and not any(v.weighted for v in shortcut):
            return "a vector scales the shortcut"
        return Residual("projection", stream, branch, fork, ways[branch])

    def latest_common_ancestor(self, first: int, second: int) -> int | None:
        """Return the latest data value, a floating one, that both were computed from."""
        common = self.nodes[first].ancestors & self.nodes[second].ancestors
        while common:
            latest = common.bit_length() - 1
            if self.nodes[latest].data:
                return latest if self.nodes[latest].floating else None
            common ^= 1 << latest
        return None

    def hidden_sum(self, operation: str, inputs: Sequence[Tensor]) -> str:
        """Say in which operation a sum of two data tensors of one shape hides, or return ''."""
        reason, values = HIDDEN.get(operation, ""), [self.nodes[self.of(x)] for x in inputs[:2]]
        if operation == "sum":
            stacked = values[0].operation == "stack" and values[0].data
            return reason if stacked else ""
        both = len(values) == 2 and all(value.data and value.floating for value in values)
        return reason if both else ""

    def is_used(self, value: int) -> bool:
        """Whether the output depends on a value. True if nothing is known of the output."""
        return not self.used or bool(self.used >> value & 1)

    def used_outside(self, residual: Residual, total: int) -> bool:
        """Whether a value on a branch has another use than the sum, whose value is `total`.

        What never reaches the network's output is no use.
        """
        inside = set(residual.way)
        uses = {use for value in inside for use in self.consumers[value]} - inside - {total}
        return any(self.outputs >> value & 1 for value in inside) or any(map(self.is_used, uses))

    def branch_kind(self, way: Iterable[int]) -> str:
        """Name what a branch consists of: attention, convolution, mlp or other.

        Attention is a softmax and a product of two data matrices; such a product without a softmax
        is a state-space model or linear attention, and is called other.
        """
        operations = [self.nodes[i].operation for i in way]
        products = any("bmm" in self.nodes[i].operation and self.nodes[i].curved for i in way)
        words = " ".join(operations)
        if "attention" in words or ("softmax" in words and products):
            return "attention"
        if products:
            return "other"
        if "conv" in words.replace(POINTWISE, "mm"):
            return "convolution"
        return "mlp" if re.search("mm|linear|conv", words) else "other"
