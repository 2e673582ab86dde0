"""Networks side by side: their curves, the difference between them, and the std by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots.style import (
    PAGE,
    Frames,
    Looks,
    Style,
    add_legend,
    display_name,
    gather,
    make_panels,
    note_computed,
    own_style,
    scale_std,
    shared_top,
    styles,
    write_note,
)

ORDERS = ("original", "sorted by magnitude")
ERRORS = 2  # a difference of fewer standard errors is not drawn as one
PALE: Style = {"linewidth": 0.5, "alpha": 0.5, "marker": ""}


def draw_compare(curves: Frames, differences: Frames, *, axes: Any = None) -> Figure:
    """Draw curves in original order, how the others differ from the first, and sorted curves.

    curves: a frame, or one a network: columns layer and std; if there, entry (the label of a
        network or of a group), member (0, 1, ... in a group), kind, depth, stage, source and
        std_error. A group is drawn as its mean and a band from its lowest to its highest network.
    differences: of each other entry minus the first: columns first, second, layer, difference and,
        for networks of other depths, position (0 to 1); if there, std_error of the difference.
        What is within twice its error is pale.
    axes: three panels to draw into, in place of a new figure.

    Raises ValueError for an empty frame or a missing column.

    >>> a = pd.DataFrame({"layer": [1, 2], "std": [1.0, 2.0], "network": "a"})
    >>> b = a.assign(network="b", std=[1.5, 1.0])
    >>> minus = pd.DataFrame({"first": "a", "second": "b", "layer": [1, 2], "difference": [0.5, -1]})
    >>> [panel.get_ylabel() for panel in draw_compare([a, b], minus).axes]
    ['std', 'std minus a', 'std']
    """
    with own_style():
        frame = label_entries(curves)
        looks = styles(frame, distinct=True)
        parts = [differences] if isinstance(differences, pd.DataFrame) else list(differences)
        relative = len(set(frame.groupby("network")["layer"].max())) > 1
        figure, panels = make_panels(axes, (PAGE, 5.4), 3, height_ratios=(3, 2, 3))
        for panel, order in zip(panels[::2], ORDERS, strict=False):
            members = frame.groupby("network", sort=False)
            lines = [draw_entry(panel, rows, looks, order, relative) for _, rows in members]
            scale_std(panel, lines)
        draw_differences(panels[1], parts, looks, relative)
        depth = "relative depth" if relative else "layer index"
        for panel, order in zip(panels, (ORDERS[0], *ORDERS), strict=False):
            rank = "relative rank" if relative and order != "original" else depth
            panel.set_xlabel(f"{rank} ({order})")
            panel.set_xlim(0, 1 if relative else 1.01 * frame["layer"].max() + 0.5)
            if not relative:
                panel.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        if not relative:
            draw_stage_ends(panels[:2], frame)
        add_legend(figure, panels[0], looks)
        note_computed(figure, frame["network"], frame["source"])
        if any("std_error" in part for part in parts):
            write_note(figure, "pale: a difference within twice its sampling error")
    return figure


def label_entries(curves: Frames) -> pd.DataFrame:
    """Return one frame whose column network holds the labels of the entries."""
    frame = gather(curves, "layer", "std")
    if "member" not in frame:
        frame["member"] = 0
    return frame.assign(network=frame["entry"].astype(str)) if "entry" in frame else frame


def draw_entry(
    panel: Axes, members: pd.DataFrame, looks: Looks, order: str, relative: bool
) -> Line2D:
    """Draw one network's curve, or a group's mean and band. Returns the curve."""
    table = members.pivot_table(index="layer", columns="member", values="std")
    stds = table.sort_index().to_numpy(float)  # (layers, members)
    if order != "original":
        stds = -np.sort(-stds, axis=0)  # each network in its own order
    count, look = len(stds), looks[str(members["network"].iloc[0])]
    x = (np.arange(count) + 0.5) / count if relative else np.arange(1, count + 1)
    if stds.shape[1] > 1:
        band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
        panel.fill_between(x, stds.min(1), stds.max(1), **band)
    step = max(1, count // 12)
    [line] = panel.plot(x, stds.mean(1), markevery=(step // 2, step), **look)
    return line


def draw_differences(
    panel: Axes, differences: Sequence[pd.DataFrame], looks: Looks, relative: bool
) -> None:
    """Draw the difference of each network to the first, zero, and where the largest one is."""
    panel.axhline(0, color="0.4", linewidth=0.6, zorder=0)
    frame = pd.concat(differences, ignore_index=True)
    error = frame["std_error"].fillna(0) if "std_error" in frame else 0.0
    frame["sure"] = frame["difference"].where(frame["difference"].abs() > ERRORS * error)
    for network, layers in frame.groupby("second", sort=False):
        look = looks[str(network)] | {"markevery": 1}
        x = layers["position" if relative else "layer"]
        panel.plot(x, layers["difference"], **look | PALE)
        panel.plot(x, layers["sure"], **look)
    panel.set_ylabel(f"std minus {display_name(str(frame['first'].iloc[0]))}")
    panel.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    limit = 1.1 * shared_top(frame["difference"].abs().groupby(frame["second"]).max().tolist())
    low, high = panel.get_ylim()
    panel.set_ylim(max(low, -limit), min(high, limit))
    name_largest(panel, frame, looks)


def name_largest(panel: Axes, frame: pd.DataFrame, looks: Looks) -> None:
    """Say above a panel how large the largest difference is, of which network, in which layer."""
    text, color = "no difference beyond twice its sampling error", "black"
    if frame["sure"].any():
        largest = frame.loc[frame["sure"].abs().idxmax()]
        network = str(largest["second"])
        where = f"{display_name(network)}, layer {largest['layer']}"
        text, color = f"largest: {largest['sure']:+.3g}, {where}", looks[network]["color"]
    panel.set_title(text, loc="right", fontsize=6.5, color=color, pad=2)


def draw_stage_ends(panels: Sequence[Axes], frame: pd.DataFrame) -> None:
    """Draw a thin line wherever a stage of the first network begins."""
    first = frame[frame["network"] == frame["network"].iloc[0]]
    stages = first.drop_duplicates("layer").sort_values("layer")
    for layer in stages["layer"][stages["stage"].diff() > 0]:
        for panel in panels:
            panel.axvline(float(layer) - 0.5, color="0.75", linewidth=0.5, linestyle=":", zorder=0)


def draw_stages(curves: Frames, *, axes: Any = None) -> Figure:
    """Draw the std of the layers of each stage, network beside network, and their median.

    curves: as for `draw_compare`; all networks of a group count. axes: one panel to draw into.
    """
    with own_style():
        frame = label_entries(curves)
        looks = styles(frame, distinct=True)
        figure, [panel] = make_panels(axes, (PAGE, 2.6))
        stages = sorted(frame["stage"].astype(int).unique())
        width = 0.8 / len(looks)
        lines = []
        for i, (network, look) in enumerate(looks.items()):
            rows = frame[frame["network"] == network]
            places = rows["stage"].map(stages.index) + (i + 0.5) * width - 0.4
            points = {key: look[key] for key in ("color", "marker", "markerfacecolor")}
            lines += panel.plot(places, rows["std"], linestyle="", alpha=0.6, **points)
            medians = rows["std"].groupby(places).median()
            half = 0.35 * width
            panel.hlines(medians, medians.index - half, medians.index + half, color="0.15")
        panel.set_xticks(range(len(stages)), [str(stage) for stage in stages])
        panel.set_xlabel("stage (a point a layer, a line at their median)")
        scale_std(panel, lines)
        add_legend(figure, panel, looks)
        note_computed(figure, frame["network"], frame["source"])
    return figure
