"""The page: what stands in it, and how it behaves in a real Chromium."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pandas as pd
import pytest

from plots import draw_dynamics, draw_fig7
from plots.page import make_page
from tests.browser import Browser, find_chromium

HOSTILE = "<script>alert(1)</script>\"'&amp;\n$x_1$ <!--title-->"
STDS = {"resnet-8": [4.0, 2.5, 0.00042, 2.25], "plain-8": [1.0, 3.0, 2.0, 3.5]}
PAPER = pd.DataFrame({"kind": "residual", "depth": 8, "layer": [2, 1, 3, 4], "std": [1.5, 3, 2, 1]})


def make_layers(stds=STDS):
    """Return a frame in which within and between are 0.6 and 0.8 times the std."""
    parts = []
    for network, values in stds.items():
        layers = range(1, len(values) + 1)
        part = pd.DataFrame({"network": network, "layer": layers, "std": values})
        part["name"] = [f"block.{i}.conv" for i in range(len(values))]
        part["kind"] = {"resnet": "residual"}.get(network.split("-")[0], "plain")
        part = part.assign(within=0.6 * part["std"], between=0.8 * part["std"], depth=8)
        parts.append(part.assign(source="hooks", images=None))
    return pd.concat(parts, ignore_index=True)


def draw(frame=None, title="Responses", caption="Fig. 7", provenance=None, **options):
    frame = make_layers() if frame is None else frame
    return make_page(title, [(caption, draw_fig7(frame))], frame, provenance or {}, **options)


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
    frame = make_layers({HOSTILE: [1.0, 2.0]}).assign(name=["\x00", "\x1b"])
    words = pd.DataFrame({"statement": [HOSTILE], "verdict": HOSTILE, "sentence": HOSTILE})
    more = {"summary": words, "verdicts": words, "facts": {HOSTILE: HOSTILE}}
    page = draw(frame, HOSTILE, HOSTILE, {HOSTILE: {HOSTILE: [HOSTILE]}, "\udc80": 1}, **more)
    read = Reader(page)
    assert sum(tag == "script" for tag, _ in read.tags) == 2
    assert {attributes.get("alt") for tag, attributes in read.tags if tag == "img"} == {HOSTILE}
    title, caption, rows, provenance, facts, summary, verdicts = 2, 1, 2, 3, 2, 3, 3
    expected = title + caption + rows + provenance + facts + summary + verdicts
    assert sum(text.strip() == HOSTILE for text in read.texts) == expected
    assert page.count("\N{REPLACEMENT CHARACTER}</td>") == 2
    assert page.encode()  # no lone surrogates


def test_the_same_input_gives_the_same_bytes():
    assert draw(paper=PAPER) == draw(paper=PAPER)


def test_it_loads_nothing_and_runs_no_script_but_its_own():
    page = draw()
    assert set(re.findall(r"https?:[^\"`$]*", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a namespace
    kinds = ("href", "src", "action", "data", "poster", "srcset")
    found = [
        value
        for _, attributes in Reader(page).tags
        for k, value in attributes.items()
        if k in kinds
    ]
    assert len(found) == 2  # the icon and a figure
    assert all(value.startswith("data:") for value in found)
    assert "url(" not in page
    [policy] = [a["content"] for _, a in Reader(page).tags if "http-equiv" in a]
    [script] = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}';\n")


def test_the_table_begins_with_what_is_read_first_and_leaves_out_what_is_empty():
    page = draw()
    heads = re.findall("<th .*?>(.*?)</th>", page)
    assert heads == [
        *("network", "layer", "std", "within", "between", "name", "source", "kind", "depth")
    ]
    assert '<td class="number">4.200e-04</td>' in page


def test_the_data_are_the_whole_numbers_and_what_is_unknown_is_null():
    frame = make_layers({"a": [1 / 3, float("inf")]}).assign(within=[float("nan"), 2])
    [text] = re.findall('id="data">(.*?)</script>', draw(frame), re.DOTALL)
    data = json.loads(text)
    assert [row[:5] for row in data["rows"]] == [
        ["a", 1, 1 / 3, None, 0.8 / 3],
        ["a", 2, None, 2, None],
    ]


def test_summary_verdicts_and_facts_stand_on_top():
    verdicts = pd.DataFrame({"statement": "s", "verdict": ["holds", None], "sentence": ["x", "y"]})
    summary = pd.DataFrame({"network": ["a"], "mean std": [0.5]})
    page = draw(summary=summary, verdicts=verdicts, facts={"images": "10 of 20"})
    assert "<dt>images</dt><dd>10 of 20</dd>" in page
    assert '<td>a</td><td class="number">0.5000</td>' in page
    assert page.count("<strong>s</strong>") == 1
    assert '<li data-verdict="holds"><b>holds</b> x</li>\n<li data-verdict=""><b></b> y' in page
    assert page.index("10 of 20") < page.index("0.5000") < page.index("holds</b>")
    assert page.index("holds</b>") < page.index("<figure")


def test_provenance_is_a_readable_list_without_what_is_empty():
    entry = {"sha256": "ab", "card": {"test_error": 8.1, "note": None}, "warnings": ["x", "y"]}
    page = draw(provenance={"resnet-8": entry})
    card = "<dt>card</dt><dd><dl><dt>test_error</dt><dd>8.1</dd></dl></dd>"
    warnings = "<dt>warnings</dt><dd><ul><li>x</li><li>y</li></ul></dd>"
    assert f"<dl><dt>sha256</dt><dd>ab</dd>{card}{warnings}</dl>" in page


def test_networks_have_the_colours_of_the_figure():
    frame = make_layers().assign(depth=56)
    figure = draw_fig7(frame, palette="colorblind")
    page = make_page("a", [("b", figure)], frame, {})
    assert page.count('"color":"#d55e00"') == 2
    assert draw(frame).count('"color":"#ff0000"') == 2


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    with Browser(program, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page that may neither request anything but itself nor raise a complaint."""
    tabs = []
    path = tmp_path / "page.html"

    def visit(page=None, state="", **options):
        path.write_text(page or draw(paper=PAPER), encoding="utf-8")
        tabs.append(browser.open(f"{path.as_uri()}{state}", **options))
        return tabs[-1]

    yield visit
    for tab in tabs:
        assert tab.errors == []
        assert {url.partition("#")[0] for url in tab.requests} == {path.as_uri()}
        tab.close()


