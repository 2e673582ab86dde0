"""The command: what may be compared, what is printed and written, and what is refused."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.compare import main
from analysis.statistics import COLUMNS
from models import build, closed_form
from models.checkpoints import loading
from models.data import probe
from models.data.preprocessing import PRESETS
from tests.analysis.cli.test_items import cifar  # noqa: F401 (a fixture)
from tests.conftest import ROOT
from tests.test_project import README


def run(*words):
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


@pytest.fixture
def files(tmp_path):
    """Checkpoints with BN tensors of their own: by name and seed."""
    paths = {}
    for i, name in enumerate(
        ["resnet-8", "plain-8", "resnet-14", "resnet-8b", "resnet-8c", "resnet-8d"]
    ):
        torch.manual_seed(i)
        network = build(name.rstrip("bcd"))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias)
        paths[name] = tmp_path / f"{name}.safetensors"
        loading.save(paths[name], network, PRESETS["[0,1]"], crop_padding="none", training={})
    return paths


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def stds(path):
    return closed_form(loading.load(path).model)["std"].to_numpy()


def test_two_checkpoints(files, out, capsys):
    words = (
        files["resnet-8"],
        files["plain-8"],
        "--source",
        "batchnorm",
        "--out",
        out,
        "--format",
        "svg",
    )
    assert run(*words) == 0
    a, b = stds(files["resnet-8"]), stds(files["plain-8"])
    table = pd.read_csv(out / "compare.csv")
    assert list(table.columns) == list(COLUMNS)
    assert table["difference"].tolist() == pytest.approx((b - a).tolist())
    worst = np.abs(b - a).argmax()
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "plain-8 vs resnet-8" in line).split()
    assert row[3:7] == [f"{b.mean():.4f}", "vs", f"{a.mean():.4f}", f"{b.mean() / a.mean():.3f}"]
    assert row[7:10] == [f"{(b - a)[worst]:+.4f}", "in", str(worst + 1)]
    assert row[11] == f"{np.corrcoef(a, b)[0, 1]:.3f}"
    assert row[13] == f"{np.abs(np.sort(a) - np.sort(b)).mean():.4f}"
    assert sorted(path.name for path in out.iterdir()) == [
        "compare-stages.svg",
        "compare.csv",
        "compare.json",
        "compare.svg",
    ]
    assert list(json.loads((out / "compare.json").read_text())) == ["resnet-8", "plain-8"]


def test_figures_say_on_which_images_they_rest(files, out):
    assert (
        run(files["resnet-8"], files["plain-8"], "--data", "probe", "--out", out, "--format", "svg")
        == 0
    )
    for name in ("compare", "compare-stages"):
        assert all(
            line in (out / f"{name}.svg").read_text() for line in probe.load().note.splitlines()
        )


def test_other_depths_are_compared_by_relative_depth(files, out):
    assert run(files["resnet-14"], files["resnet-8"], "--source", "batchnorm", "--out", out) == 0
    table = pd.read_csv(out / "compare.csv")
    a, b = stds(files["resnet-14"]), stds(files["resnet-8"])  # 13 and 7 layers
    at = (np.arange(7) + 0.5) / 7
    expected = b - np.interp(at, (np.arange(13) + 0.5) / 13, a)
    assert table["difference"].tolist() == pytest.approx(expected.tolist())


def test_every_pair_is_compared_and_measured_on_images(files, cifar, out, capsys):  # noqa: F811
    words = [files[name] for name in ("resnet-8", "plain-8", "resnet-14")]
    assert run(*words, "--data", cifar, "--out", out, "--format", "png") == 0
    table = pd.read_csv(out / "compare.csv")
    assert table.groupby(["first", "second"], sort=False).size().to_dict() == {
        ("resnet-8", "plain-8"): 7,
        ("resnet-8", "resnet-14"): 7,
        ("plain-8", "resnet-14"): 7,
    }
    assert json.loads((out / "compare.json").read_text())["plain-8"]["data"]["images"] == 20
    assert capsys.readouterr().out.count(" vs ") == 1 + 3 * 2


def test_a_file_with_itself_and_with_a_copy_under_another_name(files, tmp_path, out, capsys):
    state = {f"module.{name}": t for name, t in loading.load(files["resnet-8"]).state.items()}
    torch.save({"state_dict": state}, tmp_path / "copy.pth")
    copies = [
        f"first={files['resnet-8']}",
        f"second={files['resnet-8']}",
        f"third={tmp_path / 'copy.pth'}",
    ]
    assert run(*copies, "--source", "batchnorm", "--out", out) == 0
    table = pd.read_csv(out / "compare.csv")
    assert table["difference"].eq(0).all()
    rows = [line for line in capsys.readouterr().out.splitlines() if " vs " in line][1:]
    assert [line.endswith(" identical") for line in rows] == [True] * 3


def test_nearly_the_same_is_not_identical(files, tmp_path, out, capsys):
    checkpoint = loading.load(files["resnet-8"])
    checkpoint.state["fc.bias"][0] += 1e-6  # the curves are the same, the networks are not
    torch.save(checkpoint.state, tmp_path / "other.pth")
    assert (
        run(files["resnet-8"], tmp_path / "other.pth", "--source", "batchnorm", "--out", out) == 0
    )
    row = [line for line in capsys.readouterr().out.splitlines() if " vs " in line][1]
    assert row.endswith(" same numbers")


def test_shipped_networks_and_frames_made_earlier(files, tmp_path, out, capsys):
    from analysis.responses import main as responses

    words = [
        "--checkpoint",
        f"mine={files['resnet-8']}",
        str(files["resnet-14"]),
        "--source",
        "batchnorm",
    ]
    assert responses([*map(str, words), "--out", str(tmp_path / "earlier")]) == 0
    csv = tmp_path / "earlier" / "responses.csv"
    assert (
        run(csv, "resnet-20", f"again={files['resnet-8']}", "--source", "batchnorm", "--out", out)
        == 0
    )
    printed = capsys.readouterr().out
    [row] = [line for line in printed.splitlines() if line.strip().startswith("again vs mine")]
    assert row.endswith(" same numbers")
    assert "resnet-20 vs resnet-14" in printed


def test_a_page_to_look_at(files, tmp_path, out):
    """Every layer of every network, those of a group one by one, with the difference to the first."""
    csv = frame(tmp_path / "a.csv")
    group = f"b={files['resnet-8b']},{files['resnet-8c']}"
    words = (
        files["resnet-8"],
        csv,
        "--group",
        group,
        "--source",
        "batchnorm",
        "--out",
        out,
        "--format",
        "png",
    )
    assert run(*words, "--html") == 0
    page = (out / "compare.html").read_text()
    assert page.count("<figure ") == 2
    rows = [re.findall("<td.*?>(.*?)</td>", row) for row in re.findall("<tr .*", page)]
    heads = re.findall('data-key="(.*?)"', page)
    assert [row[0] for row in rows] == ["resnet-8"] * 7 + ["a"] * 3 + ["b"] * 14
    assert [row[heads.index("member")] for row in rows] == [""] * 10 + ["b 1"] * 7 + ["b 2"] * 7
    table = pd.read_csv(out / "compare.csv").groupby(["first", "second"])["difference"]
    shown = [row[heads.index("difference")] for row in rows]
    assert shown[:7] == [""] * 7
    assert [float(text) for text in shown[7:10]] == pytest.approx(
        table.get_group(("resnet-8", "a")).tolist(), abs=1e-4
    )
    expected = [
        std
        for name in ("resnet-8b", "resnet-8c")
        for std in stds(files[name]) - stds(files["resnet-8"])
    ]
    assert [float(text) for text in shown[10:]] == pytest.approx(expected, abs=1e-4)
    assert list(json.loads((out / "compare.json").read_text())) == [
        "resnet-8",
        "b 1",
        "b 2",
        str(csv),
    ]
    assert str(csv) in page


def test_the_same_command_writes_the_same_bytes(files, tmp_path):
    groups = [
        "--group",
        f"a={files['resnet-8']},{files['resnet-8b']}",
        "--group",
        f"b={files['resnet-8c']}",
    ]
    for name in ("a", "b"):
        words = (files["plain-8"], *groups, "--source", "batchnorm", "--out", tmp_path / name)
        assert run(*words, "--format", "svg", "pdf", "png", "--html") == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_groups_come_with_their_values_and_a_test(files, out, capsys):
    groups = {"a": ["resnet-8", "resnet-8b"], "b": ["resnet-8c", "resnet-8d"]}
    words = [
        word
        for k, v in groups.items()
        for word in ("--group", f"{k}={','.join(str(files[n]) for n in v)}")
    ]
    assert run(*words, "--source", "batchnorm", "--out", out) == 0
    printed = capsys.readouterr().out
    means = {name: [stds(files[n]).mean() for n in members] for name, members in groups.items()}
    for name, values in means.items():
        assert f"{name}: mean std of each network: {values[0]:.4f}, {values[1]:.4f}\n" in printed
    difference = np.mean(means["b"]) - np.mean(means["a"])
    assert f"b - a: {difference:+.4f}, p = " in printed
    assert (
        "the smallest that 2 and 2 can give is 0.3333); too few networks for an interval" in printed
    )
    curve = (stds(files["resnet-8c"]) + stds(files["resnet-8d"])) / 2
    assert pd.read_csv(out / "compare.csv")["std_second"].tolist() == pytest.approx(curve.tolist())
    assert set(json.loads((out / "compare.json").read_text())) == {"a 1", "a 2", "b 1", "b 2"}


def test_an_interval_where_there_are_networks_enough(files, out, capsys):
    a = ",".join(str(files[name]) for name in ("resnet-8", "resnet-8b", "resnet-8c"))
    b = ",".join([a, str(files["resnet-8d"])])
    assert run("--group", f"a={a}", "--group", f"b={b}", "--source", "batchnorm", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "the smallest that 3 and 4 can give is 0.0286); 95 % interval -" in printed


def test_the_public_checkpoints_with_each_other_and_with_shipped_networks(
    akamaster, tmp_path, capsys, monkeypatch
):
    """The README's command, whose output stands in the README."""
    monkeypatch.chdir(ROOT)
    [command] = re.findall(r"^python -m analysis.compare .*$", README, re.MULTILINE)
    assert run(*command.split("analysis.compare ")[1].split(), "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out.strip().replace(str(tmp_path / "out"), "figures")
    assert f"```text\n{printed}\n```" in README
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert table.groupby(["first", "second"]).ngroups == 6


def test_of_a_frame_with_both_sources_the_one_asked_for_is_taken(tmp_path, out, capsys):
    both = lambda f: pd.concat([f, f.assign(source="batchnorm", std=10.0, within=6.0, between=8.0)])  # noqa: E731
    a, b = (
        frame(tmp_path / "a.csv", both),
        frame(tmp_path / "b.csv", lambda f: f.assign(network="b")),
    )
    c = frame(tmp_path / "c.csv", lambda f: f.assign(network="c", source="batchnorm"))
    for other, source, expected in ((b, [], [5.0] * 3), (c, ["--source", "batchnorm"], [10.0] * 3)):
        assert run(a, other, *source, "--out", out) == 0
        assert pd.read_csv(out / "compare.csv")["std_first"].tolist() == expected
    assert capsys.readouterr().err == ""
    assert run(a, c, "--out", out) == 0
    alike = "warning: measured networks are compared with closed forms; --source makes them alike\n"
    assert capsys.readouterr().err == alike
    assert run(a, b, "--source", "batchnorm", "--out", out) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0] == f"warning: b: {b} has no numbers from batchnorm, only from hooks"
    assert warnings[1:] == ["warning: measured networks are compared with closed forms"]


