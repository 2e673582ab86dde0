import io
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm

from plots import draw_dynamics
from plots.marks import marked
from plots.style import RC

SOURCE = "closed form from BN's tensors, not measured on images"


def snapshots(stds, source="batchnorm"):
    """A frame of stds by iteration: two layers a stage."""
    rows = [
        {
            "network": "resnet-8",
            "iteration": iteration,
            "layer": i + 1,
            "stage": i // 2 + 1,
            "std": std,
        }
        for iteration, layers in stds.items()
        for i, std in enumerate(layers)
    ]
    return pd.DataFrame(rows).assign(source=source)


def epochs(means):
    return pd.DataFrame({"iteration": list(means), "mean_std": list(means.values())})


FRAME = snapshots({0: [1, 1, 1, 1], 10: [1, 2, 1, 2], 40: [0.5, 2, 0.5, 3]})
STEPS = [(0, 0.1), (20, 0.01), (30, 0.001)]


def cells(figure):
    """The x edges, the y edges, and the values (layers, snapshots) of the heat map."""
    mesh = figure.axes[0].collections[0]
    corners = mesh.get_coordinates()  # (layers + 1, snapshots + 1, 2)
    return (
        corners[0, :, 0].tolist(),
        corners[:, 0, 1].tolist(),
        mesh.get_array().reshape(len(corners) - 1, -1).tolist(),
    )


def test_the_cells_lie_at_their_iterations():
    """Whatever the order of the frame; the last one does not reach half of the long way beyond the
    end.
    """
    x, y, values = cells(draw_dynamics(FRAME.sample(frac=1, random_state=0)))
    assert x == [-2.5, 5, 25, 42.5]
    assert y == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert values == [[1, 1, 0.5], [1, 2, 2], [1, 1, 0.5], [1, 2, 3]]


def test_even_cells_are_as_wide_as_each_other():
    x, _, _ = cells(draw_dynamics(snapshots({i: [1, 2] for i in range(0, 81, 10)})))
    assert np.diff(x).tolist() == [10] * 9


def test_both_panels_have_the_same_iterations():
    upper, lower, _ = draw_dynamics(FRAME, epochs({15: 1.2, 60: 1.5})).axes
    assert upper.get_xlim() == lower.get_xlim()
    assert lower.get_xlim()[0] <= 0
    assert lower.get_xlim()[1] >= 60
    assert (upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel()) == (
        "layer index",
        "mean std",
        "iteration",
    )


def test_stage_boundaries():
    upper = draw_dynamics(FRAME).axes[0]
    seen = [line for line in upper.lines if line.get_linestyle() != "None"]
    assert [list(line.get_ydata()) for line in seen] == [[2.5, 2.5]]


def test_the_colour_bar_names_the_network():
    figure = draw_dynamics(FRAME)
    assert figure.axes[2].get_xlabel() == "std of ResNet-8's layers"
    mesh = figure.axes[0].collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.5, 3)


def test_a_steep_network_has_logarithmic_colours():
    figure = draw_dynamics(snapshots({0: [1, 1, 1], 10: [30, 2, 1]}))
    assert isinstance(figure.axes[0].collections[0].norm, LogNorm)
    assert figure.axes[2].get_xlabel() == "std of ResNet-8's layers (logarithmic)"
    figure.draw_without_rendering()
    labels = [text.get_text() for text in figure.axes[2].get_xticklabels()]
    assert [label for label in labels if label in ("1", "2", "5", "10", "20")] == [
        "1",
        "2",
        "5",
        "10",
        "20",
    ]
    assert not isinstance(
        draw_dynamics(snapshots({0: [0, 0, 0], 10: [30, 2, 0]})).axes[0].collections[0].norm,
        LogNorm,
    )


def test_the_fine_line_goes_through_all_that_is_known_in_closed_form():
    fine, points = draw_dynamics(FRAME, epochs({5: 1.25, 40: 1.5, 50: 1.75})).axes[1].lines
    assert (points.get_xdata().tolist(), points.get_ydata().tolist()) == (
        [0, 10, 40],
        [1, 1.5, 1.5],
    )
    assert points.get_linestyle() == "None"
    assert fine.get_xdata().tolist() == [0, 5, 10, 40, 50]
    assert fine.get_ydata().tolist() == [1, 1.25, 1.5, 1.5, 1.75]
    assert fine.get_linewidth() < 1