def place(tab, x, y):
    """Return where a point of the plot, in the units of its axes, is in the window."""
    return tab.value(
        "(() => { scene.svg.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const box = scene.svg.getBoundingClientRect();"
        f"return [box.x + scene.x({x}), box.y + scene.y({y})]; }})()"
    )


def told(tab):
    """Return what is told of a point: its heading, then its facts."""
    return tab.value(
        "[...document.querySelectorAll('#tip strong, #tip span')].map(e => e.innerText)"
    )


def tell(network, layer, paper=None):
    std = STDS[network][layer - 1]
    numbers = [
        f"{x:.4f}" if x > 1e-3 else f"{x:.3e}".replace("e-0", "e-")
        for x in (std, 0.6 * std, 0.8 * std)
    ]
    facts = [f"{key} {x}" for key, x in zip(("std", "within", "between"), numbers, strict=True)]
    facts[1:1] = [f"the paper: {paper:.4f}"] if paper else []
    return [f"{network}, layer {layer}", *facts, f"name block.{layer - 1}.conv", "source hooks"]


def drawn(tab):
    """Return the networks of the curves that are drawn."""
    return tab.value("scene.own.map(curve => curve.network)")


def visible(tab, selector):
    return tab.value(
        f"[...document.querySelectorAll({json.dumps(selector)})]"
        ".filter(e => e.getClientRects().length).length"
    )


def column(tab, key):
    return tab.value(
        f"[...document.querySelectorAll('#table tbody tr')]"
        f".map(row => row.cells[data.columns.indexOf('{key}')].textContent)"
    )


def address(tab):
    return unquote(tab.value("location.hash"))


def test_pointing_at_a_layer_tells_of_it_and_of_the_paper_and_covers_nothing(visit):
    tab = visit()
    tab.move(*place(tab, 2, 2.5))
    assert told(tab) == tell("resnet-8", 2, paper=1.5)
    tip, plot = (
        tab.value(
            f"(b => [b.top, b.bottom])(document.querySelector('{part}').getBoundingClientRect())"
        )
        for part in ("#tip div", "#plot")
    )
    assert tip[1] <= plot[0]
    tab.move(*place(tab, 3, 2.0))
    assert told(tab) == tell("plain-8", 3)
    tab.move(1, 1)
    assert told(tab) == []


def test_sampling_error_and_flag_are_told(visit):
    frame = make_layers({"a": [1.0, 2.0]}).assign(std_error=[0.25, None], dominated=[False, True])
    tab = visit(draw(frame))
    tab.move(*place(tab, 1, 1))
    assert told(tab)[1] == "std 1.0000 ± 0.2500"
    assert "rests on few images" not in told(tab)
    tab.move(*place(tab, 2, 2))
    assert told(tab)[1] == "std 2.0000"
    assert told(tab)[-1] == "rests on few images"


