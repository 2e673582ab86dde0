"""Count, mean and M2 of every channel and group of images: streaming, exact to rounding, mergeable.

    >>> import torch
    >>> from analysis.measuring.moments import Moments
    >>> moments = Moments.of(torch.tensor([[[[0.0, 2.0]], [[5.0, 7.0]]]]))  # 1 image, 2 channels
    >>> round(moments.std, 4), moments.within, moments.between
    (2.6926, 1.0, 2.5)

M2 is the sum of squared differences from the mean. Batches are merged by the formula of Chan, Golub
& LeVeque (1983). The groups serve the delete-a-group jackknife (Kott, 2001): blocks of 32 images
belong to 20 groups in turn, so an image's group follows from its position alone, and neither the
batch size nor the number of processes matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 32  # successive images of one group
GROUPS = 20
FAR = 16.0  # mean^2 / variance above which float32 squares are not precise enough
TINY = 1e-30  # variance below which float32 squares lose their digits or vanish
HALF = (torch.bfloat16, torch.float16)
ROW = 1024  # values that channels_last responses are read in: the fastest of 512 to 16384
RUN, SHORT_RUN = 4096, 512  # values that are added in float32; the short run is for maps > PLANE
PLANE = 1024  # values of a map; longer runs over a large flat map round alike, by 1e-5 to 1e-3


def blocks(first: int | None, images: int) -> list[tuple[int, int, int]]:
    """Return the group, start and end of every run of images in one group.

    first: position of the first image; None if it is not known, which makes it one group.

    >>> blocks(first=30, images=40)
    [(0, 0, 2), (1, 2, 34), (2, 34, 40)]
    """
    if first is None:
        return [(0, 0, images)]
    edges = [0, *range(BLOCK - first % BLOCK, images, BLOCK), images]
    return [((first + start) // BLOCK % GROUPS, start, end) for start, end in pairwise(edges)]


def sums(x: Tensor, first: int | None = 0) -> tuple[Tensor, Tensor]:
    """Return the sums and sums of squares of x by group and channel: twice (GROUPS, C), float64.

    Short runs of values are added in the precision of x (at least float32), and their sums in
    float64. The squares are exact to 1e-7, so a variance far below the squared mean is lost.

    x: responses (N, C, H, W) with at least one value. first: position of the first image.
    """
    if (
        x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    ):
        return sums_over_rows(x, first)
    if x.dtype in HALF:
        x = x.float()
    large = x.shape[2] * x.shape[3] > PLANE
    total = x.sum((2, 3)).double()  # (N, C)
    squares = torch.linalg.vector_norm(x, dim=3 if large else (2, 3)).double().square()
    if large:
        squares = squares.sum(2)  # (N, C, H) -> (N, C)
    group = [group for group, start, end in blocks(first, len(x)) for _ in range(start, end)]
    return add_by_group(group, total, squares)


def sums_over_rows(x: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
    """Return the same sums for channels_last on a CPU, two to five times as fast.

    BN's own statistics are the fastest reduction in this layout, but they add one value after
    the other in float32. Several pixels are therefore laid side by side as channels, and few
    rows are taken at a time, which keeps the runs short.
    """
    images, channels, height, width = x.shape
    pixels = math.gcd(height * width, max(1, ROW // channels))  # side by side
    rows = x.permute(0, 2, 3, 1).reshape(-1, pixels * channels)  # (N, H, W, C) -> (rows, p * C)
    per_image = height * width // pixels
    running = None
    if x.dtype in HALF:  # running statistics in float32 make the results float32
        running = torch.zeros(pixels * channels, dtype=torch.float32, device=x.device)
    groups, lengths, means, variances = [], [], [], []
    for group, start, end in blocks(first, images):
        run = RUN if height * width <= PLANE else SHORT_RUN
        for part in torch.split(rows[start * per_image : end * per_image], run):
            image = part[None, :, None].permute(0, 3, 1, 2)  # (n, p * C) -> (1, p * C, n, 1)
            mean, variance = torch.batch_norm_update_stats(image, running, running, 0.0)
            means.append(mean)
            variances.append(variance)
            lengths.append(len(part))
            groups.append(group)
    shape = len(lengths), pixels, channels
    mean, variance = (torch.stack(part).double().view(shape) for part in (means, variances))
    length = torch.tensor(lengths, dtype=torch.float64, device=x.device)[:, None]
    squares = torch.addcmul(variance, mean, mean).sum(1) * length  # (parts, p, C) -> (parts, C)
    return add_by_group(groups, mean.sum(1) * length, squares)


def add_by_group(groups: list[int], *rows: Tensor) -> tuple[Tensor, Tensor]:
    """Add the rows (n, C) of each of two tensors that belong to the same group: (GROUPS, C)."""
    index = torch.tensor(groups, device=rows[0].device)
    none = rows[0].new_zeros(GROUPS, rows[0].shape[1])
    total, squares = (none.index_add(0, index, part) for part in rows)
    return total, squares


@dataclass(frozen=True)
class Moments:
    """Moments of the values seen so far, by group of images and channel.

    counts: number of values, (GROUPS, C). means, m2s: (GROUPS, C), in units of the response and of
    its square. All are float64. Without an `s` they are those of all groups together.
    """

    counts: Tensor
    means: Tensor
    m2s: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of no values."""
        zeros = torch.zeros(GROUPS, channels, dtype=torch.float64, device=device)
        return cls(zeros, zeros, zeros)

    @classmethod
    def rough(cls, x: Tensor, first: int | None = 0) -> Moments:
        """Return the moments of one batch of responses without checking their precision.

        x: responses (N, C, H, W) with at least one value. first: position of the first image;
        None if the rows of x are not the images.
        """
        images, _, height, width = x.shape
        total, squares = sums(x, first)
        values = [0.0] * GROUPS
        for group, start, end in blocks(first, images):
            values[group] += (end - start) * height * width
        counts = torch.tensor(values, dtype=torch.float64, device=x.device)[:, None]
        mean = total / counts.clamp(min=1)
        return cls(counts.expand_as(mean), mean, squares - counts * mean.square())

    @classmethod
    def of(cls, x: Tensor, first: int | None = 0) -> Moments:
        """Return the moments of one batch of responses; arguments as for `rough`.

        In float32 the std is within 1e-6 of a float64 two-pass: channels whose mean is far from
        zero, or whose squares float32 does not hold, are computed again in float64.
        """
        if x.numel() == 0:
            raise ValueError(f"no values in a response of shape {tuple(x.shape)}")
        moments = cls.rough(x, first)
        counts, means, m2s = moments.counts, moments.means, moments.m2s
        least = (means.square() / FAR).clamp(min=TINY) * counts
        unsure = (~((least <= m2s) & (m2s < torch.inf)) & (counts > 0)).any(0)  # also if NaN
        if unsure.any():
            exact = cls.exact(x[:, unsure], first)
            means[:, unsure], m2s[:, unsure] = exact.means, exact.m2s
        return moments

    @classmethod
    def exact(cls, x: Tensor, first: int | None = 0) -> Moments:
        """Return the moments of one batch of responses, computed in float64."""
        moments = cls.empty(x.shape[1], x.device)
        for group, start, end in blocks(first, len(x)):
            counts, means, m2s = (torch.zeros_like(moments.counts) for _ in range(3))
            part = x[start:end].double()
            counts[group] = part.numel() // part.shape[1]
            variance, means[group] = torch.var_mean(part, dim=(0, 2, 3), correction=0)
            m2s[group] = variance * counts[group]
            moments = moments.merge(cls(counts, means, m2s))
        return moments

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of values; either may be empty."""
        if self.means.shape != other.means.shape:
            raise ValueError(
                f"cannot merge moments of {self.means.shape[1]} and {other.means.shape[1]} channels"
            )
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        delta = other.means - self.means
        m2s = self.m2s + other.m2s + delta.square() * (self.counts * share)
        return Moments(counts, self.means + delta * share, m2s)

    @staticmethod
    def cat(parts: Sequence[Moments]) -> Moments:
        """Return the moments of the channels of several layers side by side."""
        return Moments(
            torch.cat([part.counts for part in parts], 1),
            torch.cat([part.means for part in parts], 1),
            torch.cat([part.m2s for part in parts], 1),
        )

    def split(self, channels: list[int]) -> list[Moments]:
        """Return the moments of each of several layers, the reverse of `cat`."""
        parts = (torch.split(part, channels, 1) for part in (self.counts, self.means, self.m2s))
        return [Moments(*part) for part in zip(*parts, strict=True)]

    def to(self, device: str) -> Moments:
        """Return the same moments on another device."""
        return Moments(*(part.to(device) for part in (self.counts, self.means, self.m2s)))

    def pooled(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return counts, means and M2 of some groups together, (K, C) each.

        weights: (K, GROUPS), 1 for every group that is in and 0 for the others; default: all.
        """
        if weights is None:
            weights = self.counts.new_ones(1, GROUPS)
        counts = weights @ self.counts
        mean = weights @ (self.counts * self.means) / counts.clamp(min=1)
        off = self.means - mean[:, None]  # (K, GROUPS, C)
        spread = (weights[:, :, None] * self.counts * off.square()).sum(1)
        return counts, mean, weights @ self.m2s + spread

    @property
    def count(self) -> int:
        """Number of values of one channel."""
        return int(self.counts[:, 0].sum().item())

    @property
    def mean(self) -> Tensor:
        """Mean of every channel, (C,)."""
        return self.pooled()[1][0]

    @property
    def m2(self) -> Tensor:
        """M2 of every channel, (C,)."""
        return self.pooled()[2][0]

    @property
    def within(self) -> float:
        """Root of the mean over channels of the channel's variance."""
        return (self.m2 / self.count).mean().sqrt().item()

    @property
    def between(self) -> float:
        """Population std over channels of the channel's mean."""
        return self.mean.std(correction=0).item()

    @property
    def std(self) -> float:
        """Population std of all values: std^2 = within^2 + between^2."""
        return math.hypot(self.within, self.between)

    def std_without_groups(self) -> Tensor:
        """Return the std of all values but those of one group: (GROUPS,); NaN without groups."""
        if not self.has_groups:
            return torch.full((GROUPS,), torch.nan, dtype=torch.float64)
        every = torch.ones(GROUPS, GROUPS, dtype=torch.float64, device=self.counts.device)
        counts, mean, m2 = self.pooled(every.fill_diagonal_(0))
        return ((m2 / counts).mean(1) + mean.var(1, correction=0)).sqrt()

    @property
    def has_groups(self) -> bool:
        """Whether all groups have values, and none has more than twice as many as another.

        Images that run through the network one by one reach this at 640 images.
        """
        counts = self.counts[:, 0]
        return bool(counts.min() > 0 and counts.max() <= 2 * counts.min())

    @property
    def std_error(self) -> float:
        """Sampling error of the std over images, by the jackknife; NaN without groups."""
        return float(jackknife(self.std_without_groups()))

    @property
    def dominated(self) -> bool | None:
        """Whether one group makes more than half of the variance; None without groups."""
        if not self.has_groups:
            return None
        off = (self.means - self.mean.mean()).square()
        share = (self.m2s + self.counts * off).sum(1)  # (GROUPS,) of the total M2
        return bool(share.max() > share.sum() / 2)


def jackknife(without: Tensor) -> Tensor:
    """Return the standard error of a quantity by the delete-a-group jackknife.

    without: the quantity without one group, for every group: (GROUPS, ...). The groups should be
    of similar size.
    """
    return ((GROUPS - 1) * without.var(0, correction=0)).sqrt()
