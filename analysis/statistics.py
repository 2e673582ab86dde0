"""Compare two measured networks, or two groups of them, and estimate sampling errors.

    >>> from analysis.statistics import permutation_test
    >>> permutation_test([1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]).p  # 2 of 70 relabelings
    0.02857142857142857

Networks of one configuration differ in their seeds, so seeds are the samples of a test: one number
a network, its mean std. The layers of one network depend on each other and are never samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pandas as pd

LEVEL = 0.05  # of the test that an interval inverts: a 95 % interval
ENOUGH = "1 and 19, 2 and 5, 3 and 4, or 4 and 4"  # seeds in two groups so that smallest <= LEVEL
MOST_RELABELINGS = 200_000
COLUMNS = (
    *("first", "second", "layer", "position", "name", "stage"),
    *("std_first", "std_second", "difference"),
)


def jackknife_error(replicates: Sequence[float]) -> float:
    """Return the standard error of a statistic by the delete-a-group jackknife.

    replicates: the statistic with each of the groups left out in turn.
    Source: Shao & Tu (1995), The Jackknife and Bootstrap, section 2.3.

    >>> jackknife_error([1.0, 2.0, 3.0])
    1.1547005383792515
    """
    values = np.asarray(replicates, float)
    return float(np.sqrt((len(values) - 1) * values.var()))


def compare_frames(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Return the stds of two networks side by side, and their difference, layer by layer.

    first, second: frames of one network and one source each (see analysis.measuring.frame).

    Networks with the same layers (equal numbers of channels) are aligned by layer. Others are
    aligned by relative depth: layer i of n is at (i - 0.5) / n, and the curve of the deeper network
    is interpolated linearly at the layers of the shallower one.

    Returns the columns first and second (labels), layer, name and stage (of the shallower network),
    position (0 to 1), std_first, std_second, difference (second minus first). Raises ValueError for
    an empty frame, or one of several networks or sources.

    >>> first = pd.DataFrame(
    ...     {"layer": [1, 2], "name": ["a", "b"], "stage": 1, "channels": 4, "std": [1.0, 3.0]}
    ... )
    >>> second = first.assign(network="second", source="hooks", std=[1.5, 2.0])
    >>> compare_frames(first.assign(network="first", source="hooks"), second)["difference"].tolist()
    [0.5, -1.0]
    """
    curves = [check_single(frame).sort_values("layer") for frame in (first, second)]
    base = min(curves, key=len)
    at = positions(len(base))
    stds = [np.interp(at, positions(len(curve)), curve["std"].to_numpy(float)) for curve in curves]
    labels = [str(curve["network"].iloc[0]) for curve in curves]
    columns = {
        "first": labels[0],
        "second": labels[1],
        "layer": base["layer"].to_numpy(int),
        "position": at,
        "name": base["name"].to_numpy(),
        "stage": base["stage"].to_numpy(int),
        "std_first": stds[0],
        "std_second": stds[1],
        "difference": stds[1] - stds[0],
    }
    return pd.DataFrame(columns, columns=list(COLUMNS))


