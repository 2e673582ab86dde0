"""The numbers of residual additions: streamed sums, and the frame with one row an addition.

The ratio std(branch) / std(shortcut) says how much an addition changes the signal. No column says
how important a layer is: angles and cosines are a poor proxy for that (Hinostroza 2026); a lesion
(`analysis.additions.lesion`) measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pandas as pd
import torch
from torch import Tensor

GROUPS, GROUP = 20, 32  # image i belongs to group (i // 32) % 20 of the jackknife
RUN = 2048  # values, at most, that are added up in float32
FAR = 16.0  # mean² / variance above which squares in float32 are too coarse; then float64 is used
ROUNDING = 1e-14  # of a mean square: a smaller variance is that of float32's rounding
TINY = 1e-30  # mean square below which float32 rounds squares to nothing
COLUMNS = (
    *("network", "kind", "depth", "addition", "name", "branch", "branch_kind", "shortcut"),
    *("stage", "shape", "weights", "images", "count", "branch_std", "shortcut_std", "after_std"),
    *("ratio", "correlation", "std_error"),
)
POSITIONS = ("norm_ratio", "growth", "cosine", "block_influence", "angle")
INTEGERS = ("depth", "addition", "stage", "weights", "images", "count")


def group_zeros(columns: int) -> Tensor:
    return torch.zeros(GROUPS, columns, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class AdditionMoments:
    """What was added up of one addition, in float64.

    sums: (20, 6), by group of images: count, Σs, Σb, Σs², Σb², Σsb of shortcut s and branch b.
    angles: (8,), over positions: Σ|b|, Σ|s|, Σ|s+b|, Σcos(s, b) and its count, Σcos(s, s+b),
        Σarccos of that, and their count; zeros if they were not asked for.
    """

    sums: Tensor = field(default_factory=lambda: group_zeros(6))
    angles: Tensor = field(default_factory=lambda: group_zeros(8)[0])
    grouped: bool = True  # False if images cannot be told apart in the tensor

    def merge(self, other: AdditionMoments) -> AdditionMoments:
        """Return the moments of both sets of images together."""
        grouped = self.grouped and other.grouped
        return AdditionMoments(self.sums + other.sums, self.angles + other.angles, grouped)

    @property
    def std_error(self) -> float:
        """Return the sampling error of the ratio over images, by the delete-a-group jackknife.

        It is NaN for fewer than two groups, of 32 images each.
        """
        full = self.sums[self.sums[:, 0] > 0]
        if len(full) < 2 or not self.grouped:
            return math.nan
        ratios = [describe(full.sum(0) - part)["ratio"] for part in full]
        mean = sum(ratios) / len(ratios)
        total = sum((ratio - mean) ** 2 for ratio in ratios)
        return math.sqrt((len(ratios) - 1) / len(ratios) * total)


@dataclass(frozen=True)
class Addition:
    """One residual addition of a network.

    name: the module that adds. branch: the module whose output is added.
    shape: of one image's stream. weights: matrices, convolutions and norms on the branch.
    channels: the dimension of the channels, 1 or -1. swapped: the second operand is the stream.
    """

    name: str
    branch: str
    branch_kind: str
    shortcut: str
    shape: tuple[int, ...]
    weights: int
    channels: int
    swapped: bool
    moments: AdditionMoments = field(default_factory=AdditionMoments)

    def merge(self, other: Addition) -> Addition:
        """Return both together. Raises ValueError if they are not the same addition."""
        if (self.name, self.branch) != (other.name, other.branch):
            raise ValueError(f"{self.name} and {other.name} are two additions: cannot merge them")
        return replace(self, moments=self.moments.merge(other.moments))


def moments_of(
    stream: Tensor,
    branch: Tensor,
    images: int,
    first: int,
    mask: Tensor | None = None,
    channels: int | None = None,
) -> AdditionMoments:
    """Reduce the two operands of an addition, of one shape, to their moments.

    images: how many there are in the batch. first: the running index of its first image.
    mask: (N, T) bool, the positions that count in tensors (N, T, C).
    channels: the dimension over which vectors have norms and angles; None leaves these out.
    """
    if mask is not None:
        mask = mask.to(stream.device, torch.bool)
        if mask.shape != stream.shape[: mask.dim()]:
            raise ValueError(f"mask {tuple(mask.shape)} does not fit {tuple(stream.shape)}")
        image, grouped = mask.nonzero()[:, 0], True
        stream, branch = stream[mask], branch[mask]  # (N, T, C) -> (positions, C)
        channels = channels and -1
    else:
        if stream.dim() == 3 and stream.shape[1] == images != len(stream):
            stream, branch = stream.transpose(0, 1), branch.transpose(0, 1)  # (T, N, C) first
        image, grouped = image_of(stream, images)
    if not stream.numel():
        return AdditionMoments()
    sums = sums_of(stream, branch).to("cpu")  # (images or positions, 6)
    group = (image.to("cpu") + first) // GROUP % GROUPS
    angles = angles_of(stream, branch, channels) if channels is not None else group_zeros(8)[0]
    return AdditionMoments(group_zeros(6).index_add_(0, group, sums), angles, grouped)


def image_of(x: Tensor, images: int) -> tuple[Tensor, bool]:
    """Return the image of every row of x (all 0 if it cannot be known), and whether it is known."""
    if images and len(x) % images == 0:
        return torch.arange(images).repeat_interleave(len(x) // images), True
    return torch.zeros(len(x), dtype=torch.long), False


@lru_cache
def run_length(values: int) -> int:
    """Return the largest divisor of a number of values up to RUN."""
    return next(size for size in range(min(RUN, values), 0, -1) if values % size == 0)


def sums_of(stream: Tensor, branch: Tensor) -> Tensor:
    """Return count, Σs, Σb, Σs², Σb², Σsb of each row: (N, ...) twice -> (N, 6), float64."""
    if stream.is_contiguous(memory_format=torch.channels_last) and stream.dim() == 4:
        stream, branch = stream.permute(0, 2, 3, 1), branch.permute(0, 2, 3, 1)
    values = stream[0].numel()
    run = run_length(values)
    s, b = (wide(x).reshape(len(x), -1, run) for x in (stream, branch))  # (N, runs, values)
    squares = [torch.linalg.vector_norm(x, dim=-1).double().square() for x in (s, b)]
    parts = s.sum(-1), b.sum(-1), *squares, torch.linalg.vecdot(s, b)
    sums = torch.stack([part.double().sum(-1) for part in parts], 1)  # (N, 5)
    if s.dtype == torch.float32 and is_coarse(sums.sum(0), stream.numel()):
        return sums_of(stream.double(), branch.double())
    return torch.cat([torch.full_like(sums[:, :1], values), sums], 1)


def wide(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def is_coarse(sums: Tensor, count: int) -> bool:
    """Whether float32 lost a variance beside its squared mean, or does not hold the squares."""
    mean, squares = sums[:2] / count, sums[2:4] / count
    held = (mean.square() <= FAR * (squares - mean.square())) & (squares > TINY)
    return not bool((held & squares.isfinite()).all())


def angles_of(stream: Tensor, branch: Tensor, channels: int) -> Tensor:
    """Return the sums over positions of `AdditionMoments.angles`.

    Cosines leave out the positions at which a vector is zero: it has no direction.
    """
    s, b = wide(stream), wide(branch)
    norms = [torch.linalg.vector_norm(x, dim=channels).double() for x in (b, s, s + b)]
    branches, before, after = norms
    product = torch.linalg.vecdot(s, b, dim=channels).double()
    sums = [norm.sum() for norm in norms]
    live = (before * branches) > 0
    cosine = (product[live] / (before * branches)[live]).clamp(-1, 1)
    sums += [cosine.sum(), live.double().sum()]
    live = (before * after) > 0
    along = ((before.square() + product)[live] / (before * after)[live]).clamp(-1, 1)
    sums += [along.sum(), along.arccos().sum(), live.double().sum()]
    return torch.stack(sums).to("cpu")


def describe(sums: Tensor) -> dict[str, float]:
    """Return the stds of branch, shortcut and sum, their ratio and correlation, from (6,) sums.

    ratio: NaN if the shortcut is constant. correlation: NaN if either is.
    """
    count, *rest = sums.tolist()
    s, b, ss, bb, sb = (x / count for x in rest)
    stream, branch = (
        x if x > ROUNDING * x2 else 0 for x, x2 in ((ss - s * s, ss), (bb - b * b, bb))
    )
    both = sb - s * b
    return {
        "branch_std": math.sqrt(branch),
        "shortcut_std": math.sqrt(stream),
        "after_std": math.sqrt(max(stream + branch + 2 * both, 0)),
        "ratio": math.sqrt(branch / stream) if stream else math.nan,
        "correlation": both / math.sqrt(stream * branch) if stream * branch else math.nan,
    }


def describe_positions(angles: Tensor) -> dict[str, float]:
    """Return the quantities of POSITIONS, each a mean over positions (pixels, tokens).

    norm_ratio: mean |branch| over mean |stream|. A mean of ratios diverges at dead positions.
    growth: mean |stream after| over mean |stream before| (Heimersheim & Turner 2023).
    cosine: of branch and stream (Csordás et al. 2025).
    block_influence: 1 minus the cosine of the stream before and after (Men et al. 2024, ShortGPT).
    angle: between the stream before and after, over π (Gromov et al. 2024).
    """
    branch, stream, after, cosine, both, along, angle, moved = angles.tolist()
    if not stream:
        return dict.fromkeys(POSITIONS, math.nan)
    values = (
        branch / stream,
        after / stream,
        cosine / both if both else math.nan,
        1 - along / moved if moved else math.nan,
        angle / moved / math.pi if moved else math.nan,
    )
    return dict(zip(POSITIONS, values, strict=True))


def additions_frame(
    additions: Sequence[Addition],
    *,
    network: str,
    kind: str = "other",
    depth: int | None = None,
    images: int,
) -> pd.DataFrame:
    """Return the frame of additions, one row each, in forward order.

    stage: 1-based; a new one begins whenever the shape of the stream changes.
    count: values of shortcut and of branch. The columns of POSITIONS follow if they were measured.
    Raises ValueError for NaN or infinity in an operand, and if no values went through.
    """
    rows: list[dict[str, object]] = []
    stage, shape = 0, None
    for position, addition in enumerate(additions, start=1):
        stage, shape = stage + (addition.shape != shape), addition.shape
        total = addition.moments.sums.sum(0)
        if not total[0]:
            raise ValueError(f"no values went through {addition.name}: there is nothing to measure")
        rows.append(
            {"addition": position, "name": addition.name, "branch": addition.branch}
            | {"branch_kind": addition.branch_kind, "shortcut": addition.shortcut, "stage": stage}
            | {"shape": "x".join(map(str, shape)), "weights": addition.weights}
            | {"count": int(total[0])}
            | describe(total)
            | {"std_error": addition.moments.std_error}
            | describe_positions(addition.moments.angles)
        )
    positions = any(bool(addition.moments.angles.any()) for addition in additions)
    columns = [*COLUMNS, *(POSITIONS if positions else ())]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    frame = frame.assign(network=network, kind=kind, depth=depth, images=images)
    return frame.astype(dict.fromkeys(INTEGERS, "Int64"))
