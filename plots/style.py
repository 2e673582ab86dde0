"""What all figures share: their style, the colour of each network, panels, axes, legends and notes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import wrap
from typing import Any, TypeAlias, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

Style: TypeAlias = dict[str, Any]  # properties of a line
Looks: TypeAlias = dict[str, Style]  # by network
Frames: TypeAlias = pd.DataFrame | Sequence[pd.DataFrame]

COLUMN, PAGE = 3.3, 6.9  # inches: one column and both columns of a CVPR page
COLORS = sns.color_palette("colorblind").as_hex()
PALETTES: dict[str, dict[int, str]] = {  # colours by depth
    "paper": {20: "#bfbf00", 56: "#ff0000", 110: "#000000"},
    "colorblind": {20: COLORS[0], 56: COLORS[3], 110: "#000000"},
}
OTHERS = tuple(COLORS[i] for i in (0, 2, 4, 1, 9, 5))  # none is close to the paper's red
MARKERS = {20: "o", 56: "s", 110: "^"}  # by depth
OTHER_MARKERS = "DvPX<>"
DASHES = {"plain": (3.0, 1.2)}  # in line widths; all other kinds are solid
LONGEST = 40  # characters of a label; longer ones lose their middle
FLAT = 3.0  # times the median of the curves' maxima: a higher curve would flatten the others
COMPUTED = "closed form from BN's tensors, not measured on images"
OPTIONAL: Style = {"network": "network", "kind": "other", "depth": 0, "stage": 1}
EMPTY = "an empty frame: there is nothing to draw"
KEYS = ["network", "source", "member", "iteration"]  # a layer occurs once for each of these

TICKS = {"labelsize": 7, "major.width": 0.5, "major.size": 2, "direction": "in"}
RC: Any = {  # on top of matplotlib's defaults, for drawing and for saving
    "font.family": ["STIXGeneral", "serif"],  # a Times that comes with matplotlib
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.labelpad": 2,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.title_fontsize": 9,
    "figure.labelsize": 8,
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in TICKS.items()},
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.0,
    "legend.labelspacing": 0.25,
    "lines.linewidth": 1.0,
    "lines.markersize": 2.4,
    "lines.markeredgewidth": 0.7,
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "layer-responses",  # the same figure gives the same bytes
    "pdf.fonttype": 42,
}


@contextmanager
def own_style() -> Iterator[None]:
    """Draw in the style of this project, whatever the user's rc file says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        yield


class Drawing(Figure):
    """A figure that belongs to no window, keeps its style, and shows itself in a notebook.

    looks: line properties by network, for a page that draws the same networks again.
    """

    looks: Looks

    def draw(self, renderer: Any) -> None:
        """Draw in the project's style: matplotlib makes ticks as late as this."""
        with own_style():
            super().draw(renderer)

    def savefig(self, *args: Any, **options: Any) -> None:
        """Save in the project's style; arguments as for matplotlib's Figure."""
        with own_style():
            super().savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=200)
        return content.getvalue()


def gather(frames: Frames, *needed: str) -> pd.DataFrame:
    """Return one frame of one or several, with all columns that the figures read.

    frames: a frame, or frames of several networks. Labels that repeat get a number.
    needed: columns that must be there; missing optional ones are filled in.

    Raises ValueError if there is nothing to draw, or if a needed column is missing.
    """
    parts = []
    seen: set[tuple[Any, ...]] = set()
    for part in [frames] if isinstance(frames, pd.DataFrame) else frames:
        if missing := [column for column in needed if column not in part]:
            found = ", ".join(map(str, part)) or "no columns"
            raise ValueError(f"the frame has no column {missing[0]!r}; it has {found}")
        part = part[[key for key in part if key in needed or part[key].notna().any()]]
        computed = "norm" in part and "count" not in part  # as models.closed_form returns it
        defaults = OPTIONAL | {"dominated": False, "source": "batchnorm" if computed else "hooks"}
        part = part.assign(**{key: defaults[key] for key in defaults if key not in part})
        labels, number = part["network"].astype(str), 1
        while seen & (rows := rows_of(part)):
            number += 1
            part = part.assign(network=labels + f" ({number})")
        seen |= rows
        parts.append(part)
    if sum(map(len, parts)) == 0:
        raise ValueError(EMPTY)
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(network=frame["network"].astype(str), depth=frame["depth"].fillna(0))