@pytest.mark.parametrize(
    "few", [None, epochs({}), epochs({5: 1.25})], ids=["none", "no row", "one row"]
)
def test_measured_snapshots_are_joined_where_there_are_no_epochs(few):
    figure = draw_dynamics(FRAME.assign(source="hooks"), few)
    fine, points = figure.axes[1].lines
    assert (
        fine.get_xydata().tolist() == points.get_xydata().tolist() == [[0, 1], [10, 1.5], [40, 1.5]]
    )
    assert figure.get_supxlabel() == ""


def test_measured_snapshots_are_not_joined_with_computed_epochs():
    figure = draw_dynamics(FRAME.assign(source="hooks"), epochs({5: 1.25, 50: 1.75}))
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[5, 1.25], [50, 1.75]]
    assert figure.get_supxlabel() == f"fine line: {SOURCE}"
    assert draw_dynamics(FRAME).get_supxlabel() == SOURCE


def steps_of(figure):
    """Where the learning rate's lines are, and its labels: where they begin and what they say."""
    lower = figure.axes[1]
    labels = [(text.xy[0], text.get_text()) for text in lower.texts if text.get_text()]
    return [line.get_xdata()[0] for line in lower.lines[2:]], labels


def test_the_steps_of_the_learning_rate():
    lines, labels = steps_of(draw_dynamics(FRAME, steps=STEPS))
    assert lines == [20, 30]
    assert labels == [(0, "lr = 0.1"), (20, "lr = 0.01"), (30, "lr = 0.001")]


def test_steps_without_room_have_a_short_label_or_none():
    lines, labels = steps_of(
        draw_dynamics(FRAME, steps=[(0, 0.01), (2, 0.1), (30, 0.01), (36, 0.001)])
    )
    assert lines == [2, 30, 36]
    assert labels == [(2, "lr = 0.1"), (30, "0.01"), (36, "0.001")]


def test_steps_to_come_are_not_drawn():
    lines, labels = steps_of(draw_dynamics(FRAME, steps=[(0, 0.1), (300, 0.01), (400, 0.001)]))
    assert lines == []
    assert labels == [(0, "lr = 0.1")]


def test_no_label_lies_upon_another_or_is_cut():
    with mpl.rc_context(RC):
        figure = draw_dynamics(FRAME, steps=STEPS)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[1].texts]
    upper, lower, _ = figure.axes
    for left, right in pairwise(boxes):
        assert left.x1 < right.x0
    assert all(
        lower.get_window_extent().y1 <= box.y0 < box.y1 <= upper.get_window_extent().y0
        for box in boxes
    )
    assert boxes[-1].x1 <= figure.bbox.x1


def test_every_cell_of_the_map_is_marked():
    marks = [shown for _, shown in marked(draw_dynamics(FRAME))]
    assert {shown.network for shown in marks} == {"resnet-8"}
    points = [point for shown in marks for point in shown.points]
    assert sorted(points) == sorted(zip(FRAME["layer"], FRAME["iteration"], strict=True))


def test_one_snapshot_of_one_layer():
    figure = draw_dynamics(snapshots({0: [2]}), epochs({}), [(0, 0.1)])
    assert cells(figure) == ([-0.5, 0.5], [0.5, 1.5], [[2]])
    left, right = figure.axes[1].get_xlim()
    assert [tick for tick in figure.axes[1].get_xticks() if left <= tick <= right] == [0]
    x, _, _ = cells(draw_dynamics(snapshots({0: [2]}), epochs({391: 1.0, 800: 1.0})))
    assert x == [-50, 50]  # wide enough to be seen


def test_text_is_text_and_the_same_figure_gives_the_same_bytes():
    def save():
        buffer = io.BytesIO()
        with mpl.rc_context(RC):
            draw_dynamics(FRAME, epochs({5: 1.25}), STEPS).savefig(
                buffer, format="svg", metadata={"Date": None}
            )
        return buffer.getvalue()

    svg = save()
    assert b">lr = 0.001</text>" in svg
    assert save() == svg


def test_the_width_is_a_column_and_the_callers_style_is_left_alone():
    with mpl.rc_context({"font.size": 13}):
        before = dict(mpl.rcParams)
        assert draw_dynamics(FRAME).get_figwidth() == 3.3
        assert dict(mpl.rcParams) == before


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="an empty frame: there is nothing to draw"):
        draw_dynamics(FRAME.iloc[:0])
    both = pd.concat([FRAME, FRAME.assign(source="hooks")])
    with pytest.raises(
        ValueError,
        match="a layer twice at one iteration: draw one network and one source at a time",
    ):
        draw_dynamics(both)
