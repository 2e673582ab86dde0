"""Images, and those of another set that are nearest to them."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from plots.style import RC, WIDTH


def draw_neighbours(images: np.ndarray, nearest: np.ndarray, distances: np.ndarray) -> Figure:
    """A column for each image, above the one that is nearest to it, with their distance.

    images, nearest: (n, H, W, 3), uint8. distances: (n,). Returns a figure that belongs to no
    window.

    >>> black = np.zeros((2, 32, 32, 3), np.uint8)
    >>> figure = draw_neighbours(black, black + 1, np.array([1.0, 1.0]))
    >>> [panel.get_xlabel() for panel in figure.axes]  # two rows
    ['', '', '1.0', '1.0']
    """
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 1.0), layout="constrained")
        panels = figure.subplots(2, len(images), squeeze=False)
        for row, (name, pictures) in zip(
            panels, (("probe", images), ("nearest", nearest)), strict=True
        ):
            row[0].set_ylabel(name)
            for panel, picture in zip(row, pictures, strict=True):
                panel.imshow(picture)
                panel.set_xticks([])
                panel.set_yticks([])
                panel.spines[:].set_visible(False)
        for panel, distance in zip(panels[1], distances, strict=True):
            panel.set_xlabel(f"{distance:.1f}", fontsize=6.5)
    return figure
