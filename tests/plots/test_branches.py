"""The figure of residual additions."""

import pandas as pd
import pytest

from plots import draw_branches


def frame_of(network="mine", additions=4, kinds=("attention", "mlp"), stages=1):
    rows = range(1, additions + 1)
    return pd.DataFrame(
        {
            "addition": rows,
            "ratio": [1 / row for row in rows],
            "after_std": [float(row) for row in rows],
            "branch_kind": [kinds[row % len(kinds)] for row in rows],
            "stage": [1 + (row - 1) * stages // additions for row in rows],
        }
    ).assign(network=network, kind="other", depth=None, std_error=0.1)


def test_a_curve_for_every_network_and_markers_for_kinds():
    figure = draw_branches(pd.concat([frame_of("a"), frame_of("b", additions=6)]))
    ratios, stream = figure.axes
    curves = [(line.get_marker(), line.get_xdata().tolist()) for line in ratios.lines]
    points = [curve for curve in curves if curve[0]]
    assert sorted(points[:2]) == [("o", [2, 4]), ("s", [1, 3])]
    assert sorted(points[2:]) == [("o", [2, 4, 6]), ("s", [1, 3, 5])]
    assert len(stream.lines) == 2
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "attention", "MLP"]


def test_one_kind_of_branch_needs_no_markers():
    figure = draw_branches(frame_of(kinds=("convolution",)))
    assert len(figure.axes[0].lines) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mine"]


def test_stage_boundaries():
    lines = draw_branches(frame_of(additions=6, stages=3, kinds=("mlp",))).axes[0].lines[1:]
    assert [line.get_xdata()[0] for line in lines] == [2.5, 4.5]


def test_std_errors_are_a_band():
    [band] = draw_branches(frame_of(kinds=("mlp",))).axes[0].collections
    assert band.get_paths()[0].get_extents().ymax == pytest.approx(1.2)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match=r"^an empty frame: there is nothing to draw$"):
        draw_branches(frame_of().iloc[:0])
