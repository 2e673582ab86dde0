"""The paper's curves and claims about Fig. 7, and how far a measurement is from them.

    >>> from analysis.paper import paper_curves
    >>> paper_curves().groupby("network")["std"].mean().round(2).to_dict()
    {'plain-20': 1.82, 'plain-56': 1.52, 'resnet-110': 0.99, 'resnet-20': 1.62, 'resnet-56': 1.13}

The paper is He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and
Fig. 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import jackknife_error

ENOUGH = 200  # images: with fewer there is no verdict
CLAIMS = (
    "residual responses are generally smaller than their plain counterparts'",
    "deeper ResNets have smaller responses",
    "an individual layer of a ResNet modifies the signal less when there are more",
)
MISSING = (
    "no residual and plain network of one depth",
    "no two residual networks of different depth",
    "no two residual networks of different depth whose additions were measured on images",
)
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be judged here"
COLUMNS = (
    *("claim", "statement", "networks", "measure", "value", "expected", "verdict", "sentence"),
    "error",
)


def paper_curves() -> pd.DataFrame:
    """Return the paper's five curves: network, kind, depth, layer (1-based), std."""
    with files("analysis").joinpath("paper_fig7.csv").open() as file:
        frame = pd.read_csv(file, comment="#")
    parts = frame["network"].str.split("-", expand=True)
    frame.insert(1, "kind", parts[0].replace("resnet", "residual"))
    frame.insert(2, "depth", parts[1].astype("Int64"))
    return frame


def against_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """Compare each network of a frame with the paper's curve of its kind and depth.

    Returns one row a network, in the order of the frame: network, r (Pearson's correlation over
    layers) and ratio (mean std over the paper's mean std); NaN if the paper has no such network.
    """
    paper = {
        key: curve["std"].to_numpy() for key, curve in paper_curves().groupby(["kind", "depth"])
    }
    rows = []
    for network, layers in frame.groupby("network", sort=False):
        std = layers.sort_values("layer")["std"].to_numpy()
        curve = paper.get((layers["kind"].iloc[0], layers["depth"].iloc[0]))
        r = ratio = np.nan
        if curve is not None and len(curve) == len(std):
            r = np.corrcoef(std, curve)[0, 1] if std.std() > 0 else np.nan
            ratio = std.mean() / curve.mean()
        rows.append({"network": network, "r": r, "ratio": ratio})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Subject:
    """What the claims need to know of one network.

    widths: the numbers of channels that its layers have; they tell CIFAR-10's and ImageNet's apart.
    std: of each layer. ratio: of each residual addition, branch over shortcut; None if unknown.
    images: how many the numbers rest on; None for a closed form, which has no sampling error.
    iterations: training length, if known.
    std_without, ratio_without: the same with one group of images left out, (groups, …), or None.
    """

    label: str
    kind: str
    depth: int
    widths: frozenset[int]
    std: np.ndarray
    ratio: np.ndarray | None = None
    images: int | None = None
    iterations: int | None = None
    std_without: np.ndarray | None = None
    ratio_without: np.ndarray | None = None


@dataclass(frozen=True)
class Number:
    """What one claim says of two networks, as a number with its sampling error, and in words."""

    networks: tuple[str, str]
    measure: str
    value: float
    expected: str
    sentence: str
    error: float = np.nan

    @property
    def as_claimed(self) -> bool:
        """Whether the value is as the paper says."""
        return self.value < 0 if self.expected == "< 0" else self.value > 0.5

    @property
    def is_certain(self) -> bool:
        """Whether the value differs from the bound by more than twice its sampling error."""
        bound = 0 if self.expected == "< 0" else 0.5
        return bool(np.isnan(self.error)) or abs(self.value - bound) > 2 * self.error


def judge(subjects: Sequence[Subject]) -> pd.DataFrame:
    """Judge the paper's three claims about Fig. 7.

    Returns one row a number, with the columns of `COLUMNS`. The verdict is `holds` if the value is
    as the paper says, else `does not hold`. It is `cannot be judged here` if the two networks were
    trained for different numbers of iterations, if the numbers rest on fewer than 200 images, if
    the value is within twice its sampling error of the bound, or, without a value, if no two
    networks are ones that the claim is about. Layers are compared at the same position, as in
    Fig. 7. A network for CIFAR-10 is never compared with one for ImageNet.
    """
    rows: list[dict[str, Any]] = []
    by_label = {subject.label: subject for subject in subjects}
    for number, (statement, numbers_of, missing) in enumerate(
        zip(CLAIMS, (below_plain, order_of_means, smaller_steps), MISSING, strict=True), start=1
    ):
        claim = {"claim": number, "statement": statement}
        found = list(numbers_of(subjects))
        for item in found:
            why_open = obstacle(item, [by_label[label] for label in item.networks])
            verdict = OPEN if why_open else HOLDS if item.as_claimed else FAILS
            words = {"networks": ", ".join(item.networks), "sentence": item.sentence + why_open}
            rows.append(claim | asdict(item) | words | {"verdict": verdict})
        if not found:
            empty = dict.fromkeys(("networks", "measure", "expected"), "")
            rows.append(claim | empty | {"verdict": OPEN, "sentence": missing})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def verdict_of(numbers: pd.DataFrame) -> str:
    """Return what the numbers of one claim say together; numbers without a verdict do not count."""
    verdicts = set(numbers["verdict"])
    judged = verdicts - {OPEN} or verdicts
    return judged.pop() if len(judged) == 1 else "holds in part"


