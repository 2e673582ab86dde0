"""A page to look at: figures, table and provenance in one HTML document that needs nothing from
elsewhere.

    html = make_page("Layer responses", [("Fig. 7", draw_fig7(frame))], frame, provenance)

Curves that were marked (plots.marks) can be looked at point by point, with mouse, finger or arrow
keys, and be switched on and off; all other figures are shown as they are. The page reads well
without its script, too.
"""

from __future__ import annotations

import io
import json
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots.marks import Mark, marked
from plots.style import RC

FIRST = (  # the columns to be read first
    *("network", "member", "iteration", "lr", "layer"),
    *("std", "within", "between", "difference", "stage", "name", "source"),
)
NOT_XML = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]"
)  # characters that no XML may hold
GREY = re.compile(r"#([0-9a-f]{2})\1\1\b")
DPI = 300  # of images within a figure
SMALLEST, LARGEST = (
    1.4,
    2.3,
)  # CSS pixels a point (1/72 in): the width of a figure on a phone, and on a large screen
Rows = dict[
    tuple[str | int, ...], list[int]
]  # rows of the table, from 0, by (network, layer[, iteration])


def make_page(
    title: str,
    figures: Sequence[tuple[str, Figure]],
    table: pd.DataFrame,
    provenance: dict[str, Any],
) -> str:
    """One HTML document: it loads nothing, and its own script is the only one that may run in it.

    figures: caption and figure. table: one row a layer and network (and iteration), with columns of
    analysis/measuring/frame.py, of which network and layer are needed; the marks of the figures
    (plots.marks) refer to them. provenance: JSON by name (of a network, as a rule). The same
    arguments give the same text; the figures are left as they were. Raises TypeError for a
    provenance that JSON cannot hold.
    """
    networks = list_networks(table, figures)
    rows = rows_by_point(table)
    drawn = [
        draw_svg(figure, f"f{i}", caption, networks, rows)
        for i, (caption, figure) in enumerate(figures)
    ]
    template = files("plots").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "title": escape(title),
        "switches": write_switches(networks, drawn),
        "figures": "\n".join(
            write_figure(caption, svg) for (caption, _), svg in zip(figures, drawn, strict=True)
        ),
        "table": write_table(table, networks),
        "provenance": "\n".join(write_details(name, entry) for name, entry in provenance.items()),
        "digest": digest(template),
    }
    page = re.sub("<!--([a-z]+)-->", lambda found: parts[found[1]], template)
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", page)


def list_networks(table: pd.DataFrame, figures: Iterable[tuple[str, Figure]]) -> list[str]:
    """The networks in the order of the table, then those that only a figure shows."""
    drawn = [shown.network for _, figure in figures for _, shown in marked(figure)]
    return list(dict.fromkeys([*table["network"].astype(str), *drawn]))


def rows_by_point(table: pd.DataFrame) -> Rows:
    """Which rows of the table tell of a network's layer, and of it at an iteration, where the table
    has iterations.
    """
    rows: Rows = {}
    iterations = table.get("iteration", pd.Series([None] * len(table)))
    for i, (network, layer, iteration) in enumerate(
        zip(table["network"], table["layer"], iterations, strict=True)
    ):
        if pd.notna(layer):
            rows.setdefault((str(network), int(layer)), []).append(i)
            if pd.notna(iteration):
                rows.setdefault((str(network), int(layer), int(iteration)), []).append(i)
    return rows


