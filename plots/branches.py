"""How much every residual addition changes the signal, and how the signal grows.

from plots import draw_branches
draw_branches(frame).savefig("branches.pdf")  # frame: of analysis.measure_branches
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots.marks import mark
from plots.style import RC, WIDTH, columns_of, scale_std, styles

MARKERS = {"attention": "o", "mlp": "s", "convolution": "^", "other": "D"}  # by kind of branch
NAMES = {"mlp": "MLP"}
MANY = 60  # additions of a network from which on markers are small


def draw_branches(frame: pd.DataFrame) -> Figure:
    """Draw the ratio of every addition, and the std of the stream after it, in two panels.

    frame: columns network, kind, depth, addition, stage, branch_kind, ratio, after_std; and
        std_error, of which a band of two is drawn. One curve a network, or one for each kind of
        its branches with a marker of its own, if there are several. A short
        line marks where a stage begins.

    Returns a figure that belongs to no window. Raises ValueError for an empty frame.

    >>> frame = pd.DataFrame({"addition": [1, 2], "ratio": [1.0, 0.5], "after_std": [1.4, 1.6]})
    >>> frame = frame.assign(network="mine", kind="other", depth=None, stage=1, std_error=0.0)
    >>> figure = draw_branches(frame.assign(branch_kind="mlp"))
    >>> [panel.lines[0].get_ydata().tolist() for panel in figure.axes]
    [[1.0, 0.5], [1.4, 1.6]]
    """
    if frame.empty:
        raise ValueError("an empty frame: there is nothing to draw")
    look = styles(frame)
    kinds = [kind for kind in MARKERS if (frame["branch_kind"] == kind).any()]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for network, additions in frame.groupby("network", sort=False):
            additions = additions.sort_values("addition").astype({"addition": int})
            draw_curve(upper, str(network), additions, "ratio", look, len(kinds) > 1)
            draw_curve(lower, str(network), additions, "after_std", look, False)
        for panel, label in ((upper, "branch std / shortcut std"), (lower, "std of the stream")):
            scale_std(panel, [line.get_ydata() for line in panel.lines])
            logarithmic = panel.get_yscale() == "log"
            panel.set_ylabel(f"{label}\n(logarithmic)" if logarithmic else label)
        draw_stages(upper, frame, look)
        lower.set_xlabel("addition")
        lower.set_xlim(0, int(frame["addition"].max()) + 1)
        lower.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        draw_legend(figure, list(look.values()), kinds if len(kinds) > 1 else [])
    return figure


def draw_curve(
    panel: Axes,
    network: str,
    additions: pd.DataFrame,
    column: str,
    look: dict[str, dict[str, Any]],
    kinds: bool,
) -> None:
    """Draw one network in one panel; if that is asked for, a curve for each kind of branch."""
    parts = additions.groupby("branch_kind", sort=False) if kinds else [("", additions)]
    for kind, part in parts:
        index, values = part["addition"], part[column].astype(float)
        style: dict[str, Any] = {"marker": "" if len(part) > 1 else "o"}
        if kinds:
            size = 1.5 if len(additions) > MANY else 3
            style = {"marker": MARKERS[str(kind)], "markersize": size, "linewidth": 0.5}
            style |= {"markeredgewidth": 0.5}
            if kind != "attention":
                style["markerfacecolor"] = "white"
        [line] = panel.plot(index, values, **look[network] | style)
        mark(line, network, index)
        if column == "ratio":
            error = 2 * part["std_error"].astype(float).fillna(0)
            low, high = (values - error).clip(lower=0), values + error
            color = line.get_color()
            panel.fill_between(index, low, high, color=color, alpha=0.2, linewidth=0)


def draw_stages(panel: Axes, frame: pd.DataFrame, look: dict[str, dict[str, Any]]) -> None:
    """Draw a short line at the top where a network's stages begin, in its colour."""
    networks = list(look)
    for network, additions in frame.groupby("network", sort=False):
        row = networks.index(str(network))
        additions = additions.sort_values("addition")
        for start in additions["addition"][additions["stage"].astype(int).diff() > 0]:
            top = 1 - 0.05 * row
            panel.axvline(
                int(start) - 0.5, top - 0.045, top, color=look[str(network)]["color"], linewidth=0.8
            )


def draw_legend(figure: Figure, looks: list[dict[str, Any]], kinds: list[str]) -> None:
    """Draw a legend above the panels: the networks, and what the markers mean."""
    handles = [Line2D([], [], color=look["color"]) for look in looks]
    for look, handle in zip(looks, handles, strict=True):
        if "dashes" in look:
            handle.set_dashes(look["dashes"])
    labels = [look["label"] for look in looks]
    for kind in kinds:
        face = "0.3" if kind == "attention" else "white"
        options: dict[str, Any] = {"markerfacecolor": face, "markeredgewidth": 0.5}
        handles.append(Line2D([], [], color="0.3", linestyle="", marker=MARKERS[kind], **options))
        labels.append(NAMES.get(kind, kind))
    columns = columns_of(labels, WIDTH)
    legend = figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, handlelength=1.6, borderpad=0.3
    )
    legend.get_frame().set_linewidth(0.4)
