from itertools import pairwise

import pandas as pd
import pytest
from matplotlib.colors import LogNorm

from plots import draw_dynamics
from plots.style import COMPUTED


def snapshots(stds, source="batchnorm"):
    """Return a frame of stds by iteration: two layers a stage."""
    rows = [
        {"network": "resnet-8", "iteration": iteration, "layer": i + 1}
        | {"stage": i // 2 + 1, "std": std, "source": source}
        for iteration, layers in stds.items()
        for i, std in enumerate(layers)
    ]
    return pd.DataFrame(rows)


def epochs(means):
    return pd.DataFrame({"iteration": list(means), "mean_std": list(means.values())})


FRAME = snapshots({0: [1, 1, 1, 1], 10: [1, 2, 1, 2], 40: [0.5, 2, 0.5, 3]})
STEPS = [(0, 0.1), (20, 0.01), (30, 0.001)]


def cells(figure):
    """Return the x edges, the y edges, and the values (layers, snapshots) of the heat map."""
    mesh = figure.axes[0].collections[0]
    corners = mesh.get_coordinates()  # (layers + 1, snapshots + 1, 2)
    values = mesh.get_array().reshape(len(corners) - 1, -1)
    return corners[0, :, 0].tolist(), corners[:, 0, 1].tolist(), values.tolist()


def test_the_cells_lie_at_their_iterations_and_do_not_reach_far_beyond_the_end():
    figure = draw_dynamics(FRAME.sample(frac=1, random_state=0))
    x, y, values = cells(figure)
    assert x == [-2.5, 5, 25, 42.5]
    assert y == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert values == [[1, 1, 0.5], [1, 2, 2], [1, 1, 0.5], [1, 2, 3]]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[2.5, 2.5]]


def test_a_list_of_snapshots_is_one_run():
    parts = [part for _, part in FRAME.groupby("iteration")]
    assert cells(draw_dynamics(parts)) == cells(draw_dynamics(FRAME))


def test_both_panels_have_the_same_iterations():
    upper, lower, bar = draw_dynamics(FRAME, epochs({15: 1.2, 60: 1.5})).axes
    assert upper.get_xlim() == lower.get_xlim()
    assert lower.get_xlim()[1] >= 60
    labels = (upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel(), bar.get_xlabel())
    assert labels == ("layer index", "mean std", "iteration", "std of ResNet-8's layers")


def test_a_steep_network_has_logarithmic_colours():
    figure = draw_dynamics(snapshots({0: [1, 1, 1], 10: [30, 2, 1]}))
    assert isinstance(figure.axes[0].collections[0].norm, LogNorm)
    assert figure.axes[2].get_xlabel() == "std of ResNet-8's layers (logarithmic)"
    figure.draw_without_rendering()
    labels = [text.get_text() for text in figure.axes[2].get_xticklabels()]
    assert {"1", "2", "5", "10", "20"} <= set(labels)
    zeros = draw_dynamics(snapshots({0: [0, 0, 0], 10: [30, 2, 0]}))
    assert not isinstance(zeros.axes[0].collections[0].norm, LogNorm)


def test_the_fine_line_goes_through_all_that_is_known_in_closed_form():
    fine, points = draw_dynamics(FRAME, epochs({5: 1.25, 40: 1.5, 50: 1.75})).axes[1].lines
    assert points.get_xydata().tolist() == [[0, 1], [10, 1.5], [40, 1.5]]
    assert points.get_linestyle() == "None"
    assert fine.get_xdata().tolist() == [0, 5, 10, 40, 50]
    assert fine.get_ydata().tolist() == [1, 1.25, 1.5, 1.5, 1.75]


@pytest.mark.parametrize("few", [None, epochs({}), epochs({5: 1.25})])
def test_measured_snapshots_are_joined_if_there_are_no_epochs(few):
    figure = draw_dynamics(FRAME.assign(source="hooks"), few)
    fine, points = figure.axes[1].lines
    assert fine.get_xydata().tolist() == points.get_xydata().tolist()
    assert figure.get_supxlabel() == ""


def test_measured_snapshots_are_not_joined_with_computed_epochs():
    figure = draw_dynamics(FRAME.assign(source="hooks"), epochs({5: 1.25, 50: 1.75}))
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[5, 1.25], [50, 1.75]]
    assert figure.get_supxlabel() == f"fine line: {COMPUTED}"


RATES = [  # steps, where lines are, and the labels
    (STEPS, [20, 30], ["lr = 0.1", "lr = 0.01", "lr = 0.001"]),
    ([(0, 0.01), (2, 0.1), (30, 0.01), (36, 0.001)], [2, 30, 36], ["lr = 0.1", "0.01", "0.001"]),
    ([(0, 0.1), (300, 0.01)], [], ["lr = 0.1"]),  # a step to come
]


@pytest.mark.parametrize(("steps", "lines", "labels"), RATES)
def test_the_learning_rate_is_named_if_there_is_room(steps, lines, labels):
    lower = draw_dynamics(FRAME, steps=steps).axes[1]
    assert [line.get_xdata()[0] for line in lower.lines[2:]] == lines
    assert [text.get_text() for text in lower.texts if text.get_text()] == labels


def test_no_label_lies_upon_another_or_is_cut():
    figure = draw_dynamics(FRAME, steps=STEPS)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[1].texts]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert boxes[-1].x1 <= figure.bbox.x1


def test_one_snapshot_of_one_layer():
    figure = draw_dynamics(snapshots({0: [2]}), epochs({}), [(0, 0.1)])
    assert cells(figure) == ([-0.5, 0.5], [0.5, 1.5], [[2]])
    x, _, _ = cells(draw_dynamics(snapshots({0: [2]}), epochs({391: 1.0, 800: 1.0})))
    assert x == [-50, 50]  # wide enough to be seen


def test_two_networks_cannot_be_drawn():
    both = pd.concat([FRAME, FRAME.assign(source="hooks")])
    with pytest.raises(ValueError, match="a layer twice at one iteration: draw one network"):
        draw_dynamics(both)