def draw_svg(
    figure: Figure, name: str, caption: str, networks: list[str], rows: Rows
) -> ElementTree.Element:
    """A figure as an <svg> that can stand in HTML, beside others: `name` makes its ids unique.

    Each marked artist bears data-network, the position of its network in `networks`, and a curve
    data-points: a list of [x, y, row, ...] with x and y in the units of the SVG and rows of the
    table.
    """
    artists = marked(figure)
    svg = parse_svg(save_svg(figure, [artist for artist, _ in artists]), name)
    groups = {element.get("id"): element for element in svg.iter() if "id" in element.attrib}
    for i, (artist, shown) in enumerate(artists):
        group = groups.get(f"{name}-mark-{i}")
        if group is None:
            continue  # invisible, so it was not drawn
        group.set("data-network", str(networks.index(shown.network)))
        if points := locate(figure, artist, shown, rows):
            group.set("data-points", json.dumps(points, separators=(",", ":")))
    svg.attrib |= {"role": "img", "aria-label": NOT_XML.sub("", caption), "data-figure": name}
    return svg


def save_svg(figure: Figure, artists: Sequence[Artist]) -> str:
    """A figure as SVG text, in which each of the artists is a group with the id `mark-` and its
    position.
    """
    gids = [artist.get_gid() for artist in artists]
    buffer = io.StringIO()
    try:
        for i, artist in enumerate(artists):
            artist.set_gid(f"mark-{i}")
        with mpl.rc_context(
            {**RC, "svg.fonttype": "path"}
        ):  # a viewer may lack the font: another's words are wider
            figure.savefig(buffer, format="svg", dpi=DPI)
    finally:
        for artist, gid in zip(artists, gids, strict=True):
            artist.set_gid(gid)
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", buffer.getvalue())


def parse_svg(text: str, name: str) -> ElementTree.Element:
    """Matplotlib's SVG as an element: no namespaces, no style sheet, and `name` before every id and
    what refers to it.

    A style sheet within it would hold for the whole page, as ids do; plots/page.html has its one
    rule.
    """
    svg = ElementTree.fromstring(text)
    for parent in [*svg.iter()]:
        for child in [*parent]:
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
        parent.tag = parent.tag.rpartition("}")[2]
        parent.attrib = {key.rpartition("}")[2]: value for key, value in parent.attrib.items()}
        for key, value in parent.attrib.items():
            if key == "id":
                parent.set(key, f"{name}-{value}")
            elif key == "href" and value.startswith("#"):
                parent.set(key, f"#{name}-{value[1:]}")
            else:
                parent.set(key, GREY.sub(write_grey, value.replace("url(#", f"url(#{name}-")))
    for size in (
        "width",
        "height",
    ):  # the viewBox holds the proportions, the page decides on the size
        del svg.attrib[size]
    return svg


def write_grey(found: re.Match[str]) -> str:
    """A grey as a mixture of the page's pen and paper, which change places in the dark; colours
    stay as they are.

    >>> [GREY.sub(write_grey, color) for color in ("#000000", "#cccccc", "#ff0000")]
    ['var(--pen)', 'color-mix(in srgb, var(--pen) 20%, var(--paper))', '#ff0000']
    """
    if found[1] in ("00", "ff"):
        return "var(--pen)" if found[1] == "00" else "var(--paper)"
    return f"color-mix(in srgb, var(--pen) {100 - int(found[1], 16) / 2.55:.0f}%, var(--paper))"


def locate(figure: Figure, artist: Artist, shown: Mark, rows: Rows) -> list[list[float]]:
    """[x, y, row, ...] of every point of a line that lies within its panel and has a row in the
    table.
    """
    if not isinstance(artist, Line2D) or artist.axes is None or not shown.points:
        return []
    pixels = artist.get_transform().transform(
        np.asarray(artist.get_xydata(), dtype=float)
    )  # (points, 2)
    box = artist.axes.get_window_extent().padded(1)
    height = figure.bbox.height
    unit = 72 / figure.dpi  # an SVG is drawn at 72 dots an inch, and its y grows downwards
    return [
        [round(x * unit, 2), round((height - y) * unit, 2), *rows[shown.network, *point]]
        for (x, y), point in zip(pixels.tolist(), shown.points, strict=True)
        if box.contains(x, y) and (shown.network, *point) in rows
    ]


