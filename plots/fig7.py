"""Fig. 7 of the paper: the std of layer responses, in original order and sorted by magnitude.

from plots import draw_fig7
draw_fig7(frame, paper=paper_curves()).savefig("fig7.pdf")  # curves: of analysis.paper
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from plots.style import (
    COLUMN,
    PAGE,
    Frames,
    Looks,
    Style,
    add_legend,
    check_choice,
    gather,
    make_panels,
    note_computed,
    own_style,
    scale_std,
    styles,
    write_note,
)

ORDERS = ("original", "sorted by magnitude")
SIZES = {"column": (COLUMN, 3.5), "wide": (PAGE, 3.9), "slide": (16 / 3, 3.0)}  # inches
PAPER: Style = {
    "linewidth": 0.4,
    "markersize": 1.6,
    "marker": ".",
    "markeredgewidth": 0,
    "alpha": 0.55,
}
FORMULA: Style = {"linewidth": 0.8, "dashes": (1.0, 1.0), "marker": ""}
SPARSE = (1.0, 3.0)  # dashes of a plain network's closed form, which may have a ResNet's colour
RING: Style = {"marker": "o", "markersize": 4.5, "markerfacecolor": "none", "markeredgewidth": 0.5}
BAND: Style = {"alpha": 0.2, "linewidth": 0}
GREY = "0.3"
MARKED = 10  # markers on the longest curve


def draw_fig7(
    frames: Frames,
    paper: pd.DataFrame | None = None,
    *,
    note: str = "",
    scale: str = "auto",
    size: str = "column",
    ylim: tuple[float, float] | None = None,
    palette: str = "paper",
    title: str | None = None,
    seeds: pd.DataFrame | None = None,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw the two panels of the paper's Fig. 7.

    frames: a frame, or one a network: columns layer and std; if there, network, kind, depth,
        source and dominated. A network with both sources gets a second, dotted curve.
    paper: columns kind, depth, layer, std: the paper's curves, drawn as fine dotted lines behind
        the networks of the same kind and depth; if size is "wide", on the left of them.
    note: a text below the figure.
    scale: of the axis: "log", "linear", or "auto": linear, but a curve that would flatten all
        others is clipped, with an arrow and its highest value.
    size: "column" or "wide" (one or both columns of a page), or "slide" (16:9).
    ylim: the lowest and the highest std to show.
    palette: "paper" or "colorblind".
    title: a text above the figure.
    seeds: columns network, seed, layer, std: a band from the lowest to the highest seed.
    axes: two panels to draw into, in place of a new figure.

    Raises ValueError for an empty frame, a missing column or an unknown choice.

    >>> frame = pd.DataFrame({"layer": [1, 2, 3], "std": [0.5, 1.5, 1.0]})
    >>> figure = draw_fig7(frame)
    >>> [panel.lines[0].get_ydata().tolist() for panel in figure.axes]
    [[0.5, 1.5, 1.0], [1.5, 1.0, 0.5]]
    """
    check_choice("size", size, SIZES)
    with own_style():
        frame = gather(frames, "layer", "std")
        looks = styles(frame, palette)
        theirs = match_paper(frame, paper)
        apart = len(theirs) > 0 and size == "wide" and axes is None
        shape = (1, 2) if size == "wide" and not apart else (2, 1 + apart)
        options: Style = {} if axes is not None else {"sharey": True}
        figure, panels = make_panels(axes, SIZES[size], *shape, **options)
        ours = panels[1::2] if apart else panels
        behind = panels[::2] if apart else panels
        for panel, other, order in zip(ours, behind, ORDERS, strict=False):
            draw_seeds(panel, seeds, looks, order)
            lines = draw_curves(other, theirs, looks, order, {} if apart else PAPER)
            lines += draw_curves(panel, frame, looks, order)
            for each in dict.fromkeys((other, panel)):
                finish(each, order, frame["layer"].max())
                scale_std(each, lines, scale, ylim)
        name_sides(panels, apart)
        overlaid = len(theirs) > 0 and not apart
        add_legend(figure, panels[0], looks, explain(frame, looks, overlaid, seeds), title)
        note_computed(figure, frame["network"], frame["source"])
        if note:
            write_note(figure, note)
    return figure


