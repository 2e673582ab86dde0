"""What responses consist of: std² = within² + between², layer by layer.

from plots import draw_decomposition
draw_decomposition(frame).savefig("decomposition.pdf")
"""

from __future__ import annotations

import math
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from plots.style import (
    COLUMN,
    PAGE,
    Frames,
    Style,
    add_legend,
    display_name,
    gather,
    make_panels,
    note_computed,
    own_style,
    shared_top,
)

WITHIN: Style = {
    "facecolor": "#a8cbe6",
    "label": "within²: spread inside the channels (\N{GREEK SMALL LETTER GAMMA})",
}
BETWEEN: Style = {"facecolor": "#d55e00", "label": "between²: the channels' offsets (β)"}


def draw_decomposition(frames: Frames, *, axes: Any = None) -> Figure:
    """Draw a small panel a network: within² and, stacked on it, between²; the upper edge is std².

    frames: a frame, or one a network: columns layer, std, within; if there, network, stage and
        source. Of a network with two sources the first one is drawn. All panels share the y axis,
        except for a network that would flatten the others: it has its own, and says so.
    axes: one panel a network to draw into, in place of a new figure.

    Raises ValueError for an empty frame or a missing column.

    >>> frame = pd.DataFrame({"layer": [1, 2], "std": [5.0, 1.0], "within": [3.0, 0.6]})
    >>> [panel.get_title() for panel in draw_decomposition(frame.assign(network="resnet-20")).axes]
    ['ResNet-20']
    """
    with own_style():
        frame = gather(frames, "layer", "std", "within")
        frame = frame[frame["source"] == frame.groupby("network")["source"].transform("first")]
        networks = {str(name): rows for name, rows in frame.groupby("network", sort=False)}
        tops = [float((layers["std"] ** 2).max()) for layers in networks.values()]
        shared = shared_top(tops)
        columns = math.ceil(math.sqrt(len(networks))) if axes is None else len(networks)
        rows = math.ceil(len(networks) / columns)
        size = (COLUMN if columns < 3 else PAGE, 0.6 + 1.3 * rows)
        figure, panels = make_panels(axes, size, rows, columns)
        for panel, (network, layers), top in zip(panels, networks.items(), tops, strict=False):
            own = " (own scale)" if top > shared else ""
            draw_stack(panel, layers.sort_values("layer"))
            panel.set_ylim(0, 1.05 * max(top, shared))
            width = int(18 * figure.get_figwidth() / columns)  # characters
            panel.set_title("\n".join(wrap(display_name(network) + own, width)), pad=3)
        for panel in panels[len(networks) - columns : len(networks)]:  # below them there is none
            panel.set_xlabel("layer index")
        for panel in panels[len(networks) :]:
            panel.remove()
        panels[0].set_ylabel("std²")
        add_legend(figure, panels[0], {}, [Patch(**WITHIN), Patch(**BETWEEN)])
        note_computed(figure, frame["network"], frame["source"])
    return figure


def draw_stack(panel: Axes, layers: pd.DataFrame) -> None:
    """Draw within², and what is missing to std² on top of it, with lines between the stages."""
    within, total = (layers[part].to_numpy(float) ** 2 for part in ("within", "std"))  # (layers,)
    edges = np.append(layers["layer"], layers["layer"].max() + 1) - 0.5  # (layers + 1,)
    panel.stairs(within, edges, fill=True, **WITHIN)
    panel.stairs(total, edges, baseline=within, fill=True, **BETWEEN)
    for layer in layers["layer"][layers["stage"].diff() > 0]:
        panel.axvline(float(layer) - 0.5, color="white", linewidth=0.5)
    panel.set_xlim(edges[0], edges[-1])
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
