import numpy as np
import pandas as pd
import pytest

from plots import draw_compare, draw_stages


def curves(**entries):
    """Return entries of one member or more, each a list of stds: two layers a stage."""
    rows = [
        {"entry": entry, "network": "x", "member": member, "layer": i + 1}
        | {"stage": i // 2 + 1, "std": std, "source": "hooks"}
        for entry, members in entries.items()
        for member, stds in enumerate(members)
        for i, std in enumerate(stds)
    ]
    return pd.DataFrame(rows)


def minus(second, values, **columns):
    frame = pd.DataFrame({"first": "a", "second": second, "difference": values})
    places = (np.arange(len(values)) + 0.5) / len(values)
    return frame.assign(layer=range(1, len(values) + 1), position=places, **columns)


TWO = curves(a=[[1, 4, 2, 3]], b=[[2, 2, 2, 1]])
DIFFERENCE = minus("b", [1, -2, 0, -2])


def data(line):
    return np.asarray(line.get_ydata()).tolist()


def test_curves_in_both_orders_and_their_difference_over_the_same_layers():
    figure = draw_compare(TWO, [DIFFERENCE])
    original, below, ordered = figure.axes
    assert [data(line) for line in original.lines[:2]] == [[1, 4, 2, 3], [2, 2, 2, 1]]
    assert [data(line) for line in ordered.lines] == [[4, 3, 2, 1], [2, 2, 2, 1]]
    assert data(below.lines[1]) == [1, -2, 0, -2]
    assert below.get_ylabel() == "std minus a"
    assert len({panel.get_xlim() for panel in figure.axes}) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_the_largest_difference_is_named():
    differences = [DIFFERENCE, minus("c", [0, 0.5, 2.25, 0])]
    frame = pd.concat([TWO, curves(c=[[1, 4.5, 4.25, 3]])])
    figure = draw_compare(frame, differences)
    title = figure.axes[1].get_title(loc="right")
    assert title == "largest: +2.25, c, layer 3"
    assert figure.looks["c"]["color"] == figure.axes[1]._right_title.get_color()


def test_a_difference_within_twice_its_error_is_pale_and_not_the_largest():
    figure = draw_compare(TWO, minus("b", [1, -2, 0, -1.5], std_error=[0.4, 1.5, 0.1, 0.5]))
    _, pale, sure, *_ = figure.axes[1].lines
    assert data(pale) == [1, -2, 0, -1.5]
    assert pale.get_linewidth() < sure.get_linewidth()
    np.testing.assert_equal(data(sure), [1, np.nan, np.nan, -1.5])
    assert figure.axes[1].get_title(loc="right") == "largest: -1.5, b, layer 4"
    assert figure.get_supxlabel() == "pale: a difference within twice its sampling error"
    none = draw_compare(TWO, minus("b", [1, -2, 0, -1.5], std_error=5.0)).axes[1]
    assert none.get_title(loc="right") == "no difference beyond twice its sampling error"


def test_a_steep_network_flattens_neither_the_others_nor_their_differences():
    frame = curves(a=[[1, 1, 2, 1]], b=[[30, 2, 2, 1]], c=[[1, 2, 2, 1]])
    figure = draw_compare(frame, [minus("b", [29, 1, 0, 0]), minus("c", [0, 1, 0, 0])])
    assert all(panel.get_ylim()[1] < 3 for panel in figure.axes)
    assert [text.get_text() for text in figure.axes[0].texts] == ["↑ 30"]
    assert draw_stages(frame).axes[0].get_ylim()[1] < 3


def test_stage_boundaries():
    for panel in draw_compare(TWO, DIFFERENCE).axes[:2]:
        assert [2.5, 2.5] in [list(line.get_xdata()) for line in panel.lines]


def test_other_depths_are_drawn_by_relative_depth():
    frame = curves(a=[[1, 4]], b=[[2, 2, 2, 1]])
    figure = draw_compare(frame, minus("b", [1, -2]))
    original, below, _ = figure.axes
    assert original.lines[0].get_xdata().tolist() == [0.25, 0.75]
    assert below.lines[1].get_xdata().tolist() == [0.25, 0.75]
    assert [panel.get_xlabel() for panel in figure.axes] == [
        "relative depth (original)",
        "relative depth (original)",
        "relative rank (sorted by magnitude)",
    ]


def test_a_group_is_a_mean_and_a_band():
    frame = curves(a=[[1, 4, 2], [3, 2, 2]], b=[[1, 1, 1]])
    original, _, ordered = draw_compare(frame, minus("b", [0, 0, 0])).axes
    assert data(original.lines[0]) == [2, 3, 2]
    assert data(ordered.lines[0]) == [3.5, 2, 1.5]  # 4 2 1 and 3 2 2
    [band] = original.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 1), (1, 3), (2, 2), (2, 4), (3, 2)}


def test_stages_show_every_layer_and_the_median_in_the_colours_of_the_curves():
    frame = curves(a=[[1, 4, 2, 3]], b=[[2, 2, 2, 1], [5, 5, 5, 5]])
    figure = draw_stages(frame)
    [panel] = figure.axes
    assert [text.get_text() for text in panel.get_xticklabels()] == ["1", "2"]
    assert [sorted(data(line)) for line in panel.lines] == [[1, 2, 3, 4], [1, 2, 2, 2, 5, 5, 5, 5]]
    medians = [segment[0, 1] for lines in panel.collections for segment in lines.get_segments()]
    assert medians == [2.5, 2.5, 3.5, 3.5]
    assert figure.looks == draw_compare(frame, minus("b", [0, 0, 0, 0])).looks


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="has no column 'layer'"):
        draw_stages(TWO.drop(columns="layer"))
