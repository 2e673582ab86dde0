"""What all figures have in common: colours, labels, axes, and independence of the user's style."""

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import plots
from plots import (
    draw_benchmark,
    draw_compare,
    draw_decomposition,
    draw_dynamics,
    draw_fig7,
    draw_neighbours,
    draw_stages,
)
from plots.style import COMPUTED, DASHES, display_name, gather, scale_std, styles, write_note

A = pd.DataFrame({"layer": [1, 2, 3], "std": [1.0, 3.0, 2.0], "within": [0.8, 2.0, 1.0]})
MINUS = pd.DataFrame({"first": "a", "second": "b", "layer": [1, 2, 3], "difference": [1.0, -1, 0]})
COSTS = pd.DataFrame({"network": "a", "method": ["plain", "hooks"], "ratio": [1.0, 1.4]})
IMAGES = np.zeros((2, 32, 32, 3), np.uint8)
FIGURES = {  # how each is drawn, from as little as it takes, and its number of panels
    "fig7": (lambda **axes: draw_fig7(A, **axes), 2),
    "compare": (lambda **axes: draw_compare([named("a"), named("b")], MINUS, **axes), 3),
    "stages": (lambda **axes: draw_stages([named("a"), named("b")], **axes), 1),
    "decomposition": (lambda **axes: draw_decomposition([A, A], **axes), 2),
    "dynamics": (lambda **axes: draw_dynamics(A.assign(iteration=5), **axes), 2),
    "benchmark": (lambda **axes: draw_benchmark(COSTS, **axes), 1),
    "neighbours": (lambda **axes: draw_neighbours(IMAGES, IMAGES, np.ones(2), **axes), 4),
}
EVERY = pytest.mark.parametrize(("draw", "count"), FIGURES.values(), ids=FIGURES)
RUDE = {"text.usetex": True, "font.size": 40, "savefig.dpi": 10, "lines.linewidth": 9}
RUDE |= {"savefig.bbox": "tight", "axes.facecolor": "red", "axes.xmargin": 0.4}


def named(network):
    return A.assign(network=network)


