"""Put a network into evaluation mode inside a block, and restore it afterwards.

    with evaluation(model):
        logits = model(images)

One network is measured by one thread at a time: hooks and training flags belong to the network,
TF32 and the stance of torch.compile to the process.
"""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

T = TypeVar("T")


class Deferral:
    """Hold back Ctrl-C between `begin` and `end`; both may be called twice, or `end` alone."""

    def __init__(self) -> None:
        self.before: Any = None
        self.received: list[tuple[Any, ...]] = []

    def begin(self) -> None:
        if self.before is None and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, lambda *args: self.received.append(args))

    def end(self) -> None:
        if self.before is not None:
            before, self.before = self.before, None
            signal.signal(signal.SIGINT, before)
            if self.received and callable(before):
                before(*self.received.pop())


@contextmanager
def restoring(setup: Callable[[ExitStack], T]) -> Iterator[T]:
    """Run `setup` and, at the end of the block, everything that it pushed onto its stack.

    Ctrl-C waits while either of them runs, so that neither is left half done.
    """
    deferral, stack = Deferral(), ExitStack()
    try:
        try:
            deferral.begin()
            value = setup(stack)
            deferral.end()
            yield value
        finally:
            deferral.begin()
    finally:  # also if Ctrl-C came before `begin`
        try:
            stack.close()
        finally:
            deferral.end()


def evaluation(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context of evaluation mode, without gradients and TF32.

    At its end training flags and buffers are restored, and so are the attributes, parameters and
    buffers of modules that do more than set flags in their `train` or `eval`.
    """
    return restoring(partial(enter_evaluation, model))


def enter_evaluation(model: nn.Module, stack: ExitStack) -> None:
    stack.enter_context(torch.inference_mode(False))  # its tensors have no versions
    stack.enter_context(torch.no_grad())
    set_without_tf32(stack)
    modules = list(model.modules())
    own = [module for module in modules if overrides_train(module)]
    below = {inner for module in own for inner in module.modules()}
    after: list[dict[str, Any]] = []  # attributes of `own` once eval() has run
    for number, module in enumerate(own):
        stack.callback(restore_attributes, module, dict(vars(module)), after, number)
    for module in modules:
        stack.callback(module._buffers.update, dict(module._buffers))
        if module in below:
            for parts in (module._parameters, module._buffers, module._modules):
                stack.callback(replace_items, parts, dict(parts))
        stack.callback(setattr, module, "training", module.training)
    tensors = [x for module in below for x in module.parameters(recurse=False)]
    for x in dict.fromkeys([*model.buffers(), *tensors]):
        if not is_lazy(x) and x.layout == torch.strided:
            stack.callback(put_back, x, x.data, x.detach().clone())
    model.eval()
    after.extend(dict(vars(module)) for module in own)
    for module in modules:
        module.training = False


def overrides_train(module: nn.Module) -> bool:
    """Whether a module has a `train` or `eval` of its own, which may do more than set flags."""
    train, eval_ = (getattr(own, "__func__", None) for own in (module.train, module.eval))
    return train is not nn.Module.train or eval_ is not nn.Module.eval


def restore_attributes(
    module: nn.Module, before: dict[str, Any], after: list[dict[str, Any]], number: int
) -> None:
    """Undo what `eval` did to the attributes of a module; what changed later stays."""
    now = vars(module)
    changed = after[number] if after else dict(now)
    for name in {*before, *changed}:
        if before.get(name) is changed.get(name) or now.get(name) is not changed.get(name):
            continue
        if name in before:
            now[name] = before[name]
        else:
            del now[name]


def replace_items(items: dict[str, Any], before: dict[str, Any]) -> None:
    items.clear()
    items.update(before)


def put_back(tensor: Tensor, data: Tensor, before: Tensor) -> None:
    """Give a tensor its memory and values back. data: its `.data` of before, in that memory."""
    if tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
        tensor.data = data
    if not torch.equal(tensor, before):
        tensor.copy_(before)


def without_tf32() -> AbstractContextManager[None]:
    """Return a context in which float32 is float32 on every GPU."""
    return restoring(set_without_tf32)


def set_without_tf32(stack: ExitStack) -> None:
    for backend, setting, value in tf32_settings():
        stack.callback(setattr, backend, setting, getattr(backend, setting))
        setattr(backend, setting, value)


def tf32_settings() -> list[tuple[Any, str, object]]:
    """Return what turns TF32 off: object, attribute and value.

    Since torch 2.9, reading `allow_tf32` raises once the new settings were used.
    """
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    if hasattr(matmul, "fp32_precision"):
        return [(backend, "fp32_precision", "ieee") for backend in (matmul, cudnn.conv, cudnn.rnn)]
    return [(backend, "allow_tf32", False) for backend in (matmul, cudnn)]


PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module passes on what its one child does: data-parallel, or of torch.compile."""
    return isinstance(module, PARALLEL) or "_orig_mod" in module._modules


def qualified_names(model: nn.Module) -> dict[nn.Module, str]:
    """Return every module once, with the name that it would have without wrappers."""
    names: dict[nn.Module, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        if module not in names:
            names[module] = name
            for part, child in module.named_children():
                visit(child, name if is_wrapper(module) else f"{name}.{part}".lstrip("."))

    visit(model, "")
    return names


def reach(modules: Iterable[nn.Module], stack: ExitStack) -> None:
    """See to it that hooks run for every call of a module, until the stack is closed."""
    if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and to import it is slow
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings(
            "ignore", "Using `torch.compile.module.` when there are global hook"
        )
    own = [parallel.forward for parallel in PARALLEL]  # a user's subclass may do more
    for module in modules:  # copies on other devices have no hooks; DDP waits for other processes
        if isinstance(module, PARALLEL) and type(module).forward in own:
            replace_forward(module, module.module.__call__, stack)


def replace_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    """Let a module run `forward` until the stack is closed."""
    own = vars(module)
    if "forward" in own:
        stack.callback(own.__setitem__, "forward", own["forward"])
    else:
        stack.callback(own.pop, "forward", None)
    own["forward"] = forward
