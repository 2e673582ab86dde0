"""The page: what stands in it, and how it behaves in a real Chromium."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.figure import Figure

from plots import draw_fig7
from plots.marks import mark
from plots.page import make_page
from tests.browser import Browser, find_chromium

HOSTILE = "<script>alert(1)</script>\"'&amp;\n$x_1$ <!--title-->"
STDS = {
    "resnet-8": [10.0, 9.5, 0.00042, 9.25],
    "plain-8": [1.0, 3.0, 2.0, 4.0],
}  # as text, 10 < 9.5 < 9.25


def make_layers(stds=STDS):
    """A frame in which the three parts of a std are in the proportion 5, 3, 4."""
    parts = []
    for network, values in stds.items():
        part = pd.DataFrame(
            {"network": network, "kind": network.split("-")[0], "layer": range(1, len(values) + 1)}
        )
        part["name"] = [f"block.{i}.conv" for i in range(len(values))]
        part["stage"] = [1 + i // 2 for i in range(len(values))]
        part = part.assign(
            std=values, within=[0.6 * std for std in values], between=[0.8 * std for std in values]
        )
        parts.append(part.assign(source="hooks", depth=8, images=None))
    return pd.concat(parts, ignore_index=True)


def draw(frame, title="Layer responses", caption="Fig. 7", provenance=None):
    return make_page(
        title,
        [(caption, draw_fig7(frame))],
        frame,
        {"resnet-8": {"file": "a.pth"}} | (provenance or {}),
    )


class Reader(HTMLParser):
    """tags: what begins in a page, with its attributes. texts: what stands in it."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text)


# What stands in it


def test_hostile_words_are_words():
    frame = make_layers({HOSTILE: [1.0, 2.0]})
    page = draw(
        frame.assign(name=["\x00", "\x1b"]),
        HOSTILE,
        HOSTILE,
        {HOSTILE: {HOSTILE: HOSTILE}, "\udc80": 1},
    )
    calm = draw(make_layers({"calm": [1.0, 2.0]}), provenance={"calm": {}, "b": 1})
    outside = [
        [tag for tag, _ in Reader(re.sub("<svg.*?</svg>", "", part, flags=re.S)).tags]
        for part in (page, calm)
    ]
    assert outside[0] == outside[1]
    title, switch, caption, rows, provenance = 2, 1, 1, 2, 1
    assert Reader(page).texts.count(HOSTILE) == title + switch + caption + rows + provenance
    assert page.count("<script>") == 1
    assert page.count("\N{REPLACEMENT CHARACTER}</td>") == 2
    assert page.encode()  # no lone surrogates


def test_the_same_input_gives_the_same_bytes_and_leaves_the_figure_as_it_was():
    figure = draw_fig7(make_layers())
    pages = [make_page("a", [("b", figure)], make_layers(), {}) for _ in range(2)]
    assert (
        pages[0] == pages[1] == make_page("a", [("b", draw_fig7(make_layers()))], make_layers(), {})
    )
    assert all(artist.get_gid() is None for artist in figure.findobj())


