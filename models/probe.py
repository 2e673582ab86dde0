"""The probe set: synthetic images of 32x32 pixels that stand for CIFAR-10's test set where it cannot be had.

    from models import probe
    data = probe.load()
    data.describe()  # how many images, and how far from the test set's the responses to them are

`python -m analysis.probe` made them, by optimisation, so that every channel of every BN layer of some networks has the
mean and variance on them that it has on the test set (the idea of DeepInversion, Yin et al. 2020, arXiv 1912.08795).
They hold as a whole: any part of them has other statistics.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.cifar10 import Images
from models.files import sha256

SHIPPED = Path(__file__).with_name("probe.safetensors")


@dataclass(frozen=True)
class Probe(Images):
    """A probe set, without labels.

    card: how it was made (count, rounds, seed, versions), and under `networks` for each network, by its label: sha256,
    iterations, whether the set was made with it (made_with), and the relative differences of the layers' std from those
    on the test set (mean, largest, r; the same for the closed form, closed_form_mean and so on).
    """

    card: dict[str, Any]
    path: Path

    @property
    def note(self) -> str:
        """Which images these are, and what error is to be expected: the largest of the networks that were tried."""
        networks = self.card["networks"].values()
        ours, other = (100 * max(n["mean"] for n in networks if n["made_with"] is made) for made in (True, False))
        return (
            f"measured on the probe set ({len(self)} synthetic images in place of CIFAR-10): std within\n"
            f"{ours:.1f} % of the test set's for the networks it was made with, {other:.1f} % for others"
        )

    def describe(self) -> str:
        """One line: which images, and what error is to be expected."""
        return f"{' '.join(self.note.split())} (mean over layers, the worst of the networks tried)"

    def provenance(self) -> dict[str, Any]:
        """Where the images come from, as JSON can hold it."""
        return {"path": str(self.path), "layout": "probe set", "sha256": sha256(self.path), "note": self.note}


def load(path: str | Path = SHIPPED) -> Probe:
    """Read a probe set: the one that is shipped, or another that analysis.probe made.

    Raises FileNotFoundError or ValueError, with the path, where it is not there or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python -m analysis.probe makes a probe set")
    try:
        with safe_open(path, "np") as file:
            images, card = file.get_tensor("images"), json.loads((file.metadata() or {})["card"])
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
            raise ValueError(f"{images.dtype} of shape {images.shape}")
        data = Probe(images, None, card, path)
        data.describe()
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: no probe set, or a damaged one ({error})") from error
    return data


def as_bytes(images: np.ndarray, card: dict[str, Any]) -> bytes:
    """Images (N, 32, 32, 3), uint8, with their card, as a file."""
    return save({"images": np.ascontiguousarray(images)}, metadata={"card": json.dumps(card)})
