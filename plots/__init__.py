"""Drawing: a frame in, a matplotlib Figure out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plots.branches import draw_branches
    from plots.compare import draw_compare, draw_stages
    from plots.decomposition import draw_decomposition
    from plots.dynamics import draw_dynamics
    from plots.fig7 import draw_fig7
    from plots.neighbours import draw_neighbours

__all__ = [
    "draw_branches",
    "draw_compare",
    "draw_decomposition",
    "draw_dynamics",
    "draw_fig7",
    "draw_neighbours",
    "draw_stages",
]

HOMES = {
    "draw_branches": "plots.branches",
    "draw_compare": "plots.compare",
    "draw_decomposition": "plots.decomposition",
    "draw_dynamics": "plots.dynamics",
    "draw_fig7": "plots.fig7",
    "draw_neighbours": "plots.neighbours",
    "draw_stages": "plots.compare",
}


def __getattr__(name: str) -> Any:
    """Import matplotlib when it is needed: it takes a second, and --help does without."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOMES[name]), name)