def test_it_loads_nothing_and_runs_no_script_but_its_own():
    figure = Figure()
    figure.subplots().imshow(
        [[0, 1]]
    )  # an image within the SVG, clipped: both are named by a reference
    page = make_page("a", [("b", draw_fig7(make_layers())), ("c", figure)], make_layers(), {})
    assert not re.search("https?:", page.replace("https://github.com", ""))
    references = [
        value
        for _, attributes in Reader(page).tags
        for name, value in attributes.items()
        if name in ("href", "src", "xlink:href", "action", "data", "poster", "srcset")
    ]
    ids = [attributes["id"] for _, attributes in Reader(page).tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert all(value.startswith("data:") or value[1:] in ids for value in references)
    assert all(name in ids for name in re.findall(r"url\(#(.*?)\)", page))
    assert page.count("url(") == page.count("url(#")
    [policy] = [
        attributes["content"] for tag, attributes in Reader(page).tags if "http-equiv" in attributes
    ]
    [script] = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; ")


def test_the_table_begins_with_what_is_read_first_and_leaves_out_what_is_empty():
    page = draw(make_layers())
    heads = re.findall('data-key="(.*?)"', page)
    assert heads == "network layer std within between stage name source kind depth".split()  # noqa: SIM905
    assert '<td class="number" data-value="0.00042">4.200e-04</td>' in page
    assert '<td class="number" data-value="9.5">9.5000</td>' in page


def test_provenance_is_json():
    assert json.loads(re.search("<pre>(.*?)</pre>", draw(make_layers()), re.DOTALL)[1]) == {
        "file": "a.pth"
    }
    with pytest.raises(TypeError, match="not JSON serializable"):
        draw(make_layers(), provenance={"a": {1j}})


def test_points_refer_to_rows_of_the_table():
    """In a table with a row a layer and iteration: to the one of both."""
    table = pd.concat(
        [make_layers({"a": [1.0, 2.0]}).assign(iteration=i) for i in (0, 100)], ignore_index=True
    )
    figure = Figure(figsize=(2, 2), dpi=200)
    panel = figure.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(0, 2))
    for x, iterations in ((0.5, (100, 0)), (1.0, ())):
        [line] = panel.plot([x, x], [0.5, 1.5], linestyle="")
        mark(line, "a", [2, 1], iterations)
    [gone] = panel.plot(
        [1.0, 1.0, 1.0], [1.0, 3.0, 1.0], linestyle=""
    )  # one without a row, one outside the panel
    mark(gone, "a", [3, 1, 2])
    with mpl.rc_context({"savefig.dpi": 50}):
        page = make_page("a", [("b", figure)], table, {})
    points = [json.loads(found) for found in re.findall('data-points="(.*?)"', page)]
    assert points == [
        [[36, 108, 3], [36, 36, 0]],
        [[72, 108, 1, 3], [72, 36, 0, 2]],
        [[72, 72, 1, 3]],
    ]


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip(
            "no Chromium on this machine: chromium, chromium-browser and google-chrome are not to be found"
        )
    with Browser(program, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page. Whatever is done with it, it requests nothing but itself, and nothing is
    complained about.
    """
    tabs = []

    def visit(page=None, **options):
        path = tmp_path / "page.html"
        path.write_text(draw(make_layers()) if page is None else page, encoding="utf-8")
        tabs.append(browser.open(path, **options))
        return tabs[-1]

    yield visit
    for tab in tabs:
        assert tab.errors == []
        assert tab.requests == [(tmp_path / "page.html").as_uri()]
        tab.close()


def place(tab, curve, point):
    """Where a point of a curve is in the window."""
    return tab.value(
        f"(() => {{ const curve = document.querySelectorAll('[data-points]')[{curve}], svg = curve.closest('svg');"
        f"const [x, y] = JSON.parse(curve.dataset.points)[{point}]; svg.scrollIntoView({{behavior: 'instant'}});"
        "const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;"
        "return [box.x + scale * x, box.y + scale * y]; })()"
    )


def shown(tab):
    """The lines of what is told of a point: label, then key and value in turn."""
    return tab.value("document.querySelector('.tip').innerText.split('\\n')")


def tell(network, layer):
    std = STDS[network][layer - 1]
    parts = {"std": std, "within": 0.6 * std, "between": 0.8 * std}
    values = {"name": f"block.{layer - 1}.conv", "stage": str((layer + 1) // 2), "source": "hooks"}
    values |= {
        key: f"{value:.4f}" if value > 1e-3 else f"{value:.3e}" for key, value in parts.items()
    }
    return [f"{network}, layer {layer}", *(word for pair in values.items() for word in pair)]


def visible(tab, selector):
    """How many elements are."""
    return tab.value(
        f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.getClientRects().length).length"
    )


def column(tab, key):
    return tab.value(
        f"(() => {{ const at = [...document.querySelectorAll('th')].findIndex(th => th.dataset.key === '{key}');"
        "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[at].textContent); })()"
    )


def test_pointing_at_a_layer_tells_of_it(visit):
    tab = visit()
    assert shown(tab) == [""]
    tab.move(*place(tab, 0, 1))
    assert shown(tab) == tell("resnet-8", 2)
    tab.move(*place(tab, 1, 2))
    assert shown(tab) == tell("plain-8", 3)
    tab.move(*place(tab, 3, 0))  # the panel sorted by magnitude
    assert shown(tab) == tell("plain-8", 4)
    tab.move(1, 1)
    assert shown(tab) == [""]


def test_two_measurements_of_a_layer_stand_side_by_side(visit):
    frame = make_layers({"resnet-8": [1.0, 2.0]})
    tab = visit(
        draw(
            pd.concat([frame, frame.assign(source="batchnorm", std=[1.5, 2.5])], ignore_index=True)
        )
    )
    tab.move(*place(tab, 0, 1))
    assert shown(tab)[5:9] == ["source", "hooks batchnorm", "std", "2.0000 2.5000"]
    assert shown(tab)[9:11] == ["within", "1.2000"]


def test_arrow_keys_go_along_the_curves(visit):
    tab = visit()
    tab.press("Tab", "Tab", "Tab")  # past the two switches
    assert shown(tab) == tell("resnet-8", 1)
    tab.press("ArrowRight")
    assert shown(tab) == tell("resnet-8", 2)
    tab.press("ArrowDown")
    assert shown(tab) == tell("plain-8", 2)
    tab.press("End", "ArrowRight")
    assert shown(tab) == tell("plain-8", 4)
    tab.press("Home", "ArrowUp", "ArrowLeft")
    assert shown(tab) == tell("resnet-8", 1)
    tab.press("Escape")
    assert shown(tab) == [""]


def test_a_network_is_switched_off_and_on(visit):
    tab = visit()
    curves, rows = (".drawing [data-points][data-network='0']", "tbody tr")
    assert [visible(tab, curves), visible(tab, rows)] == [2, 8]
    tab.click("fieldset input")
    assert [visible(tab, curves), visible(tab, rows)] == [0, 4]
    tab.press("Tab", "Tab", "Home")
    assert shown(tab) == tell("plain-8", 1)
    tab.press("ArrowDown", "End")  # in the other panel
    assert shown(tab) == tell("plain-8", 1)
    tab.move(*place(tab, 0, 0))
    assert "resnet-8" not in shown(tab)[0]
    tab.click("fieldset input")
    assert [visible(tab, curves), visible(tab, rows)] == [2, 8]
    tab.press(" ")
    assert [visible(tab, curves), visible(tab, rows)] == [0, 4]


def test_many_switches_leave_room_and_cover_nothing_that_is_scrolled_to(visit):
    frame = make_layers({f"a network with a rather long label {i}": [1.0, 2.0] for i in range(40)})
    tab = visit(draw(frame), width=700, height=600)
    tab.value("document.querySelector('#layers').scrollIntoView()")
    switches, heading = (
        tab.value(f"document.querySelector('{part}').getBoundingClientRect().{edge}")
        for part, edge in (("fieldset", "bottom"), ("#layers", "top"))
    )
    assert 150 < switches <= heading
    assert switches <= 0.3 * 600 + 1


def test_the_table_is_sorted_by_numbers_and_by_words(visit):
    tab = visit()
    order = [0.00042, 1, 2, 3, 4, 9.25, 9.5, 10]
    tab.click("th[data-key=std] button")
    assert [float(text) for text in column(tab, "std")] == order
    assert tab.value("document.querySelector('th[data-key=std]').ariaSort") == "ascending"
    tab.press("Enter")
    assert [float(text) for text in column(tab, "std")] == order[::-1]
    tab.click("th[data-key=network] button")
    assert column(tab, "network") == ["plain-8"] * 4 + ["resnet-8"] * 4
    assert column(tab, "layer") == ["1", "2", "3", "4"] * 2
    assert (
        tab.value(
            "[...document.querySelectorAll('th')].filter(th => th.ariaSort !== 'none').length"
        )
        == 1
    )
    tab.move(*place(tab, 0, 1))
    assert shown(tab) == tell("resnet-8", 2)


def test_a_phone_needs_no_scrolling_aside(visit):
    wide = Figure(figsize=(9, 1))
    page = make_page(
        "a" * 80,
        [("b", draw_fig7(make_layers())), ("c", wide)],
        make_layers(),
        {"a" * 80: "b" * 200},
    )
    tab = visit(page, width=360, height=740)
    tab.value("document.querySelector('details').open = true")
    assert tab.value("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    tab.tap(*place(tab, 0, 3))
    assert shown(tab) == tell("resnet-8", 4)
    left, right = tab.value(
        "(b => [b.left, b.right])(document.querySelector('.tip').getBoundingClientRect())"
    )
    assert 0 <= left < right <= 360


LOOKS = {  # of the page, of the figure's text and axes, of its ground, and of a curve
    "body": "backgroundColor",
    ".drawing svg": "fill",
    ".drawing [id$=patch_1] path": "fill",
    "[data-points] path": "stroke",
}


def test_dark_and_light(visit):
    looks = {}
    for scheme in ("light", "dark"):
        tab = visit(scheme=scheme)
        looks[scheme] = [
            tab.value(f"getComputedStyle(document.querySelector('{selector}')).{name}")
            for selector, name in LOOKS.items()
        ]
    white, black, night, chalk = (
        "rgb(255, 255, 255)",
        "rgb(0, 0, 0)",
        "rgb(20, 20, 20)",
        "rgb(235, 235, 235)",
    )
    assert looks["light"][:3] == [white, black, white]
    assert looks["dark"][:3] == [night, chalk, night]
    assert looks["light"][3] == looks["dark"][3]  # colours stay


def test_hostile_words_do_nothing_in_a_browser(visit):
    frame = make_layers({HOSTILE: [1.0, 2.0]}).assign(name="</td><img src=x onerror=alert(2)>")
    tab = visit(draw(frame, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}))
    tab.move(*place(tab, 0, 0))
    assert "</td><img src=x onerror=alert(2)>" in shown(tab)
    assert tab.value("document.querySelectorAll('script, img').length") == 1
    assert tab.heard("Page.javascriptDialogOpening") == []


def test_without_its_script_the_page_can_be_read(visit):
    tab = visit(script=False)
    assert [visible(tab, part) for part in ("tbody tr", "[data-points]", "summary")] == [8, 4, 1]
    assert [visible(tab, part) for part in ("fieldset", ".help", "button")] == [
        0,
        0,
        0,
    ]  # they would do nothing
