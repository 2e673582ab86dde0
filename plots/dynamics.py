"""Responses through training: layer by layer as a heat map, and their mean with the learning rate's
steps.

from plots import draw_dynamics draw_dynamics(frame, epochs, steps=[(0, 0.1), (32_000, 0.01),
(48_000, 0.001)]).savefig("dynamics.pdf")
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from plots.marks import mark
from plots.style import COMPUTED, RC, STEEP, WIDTH, display_name, write_note

OUTER = (
    1 / 16
)  # of the axis' span, as far as this a cell reaches beyond the first and the last snapshot
WIDE, NARROW = (
    0.18,
    0.1,
)  # from these shares of the axis on a learning rate has room for "lr = 0.01", for "0.01"


def draw_dynamics(
    frame: pd.DataFrame, epochs: pd.DataFrame | None = None, steps: Sequence[tuple[int, float]] = ()
) -> Figure:
    """A heat map of std (layer by iteration), and below it the mean over the layers, at the width
    of one column.

    frame: of one network and one source, columns network, iteration, layer, stage, std, source; a
    snapshot's cells reach half way to its neighbours, and its mean is a point. epochs: columns
    iteration, mean_std (closed form): the fine line of the mean. steps: from which iteration on
    which learning rate holds. Returns a figure that belongs to no window: its axes are the heat
    map's, the mean's and the colour bar's. Raises ValueError for an empty frame, or one that holds
    a layer twice at one iteration.

    >>> frame = pd.DataFrame({"iteration": [0, 0, 10, 10], "layer": [1, 2, 1, 2], "std": [1.0, 1.0, 0.8, 0.4]})
    >>> figure = draw_dynamics(frame.assign(network="resnet-20", stage=1, source="batchnorm"))
    >>> figure.axes[1].lines[0].get_ydata().round(2).tolist()
    [1.0, 0.6]
    """
    if frame.empty:
        raise ValueError("an empty frame: there is nothing to draw")
    if frame.duplicated(["iteration", "layer"]).any():
        raise ValueError(
            "a layer twice at one iteration: draw one network and one source at a time"
        )
    stds = frame.pivot_table(
        index="layer", columns="iteration", values="std"
    )  # (layers, snapshots)
    line, note = choose_line(stds.mean(), epochs, computed=(frame["source"] == "batchnorm").all())
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
        draw_map(upper, stds, frame, span=line.index.max() - line.index.min())
        draw_mean(lower, stds.mean(), line)
        draw_steps(lower, steps)
        if note:
            write_note(figure, note)
    return figure


def choose_line(
    means: pd.Series[float], epochs: pd.DataFrame | None, computed: bool
) -> tuple[pd.Series[float], str]:
    """The fine line of the mean, by iteration, and a note that says what of the figure is computed,
    not measured.
    """
    formula = means[:0] if epochs is None else epochs.set_index("iteration")["mean_std"]
    if computed:
        return (
            formula.combine_first(means) if len(formula) else means
        ), COMPUTED  # pandas 2 warns of none
    return (formula, f"fine line: {COMPUTED}") if len(formula) > 1 else (means, "")


def draw_map(panel: Axes, stds: pd.DataFrame, frame: pd.DataFrame, span: float) -> None:
    """The std of every layer at every snapshot, with a colour bar above and thin lines where a
    stage begins.
    """
    values = stds.to_numpy(float)
    steep = values.max() > STEEP * np.median(values) and values.min() > 0
    sides, rows = (
        cell_edges(stds.columns.to_numpy(float), span),
        cell_edges(stds.index.to_numpy(float), 0),
    )
    norm = LogNorm() if steep else Normalize()
    cells = panel.pcolormesh(sides, rows, values, cmap="viridis", norm=norm, rasterized=True)
    ticks, form = (
        (LogLocator(subs=(1, 2, 5)), "{x:g}")
        if steep
        else (MaxNLocator(5, steps=[1, 2, 5, 10]), None)
    )
    bar = panel.figure.colorbar(
        cells, ax=panel, location="top", aspect=40, pad=0.02, ticks=ticks, format=form
    )
    bar.minorticks_off()
    bar.ax.tick_params(direction="out")
    label = f"std of {display_name(str(frame['network'].iloc[0]))}'s layers"
    bar.set_label(f"{label} (logarithmic)" if steep else label)
    stages = frame.drop_duplicates("layer").sort_values("layer")
    for layer in stages["layer"][stages["stage"].diff() > 0]:
        panel.axhline(float(layer) - 0.5, color="white", linewidth=0.5)
    for layer in stds.index[::-1]:  # for a page: the numbers of every cell
        [line] = panel.plot(stds.columns, np.full(stds.shape[1], layer), linestyle="")
        mark(line, str(frame["network"].iloc[0]), [layer] * stds.shape[1], stds.columns)
    panel.set_ylabel("layer index")
    panel.tick_params(direction="out")  # inside they would be lost in the colours
    panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def cell_edges(at: np.ndarray, span: float) -> np.ndarray:
    """Edges (n + 1,) of cells around n ascending places: half way between them; how far beyond
    them, `span` bounds.

    >>> cell_edges(np.array([0.0, 10.0, 80.0]), 80).tolist()
    [-5.0, 5.0, 45.0, 85.0]
    """
    reach = max(0.5, OUTER * span)
    halves = np.diff(at) / 2
    return np.array(
        [
            at[0] - min([reach, *halves[:1]]),
            *(at[:-1] + halves),
            at[-1] + min([reach, *halves[-1:]]),
        ]
    )


def draw_mean(panel: Axes, means: pd.Series[float], line: pd.Series[float]) -> None:
    """The mean over layers: a point a snapshot, and a fine line."""
    panel.plot(line.index, line, color="0.45", linewidth=0.6)
    panel.plot(means.index, means, "o", color="black", markersize=3)
    panel.set_xlabel("iteration")
    panel.set_ylabel("mean std")
    panel.margins(y=0.1)
    panel.xaxis.set_major_locator(
        MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1)
    )
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def draw_steps(panel: Axes, steps: Sequence[tuple[int, float]]) -> None:
    """A thin line wherever the learning rate changes, and above the panel each rate that has room
    for its label.
    """
    left, right = panel.get_xlim()
    starts = [max(left, start) for start, _ in steps]
    for start, end, (_, rate) in zip(starts, [*starts[1:], right], steps, strict=False):
        share = (min(end, right) - start) / (right - left)
        if share <= 0:
            continue  # the run has not come so far
        if start > max(left, 0):
            panel.axvline(start, color="0.6", linewidth=0.5, zorder=0)
        label = f"lr = {rate:g}" if share > WIDE else f"{rate:g}" if share > NARROW else ""
        panel.annotate(
            label,
            (start, 1),
            (1, 1),
            xycoords=panel.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=6.5,
            verticalalignment="bottom",
        )