def write_switches(networks: list[str], drawn: Sequence[ElementTree.Element]) -> str:
    """A checkbox for each network that a figure shows, with the stroke of its curve; the script
    makes them visible.
    """
    switches = []
    for i, network in enumerate(networks):
        groups = [group for svg in drawn for group in svg.iterfind(f".//*[@data-network='{i}']")]
        groups.sort(
            key=lambda group: "data-points" not in group.attrib
        )  # its own curve before pale ones and bands
        path = next((path for group in groups if (path := group.find(".//path")) is not None), None)
        if path is not None:
            stroke = ElementTree.Element(
                "path", {"d": "M 1 4 H 21", "style": path.get("style", "")}
            )
            switches.append(
                f'<label><input type="checkbox" value="{i}" checked><svg viewBox="0 0 22 8" aria-hidden="true">'
                f"{write_element(stroke)}</svg>{escape(network)}</label>"
            )
    return (
        "\n".join(["<fieldset hidden><legend>Networks</legend>", *switches, "</fieldset>"])
        if switches
        else ""
    )


def width_of(svg: ElementTree.Element) -> float:
    """In points, as it was drawn."""
    return float(svg.get("viewBox", "0 0 0 0").split()[2])


def write_figure(caption: str, svg: ElementTree.Element) -> str:
    return (
        f'<figure style="flex-basis: {LARGEST * width_of(svg):.0f}px"><figcaption>{escape(caption)}</figcaption>'
        f'<div class="scroll"><div class="drawing" style="min-width: {SMALLEST * width_of(svg):.0f}px">'
        f"\n{write_element(svg)}\n</div></div></figure>"
    )


def write_element(element: ElementTree.Element) -> str:
    return ElementTree.tostring(element, encoding="unicode")


def write_table(table: pd.DataFrame, networks: list[str]) -> str:
    """The table without its empty columns; numbers are rounded, and whole in data-value, by which
    they are sorted.
    """
    table = table.dropna(axis="columns", how="all")
    table = table[
        sorted(table, key=lambda column: FIRST.index(column) if column in FIRST else len(FIRST))
    ]
    numeric = {str(column): pd.api.types.is_numeric_dtype(table[column]) for column in table}
    align = {column: ' class="number"' if number else "" for column, number in numeric.items()}
    heads = "".join(
        f'<th scope="col" data-key="{escape(column)}"{align[column]}>{escape(column)}</th>'
        for column in numeric
    )
    lines = []
    for row, network in zip(
        table.itertuples(index=False, name=None), table["network"].astype(str), strict=True
    ):
        cells = "".join(
            write_cell(value, align[column]) for column, value in zip(numeric, row, strict=True)
        )
        lines.append(f'<tr data-network="{networks.index(network)}">{cells}</tr>')
    return "\n".join([f"<table><thead><tr>{heads}</tr></thead><tbody>", *lines, "</tbody></table>"])


def write_cell(value: Any, align: str) -> str:
    if pd.isna(value):
        return f"<td{align}></td>"
    if isinstance(value, float):
        return f'<td{align} data-value="{float(value)!r}">{write_number(value)}</td>'
    return f"<td{align}>{escape(str(value))}</td>"


def write_number(value: float) -> str:
    """Four decimals, as the commands print them; a number too small or too large for that in powers
    of ten.

    >>> [write_number(value) for value in (0.99671, 26.34881, 0.0, 4.2e-7)]
    ['0.9967', '26.3488', '0.0000', '4.200e-07']
    """
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def write_details(name: str, entry: Any) -> str:
    text = escape(json.dumps(entry, indent=2, ensure_ascii=False), quote=False)
    return f"<details><summary>{escape(name)}</summary><pre>{text}</pre></details>"


def digest(template: str) -> str:
    """The script's digest as a Content-Security-Policy names it: no other script runs, whatever a
    label may hold.
    """
    script = re.search("<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None  # plots/page.html has one
    return "sha256-" + b64encode(sha256(script[1].encode()).digest()).decode()