def test_keys_go_along_the_curves_and_zoom(visit):
    tab = visit()
    tab.value("document.querySelector('#view [name=paper]').focus()")
    tab.press("Tab")
    assert told(tab) == tell("resnet-8", 1, paper=3)
    tab.press("ArrowRight", "ArrowDown")
    assert told(tab) == tell("plain-8", 2)
    tab.press("End", "ArrowRight")
    assert told(tab) == tell("plain-8", 4)
    tab.press("Home", "ArrowUp", "ArrowLeft")
    assert told(tab) == tell("resnet-8", 1, paper=3)
    tab.press("ArrowRight", "+")
    assert tab.value("[scene.left, scene.right]") == [1, 3]
    assert told(tab) == tell("resnet-8", 2, paper=1.5)
    tab.press("0")
    assert tab.value("[scene.left, scene.right]") == [0, 4]
    tab.press("Escape")
    assert told(tab) == []


def test_dragging_zooms_and_the_other_axis_follows(visit):
    tab = visit()
    tab.drag(place(tab, 1.9, 1), place(tab, 4, 1))
    assert tab.value("zoom") == [2, 4]
    assert tab.value("scene.y(3.5) - scene.top") < 20  # 3.5 is now the highest
    assert address(tab) == "#layers=2-4"
    tab.click("#view [name=all]")
    assert (tab.value("zoom"), address(tab)) == (None, "")


def test_a_network_is_switched_off_everywhere_and_the_axis_follows(visit):
    tab = visit(draw(make_layers({"big": [9.0, 8.0], "small": [1.0, 0.5]})))
    rows = "#table tbody tr"
    assert (drawn(tab), visible(tab, rows)) == (["big", "small"], 4)
    before = tab.value("scene.bottom - scene.y(1)")
    tab.click("#networks input")
    assert (drawn(tab), visible(tab, rows)) == (["small"], 2)
    assert tab.value("scene.bottom - scene.y(1)") > 1.5 * before
    assert address(tab) == "#off=big"
    tab.press(" ")
    assert (drawn(tab), visible(tab, rows)) == (["big", "small"], 4)


def test_a_curve_that_flattens_the_others_is_clipped_with_its_value(visit):
    tab = visit(
        draw(make_layers({"steep": [30.0, 1.0, 1.0], "a": [1.0, 2.0, 1.0], "b": [1, 1, 2]}))
    )
    texts = "[...scene.svg.querySelectorAll('text')].map(e => e.textContent)"
    assert "↑ 30.0" in tab.value(texts)
    assert tab.value("scene.y(2) - scene.top") < 20
    tab.click("#view [name=log]")
    assert "↑ 30.0" not in tab.value(texts)
    assert {"1", "2", "5", "10", "20"} <= set(tab.value(texts))


def test_sorted_by_magnitude(visit):
    tab = visit()
    tab.click("#view [name=sorted]")
    tab.move(*place(tab, 2, 3.0))
    assert told(tab) == tell("plain-8", 2)
    tab.move(*place(tab, 4, 0.00042))
    assert told(tab) == tell("resnet-8", 3, paper=1)  # the paper's at the same rank


def test_the_state_is_in_the_address_and_comes_from_there(visit):
    state = "#off=plain-8&y=within&sorted=1&log=1&paper=0&layers=1-3&filter=block.2"
    tab = visit(state=state)
    assert drawn(tab) == ["resnet-8"]
    assert tab.value("[view.y.value, view.sorted.checked, view.log.checked, zoom]") == [
        *("within", True, True),
        [1, 3],
    ]
    assert visible(tab, "#table tbody tr") == 1
    assert address(tab) == state
    tab.value("location.hash = '#y=between'; new Promise(done => setTimeout(done, 50))")
    assert tab.value("[view.y.value, view.sorted.checked, zoom, off.size]") == [
        *("between", False, None, 0)
    ]


@pytest.mark.parametrize("state", ["#layers=9", "#layers=3-1", "#y=nonsense&off=nobody", "#%"])
def test_a_damaged_address_does_no_harm(visit, state):
    assert drawn(visit(state=state)) == ["resnet-8", "plain-8"]


def test_the_table_is_filtered_and_sorted(visit):
    tab = visit()
    tab.click("#search input")
    tab.press(*"RESNET block.1", "Enter")
    assert visible(tab, "#table tbody tr") == 1
    assert tab.value("document.querySelector('#search output').textContent") == "1 of 8 rows"
    tab.value("search.value = ''; search.dispatchEvent(new Event('input'))")
    tab.click("#table th:nth-child(3) button")
    stds = [float(text) for text in column(tab, "std")]
    assert stds == sorted(stds)
    tab.press("Enter")
    assert [float(text) for text in column(tab, "std")] == stds[::-1]
    tab.click("#table th:nth-child(1) button")
    assert column(tab, "network") == ["plain-8"] * 4 + ["resnet-8"] * 4