def test_a_folder_of_a_shipped_networks_name_does_not_hide_it(files, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet-20").mkdir()
    assert run("resnet-20", "b=resnet-20", "--source", "batchnorm", "--out", out) == 0


def test_frames_of_different_images_are_a_warning(tmp_path, out, capsys):
    """Such as one of the probe set's 900 and one of the test set's 10,000."""
    a = frame(tmp_path / "a.csv")
    b = frame(tmp_path / "b.csv", lambda f: f.assign(network="b", images=3000))
    assert run(a, b, "--out", out) == 0
    assert (
        capsys.readouterr().err
        == "warning: the networks were measured on different images (2, 3,000 of them)\n"
    )


def test_a_small_p_is_not_printed_as_zero_and_several_are_said_to_be_several(tmp_path, out, capsys):
    groups = []
    for group in "abc":
        for seed in range(9):
            scale = 1 + seed / 100 + "abc".index(group)
            values = {
                name: size * scale
                for name, size in (("within", 3.0), ("between", 4.0), ("std", 5.0))
            }
            frame(tmp_path / f"{group}{seed}.csv", lambda f, values=values: f.assign(**values))
        groups += [
            "--group",
            f"{group}={','.join(str(tmp_path / f'{group}{seed}.csv') for seed in range(9))}",
        ]
    assert run(*groups, "--out", out) == 0
    printed = capsys.readouterr().out
    assert (
        "p = 4.1e-05 (permutation of networks, two-sided; the smallest that 9 and 9 can give is 4.1e-05)"
        in printed
    )
    assert "3 pairs of groups: each p is of one alone, and times 3 a bound for all" in printed


def test_too_many_relabelings_are_said_and_the_rest_is_done(tmp_path, out, capsys):
    groups = []
    for group in "ab":
        for seed in range(12):
            values = {
                "within": 3.0 * (1 + seed),
                "between": 4.0 * (1 + seed),
                "std": 5.0 * (1 + seed),
            }
            frame(tmp_path / f"{group}{seed}.csv", lambda f, values=values: f.assign(**values))
        groups += [
            "--group",
            f"{group}={','.join(str(tmp_path / f'{group}{seed}.csv') for seed in range(12))}",
        ]
    assert run(*groups, "--out", out) == 0
    assert (
        "b - a: +0.0000, no exact test: 12 and 12 networks have 2,704,156 relabelings"
        in capsys.readouterr().out
    )


# Bad input


def frame(path, edit=lambda frame: frame):
    columns = {
        "network": "a",
        "kind": "other",
        "depth": None,
        "layer": [1, 2, 3],
        "name": "c",
        "norm": "b",
        "stage": 1,
    }
    columns |= {
        "channels": 4,
        "height": 8,
        "width": 8,
        "images": 2,
        "count": 512,
        "mean": 0.0,
        "std": [5.0, 5.0, 5.0],
    }
    columns |= {"within": 3.0, "between": 4.0, "source": "hooks"}
    edit(pd.DataFrame(columns)).to_csv(path, index=False)
    return path


def test_one_frame_is_enough_where_it_holds_two_networks(tmp_path, out, capsys):
    both = frame(
        tmp_path / "both.csv",
        lambda f: pd.concat([f, f.assign(network="b", std=10.0, within=6.0, between=8.0)]),
    )
    assert run(both, "--out", out) == 0
    assert "b vs a 10.0000 vs 5.0000 2.000" in " ".join(capsys.readouterr().out.split())
    alone = frame(tmp_path / "alone.csv")
    assert run(alone, "--out", tmp_path / "none") == 2
    assert (
        capsys.readouterr().err
        == f"error: {alone}: it holds one network; name another thing to compare it with\n"
    )


def test_the_same_networks_of_two_runs(tmp_path, out, capsys):
    for run_of in ("first", "second"):
        frame(tmp_path / f"{run_of}.csv", lambda f: pd.concat([f, f.assign(network="b")]))
    files = [tmp_path / "first.csv", tmp_path / "second.csv"]
    assert run(*files, "--out", out) == 2
    assert (
        "error: two things to compare are called a: name them, LABEL=ITEM\n"
        in capsys.readouterr().err
    )
    assert run(files[0], f"later={files[1]}", "--out", out) == 0
    assert [line.split()[0:4] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        ["b", "vs", "a", "5.0000"],
        ["later", "a", "vs", "a"],
    ]


def test_a_network_of_zeros_has_no_ratio(tmp_path, out, capsys):
    zeros = frame(tmp_path / "zeros.csv", lambda f: f.assign(std=0.0, within=0.0, between=0.0))
    assert run(f"zeros={zeros}", f"b={frame(tmp_path / 'b.csv')}", "--out", out) == 0
    assert "b vs zeros 5.0000 vs 0.0000 - +5.0000 in 1" in " ".join(capsys.readouterr().out.split())


def test_labels_that_pandas_takes_for_nothing(tmp_path, out, capsys):
    both = frame(
        tmp_path / "both.csv",
        lambda f: pd.concat([f.assign(network=name) for name in ("NA", "None")]),
    )
    assert run(both, "--out", out) == 0
    assert "None vs NA" in capsys.readouterr().out


BAD_FRAMES = {
    "edited": (
        lambda f: f.assign(std=[5, 5.1, 5]),
        "std, within and between of a, layer 2 do not belong together",
    ),
    "negative": (
        lambda f: f.assign(std=[5, -5, 5]),
        "std, within and between of a, layer 2 do not belong together",
    ),
    "no source": (lambda f: f.assign(source=["hooks", None, "hooks"]), "no source in line 3"),
    "no label": (lambda f: f.assign(network=["a", "a", None]), "no network in line 4"),
    "no channels": (lambda f: f.assign(channels=[4, None, 4]), "no channels in line 3"),
    "no stage": (lambda f: f.assign(stage=[None, 1, 1]), "no stage in line 2"),
    "no layer": (lambda f: f.assign(layer=[1, None, 3]), "no layer in line 3"),
    "NaN": (
        lambda f: f.assign(std=[5, np.nan, 5]),
        "std, within and between of a, layer 2 do not belong together",
    ),
    "a layer less": (
        lambda f: f.drop(index=1),
        "the layers of a are not 1 to 2: rows are missing, or were added",
    ),
    "a layer twice": (lambda f: pd.concat([f, f.iloc[:1]]), "the layers of a are not 1 to 4"),
    "other columns": (
        lambda f: f.rename(columns={"std": "sd"}),
        "not a frame of analysis.responses: its columns are",
    ),
    "words": (lambda f: f.assign(std="high"), "not a frame of analysis.responses: "),
    "half a layer": (lambda f: f.assign(layer=[1.5, 2, 3]), "not a frame of analysis.responses: "),
    "no rows": (lambda f: f.iloc[:0], "not a frame of analysis.responses: it has no rows"),
    "a formula": (
        lambda f: f.assign(network="=1+1"),
        "'=1+1' in column network is unprintable, or a formula",
    ),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_frames_that_someone_edited(name, tmp_path, out, capsys):
    edit, message = BAD_FRAMES[name]
    good, bad = frame(tmp_path / "good.csv"), frame(tmp_path / "bad.csv", edit)
    assert run(f"good={good}", bad, "--out", out) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1
    assert list(out.iterdir()) == []


BAD = {
    "one thing": (lambda f: [f["resnet-8"]], "name two things to compare, or more"),
    "no such file": (lambda f: [f["resnet-8"], "gone.pth"], "error: gone.pth: no such file"),
    "no such frame": (
        lambda f: [f["resnet-8"], "gone.csv"],
        "error: gone.csv: no such file; a frame is the",
    ),
    "no such network": (lambda f: [f["resnet-8"], "resnet-32"], "error: resnet-32: no such file"),
    "empty group": (
        lambda f: [f["resnet-8"], "--group", "a="],
        "error: --group a=: not LABEL=ITEM,ITEM,...",
    ),
    "group without a label": (
        lambda f: [f["resnet-8"], "--group", f["plain-8"]],
        "not LABEL=ITEM,ITEM,...",
    ),
    "two layouts in a group": (
        lambda f: [f["resnet-8"], "--group", f"a={f['resnet-8b']},{f['resnet-14']}"],
        "error: the networks of group a have different layouts (7 and 13 layers, or other channels): a group is one",
    ),
    "one label twice": (
        lambda f: [f["resnet-8"], f"resnet-8={f['plain-8']}"],
        "error: two things to compare are called",
    ),
    "two sources": (
        lambda f: ["--source", "hooks", "batchnorm", "--group", f"a={f['resnet-8']}"],
        "no such file",
    ),
    "one network as two seeds": (
        lambda f: [f["plain-8"], "--group", f"a={f['resnet-8']},{f['resnet-8b']},{f['resnet-8']}"],
        "error: networks 1 and 3 of group a have the same numbers: one network counts once; a group's networks differ",
    ),
    "a label as a group's network is called": (
        lambda f: [f"a 1={f['plain-8']}", "--group", f"a={f['resnet-8']},{f['resnet-8b']}"],
        "error: two things to compare are called a 1: name them, LABEL=ITEM",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, files, out, capsys):
    words, message = BAD[name]
    assert run("--source", "batchnorm", "--out", out, *words(files)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not out.exists() or list(out.iterdir()) == []


def test_one_layer(tmp_path, out, capsys):
    """There is a ratio, and no correlation."""
    for name in ("a", "b"):
        frame(tmp_path / f"{name}.csv", lambda f, name=name: f.iloc[:1].assign(network=name))
    assert run(tmp_path / "a.csv", tmp_path / "b.csv", "--out", out) == 0
    row = [line for line in capsys.readouterr().out.splitlines() if " vs " in line][1]
    assert row.split()[-5:] == ["-", "-", "0.0000", "same", "numbers"]
