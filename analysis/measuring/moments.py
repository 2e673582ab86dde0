"""Count, mean and M2 of every channel: streaming, exact to rounding, mergeable.

    >>> import torch
    >>> from analysis.measuring.moments import Moments
    >>> moments = Moments.of(torch.tensor([[[[0.0, 2.0]], [[5.0, 7.0]]]]))  # one image, two channels, 1x2 pixels
    >>> round(moments.std, 4), moments.within, moments.between
    (2.6926, 1.0, 2.5)

M2 is the sum of squared differences from the mean; batches are merged by the formula of Chan, Golub
& LeVeque (1983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 16.0  # mean^2 / variance above which a difference of squares in float32 is not good enough
HALF = (torch.bfloat16, torch.float16)
TINY = 1e-30  # variance below which float32 rounds squares to what is left of them, or to nothing
RUN, SHORT_RUN = (
    4096,
    512,
)  # values that are added up in float32, one after the other; of maps larger than PLANE
ROW = 1024  # values side by side in which a response in channels_last is read: of 512 to 16384 the fastest
PLANE = 1024  # values of a map; where a larger one is flat, longer runs round alike: in all by 1e-5 to 1e-3


def sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of every channel of x (N, C, H, W) with at least one value: (C,) and
    (C,), float64.

    Short runs of values are added up in the precision of x (float32 at least), and these in
    float64. Squares are good to 1e-7 of themselves, so a variance that is much smaller than the
    squared mean is not to be had from them.
    """
    if (
        x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    ):
        return sums_over_rows(x)
    if x.dtype in HALF:
        x = x.float()
    total = x.sum((2, 3))  # (N, C)
    large = x.shape[2] * x.shape[3] > PLANE
    squares = (
        torch.linalg.vector_norm(x, dim=3 if large else (2, 3)).double().square()
    )  # (N, C, H) or (N, C)
    return total.sum(0, dtype=torch.float64), squares.sum((0, 2) if large else 0)


def sums_over_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for channels_last on a CPU, where sums and norms over H and W take two to five times
    as long.

    BN's own statistics are the fastest there, but add up one value after the other, in float32. So
    several pixels are laid side by side as channels, and only so many rows are taken at once, which
    makes these runs short.
    """
    _, channels, height, width = x.shape
    pixels = math.gcd(height * width, max(1, ROW // channels))  # side by side
    rows = x.permute(0, 2, 3, 1).reshape(
        -1, pixels * channels
    )  # (N, H, W, C) -> (N * H * W / p, p * C)
    total, squares = torch.zeros(2, channels, dtype=torch.float64, device=x.device)
    running = None
    if x.dtype in HALF:  # in float32, and so are sums and results
        running = torch.zeros(pixels * channels, dtype=torch.float32, device=x.device)
    for part in torch.split(rows, RUN if height * width <= PLANE else SHORT_RUN):
        image = part[None, :, None].permute(
            0, 3, 1, 2
        )  # (n, p * C) -> (1, p * C, n, 1), in channels_last
        mean, variance = torch.batch_norm_update_stats(image, running, running, 0.0)
        mean = mean.double().view(pixels, channels)
        total += mean.sum(0) * len(part)
        squares += torch.addcmul(variance.double().view(pixels, channels), mean, mean).sum(0) * len(
            part
        )
    return total, squares


@dataclass(frozen=True)
class Moments:
    """Moments of the values seen so far.

    count: values a channel. mean, m2: (C,) float64, in units of the response and of its square.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of one batch of responses (N, C, H, W) with at least one value.

        In float32 the std is within a relative 1e-6 of a float64 two-pass: channels whose mean is
        far from zero, or whose squares float32 does not hold, are done again in float64.
        """
        if x.numel() == 0:
            raise ValueError(f"no values in a response of shape {tuple(x.shape)}")
        count = x.numel() // x.shape[1]
        total, squares = sums(x)
        mean = total / count
        m2 = squares - count * mean.square()
        unsure = ~(
            ((mean.square() / FAR).clamp(min=TINY) * count <= m2) & (m2 < torch.inf)
        )  # NaN, too
        if unsure.any():
            variance, mean[unsure] = torch.var_mean(
                x[:, unsure].double(), dim=(0, 2, 3), correction=0
            )
            m2[unsure] = variance * count
        return cls(count, mean, m2)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together, of which one may be empty. ValueError where
        channels differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"cannot merge moments of {len(self.mean)} and {len(other.mean)} channels"
            )
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count / count * other.count)
        return Moments(count, mean, m2)

    def to(self, device: str) -> Moments:
        """The same on another device."""
        return Moments(self.count, self.mean.to(device), self.m2.to(device))

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
        """Population std over all values: std^2 = within^2 + between^2, since all channels have as
        many values.
        """
        return float((self.within**2 + self.between**2) ** 0.5)
