"""Measuring the responses of a network's layers, comparing what was measured, and the commands of
this package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.measuring.branch_measurement import measure_branches
    from analysis.measuring.measurement import measure
    from analysis.statistics import compare_frames

__all__ = ["compare_frames", "measure", "measure_branches"]

HOMES = {
    "compare_frames": "analysis.statistics",
    "measure": "analysis.measuring.measurement",
    "measure_branches": "analysis.measuring.branch_measurement",
}


def __getattr__(name: str) -> Any:
    """Import torch when it is needed: it takes seconds, and --help does without."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def pin(name: str) -> None:
    """Import the package of that name beside this one: the folder one works in may hold another
    `models`.
    """
    place = Path(__file__).parents[1] / name / "__init__.py"
    other = getattr(sys.modules.get(name), "__file__", None)
    if other is not None and Path(other) != place:
        raise ImportError(
            f"another package called {name} is imported: {other}; import analysis before it"
        )
    if name not in sys.modules:
        spec = spec_from_file_location(name, place, submodule_search_locations=[str(place.parent)])
        assert spec is not None  # an __init__.py has a loader
        assert spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


pin("models")
pin("plots")