def test_downloads(visit):
    frame = make_layers({'a "b", c': [1 / 3, 2.0], "d": [1.0, 2.0]})
    tab = visit(draw(frame))
    catch = "HTMLAnchorElement.prototype.click = function () { saved[this.download] = this.href; }"
    tab.value(f"window.saved = {{}}; {catch}; off.add('d'); refresh(); saveTable()")
    tab.value("savePicture('svg')")
    tab.value("savePicture('png')")
    saved = tab.value("saved")
    heads, first, second = unquote(saved["Responses.csv"]).partition(",")[2].splitlines()
    assert heads.startswith("network,layer,std,within")
    assert first.startswith('"a ""b"", c",1,0.3333333333333333,')
    assert second.startswith('"a ""b"", c",2,2,')
    svg = unquote(saved["Responses.svg"]).partition(",")[2]
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "var(" not in svg
    png = base64.b64decode(saved["Responses.png"].partition(",")[2])
    assert png.startswith(b"\x89PNG")
    assert len(png) > 5_000


def test_snapshots_are_curves_that_tell_their_iteration(visit):
    parts = [make_layers({"a": [1.0 + i, 2.0]}).assign(iteration=10 * i) for i in range(3)]
    frame = pd.concat(parts, ignore_index=True)
    tab = visit(make_page("a", [("b", draw_dynamics(frame))], frame, {}))
    assert drawn(tab) == ["a"] * 3
    assert len(set(tab.value("curves.map(curve => curve.style.stroke)"))) == 3
    tab.move(*place(tab, 1, 3))
    assert "iteration 20" in told(tab)


def test_additions_are_drawn_over_their_index(visit):
    frame = pd.DataFrame({"network": "a", "addition": [1, 2], "ratio": [0.5, 0.25]})
    tab = visit(make_page("a", [], frame, {}))
    tab.move(*place(tab, 2, 0.25))
    assert told(tab) == ["a, addition 2", "ratio 0.2500"]


def test_a_phone_cuts_nothing_off(visit):
    summary = pd.DataFrame({f"column {i}": [1.5] for i in range(8)})
    page = draw(title="a" * 80, summary=summary, provenance={"a" * 80: "b" * 200}, paper=PAPER)
    tab = visit(page, width=390, height=844)
    tab.value("document.querySelector('details').open = true")
    assert tab.value("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert (
        tab.value("(s => s.scrollWidth - s.clientWidth)(document.querySelector('.summary'))") == 0
    )
    tab.tap(*place(tab, 4, 2.25))
    assert told(tab) == tell("resnet-8", 4, paper=1)
    assert "Tap a curve" in tab.value("document.querySelector('#help').textContent")
    left, right = tab.value(
        "(b => [b.left, b.right])(document.querySelector('#tip div').getBoundingClientRect())"
    )
    assert 0 <= left < right <= 390


def test_dark_and_light(visit):
    looks = {}
    for scheme in ("light", "dark"):
        tab = visit(draw(make_layers().assign(depth=[110] * 4 + [56] * 4)), scheme=scheme)
        style = "getComputedStyle(document.querySelector('{}')).{}"
        black, red = "#plot svg svg path", "#plot svg svg path:nth-child(2)"
        looks[scheme] = [
            tab.value(style.format(*pair))
            for pair in (("body", "backgroundColor"), (black, "stroke"), (red, "stroke"))
        ]
    assert looks["light"] == ["rgb(255, 255, 255)", "rgb(27, 27, 27)", "rgb(255, 0, 0)"]
    assert looks["dark"] == ["rgb(20, 20, 20)", "rgb(235, 235, 235)", "rgb(255, 0, 0)"]


def test_hostile_words_do_nothing_in_a_browser(visit):
    frame = make_layers({HOSTILE: [1.0, 2.0]}).assign(name="</td><img src=x onerror=alert(2)>")
    tab = visit(draw(frame, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}))
    tab.move(*place(tab, 1, 1))
    assert "name </td><img src=x onerror=alert(2)>" in told(tab)
    assert tab.value("document.querySelectorAll('script, img').length") == 3
    assert tab.heard("Page.javascriptDialogOpening") == []


def test_without_its_script_the_page_can_be_read(visit):
    tab = visit(draw(provenance={"a": 1}), script=False)
    assert [visible(tab, part) for part in ("tbody tr", "figure img", "summary")] == [8, 1, 1]
    assert [visible(tab, part) for part in ("form", "button", "#plot")] == [0, 0, 0]
