"""A checkpoint and how it is known, and the choice among candidates by images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.checkpoints.recognition import (
    FAR,
    FITS,
    GOOD,
    Match,
    NothingRecorded,
    label,
    match_network,
    match_preprocessing,
    stem_variance,
)
from models.data.preprocessing import PADDINGS, PRESETS, Preprocessing, mean_image, per_pixel
from models.resnet import SIZES, Config, config_of

CLASSES = 10  # of CIFAR-10
MOST_ITERATIONS = 10**9


class Known(StrEnum):
    """How something about a checkpoint is known."""

    GIVEN = "given"
    CARD = "card"
    SHORTCUTS = "shortcuts"
    RECOGNISED = "recognised"
    ASSUMED = "assumed"
    BUILT = "built by --model"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Checkpoint:
    """A network made from a file.

    model: in evaluation mode; None if it is none of ours and need not be.
    state: the tensors of the file by name.
    preprocessing: None if it is not known.
    crop_padding: how training images were padded, if known.
    warnings: what does not fit, in words.
    card: what the file says of itself.
    digest: SHA-256 of the file.
    weights_note: which copy of the weights this is, and which others the file holds.
    kind_known, preprocessing_known: how these are known. kind_fit, preprocessing_fit: how well they
    fit the images, if there were any to check them.
    """

    model: nn.Module | None
    state: dict[str, Tensor]
    preprocessing: Preprocessing | None
    crop_padding: str | None
    warnings: list[str]
    card: dict[str, Any]
    path: Path
    digest: str
    weights_note: str
    kind_known: Known
    preprocessing_known: Known
    kind_fit: Match[nn.Module] | None = None
    preprocessing_fit: Match[tuple[Preprocessing, str]] | None = None

    @property
    def config(self) -> Config | None:
        """Return which of our networks it is, if it is one."""
        return None if self.model is None else config_of(self.model)

    def batches(self, data: str | Path = "cifar10", size: int = 128) -> Iterator[Any]:
        """Yield normalised batches: images (n, 3, H, W), or (images, labels) if there are labels.

        data: `probe`, `cifar10`, or a path. size: images per batch.
        Raises ValueError if the preprocessing is not known: `models.load(…, normalize=NAME)`.
        """
        from models.data import load

        if self.preprocessing is None:
            raise ValueError(
                f"{self.path}: its preprocessing is not known: load it with normalize="
            )
        side = SIZES["cifar" if self.config is None else self.config.images]
        for images, labels in load(data, side=side).batches(size):
            x = self.preprocessing(images)
            yield x if labels is None else (x, torch.from_numpy(labels))

    @property
    def iterations(self) -> int | None:
        """Return for how many iterations it was trained, if its card says it."""
        training = self.card.get("training")
        if not isinstance(training, dict):
            return None
        count = training.get("iteration", training.get("iterations"))
        return count if type(count) is int and 0 <= count <= MOST_ITERATIONS else None

    def how_kind(self) -> str:
        """Return how the kind is known, such as `card` or `recognised, misfit 0.01, ...`."""
        config = self.config
        if self.kind_known is Known.ASSUMED and config and has_open_stride(config):
            tells = (
                "neither the tensors nor these images tell"
                if self.kind_fit
                else ("the tensors do not say; --data tells")
            )
            return f"assumed v1.5, stride on the {config.stride}: {tells}"
        return describe(self.kind_known, None if self.kind_known is Known.CARD else self.kind_fit)

    def how_preprocessing(self) -> str:
        """Return how the preprocessing is known, such as `card, misfit 0.03`."""
        return describe(self.preprocessing_known, self.preprocessing_fit)


def describe(known: Known, fit: Match[Any] | None) -> str:
    return f"{known}, {fit.describe()}" if fit and known is not Known.ASSUMED else str(known)


def has_open_stride(config: Config) -> bool:
    """Return whether the tensors leave open which convolution of a bottleneck has the stride."""
    return config.images == "imagenet" and config.shortcut in "BC"


def recognise(
    checkpoint: Checkpoint,
    models: list[nn.Module],
    normalisations: list[Preprocessing],
    images: np.ndarray,
) -> Checkpoint:
    """Return the checkpoint with that of the candidates which fits images (N, 32, 32, 3)."""
    candidates = normalisations or [*PRESETS.values(), per_pixel(mean_image(images))]
    paddings = (checkpoint.crop_padding,) if checkpoint.crop_padding else PADDINGS
    try:
        inputs = match_preprocessing(models[0], images, candidates, paddings)
    except NothingRecorded:
        if not normalisations:
            raise
        return checkpoint
    preprocessing, padding = inputs.best
    known, warnings = checkpoint.kind_known, list[str]()
    first = [m for m in models if getattr(config_of(m), "shortcut", "") != "pool"] or models
    tried = models[:1] if known is Known.CARD else first
    network = match_network(tried, images, preprocessing, padding)
    if known is Known.CARD and not network.good and len(models) > 1:
        others = match_network(first, images, preprocessing, padding)
        if others.best is not models[0] and others.clear:
            warnings.append(
                f"its card says {label(models[0])}, and the images show {label(others.best)}, which "
                f"is taken: {others.describe()}; as the card says {network.misfit:.2f}"
            )
            network, known = others, Known.RECOGNISED
    elif known is not Known.CARD and network.misfit >= GOOD / 2 and len(first) < len(models):
        network = match_network(models, images, preprocessing, padding)
    if known is Known.ASSUMED:
        known = Known.RECOGNISED
    source = checkpoint.preprocessing_known
    checkpoint = replace(
        checkpoint,
        model=network.best,
        preprocessing=preprocessing,
        crop_padding=padding,
        kind_known=known,
        kind_fit=network,
        preprocessing_known=Known.RECOGNISED if source is Known.UNKNOWN else source,
        preprocessing_fit=inputs,
    )
    return replace(checkpoint, warnings=warnings + doubts(checkpoint))


def doubts(checkpoint: Checkpoint) -> list[str]:
    """Return what does not fit, in words, for a checkpoint that was recognised by images."""
    warnings = []
    fits = {"kind": checkpoint.kind_fit, "preprocessing": checkpoint.preprocessing_fit}
    for what, match in fits.items():
        if match is None or (what == "kind" and checkpoint.kind_known is Known.CARD):
            continue
        if not match.fits:
            warnings.append(f"no {what} fits (with a misfit below {FITS}): {match.describe()}")
        elif not match.good:
            warnings.append(
                f"the {what} fits roughly, so it may be another one: {match.describe()}, and the "
                f"right one has below {GOOD}"
            )
    rough = [what for what, match in fits.items() if match is not None and not match.fits]
    if warnings and rough == ["kind"] and checkpoint.kind_known is Known.RECOGNISED:
        warnings.append(
            "BN's statistics are not those of these images: few images may make most of the variance"
        )
    elif warnings and rough:
        warnings.append(
            "the images, the preprocessing or the network are not those of the training"
        )
    config = checkpoint.config
    if config is not None and config.classes != CLASSES:
        warnings.append(
            f"it tells {config.classes} classes apart, and these images have {CLASSES}: it was trained "
            "on others, and its accuracy means nothing"
        )
    return warnings


def recognise_large(
    checkpoint: Checkpoint, models: list[nn.Module], images: np.ndarray
) -> Checkpoint:
    """Return the checkpoint with that network which fits images (N, H, W, 3) clearly best.

    ImageNet's training images are crops of random sizes, and there are few images here: the size of
    a misfit tells nothing, and neither does a small difference.
    """
    preprocessing = checkpoint.preprocessing or PRESETS["imagenet"]
    model, known, match, warnings = models[0], checkpoint.kind_known, None, list[str]()
    if len(models) > 1 and known is not Known.CARD:
        match = match_network(models, images, preprocessing, "none")
        if match.clear:
            model = match.best
            known = Known.RECOGNISED if known is Known.ASSUMED else known
        else:
            warnings.append(
                f"BN's statistics do not tell which network it is: {label(match.best)}, "
                f"{match.describe()}; taken for {label(model)}; --model builds the other"
            )
    times = stem_variance(model, images, preprocessing)
    if not 1 / FAR < times < FAR:
        warnings.append(
            f"the first BN gets {times:.2g} times the variance that it recorded: in training images "
            "were others, or normalised otherwise (--normalize)"
        )
    source = checkpoint.preprocessing_known
    return replace(
        checkpoint,
        model=model,
        preprocessing=preprocessing,
        preprocessing_known=Known.ASSUMED if source is Known.UNKNOWN else source,
        kind_known=known,
        kind_fit=match,
        warnings=warnings,
    )
