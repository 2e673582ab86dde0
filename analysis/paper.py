"""The paper's curves and claims about Fig. 7, and how far a measurement is from them.

    >>> from analysis.paper import curves
    >>> curves().groupby("network")["std"].mean().round(2).to_dict()
    {'plain-20': 1.82, 'plain-56': 1.52, 'resnet-110': 0.99, 'resnet-20': 1.62, 'resnet-56': 1.13}

The paper is He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and
Fig. 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
import pandas as pd


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

    One row a network, in the order of the frame: network, r (Pearson's, layer by layer) and ratio
    (mean std over the paper's mean std); empty where the paper has no such network.
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


def judge(
    frame: pd.DataFrame,
    blocks: pd.DataFrame | None = None,
    iterations: Mapping[str, int | None] | None = None,
) -> pd.DataFrame:
    """The paper's three statements about Fig. 7, judged on the networks of a frame.

    frame: one source for all networks (see analysis.measuring.frame). blocks: the blocks of their
    residual networks (see analysis.measuring.blocks), which the third statement is about.
    iterations: for how many networks were trained, by label, where that is known. One row a number:
    claim (1 to 3), statement, networks (whose it is), measure, value, expected (`< 0` or `> 0.5`),
    verdict and sentence. A verdict is `holds` where the value is as the paper says, else `does not
    hold`; `cannot be judged here` where the two networks were not trained for as many iterations,
    which the sentence says, and, with no value, where no two networks here are ones that the
    statement is about. Layers of two networks are compared at the same position, as in Fig. 7;
    networks for CIFAR-10 and for ImageNet are not.
    """
    rows: list[dict[str, Any]] = []
    for number, (statement, measures, why_not) in enumerate(
        zip(STATEMENTS, MEASURES, WHY_NOT, strict=True), start=1
    ):
        claim = {"claim": number, "statement": statement}
        found = list(measures(frame, blocks))
        nothing = Number((), "", math.nan, "", why_not)
        for item in found or [nothing]:
            holds = item.value < 0 if item.expected == "< 0" else item.value > 0.5
            unequal = lengths(item, iterations or {})
            verdict = OPEN if unequal or not found else "holds" if holds else "does not hold"
            words = {"networks": ", ".join(item.networks), "sentence": item.sentence + unequal}
            rows.append(claim | asdict(item) | words | {"verdict": verdict})
    return pd.DataFrame(rows)[list(CLAIM_COLUMNS)]


def verdict_of(numbers: pd.DataFrame) -> str:
    """What the numbers of one statement say together (see `judge`): those that cannot be judged do
    not count.
    """
    verdicts = set(numbers["verdict"])
    judged = verdicts - {OPEN} or verdicts
    return judged.pop() if len(judged) == 1 else "holds in part"


@dataclass(frozen=True)
class Number:
    """What one statement says of two networks, as a number, and in words."""

    networks: tuple[str, ...]
    measure: str
    value: float
    expected: str
    sentence: str


def lengths(number: Number, iterations: Mapping[str, int | None]) -> str:
    """For how many iterations the two networks were trained, in words; empty where that is equal or
    not known.
    """
    known = [iterations.get(network) for network in number.networks]
    if None in known or len(set(known)) < 2:
        return ""
    return f"; after {' and '.join(f'{count:,}' for count in known)} iterations"


def below_plain(frame: pd.DataFrame, blocks: pd.DataFrame | None) -> Iterator[Number]:
    """Every residual network against every plain one of its depth."""
    for (_, ours), (_, plain) in product(
        networks_of(frame, "residual"), networks_of(frame, "plain")
    ):
        if ours["depth"].iloc[0] != plain["depth"].iloc[0] or not one_family(ours, plain):
            continue
        names = both_names(ours, plain)
        yield difference(ours, plain, names)
        both = ours.merge(plain, on="layer", suffixes=("", "_plain"))
        below = both["std"] < both["std_plain"]
        sentence = f"{names[0]} is below {names[1]} in {below.sum()} of {len(both)} layers"
        yield Number(names, "share of layers below", below.mean(), "> 0.5", sentence)


def order_of_means(frame: pd.DataFrame, blocks: pd.DataFrame | None) -> Iterator[Number]:
    """Every residual network against every shallower one."""
    for shallow, deep in by_depth(networks_of(frame, "residual")):
        yield difference(deep, shallow, both_names(deep, shallow))


def smaller_steps(frame: pd.DataFrame, blocks: pd.DataFrame | None) -> Iterator[Number]:
    """Every residual network's blocks against those of every shallower one."""
    if blocks is None or blocks.empty:
        return
    medians = blocks.groupby("network")["ratio"].median()
    for shallow, deep in by_depth(networks_of(frame, "residual")):
        names = both_names(deep, shallow)
        if set(names) <= set(medians.index):
            ours, theirs = medians[names[0]], medians[names[1]]
            yield Number(
                names,
                "difference of median ratios of branch to shortcut",
                ours - theirs,
                "< 0",
                f"a block's branch has {ours:.3f} times the std of its shortcut in {names[0]}, {theirs:.3f} times in "
                f"{names[1]} (medians over blocks)",
            )


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, names: tuple[str, str]) -> Number:
    """Of two networks' means over layers."""
    means = ours["std"].mean(), theirs["std"].mean()
    value = means[0] - means[1]
    percent = (
        f"{abs(100 * value / means[1]):.1f} % {'less' if value < 0 else 'more'} than"
        if value
        else "as much as"
    )
    sentence = f"{names[0]} has a mean std of {means[0]:.3f}, {percent} {names[1]} ({means[1]:.3f})"
    return Number(names, "difference of mean std", value, "< 0", sentence)


def networks_of(frame: pd.DataFrame, kind: str) -> list[tuple[Any, pd.DataFrame]]:
    """The networks of a kind whose depth is known, each with its layers."""
    known = frame[(frame["kind"] == kind) & frame["depth"].notna()]
    return list(known.groupby("network", sort=False))


def by_depth(found: list[tuple[Any, pd.DataFrame]]) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """All pairs of a shallower and a deeper network of one family."""
    for (_, shallow), (_, deep) in product(found, found):
        if shallow["depth"].iloc[0] < deep["depth"].iloc[0] and one_family(shallow, deep):
            yield shallow, deep


def one_family(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Whether two networks have stages of the same widths: not one for CIFAR-10 and one for
    ImageNet.
    """
    return set(first.get("channels", ())) == set(
        second.get("channels", ())
    )  # the paper's curves do not say them


def both_names(first: pd.DataFrame, second: pd.DataFrame) -> tuple[str, str]:
    return str(first["network"].iloc[0]), str(second["network"].iloc[0])


STATEMENTS = (
    "residual responses are generally smaller than their plain counterparts'",
    "deeper ResNets have smaller responses",
    "an individual layer of a ResNet modifies the signal less when there are more",
)
MEASURES = (below_plain, order_of_means, smaller_steps)
WHY_NOT = (
    "no residual and plain network of one depth",
    "no two residual networks of different depth",
    "no two residual networks of different depth whose blocks ran on images",
)
OPEN = "cannot be judged here"
CLAIM_COLUMNS = (
    "claim",
    "statement",
    "networks",
    "measure",
    "value",
    "expected",
    "verdict",
    "sentence",
)
