import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from plots import draw_decomposition
from plots.marks import marked
from plots.style import COMPUTED, RC


def parts(network, within, between, source="hooks"):
    """A frame of one network: two layers a stage."""
    within, between = np.array(within, dtype=float), np.array(between, dtype=float)
    index = np.arange(len(within))
    columns = {"network": network, "layer": index + 1, "stage": index // 2 + 1, "source": source}
    return pd.DataFrame(
        columns | {"std": np.hypot(within, between), "within": within, "between": between}
    )


A = parts("resnet-20", [3, 0.5, 1, 2], [4, 0.25, 0, 1])


def stacks(panel):
    """Base and top of the steps in a panel, in the order in which they are drawn."""
    found = []
    for patch in panel.patches:
        tops, _, base = patch.get_data()
        found.append((np.broadcast_to(base, tops.shape).tolist(), tops.round(12).tolist()))
    return found


def test_the_squares_are_stacked_up_to_that_of_std():
    [panel] = draw_decomposition(A.sample(frac=1, random_state=0)).axes
    within, total = [9, 0.25, 1, 4], [25, 0.3125, 1, 5]
    assert stacks(panel) == [([0, 0, 0, 0], within), (within, total)]
    assert [patch.get_data().edges.tolist() for patch in panel.patches] == [
        [0.5, 1.5, 2.5, 3.5, 4.5]
    ] * 2
    assert len({patch.get_facecolor() for patch in panel.patches}) == 2
    assert panel.get_xlim() == (0.5, 4.5)


def test_stage_boundaries():
    [panel] = draw_decomposition(A).axes
    assert [list(line.get_xdata()) for line in panel.lines if line.get_linestyle() != "None"] == [
        [2.5, 2.5]
    ]


def test_layers_are_marked_at_the_upper_edge():
    line, panel = marked(draw_decomposition(A))
    assert panel[1].network == line[1].network == "resnet-20"
    assert line[1].layers == (1, 2, 3, 4)
    assert line[0].get_ydata().tolist() == pytest.approx([25, 0.3125, 1, 5])


def test_the_words():
    figure = draw_decomposition(A)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "within²: the channels' spread (\N{GREEK SMALL LETTER GAMMA})",
        "between²: their offsets (\N{GREEK SMALL LETTER BETA})",
    ]
    assert [handle.get_facecolor() for handle in legend.legend_handles] == [
        patch.get_facecolor() for patch in figure.axes[0].patches
    ]
    assert figure.get_supylabel() == "std²"


def test_the_lowest_panel_of_each_column_names_the_axis():
    rows = pd.concat([A.assign(network=f"resnet-{depth}") for depth in (8, 14, 20, 26, 32)])
    panels = draw_decomposition(rows).axes  # two rows of three, the last one empty
    assert [panel.get_xlabel() for panel in panels] == ["", "", *3 * ["layer index"]]


SHAPES = [(1, (1, 1), 3.3), (2, (1, 2), 3.3), (4, (2, 2), 3.3), (5, (2, 3), 6.9), (10, (3, 4), 6.9)]


@pytest.mark.parametrize(("count", "shape", "width"), SHAPES)
def test_a_panel_a_network(count, shape, width):
    frame = pd.concat([parts(f"plain-{i}", [i + 1], [0]) for i in range(count)])
    figure = draw_decomposition(frame)
    assert [panel.get_title() for panel in figure.axes] == [f"plain-{i}" for i in range(count)]
    assert [stacks(panel)[0][1] for panel in figure.axes] == [[(i + 1) ** 2] for i in range(count)]
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == shape
    assert figure.get_figwidth() == width
    assert len(figure.legends) == 1


def test_a_steep_network_has_an_axis_of_its_own():
    flat, other, steep = (
        parts(name, [top], [0]) for name, top in (("a", 1.0), ("b", 2.0), ("c", 20.0))
    )
    figure = draw_decomposition(pd.concat([flat, steep, other]))
    assert [panel.get_ylim() for panel in figure.axes] == [(0, 4.2), (0, 420), (0, 4.2)]
    assert [panel.get_title() for panel in figure.axes] == ["a", "c (own scale)", "b"]


def test_a_flat_network_does_not_decide_for_the_others():
    tops = {"a": 0.0, "b": 0.01, "c": 1.0, "d": 2.0, "e": 1.0}
    figure = draw_decomposition(pd.concat([parts(name, [top], [0]) for name, top in tops.items()]))
    assert [panel.get_ylim() for panel in figure.axes] == [(0, 4.2)] * 5


def test_nothing_but_zeros():
    [panel] = draw_decomposition(parts("a", [0, 0], [0, 0])).axes
    assert panel.get_ylim() == (0, 1.05)


def test_what_is_computed_is_named():
    hooks, formula = A, parts("plain-20", [1], [0], "batchnorm")
    notes = [
        draw_decomposition(rows).get_supxlabel()
        for rows in (hooks, formula, pd.concat([hooks, formula]))
    ]
    assert notes == ["", COMPUTED, f"plain-20: {COMPUTED}"]


def test_of_two_sources_the_first_is_drawn():
    both = pd.concat([parts("a", [1], [0]), parts("a", [3], [0], "batchnorm")])
    [panel] = draw_decomposition(both).axes
    assert stacks(panel)[0] == ([0], [1])


def test_nothing_is_cut_and_no_title_lies_upon_another():
    names = ["resnet-110", "plain-56", "a label that is rather", "plain-20", "resnet-20"]
    with mpl.rc_context(RC):
        figure = draw_decomposition(pd.concat([A.assign(network=name) for name in names]))
        figure.draw_without_rendering()
        titles = [panel.title.get_window_extent() for panel in figure.axes]
        legend = figure.legends[0].get_window_extent()
    assert all(
        not one.overlaps(other) for one in titles for other in [*titles, legend] if one is not other
    )
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert legend.y1 <= figure.bbox.y1


@pytest.mark.parametrize("count", [2, 10])
def test_long_titles_do_not_lie_upon_each_other(count):
    frame = pd.concat(
        [A.assign(network=f"a label of many words, number {i}, end") for i in range(count)]
    )
    with mpl.rc_context(RC):
        figure = draw_decomposition(frame)
        figure.draw_without_rendering()
        titles = [panel.title.get_window_extent() for panel in figure.axes]
    assert all(not one.overlaps(other) for one in titles for other in titles if one is not other)


def test_text_is_text_and_the_same_figure_gives_the_same_bytes():
    def save():
        buffer = io.BytesIO()
        with mpl.rc_context(RC):
            draw_decomposition(A).savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    svg = save()
    assert b">ResNet-20</text>" in svg
    assert save() == svg


def test_the_callers_style_is_left_alone():
    with mpl.rc_context({"font.size": 13}):
        before = dict(mpl.rcParams)
        draw_decomposition(A)
        assert dict(mpl.rcParams) == before


def test_an_empty_frame():
    with pytest.raises(ValueError, match="an empty frame: there is nothing to draw"):
        draw_decomposition(A.iloc[:0])
