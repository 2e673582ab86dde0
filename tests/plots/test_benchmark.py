import pandas as pd
import pytest

from plots import draw_benchmark

FRAME = pd.DataFrame(
    {
        "network": ["resnet-20"] * 4 + ["plain-20"] * 4,
        "method": ["plain forward", "fast", "slow", "missing"] * 2,
        "ratio": [1.0, 0.8, 3.0, None, 1.0, 0.9, 12.0, None],
    }
)


def test_one_mark_a_network_and_way_and_none_for_what_was_left_out():
    figure = draw_benchmark(FRAME)
    [panel] = figure.axes
    one, *marks = panel.lines
    assert list(one.get_xdata()) == [1, 1]
    assert [list(line.get_xdata()) for line in marks] == [[1, 0.8, 3], [1, 0.9, 12]]
    assert [line.get_ydata()[0] for line in marks] == [-0.125, 0.125]
    assert len({line.get_color() for line in marks} | {line.get_marker() for line in marks}) == 4
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["plain forward", "fast", "slow"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ResNet-20", "plain-20"]


def test_the_axis_is_logarithmic_and_holds_all():
    [panel] = draw_benchmark(FRAME).axes
    assert panel.get_xscale() == "log"
    assert panel.get_xlim()[0] <= 0.8 < 12 < panel.get_xlim()[1]
    assert list(panel.get_xticks()) == [0.5, 1, 2, 5, 10]


@pytest.mark.parametrize("frame", [FRAME.iloc[:0], FRAME[FRAME["method"] == "missing"]])
def test_nothing_to_draw(frame):
    with pytest.raises(ValueError, match="an empty frame: there is nothing to draw"):
        draw_benchmark(frame)
