"""Fig. 7 of the paper: the std of layer responses, in original order and sorted by magnitude.

from plots import draw_fig7
draw_fig7(frame, paper=curves()).savefig("fig7.pdf")  # curves: of analysis.paper
"""

from __future__ import annotations

import math
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import BboxBase

from plots.marks import mark, mark_legend
from plots.style import COMPUTED, RC, WIDTH, columns_of, point_of, scale_std, styles, write_note

BEHIND: dict[
    str, dict[str, Any]
] = {  # curves in a network's colour beside its own, as the legend calls them
    "paper (pale)": {"linewidth": 0.6, "alpha": 0.35},
    "closed form": {"linewidth": 0.8, "dashes": (1.0, 1.0)},
}
SPARSE = (
    1.0,
    3.0,
)  # dashes of a plain network's closed form: it may have the colour of a residual one's
INSIDE, ROWS = 8, 5  # entries and rows of a legend; with more of either it stands above the panels
ORDERS = ("original", "sorted by magnitude")


def draw_fig7(frame: pd.DataFrame, paper: pd.DataFrame | None = None, note: str = "") -> Figure:
    """Draw the two panels of the paper's Fig. 7 at the width of one column.

    frame: columns network, kind, depth, layer, std, source; one curve a network, in the order of
    the frame; where it holds both sources, the closed form is dotted, a plain network's sparsely.
    paper: columns kind, depth, layer, std; its curves are drawn behind, thin and pale, where the
    frame has a network of that kind and depth. note: stands below the figure. Returns a figure that
    belongs to no window. Raises ValueError for an empty frame.

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
                dotted = (
                    {"label": None, **BEHIND["closed form"]}
                    if both and source == "batchnorm"
                    else {}
                )
                if dotted and layers["kind"].iloc[0] == "plain":
                    dotted["dashes"] = SPARSE
                index, std, layer = curve(layers, order)
                [line] = panel.plot(
                    index, std, marker=point_of(index), **look[str(network)] | dotted
                )
                mark(line, str(network), layer)
            behind = [entry for entry, wanted in zip(BEHIND, (shown, both), strict=True) if wanted]
            legend = finish(panel, order, behind)
        if formula.all():
            write_note(figure, COMPUTED)
        if note:
            write_note(figure, note)
        draw_legends(figure, *legend)
    return figure


def draw_paper(
    panel: Axes,
    frame: pd.DataFrame,
    paper: pd.DataFrame | None,
    look: dict[str, dict[str, Any]],
    order: str,
) -> bool:
    """Draw the paper's curves of the networks of a frame, in their colours; False if there are
    none.
    """
    networks = frame.drop_duplicates(["kind", "depth"])[["network", "kind", "depth"]].dropna()
    shown = False
    for network, kind, depth in networks.itertuples(index=False):
        if paper is None:
            break
        layers = paper[(paper["kind"] == kind) & (paper["depth"] == depth)]
        if len(layers):
            index, std, _ = curve(layers, order)
            [line] = panel.plot(
                index, std, **look[network] | {"label": None} | BEHIND["paper (pale)"]
            )
            mark(line, network)
            shown = True
    return shown


def curve(
    layers: pd.DataFrame, order: str
) -> tuple[pd.Series[int], pd.Series[float], pd.Series[int]]:
    """Layer indices and stds of one network, in one of the `ORDERS`, and the layer that each point
    is.
    """
    layers = layers.sort_values("layer")
    points = (
        layers if order == "original" else layers.sort_values("std", ascending=False, kind="stable")
    )
    return layers["layer"].astype(int), points["std"], points["layer"].astype(int)


def finish(panel: Axes, order: str, behind: list[str]) -> tuple[list[Any], list[str]]:
    """Axis labels and ticks; and what the legend is to show, handles and labels."""
    panel.set_xlabel(f"layer index ({order})")
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    scale_std(panel, [line.get_ydata() for line in panel.lines])
    handles, labels = panel.get_legend_handles_labels()
    handles += [Line2D([], [], color="0.3", **BEHIND[entry]) for entry in behind]
    return handles, [*labels, *behind]


def draw_legends(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """A legend in the upper right of each panel, with room made for it; a long one stands above the
    panels.
    """
    options: dict[str, Any] = {
        "borderpad": 0.3,
        "labelspacing": 0.2,
        "handlelength": 2.2,
        "columnspacing": 1.0,
    }
    beside = min(2, columns_of(labels, WIDTH - 0.5)) if len(labels) > 4 else 1
    if len(labels) > INSIDE or len(labels) > ROWS * beside:
        columns = columns_of(labels, WIDTH)
        figure.set_figheight(figure.get_figheight() + 0.12 * math.ceil(len(labels) / columns))
        legend = figure.legend(
            handles, labels, loc="outside upper center", ncols=columns, **options
        )
        legend.get_frame().set_linewidth(0.4)
        mark_legend(legend, handles)
        return
    for panel in figure.axes:
        legend = panel.legend(
            handles, labels, loc="upper right", ncols=beside, borderaxespad=0.2, **options
        )
        legend.set_in_layout(False)
        legend.get_frame().set_linewidth(0.4)
        mark_legend(legend, handles)
    figure.draw_without_rendering()  # the layout is known from here on
    for panel in figure.axes:
        legend = cast(Legend, panel.get_legend())
        make_room(panel, legend.get_window_extent().transformed(panel.transAxes.inverted()))


def make_room(panel: Axes, box: BboxBase) -> None:
    """Raise the upper end of the axis until no curve runs through the box, which is in shares of
    the panel.
    """
    scale = panel.yaxis.get_transform()
    bottom, top = scale.transform(np.array(panel.get_ylim()))
    left, right = panel.get_xlim()
    grid = np.linspace(left + (box.x0 - 0.01) * (right - left), right, 200)
    highest = bottom
    for line in panel.lines:
        x, y = np.asarray(line.get_xydata(), dtype=float).T
        above = np.append(np.interp(grid, x, y, left=np.nan, right=np.nan), y[x >= grid[0]])
        above = above[above > 0]
        highest = max(highest, scale.transform(above).max(initial=bottom))
    room = max(box.y0 - 0.03, 0.2)  # share of the panel's height that is left for the curves there
    top = max(top, bottom + (highest - bottom) / room)
    panel.set_ylim(*scale.inverted().transform(np.array([bottom, top])))