def obstacle(number: Number, pair: Sequence[Subject]) -> str:
    """Return why a number gets no verdict, as the end of its sentence; empty if it gets one."""
    lengths = [subject.iterations for subject in pair]
    if None not in lengths and len(set(lengths)) > 1:
        return f"; after {' and '.join(f'{length:,}' for length in lengths)} iterations"
    counts = [subject.images for subject in pair if subject.images is not None]
    if counts and min(counts) < ENOUGH:
        images = "1 image" if min(counts) == 1 else f"{min(counts)} images"
        return f"; on {images}, fewer than {ENOUGH}"
    return "" if number.is_certain else f"; within twice its sampling error ({number.error:.3f})"


def with_error(
    ours: Subject, theirs: Subject, of: str, value: Callable[[np.ndarray, np.ndarray], float]
) -> tuple[float, float]:
    """Return a value of two networks, and its sampling error by the jackknife over images.

    of: `std` or `ratio`. The error is NaN if it is not known.
    """
    whole = value(getattr(ours, of), getattr(theirs, of))
    parts = [getattr(subject, f"{of}_without") for subject in (ours, theirs)]
    if parts[0] is None or parts[1] is None or len(parts[0]) != len(parts[1]):
        return whole, np.nan
    return whole, jackknife_error([value(*pair) for pair in zip(*parts, strict=True)])


def below_plain(subjects: Sequence[Subject]) -> Iterator[Number]:
    """Compare every residual network with every plain one of its depth."""
    for ours, plain in product(of_kind(subjects, "residual"), of_kind(subjects, "plain")):
        if ours.depth != plain.depth or ours.widths != plain.widths:
            continue
        yield difference_of_means(ours, plain)
        if len(ours.std) == len(plain.std):
            share, error = with_error(ours, plain, "std", lambda a, b: float((a < b).mean()))
            below, layers = round(share * len(ours.std)), len(ours.std)
            sentence = f"{ours.label} is below {plain.label} in {below} of {layers} layers"
            names = ours.label, plain.label
            yield Number(names, "share of layers below", share, "> 0.5", sentence, error)


def order_of_means(subjects: Sequence[Subject]) -> Iterator[Number]:
    """Compare every residual network with every shallower one."""
    for shallow, deep in by_depth(subjects):
        yield difference_of_means(deep, shallow)


def smaller_steps(subjects: Sequence[Subject]) -> Iterator[Number]:
    """Compare the additions of every residual network with those of every shallower one."""
    for shallow, deep in by_depth(subjects):
        if deep.ratio is None or shallow.ratio is None:
            continue
        value, error = with_error(
            deep, shallow, "ratio", lambda a, b: float(np.nanmedian(a) - np.nanmedian(b))
        )
        ours, theirs = np.nanmedian(deep.ratio), np.nanmedian(shallow.ratio)
        yield Number(
            (deep.label, shallow.label),
            "difference of median ratios of branch to shortcut",
            value,
            "< 0",
            f"a block's branch has {ours:.3f} times the std of its shortcut in {deep.label}, "
            f"{theirs:.3f} times in {shallow.label} (medians over blocks)",
            error,
        )


def difference_of_means(ours: Subject, theirs: Subject) -> Number:
    """Return the difference of two networks' mean stds."""
    value, error = with_error(ours, theirs, "std", lambda a, b: float(a.mean() - b.mean()))
    means = ours.std.mean(), theirs.std.mean()
    percent = f"{abs(100 * value / means[1]):.1f} % {'less' if value < 0 else 'more'} than"
    sentence = (
        f"{ours.label} has a mean std of {means[0]:.3f}, {percent if value else 'as much as'} "
        f"{theirs.label} ({means[1]:.3f})"
    )
    names = ours.label, theirs.label
    return Number(names, "difference of mean std", value, "< 0", sentence, error)


def of_kind(subjects: Sequence[Subject], kind: str) -> list[Subject]:
    return [subject for subject in subjects if subject.kind == kind]


def by_depth(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Subject]]:
    """Yield all pairs of a shallower and a deeper residual network of one family."""
    residual = of_kind(subjects, "residual")
    for shallow, deep in product(residual, residual):
        if shallow.depth < deep.depth and shallow.widths == deep.widths:
            yield shallow, deep
