"""The command that measures residual additions, from its arguments to its files."""

import json

import pandas as pd
import pytest
import torch

from analysis.branches import main
from models import build

pytestmark = pytest.mark.slow

BATCHES = """
import torch

def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=generator)
    labels = torch.arange(64) % 10
    return [(x[:32], labels[:32]), (x[32:], labels[32:])]

def no_labels():
    return [batch[0] for batch in batches()]
"""


@pytest.fixture
def batches(tmp_path):
    path = tmp_path / "inputs.py"
    path.write_text(BATCHES)
    return f"{path}:batches"


def test_from_arguments_to_files(batches, tmp_path, capsys):
    items = ["resnet-20", "resnet-56", "plain-20"]
    options = ["--batches", batches, "--positions", "--html", "--format", "png"]
    assert main([*items, *options, "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "branches.csv")
    assert frame["network"].value_counts(sort=False).to_dict() == {"resnet-20": 9, "resnet-56": 27}
    assert frame["images"].unique() == [64]
    assert frame[["ratio", "std_error", "angle"]].notna().all(axis=None)
    medians = frame.groupby("network")["ratio"].median()
    output = capsys.readouterr().out
    assert "plain-20: no residual additions; no sum of two tensors" in output
    [line] = [line for line in output.splitlines() if "times the std of its shortcut" in line]
    deep, shallow = (f"{medians[name]:.3f} times" for name in ("resnet-56", "resnet-20"))
    assert line.strip() == (
        f"? a block's branch has {deep} the std of its shortcut in resnet-56, {shallow} in "
        "resnet-20 (medians over blocks); on 64 images, fewer than 200"
    )
    document = json.loads((tmp_path / "branches.json").read_text())
    assert list(document) == ["resnet-20", "resnet-56"]
    assert document["resnet-20"]["data"] == batches
    assert (tmp_path / "branches.png").stat().st_size > 1000
    page = (tmp_path / "branches.html").read_text()
    assert page.count("<td>convolution</td>") == 36
    assert page.count("<li data-verdict=") == 1
    assert f"batches of {batches}" in page


def test_images_and_the_verdict(shared_cifar10, tmp_path, capsys):
    options = ["--data", str(shared_cifar10), "--images", "200", "--format", "png"]
    assert main(["resnet-20", "resnet-56", *options, "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "branches.csv")
    assert frame["images"].unique() == [200]
    medians = frame.groupby("network")["ratio"].median()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    [line] = [line for line in lines if "times the std of its shortcut" in line]
    assert line[0] == ("+" if medians["resnet-56"] < medians["resnet-20"] else "-")
    document = json.loads((tmp_path / "branches.json").read_text())
    assert document["resnet-20"]["data"]["images"] == 200
    assert document["resnet-20"]["preprocessing"]["name"] == "per-pixel"


def test_lesions(batches, tmp_path, capsys):
    options = ["--batches", batches, "--lesion", "64", "--format", "png", "--out", str(tmp_path)]
    assert main(["resnet-20", *options]) == 0
    frame = pd.read_csv(tmp_path / "branches.csv")
    assert frame[["lesion_accuracy", "lesion_loss"]].notna().all(axis=None)
    options[1] = batches.replace(":batches", ":no_labels")
    assert main(["resnet-20", *options]) == 2
    assert "resnet-20: --lesion: no labels" in capsys.readouterr().err


def test_only_networks_without_additions(batches, tmp_path, capsys):
    assert main(["plain-20", "--batches", batches, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: none of the networks has a residual addition\n"
    assert not list(tmp_path.glob("branches.*"))


def test_a_checkpoint_of_a_network_of_ones_own(batches, tmp_path, capsys):
    torch.save(build("resnet-8").state_dict(), tmp_path / "mine.pth")
    (tmp_path / "mine.py").write_text(
        "from models import build\nmake = lambda: build('resnet-8')\n"
    )
    items = [f"mine={tmp_path / 'mine.pth'}", "--model", f"{tmp_path / 'mine.py'}:make"]
    assert main([*items, "--batches", batches, "--format", "png", "--out", str(tmp_path)]) == 0
    assert len(pd.read_csv(tmp_path / "branches.csv")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet-20", "--batches", "nothing.py:f"], "--batches nothing.py:f: nothing.py: no such"),
        (["resnet-20", "--batches", "f"], "--batches f: not FILE.py:FUNCTION"),
        (["missing.pth"], "missing.pth: no such file"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_no_closed_form(capsys):
    with pytest.raises(SystemExit) as status:
        main(["resnet-20", "--source", "batchnorm"])
    assert status.value.code == 2
    assert "additions are measured on input, not computed" in capsys.readouterr().err
