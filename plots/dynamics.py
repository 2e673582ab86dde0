"""Responses through training: a heat map of layers, and their mean with the learning rate's steps.

from plots import draw_dynamics
steps = [(0, 0.1), (32_000, 0.01), (48_000, 0.001)]
draw_dynamics(frame, epochs, steps).savefig("dynamics.pdf")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from plots.style import (
    COLUMN,
    COMPUTED,
    Frames,
    Style,
    display_name,
    gather,
    make_panels,
    own_style,
    write_note,
)

OUTER = 1 / 16  # of the axis: how far a cell reaches beyond the first and the last snapshot
STEEP = 8  # times the median: a higher std makes the colours logarithmic
WIDE, NARROW = 0.18, 0.1  # shares of the axis that "lr = 0.01" and "0.01" need


def draw_dynamics(
    frames: Frames,
    epochs: pd.DataFrame | None = None,
    steps: Sequence[tuple[int, float]] = (),
    *,
    axes: Any = None,
) -> Figure:
    """Draw a heat map of std (layer by iteration), and below it the mean over the layers.

    frames: a frame, or one a snapshot, of one network and one source: columns iteration, layer,
        std; if there, network, stage and source. A snapshot's cells reach half way to the next.
    epochs: columns iteration and mean_std (closed form): the fine line of the mean.
    steps: pairs of an iteration and the learning rate that holds from there on.
    axes: two panels to draw into, in place of a new figure one column wide.

    Raises ValueError for an empty frame, a missing column, or a layer twice at one iteration.

    >>> frame = pd.DataFrame({"iteration": [0, 0, 9, 9], "layer": [1, 2, 1, 2], "std": [1, 1, 2, 4]})
    >>> draw_dynamics(frame).axes[1].lines[0].get_ydata().tolist()
    [1.0, 3.0]
    """
    with own_style():
        frame = gather(frames, "iteration", "layer", "std")
        if frame.duplicated(["iteration", "layer"]).any():
            raise ValueError(
                "a layer twice at one iteration: draw one network and one source at a time"
            )
        stds = frame.pivot_table(index="layer", columns="iteration", values="std")
        computed = bool((frame["source"] == "batchnorm").all())
        line, note = choose_line(stds.mean(), epochs, computed)
        shape: Style = {"sharex": True, "height_ratios": (5, 3)}
        figure, (upper, lower) = make_panels(axes, (COLUMN, 3.3), 2, **shape)
        draw_map(upper, stds, frame, span=line.index.max() - line.index.min())
        draw_mean(lower, stds.mean(), line)
        draw_steps(lower, steps)
        if note:
            write_note(figure, note)
    return figure


def choose_line(
    means: pd.Series[float], epochs: pd.DataFrame | None, computed: bool
) -> tuple[pd.Series[float], str]:
    """Return the fine line of the mean, by iteration, and a note on what is computed."""
    formula = means[:0] if epochs is None else epochs.set_index("iteration")["mean_std"]
    if computed:
        return (formula.combine_first(means) if len(formula) else means), COMPUTED
    return (formula, f"fine line: {COMPUTED}") if len(formula) > 1 else (means, "")


def draw_map(panel: Axes, stds: pd.DataFrame, frame: pd.DataFrame, span: float) -> None:
    """Draw the std of every layer at every snapshot, a colour bar, and lines between the stages."""
    values = stds.to_numpy(float)  # (layers, snapshots)
    steep = values.max() > STEEP * np.median(values) and values.min() > 0
    sides = cell_edges(stds.columns.to_numpy(float), span)
    rows = cell_edges(stds.index.to_numpy(float), 0)
    norm = LogNorm() if steep else Normalize()
    cells = panel.pcolormesh(sides, rows, values, cmap="viridis", norm=norm, rasterized=True)
    bar = panel.figure.colorbar(cells, ax=panel, location="top", aspect=40, pad=0.02)
    bar.locator = LogLocator(subs=(1, 2, 5)) if steep else MaxNLocator(5, steps=[1, 2, 5, 10])
    if steep:
        bar.formatter = StrMethodFormatter("{x:g}")
    bar.minorticks_off()
    bar.ax.tick_params(direction="out")
    label = f"std of {display_name(str(frame['network'].iloc[0]))}'s layers"
    bar.set_label(f"{label} (logarithmic)" if steep else label)
    stages = frame.drop_duplicates("layer").sort_values("layer")
    for layer in stages["layer"][stages["stage"].diff() > 0]:
        panel.axhline(float(layer) - 0.5, color="white", linewidth=0.5)
    panel.set_ylabel("layer index")
    panel.tick_params(direction="out")  # inside they would be lost in the colours
    panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def cell_edges(at: np.ndarray, span: float) -> np.ndarray:
    """Return the edges (n + 1,) of cells around n ascending places, half way between them.

    span: of the axis; it bounds how far the outer cells reach.

    >>> cell_edges(np.array([0.0, 10.0, 80.0]), 80).tolist()
    [-5.0, 5.0, 45.0, 85.0]
    """
    reach = max(0.5, OUTER * span)
    halves = np.diff(at) / 2
    first, last = at[0] - min([reach, *halves[:1]]), at[-1] + min([reach, *halves[-1:]])
    return np.array([first, *(at[:-1] + halves), last])


def draw_mean(panel: Axes, means: pd.Series[float], line: pd.Series[float]) -> None:
    """Draw the mean over the layers: a point a snapshot, and a fine line."""
    panel.plot(line.index, line, color="0.45", linewidth=0.6)
    panel.plot(means.index, means, "o", color="black")
    panel.set_xlabel("iteration")
    panel.set_ylabel("mean std")
    panel.margins(y=0.1)
    steps = [1, 2, 2.5, 5, 10]
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=steps, min_n_ticks=1))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def draw_steps(panel: Axes, steps: Sequence[tuple[int, float]]) -> None:
    """Draw a line wherever the learning rate changes, and name each rate that has room for it."""
    left, right = panel.get_xlim()
    starts = [max(left, start) for start, _ in steps]
    for start, end, (_, rate) in zip(starts, [*starts[1:], right], steps, strict=False):
        share = (min(end, right) - start) / (right - left)
        if share <= 0:
            continue  # the run has not come so far
        if start > max(left, 0):
            panel.axvline(start, color="0.6", linewidth=0.5, zorder=0)
        label = f"lr = {rate:g}" if share > WIDE else f"{rate:g}" if share > NARROW else ""
        place: Style = {"xycoords": panel.get_xaxis_transform(), "textcoords": "offset points"}
        panel.annotate(label, (start, 1), (1, 1), fontsize=6.5, verticalalignment="bottom", **place)