def match_paper(frame: pd.DataFrame, paper: pd.DataFrame | None) -> pd.DataFrame:
    """Return the paper's curves of the networks of a frame, under the labels of the frame."""
    networks = frame[["network", "kind", "depth"]].drop_duplicates(["kind", "depth"])
    if paper is None:
        return networks[:0]
    depth = paper["depth"].astype(networks["depth"].dtype)
    curves = paper[["kind", "layer", "std"]].assign(depth=depth, source="hooks", dominated=False)
    return networks.merge(curves, on=["kind", "depth"])


def arrange(layers: pd.DataFrame, order: str) -> pd.DataFrame:
    """Return the layers of one network in one of the ORDERS."""
    layers = layers.sort_values("layer")
    if order == "original":
        return layers
    return layers.sort_values("std", ascending=False, kind="stable")


def draw_curves(
    panel: Axes, frame: pd.DataFrame, looks: Looks, order: str, style: Style | None = None
) -> list[Line2D]:
    """Draw a curve for every network and source. Returns the curves."""
    lines: list[Line2D] = []
    if frame.empty:
        return lines
    both = frame.groupby("network")["source"].nunique()
    step = max(1, round(frame["layer"].max() / MARKED))
    for (network, source), layers in frame.groupby(["network", "source"], sort=False):
        points = arrange(layers, order)
        x = np.sort(points["layer"].to_numpy(float))
        every = 1 if style else (min(step // 2, len(x) - 1), step)
        look = looks[network] | {"markevery": every} | (style or {})
        if both[network] > 1 and source == "batchnorm":
            sparse = {"dashes": SPARSE} if layers["kind"].iloc[0] == "plain" else {}
            look |= FORMULA | sparse
        lines += panel.plot(x, points["std"], **look)
        few = points["dominated"].eq(True).fillna(False).to_numpy(bool)
        panel.plot(x[few], points["std"][few], linestyle="", color=look["color"], **RING)
    return lines


def draw_seeds(panel: Axes, seeds: pd.DataFrame | None, looks: Looks, order: str) -> None:
    """Draw a band from the lowest to the highest seed of each network, in the order asked for."""
    if seeds is None:
        return
    for network, layers in seeds[seeds["network"].isin(list(looks))].groupby("network"):
        stds = layers.pivot_table(index="seed", columns="layer", values="std")  # (seeds, layers)
        values = stds.to_numpy(float)
        if order != "original":
            values = -np.sort(-values, axis=1)
        color = looks[str(network)]["color"]
        panel.fill_between(stds.columns, values.min(0), values.max(0), color=color, **BAND)


def finish(panel: Axes, order: str, layers: int) -> None:
    """Name the axis of layers, and let it begin at 0 as in the paper."""
    panel.set_xlabel(f"layer index ({order})")
    panel.set_xlim(0, 1.02 * layers)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def name_sides(panels: Sequence[Axes], apart: bool) -> None:
    """Say which side is the paper's, if it has one, and name a shared axis only once."""
    if apart:
        panels[0].set_title("He et al. (2016), Fig. 7")
        panels[1].set_title("these networks")
        for panel in panels[1::2]:
            panel.set_ylabel("")


def explain(
    frame: pd.DataFrame, looks: Looks, paper: bool, seeds: pd.DataFrame | None
) -> list[Any]:
    """Return legend handles for each kind of curve or mark beside the networks' own."""
    handles: list[Any] = []
    if paper:
        handles.append(Line2D([], [], color=GREY, label="the paper's curve", **PAPER))
    if frame.groupby("network")["source"].nunique().max() > 1:
        handles.append(Line2D([], [], color=GREY, label="closed form", **FORMULA))
    if seeds is not None and seeds["network"].isin(list(looks)).any():
        handles.append(Patch(facecolor=GREY, label="lowest to highest seed", **BAND))
    if frame["dominated"].any():
        label = "rests on few images"
        handles.append(Line2D([], [], linestyle="", color=GREY, label=label, **RING))
    return handles
