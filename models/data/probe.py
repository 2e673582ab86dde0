"""The probe set: synthetic images of 32x32 pixels that stand for CIFAR-10's test set.

    from models.data import probe

    data = probe.load()
    print(data.describe())  # how many images, and how far off the responses to them are

`python -m analysis.probe` made them by optimisation: on them every channel of every BN layer of
some networks has the mean and variance that it has on the test set (the idea of DeepInversion, Yin
et al. 2020, arXiv 1912.08795). They hold as a whole: a part of them has other statistics. The file
is a lossless WebP that shows them side by side; the card is in its EXIF ImageDescription.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from models.data import count_images
from models.data.cifar10 import Images
from models.data.formats import SIDE
from models.files import sha256

SHIPPED = Path(__file__).with_name("probe.webp")
CARD = ExifTags.Base.ImageDescription
COLUMNS = 30  # images side by side


@dataclass(frozen=True)
class Probe(Images):
    """A probe set, without labels.

    card: how it was made (count, rounds, seed, versions), and by label the `networks` that it was
        tried on: their sha256 and iterations; whether it was made with them (made_with); relative
        differences of their layers' std from those on the test set (mean, largest, r), also of
        the closed form (closed_form_) and of as many real images (real_, real_worst_).
    """

    card: dict[str, Any]
    path: Path

    @property
    def note(self) -> str:
        """Which images these are, and the largest errors: of its makers, and of other networks."""
        networks = self.card["networks"].values()
        return self.note_for(["another", *(n["sha256"] for n in networks if n["made_with"])])

    def note_for(self, digests: Collection[str]) -> str:
        """Return which images these are, and the error to expect for some networks, in two lines.

        It is the largest error of those networks that are on the card. For the others it is the
        largest error of the networks that the set was not made with.

        digests: SHA-256 of each network's file.
        """
        networks = self.card["networks"].values()
        known = [n["mean"] for n in networks if n["sha256"] in digests]
        other = max(n["mean"] for n in networks if not n["made_with"])
        more = f": {100 * other:.1f} %" if known else ", the worst"
        more = "" if len(known) == len(set(digests)) else f" (networks not used for it{more})"
        count, error = count_images(len(self), self.total), 100 * max(known, default=other)
        return (
            f"measured on the probe set ({count} synthetic images in place of CIFAR-10): std within"
            f"\n{error:.1f} % of the test set's in the mean over layers{more}"
        )

    def describe(self) -> str:
        return f"{' '.join(self.note.split())}, the worst of those that were tried"

    def provenance(self) -> dict[str, Any]:
        facts = {"path": str(self.path), "layout": "probe set", "sha256": sha256(self.path)}
        return {**facts, "note": self.note}


def load(path: str | Path = SHIPPED) -> Probe:
    """Load a probe set; FileNotFoundError or ValueError if it is not there or damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python -m analysis.probe makes a probe set")
    try:
        with Image.open(path, formats=["WEBP"]) as file:
            card = json.loads(file.getexif()[CARD])
            sheet = np.asarray(file)  # (rows * 32, 30 * 32, 3)
        rows = sheet.shape[0] // SIDE
        if (
            sheet.shape != (rows * SIDE, COLUMNS * SIDE, 3)
            or not 0 < card["count"] <= rows * COLUMNS
        ):
            raise ValueError(f"{card['count']} images on a sheet of shape {sheet.shape}")
        places = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2)  # (rows, 30, 32, 32, 3)
        images = places.reshape(-1, SIDE, SIDE, 3)[: card["count"]]
        data = Probe(images, None, card, path, labels_known="the probe set has no labels")
        data.describe()  # the card has all that it needs
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path}: no probe set, or a damaged one ({error})") from error
    return data


def as_bytes(images: np.ndarray, card: dict[str, Any]) -> bytes:
    """Return images (N, 32, 32, 3), uint8, and their card, which holds their count, as a file."""
    rows = -(-len(images) // COLUMNS)
    places = np.zeros((rows * COLUMNS, SIDE, SIDE, 3), np.uint8)  # the places left over are black
    places[: len(images)] = images
    sheet = places.reshape(rows, COLUMNS, SIDE, SIDE, 3).swapaxes(1, 2)  # (rows, 32, 30, 32, 3)
    exif, file = Image.Exif(), BytesIO()
    exif[CARD] = json.dumps(card)
    picture = Image.fromarray(sheet.reshape(rows * SIDE, COLUMNS * SIDE, 3))
    picture.save(file, "WEBP", lossless=True, quality=100, method=6, exif=exif)
    return file.getvalue()
