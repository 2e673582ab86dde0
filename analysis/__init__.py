"""Measure the responses of a network's layers, and compare what was measured.

import analysis
frame = analysis.measure(model, batches)  # one row a layer
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.additions.measurement import measure_branches
    from analysis.measuring.measurement import measure
    from analysis.measuring.recorder import Recorder
    from analysis.paper import paper_curves
    from analysis.statistics import compare_frames

__all__ = ["Recorder", "compare_frames", "measure", "measure_branches", "paper_curves"]

_HOMES = {
    "Recorder": "analysis.measuring.recorder",
    "compare_frames": "analysis.statistics",
    "measure": "analysis.measuring.measurement",
    "measure_branches": "analysis.additions.measurement",
    "paper_curves": "analysis.paper",
}


def __getattr__(name: str) -> Any:
    """Import a function, and with it torch, when it is first used: that takes seconds."""
    if name == "__version__":
        from importlib.metadata import version

        return version("layer-responses")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _pin(name: str) -> None:
    """Import the package beside this one: the current folder may hold another `models`."""
    place = Path(__file__).parents[1] / name / "__init__.py"
    other = getattr(sys.modules.get(name), "__file__", None)
    if other is not None and Path(other) != place:
        raise ImportError(
            f"another package called {name} is imported: {other}; import analysis first"
        )
    if name not in sys.modules:
        spec = spec_from_file_location(name, place, submodule_search_locations=[str(place.parent)])
        assert spec is not None  # an __init__.py has a loader
        assert spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


_pin("models")
_pin("plots")
