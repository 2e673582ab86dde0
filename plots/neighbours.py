"""Images, and those of another set that are nearest to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from plots.style import COLUMN, make_panels, own_style


def draw_neighbours(
    images: np.ndarray, nearest: np.ndarray, distances: np.ndarray, *, axes: Any = None
) -> Figure:
    """Draw a column for each image, above the one that is nearest to it, with their distance.

    images, nearest: (n, H, W, 3), uint8. distances: (n,).
    axes: 2 n panels to draw into, in place of a new figure.

    >>> black = np.zeros((2, 32, 32, 3), np.uint8)
    >>> figure = draw_neighbours(black, black + 1, np.array([1.0, 1.0]))
    >>> [panel.get_xlabel() for panel in figure.axes]  # two rows
    ['', '', '1.0', '1.0']
    """
    count = len(images)
    with own_style():
        figure, panels = make_panels(axes, (COLUMN, 1.0), 2, count)
        for panel, picture in zip(panels, [*images, *nearest], strict=False):
            panel.imshow(picture)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
        for panel, distance in zip(panels[count:], distances, strict=False):
            panel.set_xlabel(f"{distance:.1f}", fontsize=6.5)
        panels[0].set_ylabel("probe")
        panels[count].set_ylabel("nearest")
    return figure
