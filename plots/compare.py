"""Networks side by side: their curves, the difference between them, and the std by stage."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots.marks import mark, mark_legend
from plots.style import (
    RC,
    columns_of,
    display_name,
    distinct_colors,
    note_computed,
    point_of,
    scale_std,
    styles,
)

PAGE = 6.9  # inches: both columns of a CVPR page
ORDERS = ("original", "sorted by magnitude")


def draw_compare(curves: pd.DataFrame, differences: Sequence[pd.DataFrame]) -> Figure:
    """Curves in original and sorted order, and below them how the others differ from the first.

    curves: columns entry (the label of a network or of a group), member (0, 1, ... in a group),
    kind, depth, layer, stage, std, source. A group is drawn as its mean, with a band from the
    smallest to the largest of its networks. differences: of the first entry and each other one,
    columns first, second, layer, position (0 to 1), difference, stage. Where the depths differ,
    layers are at their relative depth. Returns a figure that belongs to no window.

    >>> parts = [pd.DataFrame({"entry": entry, "std": std}) for entry, std in (("a", [1.0, 2.0]), ("b", [1.5, 1.0]))]
    >>> same = {"stage": 1, "member": 0, "kind": "other", "depth": None, "source": "hooks"}
    >>> curves = pd.concat([part.assign(layer=[1, 2], **same) for part in parts])
    >>> differences = pd.DataFrame({"first": "a", "second": "b", "layer": [1, 2], "difference": [0.5, -1.0]})
    >>> figure = draw_compare(curves, [differences.assign(position=[0.25, 0.75], stage=1)])
    >>> [len(panel.lines) for panel in figure.axes]  # two curves in each order; zero and the difference
    [2, 2, 2]
    """
    look = looks(curves)
    relative = len(set(curves.groupby(["entry", "member"])["layer"].max())) > 1
    with mpl.rc_context(RC):
        figure = Figure(figsize=(PAGE, 4.2), layout="constrained")
        panels = figure.subplot_mosaic(
            [["original", "sorted"], ["difference", "difference"]], height_ratios=(3, 2)
        )
        stds = [layers["std"] for _, layers in curves.groupby("entry")]
        for panel, order in zip((panels["original"], panels["sorted"]), ORDERS, strict=True):
            for entry, members in curves.groupby("entry", sort=False):
                draw_entry(panel, members, look[str(entry)], order, relative)
            label = "relative depth" if relative else "layer index"
            rank = "relative rank" if relative else "layer index"
            panel.set_xlabel(
                f"{label} (original)" if order == ORDERS[0] else f"{rank} (sorted by magnitude)"
            )
            scale_std(panel, stds)
        draw_differences(panels["difference"], differences, look, relative)
        if not relative:
            for panel in (panels["original"], panels["difference"]):
                draw_stage_ends(panel, curves)
        panels["difference"].yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        for panel in panels.values():
            panel.margins(x=0.01)
            if not relative:
                panel.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        handles, labels = panels["original"].get_legend_handles_labels()
        legend = figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=columns_of(labels, PAGE),
            frameon=False,
        )
        mark_legend(legend, handles)
        note_computed(figure, curves["entry"], curves["source"])
    return figure


def looks(curves: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Line properties of every entry: the paper's colours where each has its own, for dashes do not
    show everywhere.
    """
    look = styles(
        curves.drop(columns="network", errors="ignore").rename(columns={"entry": "network"})
    )
    if len({style["color"] for style in look.values()}) < len(look):
        for style, color in zip(look.values(), distinct_colors(len(look)), strict=True):
            style["color"] = color
    return look


