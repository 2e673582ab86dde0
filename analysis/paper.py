"""The paper's curves and claims about Fig. 7, and how far a measurement is from them.

    >>> from analysis.paper import curves
    >>> curves().groupby("network")["std"].mean().round(2).to_dict()
    {'plain-20': 1.82, 'plain-56': 1.52, 'resnet-110': 0.99, 'resnet-20': 1.62, 'resnet-56': 1.13}

The paper is He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and Fig. 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Claim:
    """One of the paper's statements, judged. verdict: `holds`, `does not hold` or `cannot be judged here`."""

    statement: str
    verdict: str
    evidence: str


def curves() -> pd.DataFrame:
    """The paper's five curves: network, kind, depth, layer (1-based), std."""
    with files("analysis").joinpath("paper_fig7.csv").open() as file:
        frame = pd.read_csv(file, comment="#")
    parts = frame["network"].str.split("-", expand=True)
    frame.insert(1, "kind", parts[0].replace("resnet", "residual"))
    frame.insert(2, "depth", parts[1].astype("Int64"))
    return frame


def against_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """How far each network of a frame is from the paper's curve of its kind and depth.

    One row a network, in the order of the frame: network, r (Pearson's, layer by layer) and ratio (mean std over the
    paper's mean std); empty where the paper has no such network.
    """
    paper = {key: curve["std"].to_numpy() for key, curve in curves().groupby(["kind", "depth"])}
    rows = []
    for network, layers in frame.groupby("network", sort=False):
        std = layers.sort_values("layer")["std"].to_numpy()
        curve = paper.get((layers["kind"].iloc[0], layers["depth"].iloc[0]))
        if curve is None or len(curve) != len(std):
            rows.append({"network": network, "r": np.nan, "ratio": np.nan})
        else:
            r = np.corrcoef(std, curve)[0, 1] if std.std() > 0 else np.nan
            rows.append({"network": network, "r": r, "ratio": std.mean() / curve.mean()})
    return pd.DataFrame(rows)


def judge(frame: pd.DataFrame) -> list[Claim]:
    """The paper's two claims about means over layers, judged on the networks of a frame."""
    means = frame.groupby(["network", "kind", "depth"], sort=False, dropna=False)["std"].mean().reset_index()
    residual, plain = (means[means["kind"] == kind] for kind in ("residual", "plain"))
    same_depth = [(r, p) for r in residual.itertuples() for p in plain.itertuples() if r.depth == p.depth]
    ordered = [(d, s) for s in residual.itertuples() for d in residual.itertuples() if d.depth > s.depth]
    return [
        judge_order("residual responses are smaller than plain ones of the same depth", same_depth),
        judge_order("deeper ResNets have smaller responses", ordered),
    ]


def judge_order(statement: str, pairs: list[tuple[Any, Any]]) -> Claim:
    """Whether in each pair of networks the first one's mean std is smaller."""
    if not pairs:
        return Claim(statement, "cannot be judged here", "no two networks to compare")
    holds = all(small.std < large.std for small, large in pairs)
    evidence = [
        f"{small.network} {small.std:.3f} {'<' if small.std < large.std else '>='} {large.network} {large.std:.3f}"
        for small, large in pairs
    ]
    return Claim(statement, "holds" if holds else "does not hold", ", ".join(evidence))
