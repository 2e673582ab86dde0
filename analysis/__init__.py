"""Measuring the responses of a network's layers: `measure(model, batches)` and the commands of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.hooks import measure

__all__ = ["measure"]


def __getattr__(name: str) -> Any:
    """Import torch when it is needed: it takes seconds, and --help does without."""
    if name == "measure":
        from analysis.hooks import measure

        return measure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
