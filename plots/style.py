"""Colours, dashes and names: the paper's for its networks, distinct ones for all others."""

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
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

PAPER_COLORS = {20: (0.75, 0.75, 0.0), 56: (1.0, 0.0, 0.0), 110: (0.0, 0.0, 0.0)}  # by depth
DASHES = {"plain": (3.0, 1.2)}  # in line widths; all other kinds are solid
WIDTH = 3.3  # inches: a column of a CVPR page
LONGEST = 40  # characters of a label; longer ones lose their middle
COMPUTED = "closed form from BN's tensors, not measured on images"
STEEP = 8  # times the median of all, or the highest point of another curve: from here on an axis is logarithmic

# For drawing and for saving: the last three lines take effect in savefig.
RC: Any = {
    "font.family": [
        "STIXGeneral",
        "serif",
    ],  # a Times that comes with matplotlib; a viewer of SVG may lack it
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "legend.fontsize": 6.5,
    "legend.edgecolor": "black",
    "legend.fancybox": False,
    "legend.framealpha": 1.0,
    "lines.linewidth": 1.0,
    "lines.markersize": 3,
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "layer-responses",  # the same figure gives the same bytes
    "pdf.fonttype": 42,
}


def styles(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Line properties (label, color, dashes) of every network of a frame.

    A network gets the paper's colour for its depth, unless another one of the frame has that colour
    and kind already.
    """
    networks = frame.drop_duplicates("network")[["network", "kind", "depth"]]
    taken: set[tuple[Any, str]] = set()
    result: dict[str, dict[str, Any]] = {}
    for network, kind, depth in networks.itertuples(index=False):
        color = (
            PAPER_COLORS.get(depth) if kind in ("residual", "plain") and pd.notna(depth) else None
        )
        if (color, kind) in taken:
            color = None
        taken.add((color, kind))
        result[network] = {"label": display_name(network), "color": color}
        if kind in DASHES:
            result[network]["dashes"] = DASHES[kind]
    others = [style for style in result.values() if style["color"] is None]
    for style, color in zip(others, distinct_colors(len(others)), strict=True):
        style["color"] = color
    return result


def distinct_colors(count: int) -> Sequence[Any]:
    """Colours that differ from each other and from the paper's red, black and dark yellow."""
    if count <= 6:
        return [sns.color_palette("colorblind")[i] for i in (0, 2, 4, 1, 9, 5)][:count]
    return list(sns.color_palette("husl", count))


def display_name(network: str) -> str:
    """ResNet-56 for resnet-56, as in the paper's legend; any other label as it is, whatever
    matplotlib means by it.
    """
    name = network.replace("resnet-", "ResNet-", 1) if network.startswith("resnet-") else network
    if len(name) > LONGEST:
        name = f"{name[: LONGEST // 2]}\N{HORIZONTAL ELLIPSIS}{name[1 - LONGEST // 2 :]}"
    name = name.replace("$", r"\$")  # no formula
    return (
        f" {name}" if name.startswith("_") else name
    )  # matplotlib leaves out labels with an underscore


def point_of(points: Any) -> str:
    """The marker of a curve: of one point there is no line to see."""
    return "o" if len(points) == 1 else ""


def columns_of(labels: Sequence[str], width: float) -> int:
    """How many columns of such labels fit side by side into so many inches, five at most."""
    return max(
        1, min(5, len(labels), int(72 * width / (34 + 3.2 * max(map(len, labels)))))
    )  # a line and its label


def scale_std(panel: Axes, curves: Sequence[Any]) -> None:
    """Make the axis of stds logarithmic where on a linear one a steep curve would make all others a
    flat line.
    """
    stds = [
        std[std > 0]
        for std in (np.asarray(curve, dtype=float) for curve in curves)
        if (std > 0).any()
    ]
    highest = [std.max() for std in stds]
    if stds and max(highest) > STEEP * min(np.median(np.concatenate(stds)), *highest):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_ylabel("std (logarithmic)")
    else:
        panel.set_ylabel("std")
        panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def note_computed(figure: Figure, networks: Any, sources: Any) -> None:
    """Say below a figure which of its networks are computed, where it does not show: networks and
    sources by row.
    """
    computed = np.asarray(sources) == "batchnorm"
    names = dict.fromkeys(np.asarray(networks)[computed]) if not computed.all() else ()
    if computed.any():
        write_note(
            figure,
            f"{', '.join(display_name(name) for name in names)}: {COMPUTED}" if names else COMPUTED,
        )


def write_note(figure: Figure, note: str) -> None:
    """Write a note below a figure, under those that stand there, in lines that are no wider."""
    wide = int(72 * figure.get_figwidth() / 2.8)  # characters
    lines = [
        *figure.get_supxlabel().splitlines(),
        *(part for line in note.splitlines() for part in wrap(line, wide)),
    ]
    with mpl.rc_context(RC):
        figure.supxlabel("\n".join(lines), fontsize=6.5, style="italic")
