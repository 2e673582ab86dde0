"""Residual networks and their plain counterparts, their data, and the files they are kept in."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.batchnorm import closed_form
    from models.checkpoints.loading import load
    from models.resnet import build

__all__ = ["build", "closed_form", "load"]

_HOMES = {
    "build": "models.resnet",
    "closed_form": "models.batchnorm",
    "load": "models.checkpoints.loading",
}


def __getattr__(name: str) -> Any:
    """Import a function, and with it torch, when it is first used: that takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
