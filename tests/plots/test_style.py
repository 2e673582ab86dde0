import html
import io

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from plots import draw_fig7
from plots.style import DASHES, PAPER_COLORS, RC, display_name, scale_std, styles, write_note


def networks(*rows):
    return pd.DataFrame(rows, columns=["network", "kind", "depth"]).convert_dtypes()


def test_the_papers_five_networks_look_as_in_the_paper():
    look = styles(
        networks(
            ("plain-20", "plain", 20),
            ("plain-56", "plain", 56),
            ("resnet-20", "residual", 20),
            ("resnet-56", "residual", 56),
            ("resnet-110", "residual", 110),
        )
    )
    assert {name: style["label"] for name, style in look.items()} == {
        "plain-20": "plain-20",
        "plain-56": "plain-56",
        "resnet-20": "ResNet-20",
        "resnet-56": "ResNet-56",
        "resnet-110": "ResNet-110",
    }
    yellow, red, black = (0.75, 0.75, 0), (1, 0, 0), (0, 0, 0)
    assert [style["color"] for style in look.values()] == [yellow, red, yellow, red, black]
    assert [style.get("dashes") for style in look.values()] == [DASHES["plain"]] * 2 + [None] * 3


def test_other_networks_get_colours_of_their_own():
    for count in (1, 6, 20):
        look = styles(
            networks(*[(f"resnet-{6 * n + 26}", "residual", 6 * n + 26) for n in range(count)])
        )
        used = [tuple(style["color"]) for network, style in look.items()]
        assert len(set(used)) == count
        own = [
            c
            for network, c in zip(look, used, strict=True)
            if network not in ("resnet-56", "resnet-110")
        ]
        assert not set(own) & set(PAPER_COLORS.values())


def test_two_networks_of_one_depth_and_kind_differ():
    look = styles(
        networks(
            ("a", "residual", 56), ("b", "residual", 56), ("c", "plain", 56), ("d", "other", pd.NA)
        )
    )
    assert look["a"]["color"] == PAPER_COLORS[56] == look["c"]["color"]
    assert len({tuple(look[name]["color"]) for name in "abd"}) == 3
    assert [look[name]["label"] for name in "abcd"] == list("abcd")


@pytest.mark.parametrize("label", ["_mine", "a$b$c", r"$\frac$", "<b>&amp;", "100%", "x^2_{3}"])
def test_labels_are_shown_as_they_are(label):
    frame = pd.DataFrame(
        {
            "network": label,
            "kind": "other",
            "depth": None,
            "layer": [1, 2],
            "std": [1.0, 2.0],
            "source": "hooks",
        }
    )
    figure = draw_fig7(frame)
    figure.canvas.draw()
    for axes in figure.axes:
        [text] = axes.get_legend().get_texts()
        assert text.get_text().strip().replace(r"\$", "$") == label
    content = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(content, format="svg")
    assert content.getvalue().decode().count(html.escape(label, quote=False) + "<") == 2


def test_long_labels_lose_their_middle():
    assert display_name("x" * 40) == "x" * 40
    assert (
        display_name("resnet-" + "x" * 60 + "end")
        == "ResNet-" + "x" * 13 + "\N{HORIZONTAL ELLIPSIS}" + "x" * 16 + "end"
    )
    assert len(display_name("x" * 41)) == 40


@pytest.mark.parametrize(
    ("curves", "scale"),
    [
        ([[1, 2, 3], [2, 3, 4]], "linear"),
        ([[1, 1, 1, 9]], "log"),
        ([[1, 1, 1, 7]], "linear"),
        ([[1, 1, 1, 9, 0]], "log"),
        ([[1, 2, 3], [0.01, 0.02]], "log"),
        ([[0, 0]], "linear"),
        ([[1, 2], [0, 0]], "linear"),
    ],
)
def test_a_steep_curve_makes_the_axis_logarithmic(curves, scale):
    panel = Figure().subplots()
    scale_std(panel, curves)
    assert panel.get_yscale() == scale
    assert panel.get_ylabel() == ("std" if scale == "linear" else "std (logarithmic)")


def test_long_notes_are_wrapped():
    figure = Figure(figsize=(3.3, 3))
    write_note(figure, "word " * 40)
    write_note(figure, "end")
    assert max(map(len, figure.get_supxlabel().splitlines())) <= 84
    assert " ".join(figure.get_supxlabel().split()) == " ".join(["word"] * 40 + ["end"])


def test_notes_stand_one_below_the_other():
    figure = Figure()
    write_note(figure, "first")
    write_note(figure, "second\nin two lines")
    assert figure.get_supxlabel() == "first\nsecond\nin two lines"
    [text] = figure.findobj(
        lambda artist: isinstance(artist, Text) and artist.get_text() == figure.get_supxlabel()
    )
    assert text.get_fontfamily() == RC["font.family"]
