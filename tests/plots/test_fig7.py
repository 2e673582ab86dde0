import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from analysis.paper import curves
from plots import draw_fig7
from plots.style import RC

FRAME = curves().assign(source="hooks", std=lambda frame: frame["std"] * 1.1)


def save(figure, suffix):
    buffer = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(buffer, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    return buffer.getvalue()


def test_two_panels_with_the_papers_words():
    upper, lower = draw_fig7(FRAME).axes
    assert [axes.get_xlabel() for axes in (upper, lower)] == [
        "layer index (original)",
        "layer index (sorted by magnitude)",
    ]
    assert [axes.get_ylabel() for axes in (upper, lower)] == ["std", "std"]
    for axes in (upper, lower):
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == ["plain-20", "plain-56", "ResNet-20", "ResNet-56", "ResNet-110"]


def test_the_curves_are_the_frames_numbers_in_both_orders():
    shuffled = FRAME.sample(frac=1, random_state=0)
    upper, lower = draw_fig7(shuffled).axes
    for network, layers in FRAME.groupby("network"):
        label = network.replace("resnet", "ResNet")
        [original] = [line for line in upper.lines if line.get_label() == label]
        [ordered] = [line for line in lower.lines if line.get_label() == label]
        assert (
            original.get_xdata().tolist()
            == ordered.get_xdata().tolist()
            == layers["layer"].tolist()
        )
        assert original.get_ydata().tolist() == layers["std"].tolist()
        assert ordered.get_ydata().tolist() == sorted(layers["std"], reverse=True)


def test_the_papers_colours_and_dashes():
    upper = draw_fig7(FRAME).axes[0]
    look = {line.get_label(): (to_rgb(line.get_color()), line.is_dashed()) for line in upper.lines}
    assert look == {
        "plain-20": ((0.75, 0.75, 0), True),
        "plain-56": ((1, 0, 0), True),
        "ResNet-20": ((0.75, 0.75, 0), False),
        "ResNet-56": ((1, 0, 0), False),
        "ResNet-110": ((0, 0, 0), False),
    }


def test_the_papers_curves_lie_behind_thin_and_pale_for_the_networks_shown():
    two = FRAME[FRAME["depth"] == 56]
    for axes in draw_fig7(two, paper=curves()).axes:
        paper, ours = axes.lines[:2], axes.lines[2:]
        assert len(ours) == 2
        for pale, line in zip(paper, ours, strict=True):
            assert pale.get_zorder() == line.get_zorder()  # drawn in this order
            assert pale.get_linewidth() < line.get_linewidth()
            assert pale.get_alpha() < 0.5
            assert pale.get_color() == line.get_color()
            assert pale.is_dashed() == line.is_dashed()
            np.testing.assert_allclose(line.get_ydata(), 1.1 * np.asarray(pale.get_ydata()))
        assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "paper (pale)"


def test_networks_that_the_paper_does_not_show_have_no_pale_curve():
    axes = draw_fig7(FRAME[FRAME["network"] == "plain-20"].assign(depth=26), paper=curves()).axes[0]
    assert len(axes.lines) == 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["plain-20"]


def overlapping(figure):
    """The labels of the curves that run under a legend."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        box = axes.get_legend().get_window_extent()
        for line in axes.lines:
            points = axes.transData.transform(line.get_xydata())
            if any(
                box.contains(x, y)
                for x, y in np.linspace(points[:-1], points[1:], 20).reshape(-1, 2)
            ):
                found.append(line.get_label())
    return found


@pytest.mark.parametrize(
    "networks",
    [
        ["resnet-20"],
        ["plain-20", "resnet-20"],
        ["resnet-20", "resnet-56"],
        ["resnet-110"],
        list(FRAME["network"]),
    ],
    ids=lambda names: f"{len(set(names))} {names[0]}",
)
@pytest.mark.parametrize("paper", [None, curves()], ids=["alone", "with the paper"])
def test_no_curve_runs_under_the_legend(networks, paper):
    with mpl.rc_context(RC):
        assert overlapping(draw_fig7(FRAME[FRAME["network"].isin(networks)], paper)) == []


def test_long_labels_leave_the_curves_free():
    frame = FRAME.assign(
        network=[f"{name}, {'a label of many words ' * 3}{name}" for name in FRAME["network"]]
    )
    with mpl.rc_context(RC):
        figure = draw_fig7(frame)
        assert overlapping(figure) == []
        for axes in figure.axes:
            box = axes.get_legend().get_window_extent()
            assert axes.bbox.x0 <= box.x0
            assert box.x1 <= axes.bbox.x1 + 1


def test_the_legend_of_many_networks_stands_above_the_panels():
    frame = pd.concat([FRAME.assign(network=FRAME["network"] + f"-{i}") for i in range(3)])
    with mpl.rc_context(RC):
        figure = draw_fig7(frame)
        figure.draw_without_rendering()
        [legend] = figure.legends
        assert len(legend.get_texts()) == 15
        assert legend.get_window_extent().y0 >= figure.axes[0].bbox.y1
        assert legend.get_window_extent().y1 <= figure.bbox.y1
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_a_legend_of_many_rows_stands_above_the_panels():
    """Seven labels that are too long for two columns would leave the curves a fifth of the panel."""
    frame = pd.concat(
        [FRAME.assign(network=FRAME["network"] + f", decay of all, seed {i}") for i in range(2)]
    )
    some = frame[frame["network"].isin(frame["network"].unique()[:7])]
    assert all(axes.get_legend() is None for axes in draw_fig7(some).axes)


def test_networks_of_one_layer_are_points_beside_the_legend():
    frame = FRAME[FRAME["layer"] == 1]
    with mpl.rc_context(RC):
        figure = draw_fig7(frame)
        figure.draw_without_rendering()
    for axes in figure.axes:
        assert {line.get_marker() for line in axes.lines} == {"o"}
        points = axes.transData.transform(
            np.concatenate([line.get_xydata() for line in axes.lines])
        )
        assert not any(axes.get_legend().get_window_extent().contains(*point) for point in points)
        assert 1 in axes.get_xticks()
    assert {line.get_marker() for line in draw_fig7(FRAME).axes[0].lines} == {""}


def test_the_closed_form_is_named_in_the_figure():
    def texts(figure):
        return [text.get_text() for text in figure.texts if text.get_text()]

    assert texts(draw_fig7(FRAME)) == []
    figure = draw_fig7(FRAME.assign(source="batchnorm"))
    assert [figure.get_supxlabel()] == ["closed form from BN's tensors, not measured on images"]
    assert draw_fig7(FRAME).get_supxlabel() == ""


def test_a_note_stands_below_the_figure():
    assert draw_fig7(FRAME, note="short runs").get_supxlabel() == "short runs"
    both = draw_fig7(FRAME.assign(source="batchnorm"), note="short runs").get_supxlabel()
    assert both == "closed form from BN's tensors, not measured on images\nshort runs"


def test_text_is_text_and_the_same_figure_gives_the_same_bytes():
    svg = save(draw_fig7(FRAME, curves()), "svg")
    assert b">layer index (original)</text>" in svg
    assert b">ResNet-110</text>" in svg
    assert save(draw_fig7(FRAME, curves()), "svg") == svg
    pdf = save(draw_fig7(FRAME), "pdf")
    assert b"/Type3" not in pdf  # TrueType: searchable, and accepted by journals
    assert b"/FontFile2" in pdf


def test_the_width_is_a_column():
    assert draw_fig7(FRAME).get_size_inches()[0] == 3.3


def test_the_callers_style_is_left_alone():
    with mpl.rc_context({"font.size": 13}):
        before = dict(mpl.rcParams)
        draw_fig7(FRAME)
        assert dict(mpl.rcParams) == before


def test_one_layer_and_an_empty_frame():
    one = pd.DataFrame(
        [
            {
                "network": "a",
                "kind": "other",
                "depth": pd.NA,
                "layer": 1,
                "std": 0.5,
                "source": "hooks",
            }
        ]
    )
    assert draw_fig7(one, curves()).axes[0].lines[0].get_ydata().tolist() == [0.5]
    with pytest.raises(ValueError, match="an empty frame: there is nothing to draw"):
        draw_fig7(FRAME.iloc[:0])


def test_both_sources_of_a_network_share_its_colour():
    formula = FRAME.assign(source="batchnorm", std=FRAME["std"] * 0.9)
    figure = draw_fig7(pd.concat([FRAME, formula]))
    kinds = FRAME.groupby("network", sort=False)["kind"].first()
    for axes in figure.axes:
        measured, computed = axes.lines[:5], axes.lines[5:]
        assert [line.get_color() for line in measured] == [line.get_color() for line in computed]
        dashes = {
            (kind, line._unscaled_dash_pattern[1])
            for kind, line in zip(kinds, computed, strict=True)
        }
        assert dashes == {
            ("residual", (1.0, 1.0)),
            ("plain", (1.0, 3.0)),
        }  # which may share a colour
        assert [text.get_text() for text in axes.get_legend().get_texts()][5:] == ["closed form"]
        for ours, formulas in zip(measured, computed, strict=True):
            assert formulas.get_ydata().tolist() == pytest.approx((ours.get_ydata() * 0.9).tolist())
    assert figure._supxlabel is None


def test_one_steep_curve_makes_the_axis_logarithmic():
    steep = FRAME.assign(
        std=FRAME["std"].where((FRAME["network"] != "plain-56") | (FRAME["layer"] > 3), 30.0)
    )
    for frame, scale, label in ((FRAME, "linear", "std"), (steep, "log", "std (logarithmic)")):
        for axes in draw_fig7(frame).axes:
            assert (axes.get_yscale(), axes.get_ylabel()) == (scale, label)
            bottom, top = axes.get_ylim()
            assert bottom < frame["std"].min() < frame["std"].max() < top
