"""What several threads of one process do at once: they measure different networks, and no network
twice.

torch keeps per thread whether gradients are recorded, inference mode and autocast. Hooks and
training flags belong to a network, TF32 and the stance of torch.compile to the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock

from torch import nn

LOCK = Lock()
MEASURED: set[nn.Module] = set()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Inside the block no other measurement has a module of this network. ValueError where one has
    it already.
    """
    modules = set(model.modules())
    with LOCK:
        if modules & MEASURED:
            raise ValueError(
                "this network, or a part of it, is being measured already, and hooks cannot tell for whom it runs: "
                "wait for the end of that, or measure a copy (copy.deepcopy)"
            )
        MEASURED.update(modules)
    try:
        yield
    finally:
        with LOCK:
            MEASURED.difference_update(modules)


class Shared:
    """A state of the whole process that several threads want at once: the first one enters it, the
    last one leaves it.

    >>> from contextlib import contextmanager
    >>> @contextmanager
    ... def state():
    ...     print("on")
    ...     yield
    ...     print("off")
    >>> shared = Shared(state)
    >>> with shared(), shared():
    ...     print("twice")
    on
    twice
    off
    """

    def __init__(self, state: Callable[[], AbstractContextManager[object]]) -> None:
        self.state, self.users, self.lock, self.stack = state, 0, Lock(), ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.users:
                self.stack.enter_context(self.state())
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.stack.close()
