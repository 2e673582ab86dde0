import numpy as np
import pandas as pd
import pytest

from plots import draw_decomposition


def parts(network, within, between, source="hooks"):
    """Return a frame of one network: two layers a stage."""
    within, between = np.array(within, dtype=float), np.array(between, dtype=float)
    index = np.arange(len(within))
    columns = {"network": network, "layer": index + 1, "stage": index // 2 + 1, "source": source}
    return pd.DataFrame(columns | {"std": np.hypot(within, between), "within": within})


A = parts("resnet-20", [3, 0.5, 1, 2], [4, 0.25, 0, 1])


def stacks(panel):
    """Return base and top of the steps in a panel, in the order in which they are drawn."""
    found = []
    for patch in panel.patches:
        tops, _, base = patch.get_data()
        found.append((np.broadcast_to(base, tops.shape).tolist(), tops.round(12).tolist()))
    return found


def test_the_squares_are_stacked_up_to_that_of_std():
    figure = draw_decomposition(A.sample(frac=1, random_state=0))
    [panel] = figure.axes
    within, total = [9, 0.25, 1, 4], [25, 0.3125, 1, 5]
    assert stacks(panel) == [([0, 0, 0, 0], within), (within, total)]
    assert [patch.get_data().edges.tolist() for patch in panel.patches] == [
        [0.5, 1.5, 2.5, 3.5, 4.5]
    ] * 2
    colors = [patch.get_facecolor() for patch in panel.patches]
    assert [handle.get_facecolor() for handle in figure.legends[0].legend_handles] == colors
    assert [list(line.get_xdata()) for line in panel.lines] == [[2.5, 2.5]]  # a stage ends
    assert (panel.get_ylabel(), panel.get_xlabel()) == ("std²", "layer index")


SHAPES = [(1, (1, 1), 3.3), (4, (2, 2), 3.3), (5, (2, 3), 6.9), (10, (3, 4), 6.9)]


@pytest.mark.parametrize(("count", "shape", "width"), SHAPES)
def test_a_panel_a_network(count, shape, width):
    figure = draw_decomposition([parts(f"plain-{i}", [i + 1], [0]) for i in range(count)])
    assert [panel.get_title().split(" (")[0] for panel in figure.axes] == [
        f"plain-{i}" for i in range(count)
    ]
    assert [stacks(panel)[0][1] for panel in figure.axes] == [[(i + 1) ** 2] for i in range(count)]
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols, figure.get_figwidth()) == (*shape, width)
    named = [panel.get_xlabel() for panel in figure.axes]
    assert named == [""] * (count - shape[1]) + ["layer index"] * shape[1]


def test_a_network_eight_times_as_high_does_not_flatten_the_others():
    tops = {"a": 1.0, "b": 8**0.5, "c": 1.2, "d": 0.0}
    figure = draw_decomposition([parts(name, [top], [0]) for name, top in tops.items()])
    shared = (0, pytest.approx(1.05 * 1.44))
    assert [panel.get_ylim() for panel in figure.axes] == [
        shared,
        (0, pytest.approx(8.4)),
        shared,
        shared,
    ]
    assert [panel.get_title() for panel in figure.axes] == ["a", "b (own scale)", "c", "d"]


def test_of_two_sources_the_first_is_drawn():
    both = pd.concat([parts("a", [1], [0]), parts("a", [3], [0], "batchnorm")])
    assert [stacks(panel)[0] for panel in draw_decomposition(both).axes] == [([0], [1])]


@pytest.mark.parametrize("count", [2, 10])
def test_nothing_is_cut_and_no_title_lies_upon_another(count):
    labels = [f"a label of many words, number {i}, end" for i in range(count)]
    figure = draw_decomposition([A.assign(network=label) for label in labels])
    figure.draw_without_rendering()
    titles = [panel.title.get_window_extent() for panel in figure.axes]
    legend = figure.legends[0].get_window_extent()
    for one in titles:
        assert not any(one.overlaps(other) for other in [*titles, legend] if one is not other)
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert legend.y1 <= figure.bbox.y1
