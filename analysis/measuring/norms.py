"""BN in its many forms, and what part of its output is the response."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

AFFINE = ("weight", "bias", "running_mean", "running_var")  # a module with these four is a norm
EPSILONS = (1e-5, 1e-3, 1e-4, 1e-6, 0.0)  # tried for norms that do not say theirs
TOLERANCE = 1e-4  # of the largest response: how far rounding may take a norm's output


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BN of torch's, or has the four tensors of one."""
    if isinstance(module, _BatchNorm):
        return True
    own = {**module._parameters, **module._buffers}
    tensors = [tensor for name in AFFINE if (tensor := own.get(name)) is not None]
    if len(tensors) < len(AFFINE):
        return False
    if any(is_lazy(tensor) for tensor in tensors):
        return True
    shapes = {tensor.shape for tensor in tensors}
    return len(shapes) == 1 and all(shape.numel() == max(shape, default=0) for shape in shapes)


def explain(
    name: str,
    norm: nn.Module,
    x: Tensor,
    output: Any,
    redo: tuple[Any, Any, Any] | None,
    result: StorageWeakRef | None,
) -> tuple[Tensor, bool]:
    """Return a norm's response to x, and whether it is the norm's output as it stands.

    It is if a batch norm of x wrote that output. Otherwise the batch norm, or the formula with the
    norm's own epsilon or one of the usual, must explain the output: alone, or followed by the
    norm's submodules, as timm's BatchNormAct2d carries its activation. Raises ValueError if
    nothing does, since the response is then not known.

    redo: the batch norm that ran inside the norm, with its arguments. result: the memory that it
    wrote, unless something was written over it.
    """
    is_tensor = isinstance(output, Tensor)
    if is_tensor and result is not None and output.untyped_storage()._cdata == result.cdata:
        return output, True
    candidates = [y for y in redone(norm, x, redo) if y.shape == x.shape]
    if candidates and is_tensor and not output.isfinite().all():
        return candidates[0], False  # the NaN or infinity will be reported
    for after in ([], list(norm.children())):
        misfits = [misfit(run_all(after, y.clone()), output) for y in candidates]
        if misfits and min(misfits) <= max(TOLERANCE, 4 * torch.finfo(x.dtype).eps):
            return candidates[misfits.index(min(misfits))], not after
    raise ValueError(
        f"{name} ({type(norm).__name__}) has the tensors of a BN, but its output is neither what "
        "they make of its input nor that after its submodules: put its activation into a "
        "submodule or behind it, or use nn.BatchNorm2d"
    )


def redone(norm: Any, x: Tensor, redo: tuple[Any, Any, Any] | None) -> Iterator[Tensor]:
    """Yield what the response to x (N, C, H, W) may be: `redo` again, or the formula."""
    if redo is not None:
        func, args, kwargs = redo
        output = func(*args, **kwargs)
        yield output if isinstance(output, Tensor) else output[0]
    tensors = [getattr(norm, name, None) for name in AFFINE]
    if any(tensor is not None and tensor.numel() != x.shape[1] for tensor in tensors):
        return
    weight, bias, mean, var = (None if t is None else t.flatten() for t in tensors)
    own = float(getattr(norm, "eps", EPSILONS[0]))
    for eps in (own,) if isinstance(norm, _BatchNorm) else dict.fromkeys((own, *EPSILONS)):
        yield F.batch_norm(x, mean, var, weight, bias, mean is None, eps=eps)


def run_all(modules: list[nn.Module], y: Tensor) -> Any:
    """Return what the modules make of y one after another; None if they cannot."""
    try:
        for module in modules:
            y = module.forward(y)  # not module(y), which would run its hooks once more
    except Exception:
        return None
    return y


def misfit(expected: Any, output: Any) -> float:
    """Return the largest difference in units of the largest expected value."""
    if not (isinstance(output, Tensor) and isinstance(expected, Tensor)):
        return float("inf")
    if output.shape != expected.shape:
        return float("inf")
    if not output.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((output - expected).abs().max() / scale).item()
