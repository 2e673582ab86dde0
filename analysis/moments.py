"""Count, mean and M2 of every channel: streaming, exact to rounding, mergeable.

    >>> import torch
    >>> from analysis.moments import Moments
    >>> moments = Moments.of(torch.tensor([[[[0.0, 2.0]], [[5.0, 7.0]]]]))  # one image, two channels, 1x2 pixels
    >>> round(moments.std, 4), moments.within, moments.between
    (2.6926, 1.0, 2.5)

M2 is the sum of squared differences from the mean; batches are merged by the formula of Chan, Golub & LeVeque (1983).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 16.0  # mean^2 / variance above which a difference of squares in float32 is not good enough


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

        Each image's channel is summed in the precision of x (float32 at least), and these sums in float64: in float32
        the std is within a relative 1e-6 of a float64 two-pass. Channels whose mean is far from zero are done again in
        float64.
        """
        if x.numel() == 0:
            raise ValueError(f"no values in a response of shape {tuple(x.shape)}")
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        count = x.numel() // x.shape[1]
        mean = x.mean((2, 3)).double().mean(0)  # (N, C, H, W) -> (N, C) -> (C,)
        norm = torch.linalg.vector_norm(x, dim=(2, 3)).double()  # (N, C)
        m2 = norm.square().sum(0) - count * mean.square()
        far = mean.square() * count > FAR * m2
        if far.any():
            variance, mean[far] = torch.var_mean(x[:, far].double(), dim=(0, 2, 3), correction=0)
            m2[far] = variance * count
        return cls(count, mean, m2)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together. ValueError where the channels differ."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge moments of {len(self.mean)} and {len(other.mean)} channels")
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count / count * other.count)
        return Moments(count, mean, m2)

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
        """Population std over all values: std^2 = within^2 + between^2, since all channels have as many values."""
        return float((self.within**2 + self.between**2) ** 0.5)
