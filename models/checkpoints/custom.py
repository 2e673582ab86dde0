"""Networks that are built by other people's code: `package.module:function` or
`path/to/file.py:function`.

    from models.checkpoints.custom import build_from
    network = build_from("my_networks.py:resnet20")

The code is the user's own and is run; a checkpoint never names it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

OURS = ("analysis", "models", "plots")
FORMS = "PACKAGE.MODULE:FUNCTION or FILE.py:FUNCTION, a function that takes no arguments and returns the network"


def build_from(spec: str) -> nn.Module:
    """Call the function that `spec` names and return the network that it makes.

    ValueError, with the reason, where there is no such file, module or function, where it raises,
    or where it returns something else than a torch.nn.Module.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError(f"--model {spec}: not of the form {FORMS}")
    with user_modules(Path(place).resolve().parent if place.endswith(".py") else Path.cwd()):
        module = import_place(spec, place)
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"--model {spec}: there is no function {name} in {place}")
        network = call(spec, function)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--model {spec}: {name}() returns {type(network).__name__}, not a torch.nn.Module"
        )
    return network


@contextmanager
def user_modules(folder: Path) -> Iterator[None]:
    """Import from `folder` first. A package there may be called as one of ours is: ours comes back
    at the end.
    """
    shadowed = [name for name in OURS if is_users(folder / name)]
    before = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] in shadowed
    }
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in shadowed]:
            del sys.modules[name]
        sys.modules.update(before)


def is_users(place: Path) -> bool:
    """Whether a package or a module of this name lies there that is not ours."""
    return place.with_suffix(".py").is_file() or (
        place.is_dir() and place != Path(__file__).parents[2] / place.name
    )


def import_place(spec: str, place: str) -> Any:
    """The module of a dotted name, or of a file."""
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"--model {spec}: {place}: no such file")
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None  # a .py file has a loader
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules.setdefault(path.stem, module)  # where dataclasses look for it
        call(spec, partial(found.loader.exec_module, module))
        return module
    return call(spec, partial(importlib.import_module, place))


def call(spec: str, function: Callable[[], Any]) -> Any:
    """What the user's code returns. ValueError, in one line, with what it raises."""
    try:
        return function()
    except (Exception, SystemExit) as error:  # it is anybody's code
        raise ValueError(
            f"--model {spec}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