def save(figure, suffix="svg"):
    content = io.BytesIO()
    figure.savefig(content, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    return content.getvalue()


@EVERY
def test_the_users_style_neither_matters_nor_changes(draw, count):
    with mpl.rc_context():
        mpl.rcdefaults()
        calm = save(draw())
    with mpl.rc_context(RUDE):
        before = dict(mpl.rcParams)
        assert save(draw()) == calm
        assert dict(mpl.rcParams) == before


@EVERY
def test_every_figure_shows_itself_in_a_notebook(draw, count):
    assert draw()._repr_png_().startswith(b"\x89PNG")


@EVERY
def test_every_figure_draws_into_given_axes(draw, count):
    figure = Figure()
    panels = figure.subplots(1, count, squeeze=False)
    assert draw(axes=panels) is figure
    assert all(panel.has_data() for panel in panels.flat)
    with pytest.raises(ValueError, match=f"axes: 0 given, but this figure has {count} panels"):
        draw(axes=[])


def test_text_is_text():
    assert b">layer index (original)</text>" in save(draw_fig7(A))
    pdf = save(draw_fig7(A), "pdf")
    assert b"/Type3" not in pdf  # TrueType: searchable, and accepted by journals
    assert b"/FontFile2" in pdf


def test_only_the_public_names_show():
    assert dir(plots) == sorted(plots.__all__)
    assert all(callable(getattr(plots, name)) for name in plots.__all__)
    with pytest.raises(AttributeError, match="no attribute 'draw_nothing'"):
        _ = plots.draw_nothing


def test_a_figure_needs_little_and_says_what_is_missing():
    frame = gather(A[["layer", "std"]], "layer", "std")
    assert frame.iloc[0][["network", "kind", "depth", "source"]].tolist() == [
        *("network", "other", 0, "hooks")
    ]
    with pytest.raises(ValueError, match="has no column 'std'; it has layer, within"):
        draw_fig7(A.drop(columns="std"))
    for frames in (A.iloc[:0], []):
        with pytest.raises(ValueError, match="an empty frame: there is nothing to draw"):
            draw_fig7(frames)


def test_frames_of_the_closed_form_are_called_so():
    closed = A.assign(norm="bn")  # models.closed_form has neither network nor source nor count
    assert draw_fig7(closed).get_supxlabel() == COMPUTED
    assert draw_fig7(A).get_supxlabel() == ""
    some = draw_decomposition([named("a"), named("b").assign(source="batchnorm")])
    assert some.get_supxlabel() == f"b: {COMPUTED}"


def test_labels_that_repeat_in_a_list_get_a_number():
    both = [A, A, A.assign(source="batchnorm")]
    frame = gather(both, "layer")
    assert frame["network"].unique().tolist() == ["network", "network (2)"]
    assert len(frame[frame["network"] == "network"]) == 6  # the closed form of the first


def networks(*rows):
    return pd.DataFrame(rows, columns=["network", "kind", "depth"]).convert_dtypes()


FIVE = networks(
    ("plain-20", "plain", 20),
    ("plain-56", "plain", 56),
    ("resnet-20", "residual", 20),
    ("resnet-56", "residual", 56),
    ("resnet-110", "residual", 110),
)


def test_the_papers_five_networks_look_as_in_the_paper():
    look = styles(FIVE)
    assert [style["label"] for style in look.values()] == [
        *("plain-20", "plain-56", "ResNet-20", "ResNet-56", "ResNet-110")
    ]
    yellow, red, black = (191 / 255, 191 / 255, 0), (1, 0, 0), (0, 0, 0)
    colors = [to_rgb(style["color"]) for style in look.values()]
    assert colors == [yellow, red, yellow, red, black]
    assert [style.get("dashes") for style in look.values()] == [DASHES["plain"]] * 2 + [None] * 3


@pytest.mark.parametrize("palette", ["paper", "colorblind"])
def test_networks_differ_by_more_than_colour(palette):
    look = styles(FIVE, palette)
    assert len({(style["marker"], style.get("dashes")) for style in look.values()}) == 5
    assert len({style["color"] for style in styles(FIVE, palette, distinct=True).values()}) == 5


def test_other_networks_get_colours_of_their_own():
    for count in (1, 6, 20):
        look = styles(networks(*[(f"n-{i}", "residual", 6 * i + 26) for i in range(count)]))
        assert len({style["color"] for style in look.values()}) == count
    twice = styles(networks(("a", "residual", 56), ("b", "residual", 56), ("c", "other", pd.NA)))
    assert len({style["color"] for style in twice.values()}) == 3


@pytest.mark.parametrize("label", ["_mine", "a$b$c", r"$\frac$", "<b>&amp;", "100%", "x^2_{3}"])
def test_labels_are_shown_as_they_are(label):
    figure = draw_fig7(named(label))
    save(figure)
    [text] = figure.legends[0].get_texts()
    assert text.get_text().strip().replace(r"\$", "$") == label


def test_long_labels_lose_their_middle():
    assert display_name("x" * 40) == "x" * 40
    long = display_name("resnet-" + "x" * 60 + "end")
    assert long == "ResNet-" + "x" * 13 + "\N{HORIZONTAL ELLIPSIS}" + "x" * 16 + "end"


CLIPPED = [  # stds of the curves, and where the axis ends (None: it shows all)
    ([[1, 2, 3], [2, 3, 4]], None),
    ([[1, 1, 1, 9]], None),  # nothing else that it could flatten
    ([[1, 2, 1], [1, 1, 1, 9]], 2.08),
    ([[1, 2, 1], [1, 3, 2], [1, 1, 1, 10], [1, 1, 30]], 3.16),
    ([[1, 2, 3], [0.01, 0.02]], None),  # little would be left of a curve that is high throughout
    ([[0, 0], [1, 2]], None),
]


@pytest.mark.parametrize(("curves", "top"), CLIPPED)
def test_a_curve_that_would_flatten_the_others_is_clipped(curves, top):
    for scale in ("auto", "linear"):
        panel = Figure().subplots()
        scale_std(panel, [panel.plot(stds)[0] for stds in curves], scale)
        if scale == "auto" and top:
            assert panel.get_ylim() == (pytest.approx(0.95 if top == 2.08 else 0.9), top)
            highest = [f"↑ {max(stds)}" for stds in curves if max(stds) > top]
            assert [text.get_text() for text in panel.texts] == highest
        else:
            assert panel.get_ylim()[1] > max(map(max, curves))
            assert len(panel.texts) == 0


def test_notes_are_wrapped_and_stand_one_below_the_other():
    figure = Figure(figsize=(3.3, 3))
    write_note(figure, "word " * 40)
    write_note(figure, "end")
    *lines, last = figure.get_supxlabel().splitlines()
    assert max(map(len, lines)) <= 84
    assert (" ".join(lines).split(), last) == (["word"] * 40, "end")
