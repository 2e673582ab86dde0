import numpy as np
import pandas as pd
import pytest

from analysis.paper import paper_curves
from plots import draw_fig7

PAPER = paper_curves()
FRAME = PAPER.assign(source="hooks", std=PAPER["std"] * 1.1)
LABELS = ["plain-20", "plain-56", "ResNet-20", "ResNet-56", "ResNet-110"]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curves_of(panel, label):
    return [line for line in panel.lines if line.get_label() == label]


def test_two_panels_with_the_papers_words_and_one_legend():
    figure = draw_fig7(FRAME, title="A title", note="A note")
    words = ["layer index (original)", "layer index (sorted by magnitude)"]
    assert [panel.get_xlabel() for panel in figure.axes] == words
    assert [panel.get_ylabel() for panel in figure.axes] == ["std", "std"]
    assert (figure.legends[0].get_title().get_text(), figure.get_supxlabel()) == (
        "A title",
        "A note",
    )
    assert len(figure.legends) == 1
    assert legend(figure) == LABELS


def test_the_curves_are_the_frames_numbers_in_both_orders():
    upper, lower = draw_fig7(FRAME.sample(frac=1, random_state=0)).axes
    for network, layers in FRAME.groupby("network"):
        label = network.replace("resnet", "ResNet")
        [original], [ordered] = curves_of(upper, label), curves_of(lower, label)
        assert original.get_xdata().tolist() == ordered.get_xdata().tolist()
        assert original.get_xdata().tolist() == layers["layer"].tolist()
        assert original.get_ydata().tolist() == layers["std"].tolist()
        assert ordered.get_ydata().tolist() == sorted(layers["std"], reverse=True)


def test_one_frame_or_one_a_network_is_the_same():
    parts = [part for _, part in FRAME.groupby("network", sort=False)]
    one, many = draw_fig7(FRAME).axes[1], draw_fig7(parts).axes[1]
    for line, other in zip(one.lines, many.lines, strict=True):
        assert line.get_xydata().tolist() == other.get_xydata().tolist()


def test_the_papers_curves_are_fine_and_lie_behind_those_of_the_same_networks():
    for panel in draw_fig7(FRAME[FRAME["depth"] == 56], PAPER).axes:
        lines = [line for line in panel.lines if len(line.get_xdata())]
        for theirs, ours in zip(lines[:2], lines[2:], strict=True):
            assert theirs.get_linewidth() < 0.5 * ours.get_linewidth()
            assert theirs.get_color() == ours.get_color()
            np.testing.assert_allclose(ours.get_ydata(), 1.1 * theirs.get_ydata())
    assert legend(draw_fig7(FRAME, PAPER)) == [*LABELS, "the paper's curve"]
    other = FRAME[FRAME["network"] == "plain-20"].assign(depth=26)
    assert legend(draw_fig7(other, PAPER)) == ["plain-20"]  # the paper has no such network


def test_a_wide_figure_has_the_paper_on_the_left_with_the_same_axis():
    figure = draw_fig7(FRAME, PAPER, size="wide")
    assert [panel.get_title() for panel in figure.axes[:2]] == [
        *("He et al. (2016), Fig. 7", "these networks")
    ]
    theirs, ours = (curves_of(panel, "ResNet-110")[0].get_ydata() for panel in figure.axes[:2])
    np.testing.assert_allclose(ours, 1.1 * theirs)
    assert len({panel.get_ylim() for panel in figure.axes}) == 1
    assert legend(figure) == LABELS
    assert len(draw_fig7(FRAME, size="wide").axes) == 2


def test_sizes():
    widths = [draw_fig7(FRAME, size=size).get_figwidth() for size in ("column", "wide", "slide")]
    assert widths == [3.3, 6.9, 16 / 3]
    with pytest.raises(ValueError, match="size='poster': choose one of column, wide, slide"):
        draw_fig7(FRAME, size="poster")