def rows_of(part: pd.DataFrame) -> set[tuple[Any, ...]]:
    """Return the combinations of KEYS in a frame."""
    keys = part.reindex(columns=KEYS, fill_value="").drop_duplicates()
    return set(keys.astype(str).itertuples(index=False, name=None))


def styles(frame: pd.DataFrame, palette: str = "paper", distinct: bool = False) -> Looks:
    """Return the line properties of every network of a frame: one colour each.

    frame: columns network, kind and depth. The first network of a kind and depth gets the
        palette's colour for its depth, all others get colours of their own.
    palette: "paper" or "colorblind".
    distinct: whether a plain and a residual network of one depth need different colours.
    """
    check_choice("palette", palette, PALETTES)
    networks = frame.drop_duplicates("network")[["network", "kind", "depth"]]
    taken: set[Any] = set()
    result: Looks = {}
    for network, kind, depth in networks.itertuples(index=False):
        color = PALETTES[palette].get(depth) if kind in ("residual", "plain") else None
        key = color if distinct else (color, kind)
        if key in taken:
            color = None
        taken.add(key)
        dashes = {"dashes": DASHES[kind]} if kind in DASHES else {}
        marker = MARKERS.get(depth) if color else None
        result[network] = {"label": display_name(network), "color": color, "marker": marker}
        result[network] |= {"markerfacecolor": "white" if dashes else color} | dashes
    others = [style for style in result.values() if style["color"] is None]
    used = {style["color"] for style in result.values()}
    for i, (style, color) in enumerate(
        zip(others, distinct_colors(len(others), used), strict=True)
    ):
        style |= {"color": color, "marker": OTHER_MARKERS[i % len(OTHER_MARKERS)]}
        style["markerfacecolor"] = style["markerfacecolor"] or color
    return result


def distinct_colors(count: int, used: Iterable[Any] = ()) -> list[Any]:
    """Return colours that differ from each other and from those used."""
    free = [color for color in OTHERS if color not in used]
    if count <= len(free):
        return free[:count]
    shades = mpl.colormaps["turbo"](np.linspace(0.03, 0.97, count))
    return [mpl.colors.to_hex(shade) for shade in shades]


def display_name(network: str) -> str:
    """Return a label as legends show it: ResNet-56 for resnet-56, any other one as it is."""
    name = network.replace("resnet-", "ResNet-", 1) if network.startswith("resnet-") else network
    if len(name) > LONGEST:
        name = f"{name[: LONGEST // 2]}\N{HORIZONTAL ELLIPSIS}{name[1 - LONGEST // 2 :]}"
    name = name.replace("$", r"\$")  # no formula
    return f" {name}" if name.startswith("_") else name  # matplotlib hides labels with a "_"


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError if an option has a value that does not exist."""
    if value not in choices:
        raise ValueError(f"{option}={value!r}: choose one of {', '.join(choices)}")


def make_panels(
    axes: Any, size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row.

    axes: the caller's panels, or None for new ones in a new figure.
    size: width and height of a new figure in inches. options: of Figure.subplots.

    Raises ValueError if there are not enough axes.
    """
    if axes is None:
        figure = Drawing(figsize=size, layout="constrained")
        return figure, list(np.ravel(figure.subplots(rows, columns, **options)))
    panels = list(np.ravel(axes))
    if len(panels) < rows * columns:
        raise ValueError(f"axes: {len(panels)} given, but this figure has {rows * columns} panels")
    return cast(Figure, panels[0].figure), panels


