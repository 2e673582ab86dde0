"""The probe set: synthetic images of 32x32 pixels that stand for CIFAR-10's test set where it
cannot be had.

    from models.data import probe
    data = probe.load()
    data.describe()  # how many images, and how far from the test set's the responses to them are

`python -m analysis.probe` made them, by optimisation, so that every channel of every BN layer of
some networks has the mean and variance on them that it has on the test set (the idea of
DeepInversion, Yin et al. 2020, arXiv 1912.08795). They hold as a whole: any part of them has other
statistics. The file is a sheet of them, which any viewer shows: a lossless WebP (half the bytes of
the pixels), the card in its EXIF ImageDescription.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from models.data.cifar10 import Images
from models.files import sha256

SHIPPED = Path(__file__).with_name("probe.webp")
CARD = ExifTags.Base.ImageDescription
SIDE, COLUMNS = 32, 30  # pixels of an image, images side by side on the sheet


@dataclass(frozen=True)
class Probe(Images):
    """A probe set, without labels.

    card: how it was made (count, rounds, seed, versions), and under `networks` for each network, by
    its label: sha256, iterations, whether the set was made with it (made_with), and the relative
    differences of the layers' std from those on the test set (mean, largest, r; the same for the
    closed form, closed_form_mean and so on; real_mean, real_worst_mean, real_r and real_worst_r: on
    parts of the test set of as many images, the median and the worst).
    """

    card: dict[str, Any]
    path: Path

    @property
    def note(self) -> str:
        """Which images these are, and what error is to be expected: the largest of the networks
        that were tried.
        """
        networks = self.card["networks"].values()
        ours, other = (100 * max(n["mean"] for n in networks if n["made_with"] is made) for made in (True, False))
        return (
            f"measured on the probe set ({len(self)} synthetic images in place of CIFAR-10): std within\n"
            f"{ours:.1f} % of the test set's in the mean over layers (networks not used for it: {other:.1f} %)"
        )

    def describe(self) -> str:
        """One line: which images, and what error is to be expected."""
        return f"{' '.join(self.note.split())}, the worst of those that were tried"

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
        with Image.open(path, formats=["WEBP"]) as file:
            card = json.loads(file.getexif()[CARD])
            sheet = np.asarray(file)
        rows = sheet.shape[0] // SIDE
        if sheet.shape != (rows * SIDE, COLUMNS * SIDE, 3) or not 0 < card["count"] <= rows * COLUMNS:
            raise ValueError(f"{card['count']} images on a sheet of shape {sheet.shape}")
        images = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
        data = Probe(images[: card["count"]], None, card, path)
        data.describe()
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: no probe set, or a damaged one ({error})") from error
    return data


def as_bytes(images: np.ndarray, card: dict[str, Any]) -> bytes:
    """Images (N, 32, 32, 3), uint8, with their card, which counts them, as a file."""
    rows = -(-len(images) // COLUMNS)
    places = np.zeros((rows * COLUMNS, SIDE, SIDE, 3), np.uint8)  # black where no image is left
    places[: len(images)] = images
    sheet = places.reshape(rows, COLUMNS, SIDE, SIDE, 3).swapaxes(1, 2).reshape(rows * SIDE, COLUMNS * SIDE, 3)
    exif, file = Image.Exif(), BytesIO()
    exif[CARD] = json.dumps(card)
    Image.fromarray(sheet).save(file, "WEBP", lossless=True, quality=100, method=6, exif=exif)
    return file.getvalue()
