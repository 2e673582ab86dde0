"""Colours, dashes and names: the paper's for its networks, distinct ones for all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

PAPER_COLORS = {20: (0.75, 0.75, 0.0), 56: (1.0, 0.0, 0.0), 110: (0.0, 0.0, 0.0)}  # by depth
DASHES = {"plain": (3.0, 1.2)}  # in line widths; all other kinds are solid
WIDTH = 3.3  # inches: a column of a CVPR page

# For drawing and for saving: the last three lines take effect in savefig.
RC: Any = {
    "font.family": ["STIXGeneral", "serif"],  # a Times that comes with matplotlib; a viewer of SVG may lack it
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
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "layer-responses",  # the same figure gives the same bytes
    "pdf.fonttype": 42,
}


def styles(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Line properties (label, color, dashes) of every network of a frame.

    A network gets the paper's colour for its depth, unless another one of the frame has that colour and kind already.
    """
    networks = frame.drop_duplicates("network")[["network", "kind", "depth"]]
    taken: set[tuple[Any, str]] = set()
    result: dict[str, dict[str, Any]] = {}
    for network, kind, depth in networks.itertuples(index=False):
        color = PAPER_COLORS.get(depth) if kind in ("residual", "plain") and pd.notna(depth) else None
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
    """ResNet-56 for resnet-56, as in the paper's legend; any other label as it is, whatever matplotlib means by it."""
    name = network.replace("resnet-", "ResNet-", 1) if network.startswith("resnet-") else network
    name = name.replace("$", r"\$")  # no formula
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves out labels with an underscore


def write_note(figure: Figure, note: str) -> None:
    """Write a note below a figure, under those that stand there."""
    lines = [line for line in (figure.get_supxlabel(), note) if line]
    with mpl.rc_context(RC):
        figure.supxlabel("\n".join(lines), fontsize=6.5, style="italic")
