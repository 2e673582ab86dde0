"""What measuring costs: the time of several ways, in ordinary forward passes.

from plots.benchmark import draw_benchmark
draw_benchmark(frame).savefig("benchmark.pdf")
"""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from plots.style import RC, WIDTH, display_name

MARKERS = "osD^vP"
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)


def draw_benchmark(frame: pd.DataFrame) -> Figure:
    """One row a way, one mark a network: seconds over those of the plain forward pass, at the width
    of one column.

    frame: columns network, way, ratio (1 for the plain forward pass; empty for a way that was left
    out). A line goes through 1. Returns a figure that belongs to no window. Raises ValueError where
    there is nothing to draw.
    """
    known = frame.dropna(subset="ratio")
    ways = list(dict.fromkeys(known["way"]))
    if not ways:
        raise ValueError("an empty frame: there is nothing to draw")
    networks = known.groupby("network", sort=False)
    colors = sns.color_palette("colorblind", len(networks))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(ways)), layout="constrained")
        panel = figure.subplots()
        panel.axvline(1, color="0.6", linewidth=0.6, zorder=0)
        for index, (network, rows) in enumerate(networks):
            offset = 0.5 * (
                (index + 0.5) / len(networks) - 0.5
            )  # side by side where they are alike
            panel.plot(
                rows["ratio"],
                rows["way"].map(ways.index) + offset,
                MARKERS[index % len(MARKERS)],
                markersize=3,
                color=colors[index],
                label=display_name(str(network)),
                markeredgewidth=0,
            )
        panel.set_xscale("log")
        low, high = min(0.5, 0.9 * known["ratio"].min()), max(2.0, 1.15 * known["ratio"].max())
        panel.set_xlim(low, high)
        panel.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_xlabel("time (plain forward pass = 1)")
        panel.set_yticks(range(len(ways)), ways)
        panel.set_ylim(len(ways) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        figure.legend(
            loc="outside upper center",
            ncols=min(5, len(networks)),
            frameon=False,
            handletextpad=0.1,
            columnspacing=0.8,
            borderpad=0.1,
        )
    return figure
