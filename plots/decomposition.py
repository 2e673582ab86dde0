"""What responses consist of: std^2 = within^2 + between^2, layer by layer.

from plots import draw_decomposition
draw_decomposition(frame).savefig("decomposition.pdf")
"""

from __future__ import annotations

import math
from textwrap import wrap

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots.compare import PAGE
from plots.marks import mark
from plots.style import RC, STEEP, WIDTH, display_name, note_computed

WITHIN = "within²: the channels' spread (\N{GREEK SMALL LETTER GAMMA})"
BETWEEN = "between²: their offsets (\N{GREEK SMALL LETTER BETA})"
BLUE, ORANGE = (
    sns.color_palette("colorblind")[9],
    sns.color_palette("colorblind")[3],
)  # pale, strong: it is the smaller


def draw_decomposition(frame: pd.DataFrame) -> Figure:
    """A small panel a network: within^2 and, stacked on it, between^2; the upper edge is std^2.

    frame: columns network, layer, stage, std, within, between, source; of a network with two
    sources the first one is drawn. All panels share the y axis, but for a network that would make
    the others flat: it has its own, and says so. Returns a figure that belongs to no window, one
    column wide for up to four networks. Raises ValueError for an empty frame.

    >>> frame = pd.DataFrame({"layer": [1, 2], "std": [5.0, 1.0], "within": [3.0, 0.6], "between": [4.0, 0.8]})
    >>> figure = draw_decomposition(frame.assign(network="resnet-20", stage=1, source="hooks"))
    >>> [panel.get_title() for panel in figure.axes]
    ['ResNet-20']
    """
    if frame.empty:
        raise ValueError("an empty frame: there is nothing to draw")
    networks = [
        (str(name), first_source(rows)) for name, rows in frame.groupby("network", sort=False)
    ]
    columns = math.ceil(math.sqrt(len(networks)))
    rows = math.ceil(len(networks) / columns)
    tops = np.array([float((layers["std"] ** 2).max()) for _, layers in networks])
    usual = np.percentile(tops[tops > 0], 50, method="lower") if tops.any() else 0.0
    common = tops[tops <= STEEP * usual].max() or 1.0
    with mpl.rc_context(RC):
        figure = Figure(
            figsize=(WIDTH if columns < 3 else PAGE, 0.6 + 1.3 * rows), layout="constrained"
        )
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for panel, (network, layers), top in zip(panels, networks, tops, strict=False):
            draw_stack(panel, layers)
            mark_layers(panel, network, layers)
            own = " (own scale)" if top > common else ""
            title = wrap(f"{display_name(network)}{own}", int(18 * figure.get_figwidth() / columns))
            panel.set_title("\n".join(title), fontsize=8, pad=3)
            panel.set_ylim(0, 1.05 * max(top, common))
        for panel in figure.axes[len(networks) :]:
            panel.remove()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=2, frameon=False, handlelength=1.2
        )
        for panel in figure.axes[-columns:]:  # below them there is none
            panel.set_xlabel("layer index")
        figure.supylabel("std²", fontsize=8)
        shown = pd.concat([layers for _, layers in networks])
        note_computed(figure, shown["network"], shown["source"])
    return figure


def first_source(rows: pd.DataFrame) -> pd.DataFrame:
    """The layers of a network in order, from the source that its rows begin with."""
    return rows[rows["source"] == rows["source"].iloc[0]].sort_values("layer")


def mark_layers(panel: Axes, network: str, layers: pd.DataFrame) -> None:
    """Let a page switch the panel with its network, and show a layer's numbers at its upper edge."""
    mark(panel, network)
    [line] = panel.plot(layers["layer"], layers["std"] ** 2, linestyle="")
    mark(line, network, layers["layer"])


def draw_stack(panel: Axes, layers: pd.DataFrame) -> None:
    """One network's within^2, and what is missing to std^2 on top of it, with thin lines where a
    stage begins.
    """
    within, total = (layers[part].to_numpy(float) ** 2 for part in ("within", "std"))
    edges = np.append(layers["layer"], layers["layer"].max() + 1) - 0.5  # (layers + 1,)
    panel.stairs(within, edges, fill=True, color=BLUE, label=WITHIN)
    panel.stairs(total, edges, baseline=within, fill=True, color=ORANGE, label=BETWEEN)
    for layer in layers["layer"][layers["stage"].diff() > 0]:
        panel.axvline(float(layer) - 0.5, color="white", linewidth=0.5)
    panel.set_xlim(edges[0], edges[-1])
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