def same_layout(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Whether two networks have as many layers, with as many channels each."""
    return bool(first["channels"].tolist() == second["channels"].tolist())


def positions(count: int) -> np.ndarray:
    """Return the relative depths (count,) of the layers of a network, between 0 and 1."""
    return (np.arange(count) + 0.5) / count


def check_single(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame. Raise ValueError unless it holds one network, one source, finite stds."""
    for column in ("network", "source"):
        if len(frame[column].drop_duplicates()) != 1:
            found = ", ".join(map(str, frame[column].drop_duplicates())) or "none"
            raise ValueError(f"a frame of one {column} is needed, and this one has: {found}")
    if not np.isfinite(frame["std"].astype(float)).all():
        raise ValueError(f"{frame['network'].iloc[0]}: NaN or infinity among the stds")
    return frame


def summarise_pair(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, Any]:
    """Summarise how two networks differ; arguments as for `compare_frames`.

    ratio: mean std of the second over that of the first; NaN if that is 0.
    largest, layer, name: the largest difference of a layer (second minus first), and where it is.
    r, rho: Pearson's and Spearman's correlation over layers; NaN for fewer than three layers or a
        constant curve.
    area: between the curves sorted by magnitude, over the relative rank; in units of std.
    identical: whether networks with the same layers have the same numbers.
    """
    layers = compare_frames(first, second)
    worst = layers.loc[layers["difference"].abs().idxmax()]
    falling = [np.sort(frame["std"].to_numpy(float))[::-1] for frame in (first, second)]
    at = positions(min(map(len, falling)))
    ranked = [np.interp(at, positions(len(curve)), curve) for curve in falling]
    mean = first["std"].mean()
    return {
        "ratio": second["std"].mean() / mean if mean else float("nan"),
        "largest": worst["difference"],
        "layer": int(worst["layer"]),
        "name": str(worst["name"]),
        "r": correlation(layers["std_first"], layers["std_second"]),
        "rho": correlation(layers["std_first"].rank(), layers["std_second"].rank()),
        "area": float(np.abs(ranked[1] - ranked[0]).mean()),
        "identical": same_layout(first, second) and first["std"].tolist() == second["std"].tolist(),
    }


def correlation(x: pd.Series[float], y: pd.Series[float]) -> float:
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


@dataclass(frozen=True)
class PermutationTest:
    """The result of a permutation test of two groups of seeds.

    difference: of the groups' means, second minus first.
    p: two-sided; the share of relabelings whose means are at least as far apart.
    smallest: the smallest p that so many seeds can give.
    interval: 95 %, of the difference; None if there are too few seeds (`ENOUGH`): no shift is then
        ever rejected at 5 %.
    """

    difference: float
    p: float
    smallest: float
    interval: tuple[float, float] | None


def permutation_test(first: Sequence[float], second: Sequence[float]) -> PermutationTest:
    """Test exactly, over all relabelings of the seeds, whether two groups differ in their means.

    first, second: one value a seed.

    If both groups come from one distribution, P(p <= a) <= a for every a. The interval holds the
    shifts of the first group that the test does not reject at 5 %. Raises ValueError for an empty
    group, or for more than 200,000 relabelings.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if not np.isfinite([*a, *b]).all():
        raise ValueError("NaN or infinity among the values of two groups")
    if not len(a) or not len(b):
        raise ValueError("a group without a network: there is nothing to compare")
    total = comb(len(a) + len(b), len(a))
    if total > MOST_RELABELINGS:
        raise ValueError(
            f"{len(a)} and {len(b)} networks have {total:,} relabelings, and at most "
            f"{MOST_RELABELINGS:,} are tried: compare fewer networks"
        )
    chosen = np.array(list(combinations(range(len(a) + len(b)), len(a))))  # (relabelings, n)
    smallest = (2 if len(a) == len(b) else 1) / total  # swapping groups of one size is as extreme
    interval = None
    if smallest <= LEVEL:
        reach = 2 * float(np.ptp(np.concatenate([a, b]))) + 1e-9
        interval = accepted_end(a, b, chosen, -reach), accepted_end(a, b, chosen, reach)
    return PermutationTest(float(b.mean() - a.mean()), p_value(a, b, chosen), smallest, interval)


def p_value(a: np.ndarray, b: np.ndarray, chosen: np.ndarray) -> float:
    """Return the share of relabelings whose means are as far apart as those of a and b.

    chosen: (relabelings, n), the members of each relabeling's first group.
    """
    values = np.concatenate([a, b])
    sums = values[chosen].sum(1)  # (relabelings, n) -> (relabelings,)
    differences = np.abs((values.sum() - sums) / len(b) - sums / len(a))
    observed = abs(b.mean() - a.mean())
    rounding = 1e-12 * np.abs(values).max(initial=0)
    return float((differences >= observed - rounding).mean())


def accepted_end(a: np.ndarray, b: np.ndarray, chosen: np.ndarray, reach: float) -> float:
    """Return the farthest shift, towards observed + reach, that the test does not reject."""
    observed = float(b.mean() - a.mean())
    inside, outside = observed, observed + reach
    for _ in range(60):
        middle = (inside + outside) / 2
        if p_value(a + middle, b, chosen) > LEVEL:
            inside = middle
        else:
            outside = middle
    return inside
