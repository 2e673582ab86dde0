"""The closed form of a checkpoint: which epsilon is assumed, what is in doubt, what is left out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd
    from torch import Tensor, nn

    from models.checkpoints.loading import Checkpoint

SHOWN = 3  # names in a printed line


def compute(label: str, checkpoint: Checkpoint, eps: float | None) -> pd.DataFrame:
    """Return the rows of a network, with the facts of `closed_form`; say what is assumed."""
    from models.batchnorm import closed_form

    model = checkpoint.model
    if not any(name.endswith("running_var") for name in checkpoint.state):
        raise ValueError(
            f"{checkpoint.path}: it has no BN with recorded statistics to compute from; "
            "python -m analysis.branches measures residual additions instead"
        )
    if model is not None and not says_eps(checkpoint):
        source: nn.Module | Mapping[str, Tensor] = model.state_dict()
    else:
        source = checkpoint.state if model is None else model
    try:
        rows = closed_form(source, eps=eps)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    facts: Mapping[str, Any] = rows.attrs
    if facts["eps"] is not None:
        effect = f"{100 * facts['eps_effect']:.2g} %"
        print(
            f"{label}: epsilon {facts['eps']:g} assumed; 1e-5, 1e-3 or 0 changes a std by up to "
            f"{effect}"
        )
    elif eps is not None:
        print(f"{label}: --eps: no effect, the network says its epsilon", file=sys.stderr)
    doubts = []
    if facts["ambiguous"]:
        names = list_names(facts["ambiguous"])
        doubts.append(f"names and order of the tensors disagree on {names}")
    if facts["sorted"] and model is None:
        doubts.append("the tensors are sorted by name, so the order of the layers is a guess")
    for doubt in doubts:
        checkpoint.warnings.append(f"{doubt}; a forward pass (--model) tells")
        print(f"warning: {label}: {checkpoint.warnings[-1]}", file=sys.stderr)
    return rows


def says_eps(checkpoint: Checkpoint) -> bool:
    """Whether the epsilon of a network is known: it was built by its own code, or trained by ours."""
    from models.checkpoints.loading import Known

    return checkpoint.kind_known is Known.BUILT or bool(checkpoint.card)


def report_missing(label: str, done: str, missing: Mapping[str, str]) -> None:
    """Say which convolutions are not measured, or not computed, and why."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in missing.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        print(f"{label}: not {done}, {reason}: {list_names(names)}")


def list_names(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
