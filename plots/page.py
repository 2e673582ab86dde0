"""A page to look at: curves, figures, table and provenance in one HTML file that needs nothing else.

html = make_page("Layer responses", [("Fig. 7", draw_fig7(frame))], frame, provenance)

Its script (plots/page.js) draws the curves from the data in the page; without it, the figures and
the tables are there.
"""

from __future__ import annotations

import io
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from plots.style import OPTIONAL, Looks, styles

FIRST = (  # the columns to be read first
    *("network", "member", "iteration", "lr", "layer", "addition", "std", "std_error", "ratio"),
    *("within", "between", "difference", "stage", "name", "source"),
)
QUANTITIES = (  # what can be drawn over the layers, if the table has it
    *("std", "difference", "within", "between", "mean", "ratio"),
    *("branch_std", "shortcut_std", "after_std", "correlation"),
)
FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]"
)  # characters that no XML may hold
PIXELS = 110  # of the page, an inch of a figure


def make_page(
    title: str,
    figures: Sequence[tuple[str, Figure]],
    table: pd.DataFrame,
    provenance: Mapping[str, Any],
    *,
    summary: pd.DataFrame | None = None,
    verdicts: pd.DataFrame | None = None,
    facts: Mapping[str, str] | None = None,
    paper: pd.DataFrame | None = None,
) -> str:
    """Return one HTML document that loads nothing and runs no script but its own.

    figures: pairs of a caption and a figure; the networks have the colours of the first figure.
    table: a row a layer (or addition) and network, with columns network and layer (or addition).
    provenance: where the numbers come from: mappings, lists, texts and numbers, by name.
    summary: a table for the top, as the commands print it.
    verdicts: columns sentence and, if there, statement and verdict.
    facts: what to know first: the number of images, the data, the date, the command.
    paper: columns kind, depth, layer, std: the paper's curves.

    The same arguments give the same text.
    """
    pieces = {
        name: files("plots").joinpath(name).read_text("utf-8") for name in ("page.html", "page.js")
    }
    script = pieces["page.js"]
    table = order_columns(table)
    looks: Looks = next((figure.looks for _, figure in figures if hasattr(figure, "looks")), {})
    data = json.dumps(embed(title, table, looks, paper), separators=(",", ":"))
    parts = {
        "title": escape(title),
        "facts": write_tree(facts) if facts else "",
        "summary": "" if summary is None else write_table(summary),
        "verdicts": "" if verdicts is None else write_verdicts(verdicts),
        "figures": "\n".join(write_figure(*pair) for pair in figures),
        "table": write_table(table),
        "provenance": "\n".join(write_section(*item) for item in provenance.items()),
        "data": data.replace("<", r"\u003c"),
        "script": script,
        "digest": "sha256-" + b64encode(sha256(script.encode()).digest()).decode(),
    }
    page = re.sub("<!--([a-z]+)-->", lambda found: parts[found[1]], pieces["page.html"])
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", page)


def order_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without its empty columns, those of FIRST before all others."""
    table = table.dropna(axis="columns", how="all")
    order = {column: i for i, column in enumerate(FIRST)}
    return table[sorted(table, key=lambda column: order.get(column, len(order)))]


def embed(
    title: str, table: pd.DataFrame, looks: Looks, paper: pd.DataFrame | None
) -> dict[str, Any]:
    """Return what the script draws from, as JSON can hold it; rows are those of the table."""
    full = table.assign(**{key: OPTIONAL[key] for key in ("kind", "depth") if key not in table})
    full = full.assign(network=full["network"].astype(str), depth=full["depth"].fillna(0))
    networks, looks, keys = {}, styles(full) | looks, ["network", "kind", "depth"]
    for network, kind, depth in full.groupby(keys, sort=False, dropna=False).groups:
        color = to_hex(looks[network]["color"])
        networks[network] = {"color": color, "dashed": "dashes" in looks[network], "paper": []}
        if paper is not None:
            curve = paper[(paper["kind"] == kind) & (paper["depth"] == depth)].sort_values("layer")
            networks[network]["paper"] = curve["std"].tolist()
    known = table.notna() & ~table.isin([np.inf, -np.inf])
    return {
        "title": title,
        "x": "layer" if "layer" in table else "addition",
        "quantities": [name for name in QUANTITIES if name in table],
        "networks": networks,
        "columns": list(table),
        "rows": table.astype(object).where(known, None).to_numpy().tolist(),
    }


def write_figure(caption: str, figure: Figure) -> str:
    """Return a figure as an image within the page, sharp on a screen of twice the usual density."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=2 * PIXELS)
    image = b64encode(content.getvalue()).decode()
    return (
        f'<figure style="flex-basis: {PIXELS * figure.get_figwidth():.0f}px">'
        f"<figcaption>{escape(caption)}</figcaption>"
        f'<img alt="{escape(caption)}" src="data:image/png;base64,{image}"></figure>'
    )


def write_table(table: pd.DataFrame) -> str:
    """Return a table as HTML; numbers are rounded, and aligned on the right."""
    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in table]
    align = [' class="number"' if number else "" for number in numeric]
    heads = "".join(
        f'<th scope="col"{style}>{escape(str(name))}</th>'
        for name, style in zip(table, align, strict=True)
    )
    lines = [
        "<tr>" + "".join(map(write_cell, row, align)) + "</tr>"
        for row in table.itertuples(index=False, name=None)
    ]
    return "\n".join([f"<table><thead><tr>{heads}</tr></thead><tbody>", *lines, "</tbody></table>"])


def write_cell(value: Any, align: str) -> str:
    if pd.isna(value):
        return f"<td{align}></td>"
    text = write_number(value) if isinstance(value, float) else str(value)
    return f"<td{align}>{escape(text)}</td>"


def write_number(value: float) -> str:
    """Return four decimals as the commands print them, or a power of ten if that says too little.

    >>> [write_number(value) for value in (0.99671, 26.34881, 0.0, 4.2e-7)]
    ['0.9967', '26.3488', '0.0000', '4.200e-07']
    """
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def write_verdicts(verdicts: pd.DataFrame) -> str:
    """Return the sentences as a list, each with its verdict, below the statement they judge."""
    columns = ["statement", "verdict", "sentence"]
    rows = verdicts.reindex(columns=columns, fill_value="").fillna("").map(escape)
    lines = []
    for statement, judged in rows.groupby("statement", sort=False):
        lines += [f"<li><strong>{statement}</strong></li>"] if statement else []
        for verdict, sentence in zip(judged["verdict"], judged["sentence"], strict=True):
            lines.append(f'<li data-verdict="{verdict}"><b>{verdict}</b> {sentence}</li>')
    return "\n".join(['<ul class="verdicts">', *lines, "</ul>"])


def write_section(name: str, entry: Any) -> str:
    return f"<details><summary>{escape(name)}</summary>{write_tree(entry)}</details>"


def write_tree(entry: Any) -> str:
    """Return nested mappings and lists as nested HTML lists; what is empty is left out."""
    if isinstance(entry, Mapping):
        parts = [
            f"<dt>{escape(str(key))}</dt><dd>{write_tree(value)}</dd>"
            for key, value in entry.items()
            if value not in (None, "", [], {})
        ]
        return f"<dl>{''.join(parts)}</dl>"
    if isinstance(entry, list | tuple):
        return f"<ul>{''.join(f'<li>{write_tree(value)}</li>' for value in entry)}</ul>"
    return escape(str(entry))
