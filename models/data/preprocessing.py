"""What is done to images before a network sees them: the normalisation, and the augmentation.

>>> import numpy as np
>>> from models.data.preprocessing import PRESETS
>>> black = np.zeros((1, 32, 32, 3), dtype=np.uint8)
>>> PRESETS["[-1,1]"](black)[0, :, 0, 0]
tensor([-1., -1., -1.])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PER_PIXEL = "per-pixel"  # the paper's: the training set's mean image is subtracted
CROP_PADDING = 4  # pixels on each side
PADDINGS = ("black", "zero", "none")  # black: before the normalisation; zero: after it


@dataclass(frozen=True)
class Preprocessing:
    """A normalisation: (image / 255 - mean) / std.

    name: one of `PRESETS`, `per-pixel`, or numbers as `parse_normalize` takes them.
    mean: (3, 1, 1), or (3, 32, 32) for a mean image; float32, 1 is white.
    std: (3, 1, 1), likewise.

    ValueError: if the tensors have other shapes, or are not finite, or a std is not positive.
    """

    name: str
    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.mean.shape), tuple(self.std.shape)
        if shapes[0] not in ((3, 1, 1), (3, 32, 32)) or shapes[1] != (3, 1, 1):
            raise ValueError(f"the preprocessing has a mean and a std of the shapes {shapes}")
        if any(x.is_complex() or not x.isfinite().all() for x in (self.mean, self.std)):
            raise ValueError("the mean or std of the preprocessing is not finite and real")
        if not (self.std > 0).all():
            raise ValueError("the preprocessing has a std of 0 or less")

    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        """Return images (N, H, W, 3), uint8 RGB, as float32 (N, 3, H, W)."""
        x = torch.as_tensor(images).permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
        x = x.contiguous().float().div_(255)
        return x.sub_(self.mean.to(x.device)).div_(self.std.to(x.device))

    def scaled(self, x: Tensor) -> Tensor:
        """Return images (N, 3, H, W), float32 with 1 for white, normalised; x stays as it is."""
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


def per_channel(name: str, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """Return a normalisation with one mean and one std a channel."""
    return Preprocessing(name, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))


def per_pixel(mean_image: Tensor) -> Preprocessing:
    """Return the paper's normalisation for a mean image (3, 32, 32); 1 is white."""
    return Preprocessing(PER_PIXEL, mean_image.float(), torch.ones(3, 1, 1))


def mean_image(images: np.ndarray) -> Tensor:
    """Return the mean of images (N, H, W, 3), uint8, as float32 (3, H, W); 1 is white."""
    mean = images.mean(axis=0, dtype=np.float64) / 255  # (N, H, W, 3) -> (H, W, 3)
    return torch.from_numpy(mean).permute(2, 0, 1).float().contiguous()


CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
PRESETS = {
    p.name: p
    for p in (
        per_channel("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        per_channel("cifar10", CIFAR10_MEAN, (0.2470, 0.2435, 0.2616)),  # std of all values
        per_channel("cifar10-2", CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),  # mean std of an image
        per_channel("[-1,1]", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        per_channel("[0,1]", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )
}


def parse_normalize(text: str) -> Preprocessing | str:
    """Return the normalisation that a word names, or the word if images must tell it.

    text: a name of `PRESETS`, `auto`, `per-pixel`, or the mean and std of each channel.

    ValueError: with what is allowed, for another word.

    >>> parse_normalize("0.5,0.5,0.5/0.25,0.25,0.25").std.flatten()
    tensor([0.2500, 0.2500, 0.2500])
    """
    if text in ("auto", PER_PIXEL):
        return text
    if text in PRESETS:
        return PRESETS[text]
    try:
        mean, std = (list(map(float, half.split(","))) for half in text.split("/"))
        return per_channel(text, mean, std)
    except (ValueError, RuntimeError) as error:  # of float, and of torch for other than 3 numbers
        allowed = ", ".join(["auto", *PRESETS, PER_PIXEL])
        raise ValueError(
            f"unknown normalisation {text[:60]!r}: one of {allowed}, or the mean and std of the "
            "three channels, as in 0.5,0.5,0.5/0.25,0.25,0.25"
        ) from error


def random_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pad images (N, C, H, W) with 4 zeros, cut a random (H, W) from each and flip half of them."""
    n, _, height, width = x.shape
    x = F.pad(x, (CROP_PADDING,) * 4)
    top, left = torch.randint(
        0, 2 * CROP_PADDING + 1, (2, n, 1), generator=generator, device=x.device
    )
    flip = torch.randint(0, 2, (n, 1), generator=generator, device=x.device)
    column = torch.arange(width, device=x.device)
    rows = top + torch.arange(height, device=x.device)  # (N, H)
    columns = left + torch.where(flip == 1, width - 1 - column, column)  # (N, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    cut = x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return cut.permute(0, 3, 1, 2)


def augment(
    images: np.ndarray | Tensor, normalise: Preprocessing, padding: str, generator: torch.Generator
) -> Tensor:
    """Return images (N, H, W, 3), uint8, normalised and augmented as in training.

    padding: `black` pads before the normalisation, `zero` after it; `none` does not augment.

    float32 (N, 3, H, W).
    """
    if padding == "zero":
        return random_crop(normalise(images), generator)
    if padding == "black":
        raw = torch.as_tensor(images).permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
        return normalise(random_crop(raw, generator).permute(0, 2, 3, 1))
    return normalise(images)
