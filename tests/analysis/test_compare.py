"""The command: what may be compared, what is printed and written, and what is refused."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.statistics import COLUMNS
from models import build, closed_form
from models.checkpoints import loading
from models.data import probe
from models.files import sha256
from tests.helpers import (
    PAGES,
    ROOT,
    files_in,
    frame,
    randomize_norms,
    read_table,
    readme_command,
    run,
    save,
    succeed,
)

FORMULA = "--source batchnorm --format svg"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Return checkpoints by name: two depths, two kinds, and three more seeds of resnet-8."""
    folder, paths = tmp_path_factory.mktemp("seeds"), {}
    for i, name in enumerate(
        ["resnet-8", "plain-8", "resnet-14", "resnet-8b", "resnet-8c", "resnet-8d"]
    ):
        torch.manual_seed(i)
        network = randomize_norms(build(name.rstrip("bcd")))
        paths[name] = save(folder / f"{name}.safetensors", network, "[0,1]")
    return paths


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a frame with other columns, and gives its path."""

    def write(name, **columns):
        path = tmp_path / f"{name}.csv"
        frame(**columns).to_csv(path, index=False)
        return path

    return write


def stds(path):
    return closed_form(loading.load(path).model)["std"].to_numpy()


def scaled(factor):
    """Return the columns of a frame with all numbers of another size."""
    return {"std": 5.0 * factor, "within": 3.0 * factor, "between": 4.0 * factor}


def words(printed):
    return " ".join(printed.split())


def rows_of_pairs(printed):
    return [line for line in printed.splitlines() if " vs " in line][1:]


# What is compared


def test_two_checkpoints(seeds, out):
    printed = succeed(f"compare {seeds['resnet-8']} {seeds['plain-8']} --out {out} {FORMULA}").out
    a, b = stds(seeds["resnet-8"]), stds(seeds["plain-8"])
    table = read_table(out / "compare.csv")
    assert list(table.columns) == list(COLUMNS)
    assert table["difference"].tolist() == pytest.approx((b - a).tolist())
    worst = np.abs(b - a).argmax()
    row = rows_of_pairs(printed)[0].split()
    assert row[3:7] == [f"{b.mean():.4f}", "vs", f"{a.mean():.4f}", f"{b.mean() / a.mean():.3f}"]
    assert row[7:10] == [f"{(b - a)[worst]:+.4f}", "in", str(worst + 1)]
    assert row[11] == f"{np.corrcoef(a, b)[0, 1]:.3f}"
    assert row[13] == f"{np.abs(np.sort(a) - np.sort(b)).mean():.4f}"
    names = ["compare-stages.svg", "compare.csv", "compare.json", "compare.svg"]
    assert list(files_in(out)) == names
    assert list(json.loads((out / "compare.json").read_text())) == ["resnet-8", "plain-8"]


def test_other_depths_are_compared_by_relative_depth(seeds, out):
    succeed(f"compare {seeds['resnet-14']} {seeds['resnet-8']} --out {out} {FORMULA}")
    a, b = stds(seeds["resnet-14"]), stds(seeds["resnet-8"])  # 13 and 7 layers
    expected = b - np.interp((np.arange(7) + 0.5) / 7, (np.arange(13) + 0.5) / 13, a)
    assert read_table(out / "compare.csv")["difference"].tolist() == pytest.approx(
        expected.tolist()
    )


def test_every_pair_is_compared_and_measured_on_images(files, images, out):
    names = " ".join(map(str, files.values()))
    printed = succeed(f"compare {names} --data {images} --out {out} --format svg").out
    table = read_table(out / "compare.csv")
    pairs = [("resnet-8", "plain-8"), ("resnet-8", "resnet-14"), ("plain-8", "resnet-14")]
    assert table.groupby(["first", "second"]).size().to_dict() == dict.fromkeys(pairs, 7)
    assert json.loads((out / "compare.json").read_text())["plain-8"]["data"]["images"] == 40
    assert len(rows_of_pairs(printed)) == 3


def test_figures_say_on_which_images_they_rest(files, out):
    line = f"compare {files['resnet-8']} {files['plain-8']} --data probe"
    succeed(f"{line} --out {out} --format svg")
    digests = [sha256(files[name]) for name in ("resnet-8", "plain-8")]
    note = " ".join(probe.load().note_for(digests).split())
    for name in ("compare", "compare-stages"):
        texts = re.findall(r">([^<>]+)</(?:text|tspan)>", (out / f"{name}.svg").read_text())
        assert note in " ".join(texts)


def test_a_copy_is_identical_and_nearly_the_same_is_not(seeds, tmp_path, out):
    """Under other names of the tensors. A changed classifier leaves the curves as they are."""
    path = seeds["resnet-8"]
    state = loading.load(path).state
    torch.save(
        {"state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "copy.pth"
    )
    state["fc.bias"][0] += 1e-6
    torch.save(state, tmp_path / "other.pth")
    line = f"compare first={path} second={path} third=copy.pth fourth=other.pth --out {out}"
    rows = rows_of_pairs(succeed(f"{line} {FORMULA}").out)
    assert read_table(out / "compare.csv")["difference"].eq(0).all()
    endings = [" same numbers" if "fourth" in row else " identical" for row in rows]
    assert len(rows) == 6
    assert all(row.endswith(ending) for row, ending in zip(rows, endings, strict=True))


@pytest.mark.integration
def test_shipped_networks_and_frames_made_earlier(seeds, out):
    """A folder of a shipped network's name does not hide it."""
    out.mkdir()
    (out.parent / "resnet-20").mkdir()
    mine = f"mine={seeds['resnet-8']}"
    succeed(f"responses --checkpoint {mine} {seeds['resnet-14']} --out {out} {FORMULA}")
    line = f"compare {out}/responses.csv resnet-20 again={seeds['resnet-8']} --out {out} {FORMULA}"
    rows = rows_of_pairs(succeed(line).out)
    [row] = [row for row in rows if "again vs mine" in row]
    assert row.endswith(" same numbers")
    assert any("resnet-20 vs resnet-14" in row for row in rows)


