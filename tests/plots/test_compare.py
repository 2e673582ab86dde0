import numpy as np
import pandas as pd
import pytest

from plots import draw_compare, draw_stages
from plots.marks import marked
from plots.style import COMPUTED


def curves(**entries):
    """Entries of one member or more, each a list of stds: two layers a stage."""
    rows = []
    for entry, members in entries.items():
        for member, stds in enumerate(members):
            rows += [
                {
                    "entry": entry,
                    "network": "x",
                    "member": member,
                    "kind": "other",
                    "depth": None,
                    "layer": i + 1,
                    "stage": i // 2 + 1,
                    "std": std,
                    "source": "hooks",
                }
                for i, std in enumerate(stds)
            ]
    return pd.DataFrame(rows)


def differences(second, values, layers=None):
    count = len(values)
    return pd.DataFrame(
        {
            "first": "a",
            "second": second,
            "layer": layers or range(1, count + 1),
            "difference": values,
            "stage": 1,
        }
        | {"position": (np.arange(count) + 0.5) / count}
    )


def test_curves_in_both_orders_and_their_difference():
    figure = draw_compare(
        curves(a=[[1, 4, 2, 3]], b=[[2, 2, 2, 1]]), [differences("b", [1, -2, 0, -2])]
    )
    original, ordered, below = figure.axes
    assert [line.get_ydata().tolist() for line in original.lines[:2]] == [
        [1, 4, 2, 3],
        [2, 2, 2, 1],
    ]
    assert [line.get_ydata().tolist() for line in ordered.lines] == [[4, 3, 2, 1], [2, 2, 2, 1]]
    assert ordered.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    zero, difference = below.lines[:2]
    assert list(zero.get_ydata()) == [0, 0]
    assert difference.get_ydata().tolist() == [1, -2, 0, -2]
    assert below.get_ylabel() == "std less that of\na"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_steep_curve_does_not_flatten_the_others():
    parts = curves(a=[[1, 1, 2, 1]], b=[[30, 2, 2, 1]])
    original, ordered, below = draw_compare(parts, [differences("b", [29, 1, 0, 0])]).axes
    assert [panel.get_yscale() for panel in (original, ordered, below)] == ["log", "log", "linear"]
    assert draw_stages(parts).axes[0].get_yscale() == "log"


def test_a_network_of_one_layer_is_a_point():
    figure = draw_compare(curves(a=[[1]], b=[[2]]), [differences("b", [1])])
    assert {line.get_marker() for panel in figure.axes[:2] for line in panel.lines} == {"o"}
    assert figure.axes[2].lines[1].get_marker() == "o"


def test_stage_boundaries():
    figure = draw_compare(
        curves(a=[[1, 4, 2, 3]], b=[[2, 2, 2, 1]]), [differences("b", [1, -2, 0, -2])]
    )
    for panel in (figure.axes[0], figure.axes[2]):
        assert [2.5, 2.5] in [list(line.get_xdata()) for line in panel.lines]


def test_other_depths_are_drawn_by_relative_depth():
    figure = draw_compare(curves(a=[[1, 4]], b=[[2, 2, 2, 1]]), [differences("b", [1, -2])])
    original, _, below = figure.axes
    assert original.lines[0].get_xdata().tolist() == [0.25, 0.75]
    assert below.lines[1].get_xdata().tolist() == [0.25, 0.75]
    assert [panel.get_xlabel() for panel in figure.axes] == [
        "relative depth (original)",
        "relative rank (sorted by magnitude)",
        "relative depth",
    ]


def test_a_group_is_a_mean_and_a_band():
    figure = draw_compare(
        curves(a=[[1, 4, 2], [3, 2, 2]], b=[[1, 1, 1]]), [differences("b", [0, 0, 0])]
    )
    original, ordered, _ = figure.axes
    assert original.lines[0].get_ydata().tolist() == [2, 3, 2]
    assert ordered.lines[0].get_ydata().tolist() == [3.5, 2, 1.5]  # 4 2 1 and 3 2 2
    [band] = original.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {
        (1.0, 1.0),
        (1.0, 3.0),
        (2.0, 2.0),
        (2.0, 4.0),
    }


def test_what_is_computed_is_named():
    parts = curves(a=[[1, 4]], b=[[2, 2]])
    notes = []
    for computed in ([], ["b"], ["a", "b"]):
        rows = parts.assign(source=np.where(parts["entry"].isin(computed), "batchnorm", "hooks"))
        figures = draw_compare(rows, [differences("b", [1, -2])]), draw_stages(rows)
        notes.append([figure.get_supxlabel() for figure in figures])
    assert notes == [["", ""], [f"b: {COMPUTED}"] * 2, [COMPUTED] * 2]


def test_points_are_marked_with_their_layers():
    figure = draw_compare(
        curves(a=[[1, 4, 2, 3]], b=[[2, 2, 2, 1]]), [differences("b", [1, -2, 0, -2])]
    )
    marks = [
        shown for artist, shown in marked(figure) if shown.layers and artist in figure.axes[1].lines
    ]
    assert [(shown.network, shown.layers) for shown in marks] == [
        ("a", (2, 4, 3, 1)),
        ("b", (1, 2, 3, 4)),
    ]


def test_stages():
    figure = draw_stages(curves(a=[[1, 4, 2, 3]], b=[[2, 2, 2, 1], [5, 5, 5, 5]]))
    [panel] = figure.axes
    assert [text.get_text() for text in panel.get_xticklabels()] == ["1", "2"]
    strips = [points for points in panel.collections if len(points.get_offsets()) > 1]
    drawn = sorted(y for points in strips for _, y in points.get_offsets())
    assert drawn == pytest.approx(sorted([1, 4, 2, 3, 2, 2, 2, 1, 5, 5, 5, 5]))
    medians = {float(y) for line in panel.lines for y in line.get_ydata()}
    assert medians >= {2.5, 3.5}  # a: of 1 4, of 2 3; b: of 2 2 5 5, of 2 1 5 5
    shown = [(type(artist).__name__, mark.network) for artist, mark in marked(figure)]
    assert (
        shown.count(("PathCollection", "a")) == shown.count(("PathCollection", "b")) == 2
    )  # one a stage
    assert shown.count(("Text", "b")) == 1
