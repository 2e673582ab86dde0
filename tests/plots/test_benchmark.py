import pandas as pd
import pytest

from plots.benchmark import draw_benchmark

FRAME = pd.DataFrame(
    {
        "network": ["resnet-20"] * 4 + ["plain-20"] * 4,
        "way": ["plain forward", "fast", "slow", "missing"] * 2,
        "ratio": [1.0, 0.8, 3.0, None, 1.0, 0.9, 12.0, None],
    }
)


def test_one_mark_a_network_and_way():
    [panel] = draw_benchmark(FRAME).axes
    one, *marks = panel.lines
    assert list(one.get_xdata()) == [1, 1]
    assert [line.get_label() for line in marks] == ["ResNet-20", "plain-20"]
    assert [list(line.get_xdata()) for line in marks] == [[1, 0.8, 3], [1, 0.9, 12]]
    assert [list(line.get_ydata()) for line in marks] == [
        [-0.125, 0.875, 1.875],
        [0.125, 1.125, 2.125],
    ]
    assert len({line.get_color() for line in marks} | {line.get_marker() for line in marks}) == 4


def test_ways_that_were_left_out_have_no_row():
    [panel] = draw_benchmark(FRAME).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "plain forward",
        "fast",
        "slow",
    ]
    assert panel.get_ylim() == (2.5, -0.5)


def test_the_axis_is_logarithmic_and_holds_all():
    [panel] = draw_benchmark(FRAME).axes
    assert panel.get_xscale() == "log"
    assert panel.get_xlim()[0] <= 0.8 < 12 < panel.get_xlim()[1]
    assert list(panel.get_xticks()) == [0.5, 1, 2, 5, 10]
    assert panel.get_xlabel() == "time (plain forward pass = 1)"


def test_one_column_wide_with_the_networks_in_a_row():
    figure = draw_benchmark(FRAME)
    assert figure.get_figwidth() == 3.3
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ResNet-20", "plain-20"]


@pytest.mark.parametrize("frame", [FRAME.iloc[:0], FRAME[FRAME["way"] == "missing"]])
def test_nothing_to_draw(frame):
    with pytest.raises(ValueError, match="an empty frame: there is nothing to draw"):
        draw_benchmark(frame)
