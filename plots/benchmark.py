"""What measuring costs: the time of several methods, in ordinary forward passes.

from plots import draw_benchmark
draw_benchmark(frame).savefig("benchmark.pdf")
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from plots.style import COLUMN, EMPTY, Frames, add_legend, gather, make_panels, own_style, styles

TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)


def draw_benchmark(frames: Frames, *, axes: Any = None) -> Figure:
    """Draw one row a method of measuring, one mark a network: its time over a plain forward pass.

    frames: a frame, or one a network: columns network, method, ratio (1 for the plain forward pass;
        empty for a method that was left out).
    axes: a panel to draw into, in place of a new figure one column wide.

    Raises ValueError if there is nothing to draw, or if a column is missing.
    """
    with own_style():
        known = gather(frames, "network", "method", "ratio").dropna(subset="ratio")
        if known.empty:
            raise ValueError(EMPTY)
        methods = list(dict.fromkeys(known["method"]))
        looks = styles(known, distinct=True)
        figure, [panel] = make_panels(axes, (COLUMN, 0.9 + 0.24 * len(methods)))
        panel.axvline(1, color="0.6", linewidth=0.6, zorder=0)
        for i, (network, look) in enumerate(looks.items()):
            rows = known[known["network"] == network]
            shift = 0.5 * ((i + 0.5) / len(looks) - 0.5)  # side by side if they are alike
            marks = {key: look[key] for key in ("color", "marker")}
            panel.plot(
                rows["ratio"], rows["method"].map(methods.index) + shift, linestyle="", **marks
            )
        panel.set_xscale("log")
        low, high = min(0.5, 0.9 * known["ratio"].min()), max(2.0, 1.15 * known["ratio"].max())
        panel.set_xlim(low, high)
        panel.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("time (plain forward pass = 1)")
        panel.set_yticks(range(len(methods)), methods)
        panel.set_ylim(len(methods) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        add_legend(figure, panel, looks)
    return figure
