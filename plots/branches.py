"""How much every residual addition changes the signal, and how the signal grows.

from plots import draw_branches
draw_branches(frame).savefig("branches.pdf")  # frame: of analysis.measure_branches
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots.style import (
    COLUMN,
    Frames,
    Looks,
    Style,
    add_legend,
    gather,
    make_panels,
    own_style,
    scale_std,
    styles,
)

MARKERS = {"attention": "o", "mlp": "s", "convolution": "^", "other": "D"}  # by kind of branch
NAMES = {"mlp": "MLP"}
MANY = 60  # additions of a network from which on markers are small


def draw_branches(frames: Frames, *, axes: Any = None) -> Figure:
    """Draw the ratio of every addition, and the std of the stream after it, in two panels.

    frames: a frame, or one a network: columns addition, ratio, after_std; if there, network, kind,
        depth, stage, branch_kind, and std_error, of which a band of two is drawn. Markers tell the
        kinds of branches apart, if there are several. A short line marks where a stage begins.
    axes: two panels to draw into, in place of a new figure one column wide.

    Raises ValueError for an empty frame or a missing column.

    >>> frame = pd.DataFrame({"addition": [1, 2], "ratio": [1.0, 0.5], "after_std": [1.4, 1.6]})
    >>> [panel.lines[0].get_ydata().tolist() for panel in draw_branches(frame).axes]
    [[1.0, 0.5], [1.4, 1.6]]
    """
    with own_style():
        frame = gather(frames, "addition", "ratio", "after_std")
        frame = frame.assign(branch_kind=frame.get("branch_kind", "other"))
        looks = styles(frame)
        for look in looks.values():
            look["marker"] = ""  # markers are kinds of branches here
        kinds = [kind for kind in MARKERS if (frame["branch_kind"] == kind).any()]
        shape: Style = {"sharex": True, "height_ratios": (3, 2)}
        figure, (upper, lower) = make_panels(axes, (COLUMN, 3.3), 2, **shape)
        for _, additions in frame.groupby("network", sort=False):
            draw_curve(upper, additions.sort_values("addition"), "ratio", looks, len(kinds) > 1)
            draw_curve(lower, additions.sort_values("addition"), "after_std", looks, False)
        for panel, label in ((upper, "branch std / shortcut std"), (lower, "std of the stream")):
            scale_std(panel, panel.lines[:])
            panel.set_ylabel(label)
        draw_stages(upper, frame, looks)
        lower.set_xlabel("addition")
        lower.set_xlim(0, int(frame["addition"].max()) + 1)
        lower.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        add_legend(figure, upper, looks, [explain(kind) for kind in kinds if len(kinds) > 1])
    return figure


def draw_curve(
    panel: Axes, additions: pd.DataFrame, column: str, looks: Looks, kinds: bool
) -> None:
    """Draw one network in one panel, with markers by kind of branch if that is asked for."""
    index, values = additions["addition"].astype(int), additions[column].astype(float)
    look = looks[str(additions["network"].iloc[0])]
    style: Style = {"marker": "" if len(additions) > 1 else "o", "linewidth": 0.5 if kinds else 1.0}
    panel.plot(index, values, **look | style)
    if column == "ratio" and "std_error" in additions:
        error = 2 * additions["std_error"].astype(float).fillna(0)
        band: Style = {"color": look["color"], "alpha": 0.25, "linewidth": 0}
        panel.fill_between(index, values - error, values + error, **band)
    size = 1.5 if len(additions) > MANY else 2.4
    for kind, part in additions.groupby("branch_kind") if kinds else ():
        face = look["color"] if kind == "attention" else "white"
        points: Style = {"marker": MARKERS[str(kind)], "markersize": size, "markerfacecolor": face}
        panel.plot(part["addition"], part[column], linestyle="", color=look["color"], **points)


def draw_stages(panel: Axes, frame: pd.DataFrame, looks: Looks) -> None:
    """Draw a short line at the top where a network's stages begin, in its colour."""
    for row, (network, look) in enumerate(looks.items()):
        additions = frame[frame["network"] == network].sort_values("addition")
        for start in additions["addition"][additions["stage"].astype(int).diff() > 0]:
            top = 1 - 0.05 * row
            panel.axvline(int(start) - 0.5, top - 0.045, top, color=look["color"], linewidth=0.8)


def explain(kind: str) -> Line2D:
    """Return a legend's handle for the marker of a kind of branch."""
    face = "0.3" if kind == "attention" else "white"
    label = NAMES.get(kind, kind)
    style: Style = {"marker": MARKERS[kind], "markerfacecolor": face, "label": label}
    return Line2D([], [], color="0.3", linestyle="", **style)
