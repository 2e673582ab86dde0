"""Figures of layer responses: a frame in, a matplotlib Figure out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plots.benchmark import draw_benchmark
    from plots.branches import draw_branches
    from plots.compare import draw_compare, draw_stages
    from plots.decomposition import draw_decomposition
    from plots.dynamics import draw_dynamics
    from plots.fig7 import draw_fig7
    from plots.neighbours import draw_neighbours

__all__ = [
    "draw_benchmark",
    "draw_branches",
    "draw_compare",
    "draw_decomposition",
    "draw_dynamics",
    "draw_fig7",
    "draw_neighbours",
    "draw_stages",
]


def __getattr__(name: str) -> Any:
    """Import a function, and with it matplotlib, when it is first used: that takes a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "compare" if name == "draw_stages" else name.removeprefix("draw_")
    return getattr(import_module(f"plots.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