def test_a_steep_curve_is_clipped_unless_the_axis_is_logarithmic_or_given():
    steep = FRAME["std"].where((FRAME["network"] != "plain-56") | (FRAME["layer"] > 3), 30.0)
    frame = FRAME.assign(std=steep)
    for panel in draw_fig7(frame).axes:
        assert (panel.get_yscale(), panel.get_ylabel()) == ("linear", "std")
        assert panel.get_ylim()[1] < 5
        assert [text.get_text() for text in panel.texts] == ["↑ 30"]
    for panel in draw_fig7(frame, scale="log").axes:
        assert (panel.get_yscale(), panel.get_ylabel()) == ("log", "std (logarithmic)")
        assert panel.get_ylim()[1] > 30
    assert draw_fig7(frame, scale="linear").axes[0].get_ylim()[1] > 30
    assert draw_fig7(frame, ylim=(0, 2)).axes[0].get_ylim() == (0, 2)


def test_a_band_reaches_from_the_lowest_to_the_highest_seed_in_each_order():
    seeds = [[1.0, 4.0, 2.0], [3.0, 2.0, 2.5]]
    rows = [
        {"network": "a", "seed": seed, "layer": i + 1, "std": std}
        for seed, stds in enumerate(seeds)
        for i, std in enumerate(stds)
    ]
    frame = pd.DataFrame({"network": "a", "layer": [1, 2, 3], "std": [2.0, 3.0, 2.2]})
    figure = draw_fig7(frame, seeds=pd.DataFrame([*rows, rows[0] | {"network": "other"}]))
    expected = ({(1, 1), (1, 3), (2, 2), (2, 4), (3, 2), (3, 2.5)},)
    expected += ({(1, 3), (1, 4), (2, 2), (2, 2.5), (3, 1), (3, 2)},)
    for panel, corners in zip(figure.axes, expected, strict=True):
        [band] = panel.collections
        assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} == corners
    assert legend(figure) == ["a", "lowest to highest seed"]


def test_layers_that_rest_on_few_images_are_ringed():
    frame = pd.DataFrame({"layer": [1, 2, 3], "std": [2.0, 3.0, 2.2]})
    figure = draw_fig7(frame.assign(dominated=[False, True, False]))
    assert [panel.lines[-1].get_xydata().tolist() for panel in figure.axes] == [[[2, 3]], [[1, 3]]]
    assert legend(figure) == ["network", "rests on few images"]
    assert legend(draw_fig7(frame.assign(dominated=False))) == ["network"]


def test_both_sources_of_a_network_share_its_colour():
    formula = FRAME.assign(source="batchnorm", std=FRAME["std"] * 0.9)
    figure = draw_fig7(pd.concat([FRAME, formula]))
    for panel in figure.axes:
        lines = [line for line in panel.lines if len(line.get_xdata())]
        for measured, computed in zip(lines[:5], lines[5:], strict=True):
            assert measured.get_color() == computed.get_color()
            assert measured._unscaled_dash_pattern != computed._unscaled_dash_pattern
            np.testing.assert_allclose(computed.get_ydata(), 0.9 * measured.get_ydata())
    assert legend(figure) == [*LABELS, "closed form"]
    assert figure.get_supxlabel() == ""


@pytest.mark.parametrize("words", [0, 3])
def test_a_long_legend_stands_above_the_panels_and_is_not_cut(words):
    names = [FRAME["network"] + f"-{i}" + ", a label of words" * words for i in range(3)]
    figure = draw_fig7(pd.concat([FRAME.assign(network=name) for name in names]))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert len(legend(figure)) == 15
    assert figure.axes[0].bbox.y1 <= box.y0 < box.y1 <= figure.bbox.y1
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_a_network_of_one_layer_is_a_point():
    [line, *_] = draw_fig7(FRAME[FRAME["layer"] == 1]).axes[0].lines
    assert (line.get_marker(), line.get_markevery()) == ("o", (0, 1))
