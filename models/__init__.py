"""Residual networks and their plain counterparts, the data they are trained on, and the files they
are kept in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.batchnorm import closed_form
    from models.checkpoints.loading import load
    from models.resnet import build

__all__ = ["build", "closed_form", "load"]

HOMES = {
    "build": "models.resnet",
    "closed_form": "models.batchnorm",
    "load": "models.checkpoints.loading",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch takes seconds, and --help does not need
    it.
    """
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOMES[name]), name)