def add_legend(
    figure: Figure, panel: Axes, looks: Looks, others: Sequence[Any] = (), title: str | None = None
) -> None:
    """Put one legend above all panels of a figure; in a caller's figure, into the first panel.

    looks: line properties by network. others: handles of what else there is to explain.
    title: a text above it.
    """
    handles = [Line2D([], [], **look) for look in looks.values()] + list(others)
    if not isinstance(figure, Drawing):
        panel.legend(handles=handles, title=title)
        return
    figure.looks = looks
    widest = max(len(handle.get_label()) for handle in handles)
    fitting = int(72 * figure.get_figwidth() / (32 + 3.2 * widest))  # a line and its label
    rows = -(-len(handles) // max(1, min(5, fitting)))
    place: Style = {"loc": "outside upper center", "ncols": -(-len(handles) // rows)}
    figure.legend(handles=handles, title=title, **place)


def shared_top(tops: Sequence[float]) -> float:
    """Return the highest of the tops that would not flatten the others.

    >>> shared_top([3.4, 2.7, 26.9, 3.0]), shared_top([0.2, 9.0])
    (3.4, 0.2)
    """
    positive = [top for top in tops if top > 0]
    usual = float(np.percentile(positive, 50, method="lower")) if positive else 0.0
    return max((top for top in positive if top <= FLAT * usual), default=1.0)


def scale_std(panel: Axes, lines: Sequence[Line2D], scale: str = "auto", ylim: Any = None) -> None:
    """Scale a panel's axis of stds and name it.

    scale: "log", "linear", or "auto": linear, but a curve that would flatten all others is clipped.
    ylim: the lowest and the highest std to show, or None for all that scale lets through.
    """
    check_choice("scale", scale, ("auto", "linear", "log"))
    panel.set_ylabel("std (logarithmic)" if scale == "log" else "std")
    if scale == "log":
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    stds = [np.asarray(line.get_ydata(), dtype=float) for line in lines]
    tops = [float(np.nanmax(std, initial=0)) for std in stds]
    top = shared_top(tops)
    steep = [np.nanmedian(std) for std, high in zip(stds, tops, strict=True) if high > top]
    if ylim is None and scale == "auto" and steep and max(steep) <= top:
        low = min(float(np.nanmin(std, initial=top)) for std in stds)
        ylim = (max(0.0, low - 0.05 * (top - low)), top + 0.08 * (top - low))
    if ylim is not None:
        panel.set_ylim(*ylim)
        over = [line for line, high in zip(lines, tops, strict=True) if high > ylim[1]]
        show_clipped(panel, [line for line in over if line.axes is panel])


def show_clipped(panel: Axes, lines: Sequence[Line2D]) -> None:
    """Give each line that leaves the panel an arrow and its highest value, above the edge."""
    for i, line in enumerate(lines):
        x, y = np.asarray(line.get_xydata(), dtype=float).T
        highest = int(np.nanargmax(y))
        panel.annotate(
            f"\N{UPWARDS ARROW} {y[highest]:.3g}",
            (x[highest], 1),
            (20 * i, 1),
            xycoords=panel.get_xaxis_transform(),
            textcoords="offset points",
            color=line.get_color(),
            fontsize=6.5,
            annotation_clip=False,
        )


def note_computed(figure: Figure, networks: pd.Series[str], sources: pd.Series[str]) -> None:
    """Say below a figure which of its networks are computed, not measured."""
    computed = ~networks.isin(networks[sources != "batchnorm"])
    names = ", ".join(map(display_name, networks[computed].unique()))
    if computed.any():
        write_note(figure, COMPUTED if computed.all() else f"{names}: {COMPUTED}")


def write_note(figure: Figure, note: str) -> None:
    """Write a note below a figure, under those that stand there, in lines that fit its width."""
    wide = int(72 * figure.get_figwidth() / 2.8)  # characters
    lines = [part for line in note.splitlines() for part in wrap(line, wide)]
    with own_style():
        text = "\n".join([*figure.get_supxlabel().splitlines(), *lines])
        figure.supxlabel(text, fontsize=6.5, style="italic")
