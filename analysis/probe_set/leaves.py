"""Dead leaves: the images from which analysis.probe starts, a model of occlusion in pictures.

Things of all sizes, small ones more often than large ones, fall onto the picture until it is
covered, and what lies on top is seen. Such images have the edges, the flat parts and the scales of
photographs, and show nothing (Lee, Mumford & Huang 2001, IJCV 41; Baradad et al. 2021, arXiv
2106.05963, trained networks on them). Each has the colours of one photograph: some layers respond
to little but a strong red, which few photographs have, or to an aeroplane in a blue sky. In some
images a few leaves lie on a single one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FINER = 3  # images are drawn with so many times as many pixels a side, then averaged
SMALLEST = (1.5, 16.0)  # pixels: range of the radius of an image's smallest leaves
IN_FRONT = 3  # leaves in front, at most, near the middle
CENTRAL = (3.0, 11.0)  # pixels: range of their radii
OPEN = 1 / 6  # share of images with one leaf behind those, as a sky
BEHIND = 4.5  # radius of that leaf, in sides of the image: it covers all
MOST = 400  # leaves in an image
REACH = 1.42  # radii from a leaf's middle to its farthest point, as in a square or a star
SHADE = 0.06  # standard deviation of the slope of brightness across a leaf


@dataclass
class Picture:
    """An image in the making: colours (n, 3), pixels (H, W, 3), and which are covered (H, W)."""

    random: np.random.Generator
    colors: np.ndarray
    pixels: np.ndarray
    covered: np.ndarray

    def drop(self, y: float, x: float, radius: float) -> None:
        """Let a leaf fall under those that lie there.

        It is an ellipse, a rectangle or a star, in any direction.
        """
        random = self.random
        angle, slim = random.uniform(0, np.pi), random.uniform(0.3, 1)
        ends = [
            (max(0, int(place - REACH * radius)), max(0, int(place + REACH * radius) + 2))
            for place in (y, x)
        ]
        box = tuple(slice(*end) for end in ends)
        covered, pixels = self.covered[box], self.pixels[box]
        rows, columns = np.ogrid[: covered.shape[0], : covered.shape[1]]
        down, right = (rows + ends[0][0] - y) / radius, (columns + ends[1][0] - x) / radius
        along, across = (
            right * np.cos(angle) + down * np.sin(angle),
            down * np.cos(angle) - right * np.sin(angle),
        )
        distance = np.hypot(along, across / slim)
        match random.integers(3):
            case 0:
                inside = distance < 1
            case 1:
                inside = (abs(along) < 1) & (abs(across) < slim)
            case _:
                turn = random.integers(2, 6) * np.arctan2(across / slim, along) + random.uniform(
                    0, 2 * np.pi
                )
                inside = distance < 1 + (REACH - 1) * np.sin(turn)
        seen = inside & ~covered
        shade = random.normal(0, SHADE) * along + random.normal(0, SHADE) * across
        pixels[seen] = random.choice(self.colors) + shade[seen][:, None]
        covered |= seen


def dead_leaves(
    photographs: np.ndarray, count: int, seed: int, progress: Callable[[], object] = lambda: None
) -> np.ndarray:
    """Return images (count, H, W, 3), float32, 1 for white; a few pixels are out of range.

    photographs: (N, H, W, 3), uint8. Each image takes its colours from a random one.
    progress: called after each image.
    """
    random = np.random.default_rng(seed)
    images = np.empty((count, *photographs.shape[1:]), np.float32)
    for image, number in zip(images, random.integers(len(photographs), size=count), strict=True):
        image[:] = draw(random, photographs[number])
        progress()
    return images


def draw(random: np.random.Generator, photograph: np.ndarray) -> np.ndarray:
    """Return one image with the size and the colours of a photograph (H, W, 3)."""
    side = FINER * len(photograph)
    colors = photograph.reshape(-1, 3).astype(np.float32) / 255
    pixels, covered = np.full((side, side, 3), colors.mean(0)), np.zeros((side, side), bool)
    picture = Picture(random, colors, pixels, covered)
    for _ in range(random.integers(IN_FRONT + 1)):
        y, x = random.normal(side / 2, side / 8, 2)
        picture.drop(y, x, FINER * random.uniform(*CENTRAL))
    if random.random() < OPEN:
        picture.drop(side / 2, side / 2, BEHIND * side)
    smallest, largest = FINER * np.exp(random.uniform(*np.log(SMALLEST))), side / 1.2
    for _ in range(MOST):
        if picture.covered.all():
            break
        radius = (
            random.uniform(largest**-2, smallest**-2) ** -0.5
        )  # density of radii r^-3: the same at every scale
        y, x = random.uniform(-radius / 2, side + radius / 2, 2)
        picture.drop(y, x, radius)
    image: np.ndarray = pixels.reshape(len(photograph), FINER, len(photograph), FINER, 3).mean(
        (1, 3)
    )
    return image
