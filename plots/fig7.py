"""Fig. 7 of the paper: the std of layer responses, in original order and sorted by magnitude.

from plots import draw_fig7
draw_fig7(frame, paper=analysis.paper.curves()).savefig("fig7.pdf")
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots.marks import mark, mark_legend
from plots.style import RC, WIDTH, styles, write_note

BEHIND: dict[str, dict[str, Any]] = {  # curves in a network's colour beside its own, as the legend calls them
    "paper (pale)": {"linewidth": 0.6, "alpha": 0.35},
    "closed form": {"linewidth": 0.8, "dashes": (1.0, 1.0)},
}
ROW = 0.1  # height of a legend's row, as a share of the panel's
RIGHT = {1: 0.62, 2: 0.35}  # where a legend of one or two columns begins, as a share of the panel's width
STEEP = 8  # times the median: from here on the largest std makes the axis logarithmic
ORDERS = ("original", "sorted by magnitude")


def draw_fig7(frame: pd.DataFrame, paper: pd.DataFrame | None = None, note: str = "") -> Figure:
    """Draw the two panels of the paper's Fig. 7 at the width of one column.

    frame: columns network, kind, depth, layer, std, source; one curve a network, in the order of the frame; where it
    holds both sources, the closed form is dotted. paper: columns kind, depth, layer, std; its curves are drawn behind,
    thin and pale, where the frame has a network of that kind and depth. note: stands below the figure. Returns a figure
    that belongs to no window. Raises ValueError for an empty frame.

    >>> frame = pd.DataFrame({"layer": [1, 2, 3], "std": [0.5, 1.5, 1.0], "source": "hooks"})
    >>> figure = draw_fig7(frame.assign(network="plain-8", kind="plain", depth=8))
    >>> [panel.lines[0].get_ydata().tolist() for panel in figure.axes]
    [[0.5, 1.5, 1.0], [1.5, 1.0, 0.5]]
    """
    if frame.empty:
        raise ValueError("an empty frame: there is nothing to draw")
    look = styles(frame)
    formula = frame["source"] == "batchnorm"
    both = bool(formula.any() and not formula.all())
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        for panel, order in zip(figure.subplots(2, 1), ORDERS, strict=True):
            shown = draw_paper(panel, frame, paper, look, order)
            for (network, source), layers in frame.groupby(["network", "source"], sort=False):
                dotted = {"label": None, **BEHIND["closed form"]} if both and source == "batchnorm" else {}
                index, std, layer = curve(layers, order)
                [line] = panel.plot(index, std, **look[str(network)] | dotted)
                mark(line, str(network), layer)
            finish(panel, order, [entry for entry, wanted in zip(BEHIND, (shown, both), strict=True) if wanted])
        if formula.all():
            write_note(figure, "closed form from BN's tensors, not measured on images")
        if note:
            write_note(figure, note)
    return figure


def draw_paper(
    panel: Axes, frame: pd.DataFrame, paper: pd.DataFrame | None, look: dict[str, dict[str, Any]], order: str
) -> bool:
    """Draw the paper's curves of the networks of a frame, in their colours; False if there are none."""
    networks = frame.drop_duplicates(["kind", "depth"])[["network", "kind", "depth"]].dropna()
    shown = False
    for network, kind, depth in networks.itertuples(index=False):
        if paper is None:
            break
        layers = paper[(paper["kind"] == kind) & (paper["depth"] == depth)]
        if len(layers):
            index, std, _ = curve(layers, order)
            [line] = panel.plot(index, std, **look[network] | {"label": None} | BEHIND["paper (pale)"])
            mark(line, network)
            shown = True
    return shown


def curve(layers: pd.DataFrame, order: str) -> tuple[pd.Series[int], pd.Series[float], pd.Series[int]]:
    """Layer indices and stds of one network, in one of the `ORDERS`, and the layer that each point is."""
    layers = layers.sort_values("layer")
    points = layers if order == "original" else layers.sort_values("std", ascending=False, kind="stable")
    return layers["layer"].astype(int), points["std"], points["layer"].astype(int)


def finish(panel: Axes, order: str, behind: list[str]) -> None:
    """Axis labels, ticks, and the legend in the upper right, with room made for it above the curves there."""
    panel.set_xlabel(f"layer index ({order})")
    panel.set_ylabel("std")
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    points = np.concatenate([np.asarray(line.get_xydata()) for line in panel.lines])  # (points, 2)
    if points[:, 1].max() > STEEP * np.median(points[:, 1]) and points[:, 1].min() > 0:
        panel.set_yscale("log")  # else one steep curve makes all others a flat line
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_ylabel("std (logarithmic)")
    else:
        panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    handles, labels = panel.get_legend_handles_labels()
    for entry in behind:
        handles.append(Line2D([], [], color="0.3", **BEHIND[entry]))
        labels.append(entry)
    columns = 2 if len(labels) > 4 else 1
    share = 0.06 + ROW * math.ceil(len(labels) / columns)  # of the panel's height
    to_axis, from_axis = (f.transform for f in (panel.yaxis.get_transform(), panel.yaxis.get_transform().inverted()))
    bottom, top = to_axis(np.array(panel.get_ylim()))
    right = points[points[:, 0] > panel.get_xlim()[1] * RIGHT[columns], 1]
    highest = to_axis(right).max(initial=bottom)
    top = max(top, bottom + (highest - bottom) / (1 - min(share, 0.8)))
    panel.set_ylim(*from_axis(np.array([bottom, top])))
    legend = panel.legend(
        handles, labels, loc="upper right", ncols=columns, borderpad=0.3, labelspacing=0.2, handlelength=2.2,
        columnspacing=1.0, borderaxespad=0.2,
    )  # fmt: skip
    legend.get_frame().set_linewidth(0.4)
    mark_legend(legend, handles)
