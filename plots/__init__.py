"""Drawing: a frame in, a matplotlib Figure out."""

from __future__ import annotations

from plots.fig7 import draw_fig7

__all__ = ["draw_fig7"]
