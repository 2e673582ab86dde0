"""What measuring a network has given: merged over processes, and as a frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from analysis.additions.moments import Addition
from analysis.additions.moments import describe as describe_sums
from analysis.measuring.eval_mode import is_wrapper
from analysis.measuring.frame import make_frame
from analysis.measuring.pairs import Layer
from models.resnet import config_of


@dataclass(frozen=True)
class Measurement:
    """What one or several meters have measured of a network, on different images.

    kind, depth: of the paper's networks; `other` and None for any other.
    layers: in forward order, with their moments.
    additions: likewise; None if they were not measured.
    unpaired, unseen: convolutions that are in no layer, and why, by name.
    images, labelled, correct: how many there were, had labels, and were classified as these say.
    method: `folded`, or `hooks: ` and why.
    """

    kind: str
    depth: int | None
    layers: list[Layer]
    additions: list[Addition] | None
    unpaired: dict[str, str]
    unseen: dict[str, str]
    images: int
    labelled: int
    correct: int
    method: str

    @property
    def accuracy(self) -> float | None:
        """Share of the labels that were hit; None without labels."""
        return self.correct / self.labelled if self.labelled else None

    def std_without_groups(self) -> np.ndarray:
        """Return the std of every layer without one group of images: (20, layers).

        NaN on too few images; see `Moments.has_groups`.
        """
        return np.stack([x.moments.std_without_groups().numpy() for x in self.layers], axis=1)

    def ratios(self) -> np.ndarray | None:
        """Return the ratio of branch to shortcut of every addition; None if there is none."""
        if not self.additions:
            return None
        return np.array([describe_sums(x.moments.sums.sum(0))["ratio"] for x in self.additions])

    def ratios_without_groups(self) -> np.ndarray | None:
        """Return the ratios without one group of images: (20, additions), as `std_without_groups`."""
        if not self.additions or np.isnan(self.std_without_groups()).any():
            return None
        sums = [x.moments.sums for x in self.additions]  # (20, 6) each
        rows = [[describe_sums(x.sum(0) - part)["ratio"] for part in x] for x in sums]
        return np.array(rows).T

    @property
    def std_error(self) -> np.ndarray:
        """Sampling error of every layer's std; NaN on too few images."""
        return np.array([layer.moments.std_error for layer in self.layers])

    @property
    def dominated(self) -> list[bool | None]:
        """Whether one group of images makes more than half of a layer's variance; None as above."""
        return [layer.moments.dominated for layer in self.layers]

    def merge(self, other: Measurement) -> Measurement:
        """Return both together. ValueError if they are not of the same layers."""
        if not (self.images and other.images):
            return self if self.images else other
        ours, theirs = ([(x.name, x.norm) for x in m.layers] for m in (self, other))
        if ours != theirs:
            raise ValueError("two parts of the images ran through different layers of the network")
        layers = [
            replace(a, moments=a.moments.merge(b.moments))
            for a, b in zip(self.layers, other.layers, strict=True)
        ]
        additions = self.additions and [
            a.merge(b) for a, b in zip(self.additions, other.additions or [], strict=True)
        ]
        return replace(
            self,
            layers=layers,
            additions=additions,
            unpaired={**other.unpaired, **self.unpaired},
            unseen={name: why for name, why in self.unseen.items() if name in other.unseen},
            images=self.images + other.images,
            labelled=self.labelled + other.labelled,
            correct=self.correct + other.correct,
            method=other.method if self.method == "folded" else self.method,
        )

    def to_frame(self, network: str) -> pd.DataFrame:
        """Return the frame. ValueError if there are no images, or no values in a layer."""
        if self.images == 0:
            raise ValueError("no images: there is nothing to measure")
        if empty := [layer.name for layer in self.layers if layer.moments.count == 0]:
            raise ValueError(f"no image gave a response of {empty[0]}: use other images")
        rows: list[dict[str, object]] = []
        stage, size = 0, None
        for position, layer in enumerate(self.layers, start=1):
            stage += (layer.height, layer.width) != size
            size = layer.height, layer.width
            rows.append({"layer": position, "stage": stage, **describe(layer)})
        known: dict[str, Any] = {"kind": self.kind, "depth": self.depth, "images": self.images}
        return make_frame(rows, network=network, source="hooks", **known)


def describe(layer: Layer) -> dict[str, object]:
    """Return the columns of a frame that belong to one layer alone."""
    moments = layer.moments
    channels = moments.means.shape[1]
    return {
        "name": layer.name,
        "norm": layer.norm,
        "channels": channels,
        "height": layer.height,
        "width": layer.width,
        "count": moments.count * channels,
        "mean": moments.mean.mean().item(),
        "std": moments.std,
        "std_error": moments.std_error,
        "within": moments.within,
        "between": moments.between,
        "dominated": moments.dominated,
    }


def unwrapped(model: nn.Module) -> nn.Module:
    while is_wrapper(model):
        model = next(model.children())
    return model


def network_in(model: nn.Module) -> tuple[str, int | None]:
    """Return kind and depth of one of the paper's networks, or `other` and None."""
    config = config_of(unwrapped(model))
    return (config.kind, config.depth) if config else ("other", None)


def name_of(model: nn.Module) -> str:
    """Return a name such as `resnet-56`, or the class of a network of another kind."""
    config = config_of(unwrapped(model))
    return config.name if config else type(unwrapped(model)).__name__