def test_a_page_to_look_at(seeds, write, out):
    """Every layer of every network, those of a group one by one, with the difference to the first."""
    csv, group = write("a"), f"b={seeds['resnet-8b']},{seeds['resnet-8c']}"
    succeed(f"compare {seeds['resnet-8']} {csv} --group {group} --out {out} {FORMULA} --html")
    page = (out / "compare.html").read_text()
    assert page.count("<figure ") == 2
    [text] = re.findall('id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    layers = pd.DataFrame(data["rows"], columns=data["columns"])
    assert layers["network"].tolist() == ["resnet-8"] * 7 + ["a"] * 3 + ["b"] * 14
    assert layers["member"].fillna("").tolist() == [""] * 10 + ["b 1"] * 7 + ["b 2"] * 7
    table = read_table(out / "compare.csv").groupby(["first", "second"])["difference"]
    shown = layers["difference"].tolist()
    assert np.isnan(shown[:7]).all()
    expected = table.get_group(("resnet-8", "a")).tolist()
    for name in ("resnet-8b", "resnet-8c"):
        expected += (stds(seeds[name]) - stds(seeds["resnet-8"])).tolist()
    assert shown[7:] == pytest.approx(expected)
    sources = list(json.loads((out / "compare.json").read_text()))
    assert sources == ["resnet-8", "b 1", "b 2", str(csv)]
    assert str(csv) in page


def test_the_same_command_writes_the_same_bytes(seeds, tmp_path):
    group = f"a={seeds['resnet-8']},{seeds['resnet-8b']}"
    for name in ("a", "b"):
        succeed(
            f"compare {seeds['plain-8']} --group {group} {FORMULA} --html --out {tmp_path / name}"
        )
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


@pytest.mark.real
def test_the_public_checkpoints_and_the_shipped_networks(akamaster, out, monkeypatch):
    """The documentation shows the command and all of its output."""
    monkeypatch.chdir(ROOT)
    printed = succeed(f"{readme_command('compare')} --out {out}").out
    assert f"```text\n{printed.strip()}\n```".replace(str(out), "figures") in PAGES
    assert read_table(out / "compare.csv").groupby(["first", "second"]).ngroups == 6


# Groups


def test_groups_come_with_their_values_and_a_test(seeds, out):
    groups = {"a": ["resnet-8", "resnet-8b"], "b": ["resnet-8c", "resnet-8d"]}
    options = [f"--group {group}={seeds[one]},{seeds[two]}" for group, (one, two) in groups.items()]
    printed = succeed(f"compare {' '.join(options)} --out {out} {FORMULA}").out
    means = {group: [stds(seeds[name]).mean() for name in names] for group, names in groups.items()}
    for group, (one, two) in means.items():
        assert f"{group}: mean std of each network: {one:.4f}, {two:.4f}\n" in printed
    difference = np.mean(means["b"]) - np.mean(means["a"])
    assert f"b - a: {difference:+.4f}, p = " in printed
    assert (
        "the smallest that 2 and 2 can give is 0.3333); too few networks for an interval" in printed
    )
    curve = (stds(seeds["resnet-8c"]) + stds(seeds["resnet-8d"])) / 2
    assert read_table(out / "compare.csv")["std_second"].tolist() == pytest.approx(curve.tolist())
    assert set(json.loads((out / "compare.json").read_text())) == {"a 1", "a 2", "b 1", "b 2"}


def grouped(write, sizes, scale):
    """Return the options for groups of frames: sizes by label; scale(group, seed): size of the numbers."""
    options = []
    for group, size in sizes.items():
        paths = [write(f"{group}{i}", **scaled(scale(group, i))) for i in range(size)]
        options.append(f"--group {group}={','.join(map(str, paths))}")
    return " ".join(options)


def test_an_interval_if_there_are_enough_networks(write, out):
    options = grouped(write, {"a": 3, "b": 4}, lambda group, i: 1 + i / 100)
    printed = succeed(f"compare {options} --out {out} --format svg").out
    assert "the smallest that 3 and 4 can give is 0.0286); 95 % interval -" in printed


def test_a_small_p_is_not_printed_as_zero_and_several_are_said_to_be_several(write, out):
    sizes = {"a": 9, "b": 9, "c": 9}
    options = grouped(write, sizes, lambda group, i: 1 + i / 100 + "abc".index(group))
    printed = succeed(f"compare {options} --out {out} --format svg").out
    assert "p = 4.1e-05 (permutation of networks, two-sided; " in printed
    assert re.search(r"^3 pairs of groups: .* 3 ", printed, re.MULTILINE)


def test_too_many_relabelings_are_said_and_the_rest_is_done(write, out):
    options = grouped(write, {"a": 12, "b": 12}, lambda group, i: 1 + i)
    printed = succeed(f"compare {options} --out {out} --format svg").out
    assert "b - a: +0.0000, no exact test: 12 and 12 networks have 2,704,156 relabelings" in printed


# Frames


def test_of_a_frame_with_both_sources_the_one_asked_for_is_taken(tmp_path, write, out):
    parts = [frame(), frame(source="batchnorm", **scaled(2))]
    pd.concat(parts).to_csv(tmp_path / "a.csv", index=False)
    b, c = write("b", network="b"), write("c", network="c", source="batchnorm")
    options = f"--out {out} --format svg"
    for other, source, std in ((b, "", 5.0), (c, "--source batchnorm", 10.0)):
        assert succeed(f"compare a.csv {other} {source} {options}").err == ""
        assert read_table(out / "compare.csv")["std_first"].tolist() == [std] * 3
    alike = "warning: measured networks are compared with closed forms; --source makes them alike\n"
    assert succeed(f"compare a.csv {c} {options}").err == alike
    warned = succeed(f"compare a.csv {b} --source batchnorm {options}").err.splitlines()
    assert warned[0] == f"warning: b: {b} has no numbers from batchnorm, only from hooks"
    assert warned[1:] == ["warning: measured networks are compared with closed forms"]


def test_frames_of_different_images_are_a_warning(write, out):
    """Such as one of the probe set's 900 and one of the test set's 10,000."""
    a, b = write("a"), write("b", network="b", images=3000)
    warned = succeed(f"compare {a} {b} --out {out} --format svg").err
    assert (
        warned == "warning: the networks were measured on different numbers of images (2, 3,000)\n"
    )


def test_one_frame_is_enough_if_it_holds_two_networks(tmp_path, write, out):
    pd.concat([frame(), frame(network="b", **scaled(2))]).to_csv(tmp_path / "both.csv", index=False)
    printed = succeed(f"compare both.csv --out {out} --format svg").out
    assert "b vs a 10.0000 vs 5.0000 2.000" in words(printed)
    alone = write("alone")
    error = run(f"compare {alone} --out {out}").error
    assert error == f"error: {alone}: it holds one network; name another thing to compare it with"


def test_the_same_networks_of_two_runs(tmp_path, out):
    for name in ("first", "second"):
        pd.concat([frame(), frame(network="b")]).to_csv(tmp_path / f"{name}.csv", index=False)
    error = run(f"compare first.csv second.csv --out {out}").error
    assert error == "error: two things to compare are called a: name them, LABEL=ITEM"
    printed = succeed(f"compare first.csv later=second.csv --out {out} --format svg").out
    assert [words(row)[:10] for row in rows_of_pairs(printed)[:2]] == ["b vs a 5.0", "later a vs"]


def test_networks_of_zeros_and_of_one_layer(write, out):
    """Zeros have no ratio, and one layer has no correlation."""
    zeros, b = write("zeros", **scaled(0)), write("b", network="b")
    printed = succeed(f"compare zeros={zeros} {b} --out {out} --format svg").out
    assert "b vs zeros 5.0000 vs 0.0000 - +5.0000 in 1" in words(printed)
    one = frame().iloc[:1]
    for name in ("c", "d"):
        one.assign(network=name).to_csv(out / f"{name}.csv", index=False)
    printed = succeed(f"compare {out}/c.csv {out}/d.csv --out {out} --format svg").out
    assert rows_of_pairs(printed)[0].split()[-5:] == ["-", "-", "0.0000", "same", "numbers"]


def test_labels_that_pandas_takes_for_nothing(tmp_path, out):
    pd.concat([frame(network=name) for name in ("NA", "None")]).to_csv(
        tmp_path / "a.csv", index=False
    )
    assert "None vs NA" in succeed(f"compare a.csv --out {out} --format svg").out


# Bad input


APART = "std, within and between of a, layer 2 do not belong together"
BAD_FRAMES = {
    "edited": (frame(std=[5, 5.1, 5]), APART),
    "negative": (frame(std=[5, -5, 5]), APART),
    "NaN": (frame(std=[5, np.nan, 5]), APART),
    "infinite": (frame(std=[5, np.inf, 5], within=[3, np.inf, 3]), APART),
    "gigantic": (frame(std=[5, 5e200, 5], within=[3, 3e200, 3], between=[4, 4e200, 4]), APART),
    "no source": (frame(source=["hooks", None, "hooks"]), "no source in line 3"),
    "no label": (frame(network=["a", "a", None]), "no network in line 4"),
    "no channels": (frame(channels=[4, None, 4]), "no channels in line 3"),
    "no stage": (frame(stage=[None, 1, 1]), "no stage in line 2"),
    "no layer": (frame(layer=[1, None, 3]), "no layer in line 3"),
    "a layer less": (frame().drop(index=1), "the layers of a are not 1 to 2: rows are missing"),
    "a layer twice": (frame(layer=[1, 2, 2]), "the layers of a are not 1 to 3"),
    "other columns": (frame().rename(columns={"std": "sd"}), "not a frame of analysis.responses: "),
    "a word for a number": (frame(std="high"), "not a frame of analysis.responses: "),
    "half a layer": (frame(layer=[1.5, 2, 3]), "not a frame of analysis.responses: "),
    "no rows": (frame().iloc[:0], "not a frame of analysis.responses: it has no rows"),
    "a formula": (frame(network="=1+1"), "'=1+1' in column network is unprintable, or a formula"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_frames_that_someone_edited(name, tmp_path, write, out):
    bad, message = BAD_FRAMES[name]
    bad.to_csv(tmp_path / "bad.csv", index=False)
    assert message in run(f"compare good={write('good')} bad.csv --out {out}").error
    assert files_in(out) == {}


BAD = {  # items and groups; words of the line
    "one thing": ("{resnet-8}", "name two things to compare, or more"),
    "no such file": ("{resnet-8} gone.pth", "error: gone.pth: no such file"),
    "no such frame": ("{resnet-8} gone.csv", "error: gone.csv: no such file; a frame is what"),
    "no such network": ("{resnet-8} resnet-32", "error: resnet-32: no such file"),
    "empty group": ("{resnet-8} --group a=", "error: --group a=: LABEL=ITEM,ITEM,... with one"),
    "group without a label": ("{resnet-8} --group {plain-8}", "LABEL=ITEM,ITEM,... with one"),
    "two layouts in a group": (
        "{resnet-8} --group a={resnet-8b},{resnet-14}",
        "error: the networks of group a have different layers (7 and 13, or",
    ),
    "one label twice": ("{resnet-8} resnet-8={plain-8}", "error: two things to compare are called"),
    "two sources": ("{resnet-8} {plain-8} --source hooks batchnorm", "unrecognized arguments"),
    "one network as two seeds": (
        "{plain-8} --group a={resnet-8},{resnet-8b},{resnet-8}",
        "error: networks 1 and 3 of group a have the same numbers: one network counts once",
    ),
    "a label as a group's network is called": (
        "'a 1={plain-8}' --group a={resnet-8},{resnet-8b}",
        "error: two things to compare are called a 1: name them, LABEL=ITEM",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, seeds, out):
    items, message = BAD[name]
    assert message in run(f"compare --source batchnorm --out {out} {items.format(**seeds)}").error
    assert not out.exists() or files_in(out) == {}
