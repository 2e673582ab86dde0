"""Where the output of a convolution goes in one forward pass, operation by operation.

A dispatch mode follows the memory of the output: views share it, copies and casts to another float
type are followed too. Anything else that reads it is a use, and what overwrites it ends the trail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.measuring.batches import tensors_in

COPIES = ("aten::clone", "aten::_to_copy", "aten::contiguous")


class Doubt(Exception):
    """Why a folded pass cannot be trusted, in words."""


@dataclass(eq=False)
class Call:
    """One call of a convolution, and what its output met.

    conv: None for a convolution that is no registered module. norms: BNs that took the output in.
    uses: other operations that computed with it. same: the BN's input was the very output.
    direct: the BN's output was the response; otherwise the BN's submodules made it of that.
    changes_type: the BN's response was of another type than its input.
    """

    name: str
    conv: nn.Module | None
    asked: bool
    norms: list[nn.Module] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)
    same: bool = False
    direct: bool = False
    explained: bool = False
    changes_type: bool = False


@dataclass
class Frame:
    """A convolution or norm that is running, and the operations inside it.

    uses: operations on convolutions' outputs. redo: the last batch norm and its arguments. result:
    the memory that it wrote, as long as nothing overwrites that. inner: calls that a norm inside
    it took in.
    """

    module: nn.Module
    is_conv: bool
    uses: list[tuple[Call, str]] = field(default_factory=list)
    redo: tuple[Any, Any, Any] | None = None
    result: StorageWeakRef | None = None
    inner: list[Call] = field(default_factory=list)


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow the outputs of convolutions through the operations of one forward pass.

    kernel_size: of convolutions that are asked for. folded: whether some of the network's run
    folded. stack: the convolutions and norms that are running. outputs: what is followed, by
    address.
    """

    def __init__(self, kernel_size: tuple[int, ...], folded: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernel_size, self.folded = kernel_size, folded
        self.stack: list[Frame] = []
        self.outputs: dict[int, tuple[StorageWeakRef, Call, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Save torch the import of its compiler: nothing is compiled during a pass."""
        return False

    def track(self, x: Tensor, call: Call) -> None:
        reference = weak(x)
        self.outputs[reference.cdata] = reference, call, geometry(x)

    def find(self, x: Tensor) -> Call | None:
        """Return the call whose output x is, with all its values in their places."""
        found = self.outputs.get(address(x))
        return found[1] if found is not None and found[2] == geometry(x) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and note which convolutions' outputs it computes with."""
        kwargs = kwargs or {}
        inputs = list(tensors_in([args, kwargs] if kwargs else args))
        if self.folded:
            for x in inputs:
                if hasattr(x, "_folded"):  # says analysis.measuring.folding
                    raise Doubt(f"the output of {x._folded} goes elsewhere too")
        output = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        if "conv" in name and not (self.stack and self.stack[-1].is_conv):
            self.track_function(args, output)
        found = {address(x): x for x in inputs} if self.outputs or self.stack else {}
        calls = [self.outputs[key][1] for key in found if key in self.outputs]
        frame = self.stack[-1] if self.stack and not self.stack[-1].is_conv else None
        if func._schema.is_mutable:
            self.forget_overwritten(func, args, kwargs)
        if not calls or func.is_view:
            return output
        call = self.find(inputs[0])
        if call is not None and name in COPIES and output.is_floating_point():
            self.track(output, call)
            return output
        short = name.removeprefix("aten::")
        for call in calls:
            frame.uses.append((call, short)) if frame else call.uses.append(short)
        if frame and "batch_norm" in name:
            frame.redo, frame.result = (func, args, kwargs), weak(next(tensors_in(output)))
        return output

    def track_function(self, args: Any, output: Any) -> None:
        """Track the output of a convolution that runs as a function."""
        weight = args[1] if len(args) > 1 else None
        if isinstance(output, Tensor) and isinstance(weight, Tensor) and weight.dim() == 4:
            asked = tuple(weight.shape[2:]) == self.kernel_size and True not in args[6:7]
            self.track(output, Call("", None, asked))

    def forget_overwritten(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for x in tensors_in([value]):
                    key = address(x)
                    self.outputs.pop(key, None)
                    for frame in self.stack:
                        if frame.result is not None and frame.result.cdata == key:
                            frame.result = None


def why_unpaired(call: Call, names: dict[nn.Module, str]) -> str:
    """Return why a convolution's output is in no layer; empty if it is in one."""
    norms, uses = [names[norm] for norm in call.norms], list(dict.fromkeys(call.uses))
    if len(norms) == 1 and not uses:
        return ""
    if norms:
        return f"its output goes into {norms[0]} and also into {', '.join(norms[1:] + uses)}"
    if uses:
        return f"its output goes into {', '.join(uses)}, not unchanged into a BN"
    return "its output goes into no BN"


def address(x: Tensor) -> int:
    """Return what tells the memory of a tensor apart; 0 if it has none of its own."""
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, for example
        return 0


def geometry(x: Tensor) -> Any:
    """Return how a tensor's values lie in its memory."""
    strides = tuple(step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1)
    return x.dtype, x.shape, strides, x.storage_offset()


def weak(x: Tensor) -> StorageWeakRef:
    """Return a reference to the memory of a tensor: while it lives, no other gets the address."""
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