def draw_entry(
    panel: Axes, members: pd.DataFrame, style: dict[str, Any], order: str, relative: bool
) -> None:
    """One network's curve, or a group's mean and band."""
    entry = str(members["entry"].iloc[0])
    table = members.pivot_table(
        index="layer", columns="member", values="std"
    ).sort_index()  # (layers, members)
    stds = table.to_numpy(float)
    mean = stds.mean(1)
    ranks = np.arange(len(mean)) if order == ORDERS[0] else np.argsort(-mean, kind="stable")
    if order != ORDERS[0]:
        stds = -np.sort(-stds, axis=0)  # each network in its own order
    x = (np.arange(len(mean)) + 0.5) / len(mean) if relative else np.arange(1, len(mean) + 1)
    [line] = panel.plot(x, stds.mean(1), marker=point_of(x), **style)
    alone = stds.shape[1] == 1
    mark(line, entry, table.index.to_numpy()[ranks] if alone or order == ORDERS[0] else ())
    if not alone:
        band = panel.fill_between(
            x, stds.min(1), stds.max(1), color=style["color"], alpha=0.2, linewidth=0
        )
        mark(band, entry)


def draw_differences(
    panel: Axes,
    differences: Sequence[pd.DataFrame],
    look: dict[str, dict[str, Any]],
    relative: bool,
) -> None:
    """The difference of each network to the first, with zero marked."""
    panel.axhline(0, color="0.4", linewidth=0.6, zorder=0)
    for layers in differences:
        entry = str(layers["second"].iloc[0])
        x = layers["position"] if relative else layers["layer"]
        [line] = panel.plot(x, layers["difference"], marker=point_of(x), **look[entry])
        mark(line, entry, () if relative else layers["layer"])
    panel.set_xlabel("relative depth" if relative else "layer index")
    first = display_name(str(differences[0]["first"].iloc[0]))
    panel.set_ylabel("\n".join(["std less that of", *wrap(first, 24)]))


def draw_stage_ends(panel: Axes, curves: pd.DataFrame) -> None:
    """A thin line wherever a new stage begins."""
    entry = curves[
        (curves["entry"] == curves["entry"].iloc[0]) & (curves["member"] == 0)
    ].sort_values("layer")
    for layer in entry["layer"][entry["stage"].diff() > 0]:
        panel.axvline(
            float(layer) - 0.5, color="0.75", linewidth=0.5, linestyle=(0, (1, 2)), zorder=0
        )


def draw_stages(curves: pd.DataFrame) -> Figure:
    """The std of the layers of each stage, network beside network: a point a layer, a line at their
    median.

    curves: as for `draw_compare`; all networks of a group count. Returns a figure that belongs to
    no window.
    """
    look = looks(curves)
    order = list(look)
    data = curves.assign(stage=curves["stage"].astype(int), std=curves["std"].astype(float))
    colors = {entry: style["color"] for entry, style in look.items()}
    with mpl.rc_context(RC):
        figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
        panel = figure.subplots()
        options = {
            "data": data,
            "x": "stage",
            "y": "std",
            "hue": "entry",
            "hue_order": order,
            "ax": panel,
        }
        sns.stripplot(
            **options, palette=colors, dodge=True, size=2.5, alpha=0.5, jitter=False, legend=False
        )
        sns.pointplot(
            **options,
            palette=dict.fromkeys(order, "0.15"),
            dodge=0.8 * (1 - 1 / len(order)),
            estimator="median",
            errorbar=None,
            linestyle="none",
            marker="_",
            markersize=min(16, 90 / len(order)),
            markeredgewidth=1.2,
            legend=False,
        )
        panel.set_xlabel("stage")
        scale_std(panel, [layers["std"] for _, layers in data.groupby("entry")])
        handles = [
            mpl.lines.Line2D([], [], color=colors[entry], marker="o", linestyle="", markersize=4)
            for entry in order
        ]
        owners = {mpl.colors.to_hex(colors[entry]): entry for entry in order}
        for (
            points
        ) in panel.collections:  # of one stage and network; without a colour where there are none
            for color in np.asarray(points.get_facecolor())[:1]:
                mark(points, owners[mpl.colors.to_hex(color)])
        for entry, handle, medians in zip(order, handles, panel.lines, strict=True):
            mark(handle, entry)
            mark(medians, entry)
        labels = [look[entry]["label"] for entry in order]
        columns = columns_of(labels, PAGE)
        legend = figure.legend(
            handles, labels, loc="outside upper center", ncols=columns, frameon=False
        )
        mark_legend(legend, handles)
        note_computed(figure, curves["entry"], curves["source"])
    return figure
