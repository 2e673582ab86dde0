"""What is done to images before a network sees them: the normalisations that people train with, and
the padding.

>>> import numpy as np
>>> from models.data.preprocessing import PRESETS
>>> black = np.zeros((1, 32, 32, 3), dtype=np.uint8)
>>> PRESETS["[-1,1]"](black)[0, :, 0, 0]
tensor([-1., -1., -1.])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PER_PIXEL = "per-pixel"  # the paper's: the training set's mean image is subtracted, nothing is divided
CROP_PADDING = 4  # pixels on each side
PADDINGS = ("black", "zero", "none")  # black: before the normalisation; zero: after it


@dataclass(frozen=True)
class Preprocessing:
    """A normalisation: (image / 255 - mean) / std.

    name: one of `PRESETS`, or `per-pixel`. mean: (3, 1, 1), or (3, 32, 32) for a mean image; std:
    (3, 1, 1); both float32, in units of 1 for white. ValueError for others.
    """

    name: str
    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.mean.shape), tuple(self.std.shape)
        if shapes[0] not in ((3, 1, 1), (3, 32, 32)) or shapes[1] != (3, 1, 1) or not (self.std > 0).all():
            raise ValueError(
                f"the preprocessing has a mean of shape {shapes[0]} and a std of {shapes[1]}, or a std of 0"
            )

    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        """Images (N, H, W, 3), uint8 RGB, to float32 (N, 3, H, W)."""
        x = torch.as_tensor(images).permute(0, 3, 1, 2).contiguous().float().div_(255)  # (N, H, W, 3) -> (N, 3, H, W)
        return x.sub_(self.mean.to(x.device)).div_(self.std.to(x.device))

    def scaled(self, x: Tensor) -> Tensor:
        """The same for images (N, 3, H, W) in float32, 1 for white, which are left as they are."""
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


def preset(name: str, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Preprocessing:
    """A normalisation with one mean and one std a channel."""
    return Preprocessing(name, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))


def per_pixel(mean_image: Tensor) -> Preprocessing:
    """The paper's normalisation: a mean image (3, 32, 32), in units of 1 for white, is subtracted.
    """
    return Preprocessing(PER_PIXEL, mean_image.float(), torch.ones(3, 1, 1))


def mean_image(images: np.ndarray) -> Tensor:
    """The mean of images (N, H, W, 3), uint8, as float32 (3, H, W) in units of 1 for white."""
    mean = images.mean(axis=0, dtype=np.float64) / 255  # (N, H, W, 3) -> (H, W, 3)
    return torch.from_numpy(mean).permute(2, 0, 1).float().contiguous()


CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
PRESETS = {
    p.name: p
    for p in (
        preset("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        preset("cifar10", CIFAR10_MEAN, (0.2470, 0.2435, 0.2616)),  # std of all values of a channel
        preset("cifar10-2", CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),  # mean of the stds of single images
        preset("[-1,1]", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        preset("[0,1]", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )
}


def random_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pad images (N, C, H, W) by 4 pixels of zeros, cut a random (H, W) from each and flip every
    other one or so.
    """
    n, _, height, width = x.shape
    x = F.pad(x, (CROP_PADDING,) * 4)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, n, 1), generator=generator, device=x.device)
    flip = torch.randint(0, 2, (n, 1), generator=generator, device=x.device)
    column = torch.arange(width, device=x.device)
    rows = top + torch.arange(height, device=x.device)  # (N, H)
    columns = left + torch.where(flip == 1, width - 1 - column, column)  # (N, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    cut = x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return cut.permute(0, 3, 1, 2)


def augment(images: np.ndarray | Tensor, normalise: Preprocessing, padding: str, generator: torch.Generator) -> Tensor:
    """Images (N, H, W, 3), uint8, normalised and augmented as in training: float32 (N, 3, H, W).

    padding: `black` pads before the normalisation, `zero` after it, `none` leaves the images as
    they are.
    """
    if padding == "zero":
        return random_crop(normalise(images), generator)
    if padding == "black":
        raw = torch.as_tensor(images).permute(0, 3, 1, 2)  # (N, 3, H, W)
        return normalise(random_crop(raw, generator).permute(0, 2, 3, 1))
    return normalise(images)
