"""The command, from its options to its files."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress

import pandas as pd
import pytest
import torch
from PIL import Image

import analysis
from analysis.cli.items import split_label
from analysis.measuring.frame import COLUMNS
from analysis.responses import main
from models import build, closed_form, zoo
from models.checkpoints import loading
from models.data import cifar10, probe
from models.data.formats import CLASSES
from models.data.preprocessing import PRESETS
from tests.conftest import ROOT
from tests.models.checkpoints.test_recognition import blobs, record
from tests.test_project import COMMANDS, README


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of forty images in class folders."""
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(blobs(40, seed=0)):
        (folder / CLASSES[i % 10]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / CLASSES[i % 10] / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Checkpoints of small networks by name, with BN statistics that fit the images, and with
    cards.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    x = PRESETS["imagenet"](blobs(40, seed=0))
    paths = {}
    for name in ("resnet-8", "plain-8", "resnet-14"):
        torch.manual_seed(1)
        paths[name] = folder / f"{name}.safetensors"
        network = record(build(name), x)
        loading.save(
            paths[name], network, PRESETS["imagenet"], crop_padding="none", training={"seed": 1}
        )
    return paths


def run(*words):
    """The exit status of the command, whether argparse or main ends it."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def shown_in_readme(printed, out):
    return f"```text\n{printed.strip()}\n```".replace(str(out), "figures") in README


def words_of(command):
    return command.split("-m analysis.responses ")[1].split()


def test_the_main_job_on_real_input(shared_cifar10, tmp_path, capsys):
    """The README's first command, on some images: what it says before it measures stands in the
    README.
    """
    assert (
        run(*words_of(COMMANDS[0]), "--data", shared_cifar10, "--images", 256, "--out", tmp_path)
        == 0
    )
    printed = capsys.readouterr().out
    before = printed.partition("\n\n")[0].splitlines()[1:]
    assert len(before) == 10  # network and preprocessing of each
    assert "\n".join(before) in README
    frame = pd.read_csv(tmp_path / "responses.csv")
    assert list(frame.columns) == list(COLUMNS)
    layers = {"plain-20": 19, "plain-56": 55, "resnet-20": 19, "resnet-56": 55, "resnet-110": 109}
    assert frame.groupby("network", sort=False).size().to_dict() == layers
    claims = pd.read_csv(tmp_path / "claims.csv")
    assert claims.groupby("claim").size().tolist() == [4, 3, 3]
    unequal = claims["sentence"].str.contains("; after ")
    assert set(claims["verdict"][~unequal]) <= {"holds", "does not hold"}
    assert set(claims["verdict"][unequal]) <= {"cannot be judged here"}
    assert all(sentence in printed for sentence in claims["sentence"])
    blocks = claims[claims["claim"] == 3]["networks"].tolist()
    assert blocks == ["resnet-56, resnet-20", "resnet-110, resnet-20", "resnet-110, resnet-56"]


def test_a_wrong_place_in_the_environment_is_an_error(tmp_path, monkeypatch, capsys):
    """As a wrong --data is: no stand-in for what was named."""
    monkeypatch.setenv("CIFAR10", str(tmp_path / "typo"))
    assert run("--depth", 20, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(
        f"error: $CIFAR10: {tmp_path / 'typo'}: no such file or folder; "
    )


def test_the_stand_in_is_used_as_a_whole(tmp_path, capsys):
    assert (
        run(
            "--depth",
            20,
            "--kind",
            "residual",
            "--images",
            100,
            "--out",
            tmp_path,
            "--format",
            "svg",
        )
        == 0
    )
    [line] = capsys.readouterr().err.splitlines()
    assert (
        ". The probe set stands for them, all of it whatever --images says (--data cifar10 asks for"
        in line
    )
    assert set(pd.read_csv(tmp_path / "responses.csv")["images"]) == {len(probe.load())}


def test_the_main_job_without_any_data(tmp_path, capsys):
    """Hooks measure the shipped networks on the probe set; the command, the figures and the
    provenance say so.
    """
    assert run(*words_of(COMMANDS[0]), "--out", tmp_path, "--format", "svg") == 0
    shown = capsys.readouterr()
    [line] = shown.err.splitlines()
    assert line.startswith("no CIFAR-10 test images found: tried $CIFAR10 (not set), data, ")
    assert line.endswith(". The probe set stands for them (--data cifar10 asks for no stand-in)")
    note = probe.load().note
    assert probe.load().describe() in shown.out.splitlines()
    assert drawn(tmp_path) == ["plain-20", "plain-56", "resnet-20", "resnet-56", "resnet-110"]
    for figure in ("fig7", "decomposition"):
        assert all(part in (tmp_path / f"{figure}.svg").read_text() for part in note.splitlines())
    frame = pd.read_csv(tmp_path / "responses.csv")
    assert set(frame["source"]) == {"hooks"}
    assert set(frame["images"]) == {len(probe.load())}
    entries = json.loads((tmp_path / "responses.json").read_text())
    assert entries["resnet-110"]["data"]["layout"] == "probe set"
    assert entries["resnet-110"]["data"]["note"] == note
    assert entries["resnet-110"]["accuracy"] is None
    assert (
        "an individual layer of a ResNet modifies the signal less when there are more: holds"
        in shown.out
    )


def test_two_public_checkpoints_on_real_input(
    akamaster, shared_cifar10, tmp_path, capsys, monkeypatch
):
    """The README's second command, whose output stands in the README."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    [command] = re.findall(
        r"^python -m analysis.responses --checkpoint resnet-20=.*$", README, re.MULTILINE
    )
    assert run(*words_of(command), "--out", out) == 0
    assert shown_in_readme(capsys.readouterr().out, out)
    frame = pd.read_csv(out / "responses.csv")
    measured, formula = (
        frame[frame["source"] == source].reset_index() for source in ("hooks", "batchnorm")
    )
    assert measured.groupby("network").size().to_dict() == {"resnet-20": 19, "resnet-56": 55}
    means = measured.groupby("network")["std"].mean()
    assert means["resnet-20"] == pytest.approx(0.7324, abs=5e-5)
    assert means["resnet-56"] == pytest.approx(0.4539, abs=5e-5)
    difference = (formula["std"] / measured["std"] - 1).abs().groupby(measured["network"])
    assert difference.mean().tolist() == pytest.approx([0.045, 0.050], abs=5e-4)  # see README
    assert difference.max()["resnet-56"] == pytest.approx(0.30, abs=5e-3)
    entries = json.loads((out / "responses.json").read_text())
    for name, accuracy in (("resnet-20", 0.9173), ("resnet-56", 0.9339)):
        assert entries[name]["accuracy"] == pytest.approx(accuracy)
        assert entries[name]["preprocessing"]["name"] == "imagenet"
        assert entries[name]["preprocessing"]["crop_padding"] == "black"
        assert entries[name]["network"]["kind_known"].startswith("recognised, misfit 0.0")
        assert entries[name]["data"]["exact"] is True
        assert entries[name]["warnings"] == []
    images = ["decomposition.pdf", "decomposition.png", "fig7.pdf", "fig7.png"]
    assert sorted(path.name for path in out.iterdir()) == [
        "claims.csv",
        *images,
        "responses.csv",
        "responses.json",
    ]


def test_the_closed_form_of_the_real_checkpoints(akamaster, tmp_path):
    named = [f"resnet-{depth}={path}" for depth, path in akamaster.items()]
    assert run("--checkpoint", *named, "--source", "batchnorm", "--out", tmp_path) == 0
    means = pd.read_csv(tmp_path / "responses.csv").groupby("network")["std"].mean()
    assert means.tolist() == pytest.approx([0.7318, 0.4536], abs=5e-5)


def test_what_is_written_and_printed(files, images, tmp_path, capsys):
    assert (
        run(
            "--checkpoint",
            *files.values(),
            "--data",
            images,
            "--out",
            tmp_path / "out",
            "--format",
            "svg",
        )
        == 0
    )
    printed = capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "out" / "responses.csv")
    assert frame["network"].drop_duplicates().tolist() == ["resnet-8", "plain-8", "resnet-14"]
    assert set(frame["source"]) == {"hooks"}
    assert set(frame["images"]) == {40}
    data = cifar10.load(images)
    for name, path in files.items():
        network = loading.load(path).model
        expected = analysis.measure(network, [PRESETS["imagenet"](data.images)])["std"]
        assert frame[frame["network"] == name]["std"].tolist() == pytest.approx(
            expected.tolist(), rel=1e-6
        )
        hits = (network(PRESETS["imagenet"](data.images)).argmax(1).numpy() == data.labels).mean()
        [row] = [
            line.split()
            for line in printed.splitlines()
            if line.split()[1:2] == [str(len(expected))] and name in line
        ]
        std = [expected.mean(), expected.min(), expected.max()]
        assert row == [
            name,
            str(len(expected)),
            f"{100 * hits:.2f}",
            *(f"{value:.4f}" for value in std),
            "-",
            "-",
        ]
    means = frame.groupby("network")["std"].mean()
    sign = "<" if means["resnet-8"] < means["plain-8"] else ">="
    percent = abs(100 * (means["resnet-8"] / means["plain-8"] - 1))
    assert (
        f"    {'+' if sign == '<' else '-'} resnet-8 has a mean std of {means['resnet-8']:.3f}, {percent:.1f} % "
        f"{'less' if sign == '<' else 'more'} than plain-8 ({means['plain-8']:.3f})\n"
    ) in printed
    names = ["claims.csv", "decomposition.svg", "fig7.svg", "responses.csv", "responses.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert ">ResNet-14</text>" in (tmp_path / "out" / "fig7.svg").read_text()


def test_a_page_to_look_at(files, tmp_path, capsys):
    words = (
        "--checkpoint",
        *files.values(),
        "--source",
        "batchnorm",
        "--out",
        tmp_path,
        "--format",
        "png",
    )
    assert run(*words, "--html") == 0
    assert capsys.readouterr().out.endswith(
        f"wrote {tmp_path}/decomposition.png\nwrote {tmp_path}/responses.html\n"
    )
    page = (tmp_path / "responses.html").read_text()
    assert page.count("<figure ") == 2
    assert page.count("<tr ") == len(pd.read_csv(tmp_path / "responses.csv"))
    for entry in json.loads((tmp_path / "responses.json").read_text()).values():
        assert entry["checkpoint"]["sha256"] in page


def test_the_same_command_writes_the_same_bytes(files, images, tmp_path):
    for out in ("a", "b"):
        words = ("--checkpoint", *files.values(), "--data", images, "--out", tmp_path / out)
        assert run(*words, "--format", "svg", "pdf", "png", "--html") == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_labels(files, images, tmp_path, capsys):
    words = ("--data", images, "--out", tmp_path / "out")
    first = files["resnet-8"]
    assert (
        run("--checkpoint", f"mine={first}", first, f"a=b={first}", *words) == 2
    )  # a=b is a label, =PATH no path
    other = tmp_path / "epoch=3-step=100.ckpt"
    torch.save(build("resnet-8").state_dict(), other)
    assert (
        run(
            "--checkpoint",
            f"mine={first}",
            first,
            other,
            "--kind",
            "residual",
            "--normalize",
            "imagenet",
            *words,
        )
        == 0
    )
    frame = pd.read_csv(tmp_path / "out" / "responses.csv")
    assert frame["network"].drop_duplicates().tolist() == ["mine", "resnet-8", "epoch=3-step=100"]
    capsys.readouterr()
    assert run("--checkpoint", f"plain-8={first}", *words) == 0
    assert (
        "warning: plain-8: the label says plain-8, the file holds resnet-8"
        in capsys.readouterr().err
    )


def test_an_existing_path_wins_over_a_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epoch=3.ckpt").touch()
    assert split_label("epoch=3.ckpt") == (None, type(tmp_path)("epoch=3.ckpt"))
    assert split_label("other=3.ckpt") == ("other", type(tmp_path)("3.ckpt"))
    assert split_label("a.ckpt") == (None, type(tmp_path)("a.ckpt"))


def test_images_batch_size_and_split(files, images, tmp_path):
    words = ("--checkpoint", files["resnet-8"], "--data", images, "--images", 12, "--out", tmp_path)
    assert run(*words, "--batch-size", 5) == 0
    one = pd.read_csv(tmp_path / "responses.csv")
    assert set(one["images"]) == {12}
    assert run(*words) == 0
    assert pd.read_csv(tmp_path / "responses.csv")["std"].tolist() == pytest.approx(
        one["std"].tolist(), rel=1e-6
    )


def test_a_progress_bar_over_all_networks(files, images, tmp_path):
    """In a terminal, which a pseudo-terminal stands in for."""
    import pty
    import termios

    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 100))
    words = [
        "--checkpoint",
        files["resnet-8"],
        files["plain-8"],
        "--data",
        images,
        "--out",
        tmp_path,
    ]
    command = [sys.executable, "-m", "analysis.responses", *map(str, words)]
    process = subprocess.Popen(command, stderr=child, stdout=subprocess.DEVNULL, cwd=ROOT)
    os.close(child)
    shown = b""
    with suppress(OSError):  # the end of a pseudo-terminal
        while part := os.read(parent, 4096):
            shown += part
    os.close(parent)
    assert process.wait() == 0
    assert b"/80" in shown  # 2 networks, 40 images each
    assert b"plain-8" in shown


def test_the_closed_form_needs_no_images(files, tmp_path, capsys):
    assert (
        run(
            "--checkpoint",
            *files.values(),
            "--source",
            "batchnorm",
            "--out",
            tmp_path,
            "--format",
            "svg",
        )
        == 0
    )
    frame = pd.read_csv(tmp_path / "responses.csv")
    assert set(frame["source"]) == {"batchnorm"}
    assert frame[["height", "width", "images", "count"]].isna().all(axis=None)
    expected = closed_form(loading.load(files["plain-8"]).model)["std"]
    assert frame[frame["network"] == "plain-8"]["std"].tolist() == pytest.approx(expected.tolist())
    assert (
        "closed form from BN's tensors, not measured on images"
        in (tmp_path / "fig7.svg").read_text()
    )
    entry = json.loads((tmp_path / "responses.json").read_text())["plain-8"]
    assert entry["source"] == ["batchnorm"]
    assert "data" not in entry
    assert "accuracy" not in entry


def test_it_is_the_fallback_where_nothing_stands_for_the_images(files, tmp_path, capsys):
    """There is no stand-in for the training images."""
    words = ("--checkpoint", files["resnet-8"], "--split", "train")
    assert run(*words, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("no CIFAR-10 train images found: tried $CIFAR10 (not set), data, ")
    assert shown[1:] == [
        "no images: the closed form from BN's tensors instead (--source batchnorm)"
    ]
    assert set(pd.read_csv(tmp_path / "out" / "responses.csv")["source"]) == {"batchnorm"}
    assert run(*words, "--out", tmp_path / "other", "--source", "hooks") == 2
    assert "error: no CIFAR-10 train images found" in capsys.readouterr().err


def test_the_probe_set_by_name(files, tmp_path, capsys, monkeypatch):
    """Also where results go to a folder of that name; the closed form needs no images, whatever
    stands for them.
    """
    words = ("--checkpoint", files["resnet-8"], "--data", "probe", "--format", "svg")
    assert run(*words, "--source", "hooks", "batchnorm", "--out", tmp_path / "out") == 0
    assert "measured on the probe set" in capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "out" / "responses.csv")
    assert set(frame[frame["source"] == "hooks"]["images"]) == {len(probe.load())}
    assert run(*words, "--source", "batchnorm", "--out", tmp_path / "formula") == 0
    assert "probe" not in (tmp_path / "formula" / "fig7.svg").read_text()
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert run(*words, "--out", "probe") == 0
    assert "measured on the probe set" in capsys.readouterr().out


def test_without_images_the_label_says_whether_a_network_is_plain(tmp_path, capsys):
    torch.save(build("plain-8").state_dict(), tmp_path / "a.pt")
    words = ("--source", "batchnorm", "--out", tmp_path)
    kinds = {}
    for label in ("plain-8", "mine"):
        assert run("--checkpoint", f"{label}={tmp_path / 'a.pt'}", *words) == 0
        kinds[label] = pd.read_csv(tmp_path / "responses.csv")["kind"].iloc[0]
    assert kinds == {"plain-8": "plain", "mine": "residual"}
    assert "mine: network resnet-8 (assumed)" in capsys.readouterr().out
    assert run("--checkpoint", f"mine={tmp_path / 'a.pt'}", "--kind", "plain", *words) == 0
    assert pd.read_csv(tmp_path / "responses.csv")["kind"].iloc[0] == "plain"


def test_what_does_not_fit_is_a_warning(files, images, tmp_path, capsys):
    words = ("--checkpoint", files["resnet-8"], "--data", images, "--out", tmp_path)
    assert run(*words, "--normalize", "[-1,1]") == 0
    assert (
        "warning: resnet-8: no preprocessing fits (with a misfit below 0.15): misfit "
        in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "responses.json").read_text())["resnet-8"]["warnings"]


# Bad input: one line that says what, where and what to do, status 2, and what was there is there
# still


def nan_weights(path, files):
    network = build("resnet-8")
    network.conv1.weight.data.fill_(float("nan"))
    torch.save(network.state_dict(), path / "nan.pt")
    return path / "nan.pt"


def overflowing(path, files):
    network = record(build("resnet-8"), torch.randn(8, 3, 32, 32))
    network.layer2[0].bn1.weight.data.fill_(1e38)
    torch.save(network.state_dict(), path / "overflow.pt")
    return path / "overflow.pt"


def text(path, files):
    (path / "notes.pt").write_text("hello")
    return path / "notes.pt"


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def evil(path, files):
    torch.save(Evil(), path / "evil.pt")
    return path / "evil.pt"


def other_network(path, files):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path / "other.pt")
    return path / "other.pt"


def missing_tensor(path, files):
    state = build("resnet-8").state_dict()
    del state["bn1.weight"]
    torch.save(state, path / "missing.pt")
    return path / "missing.pt"


def extra_tensor(path, files):
    torch.save(
        build("resnet-8").state_dict() | {"layer1.0.bn3.weight": torch.ones(16)}, path / "extra.pt"
    )
    return path / "extra.pt"


def good(path, files):
    return files["resnet-8"]


def blocked(path):
    (path / "file").write_text("")
    return path / "file" / "out"


def truncated_archive(path):
    (path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b" + bytes(40))
    return path / "cifar-10-python.tar.gz"


def empty_folder(path):
    (path / "empty").mkdir()
    return path / "empty"


BAD = {
    "missing file": (
        lambda p, f: p / "gone.pth",
        {},
        "error: {path}/gone.pth: no such file; a checkpoint is a file",
    ),
    "text": (
        text,
        {},
        "error: {path}/notes.pt: not a checkpoint, damaged or truncated; a checkpoint is a file of",
    ),
    "code": (
        evil,
        {},
        "error: {path}/evil.pt: refused: it asks for posix.system, which could run code",
    ),
    "other network": (
        other_network,
        {},
        "error: {path}/other.pt: none of the paper's networks (CIFAR-10's: ",
    ),
    "missing tensor": (
        missing_tensor,
        {},
        "error: {path}/missing.pt: the tensors are not those of resnet-8: "
        "bn1.weight is missing; --model FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION builds any other "
        "network, --source batchnorm needs none",
    ),
    "extra tensor": (extra_tensor, {}, "layer1.0.bn3.weight is too many"),
    "NaN in the weights": (
        nan_weights,
        {},
        "error: {path}/nan.pt: NaN or infinity in conv1.weight: the training "
        "diverged, or the file is damaged",
    ),
    "NaN in a response": (
        overflowing,
        {},
        "error: {path}/overflow.pt: NaN or infinity in the response of layer 4 "
        "(layer2.0.conv1) in batch 1: look at the weights and at the images",
    ),
    "truncated archive": (
        good,
        {"--data": truncated_archive},
        "error: {path}/cifar-10-python.tar.gz: damaged or truncated archive",
    ),
    "no images": (
        good,
        {"--data": empty_folder},
        "error: {path}/empty: no CIFAR-10 test images here; looked for",
    ),
    "no data": (
        good,
        {"--data": lambda p: p / "nowhere"},
        "error: {path}/nowhere: no such file or folder; --data "
        "takes a folder or an archive of CIFAR-10",
    ),
    "too many images": (
        good,
        {"--images": lambda p: 41},
        "error: --images 41: there are 40 images in ",
    ),
    "CIFAR-10 or nothing": (
        good,
        {"--data": lambda p: "cifar10"},
        "error: no CIFAR-10 test images found: tried ",
    ),
    "part of the probe set": (
        good,
        {"--data": lambda p: "probe", "--images": lambda p: 100},
        "error: --images 100: the probe set holds only as a whole; leave --images out",
    ),
    "probe set for training": (
        good,
        {"--data": lambda p: "probe", "--split": lambda p: "train"},
        "error: --split train: the probe set stands for the test images",
    ),
    "out": (
        good,
        {"--out": blocked},
        "error: --out {path}/file/out: Not a directory; name a folder that can be written",
    ),
    "0 images": (
        good,
        {"--images": lambda p: 0},
        "argument --images: '0' is not a whole number of 1 or more",
    ),
    "batch size 0": (
        good,
        {"--batch-size": lambda p: 0},
        "argument --batch-size: '0' is not a whole number of 1",
    ),
    "negative images": (
        good,
        {"--images": lambda p: -3},
        "argument --images: '-3' is not a whole number of 1",
    ),
    "device": (
        good,
        {"--device": lambda p: "tpu"},
        "argument --device: invalid choice: 'tpu' (choose from ",
    ),
    "split": (
        good,
        {"--split": lambda p: "val"},
        "argument --split: invalid choice: 'val' (choose from ",
    ),
    "preset": (
        good,
        {"--normalize": lambda p: "mnist"},
        "--normalize: unknown preset 'mnist'; one of auto, imagenet, "
        "cifar10, cifar10-2, [-1,1], [0,1], per-pixel",
    ),
}


@pytest.mark.parametrize(("checkpoint", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input(checkpoint, options, message, files, images, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "responses.csv").write_text("from an earlier run")
    words = {
        "--checkpoint": checkpoint(tmp_path, files),
        "--data": images,
        "--out": tmp_path / "out",
    }
    words |= {option: value(tmp_path) for option, value in options.items()}
    status = run(*(str(word) for pair in words.items() for word in pair))
    shown = capsys.readouterr().err
    assert status == 2
    assert message.format(path=tmp_path) in shown
    assert "Traceback" not in shown
    errors = [line for line in shown.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert shown.endswith(errors[0] + "\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["responses.csv"]
    assert (tmp_path / "out" / "responses.csv").read_text() == "from an earlier run"
    assert not (tmp_path / "evil").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none(files, images, tmp_path, capsys):
    assert run("--checkpoint", files["resnet-8"], "--data", images, "--device", "cuda") == 2
    assert (
        "--device cuda: torch sees no CUDA device on this machine; use --device cpu"
        in capsys.readouterr().err
    )


def test_two_kinds_and_two_equal_labels(files, images, tmp_path, capsys):
    assert run("--checkpoint", files["resnet-8"], "--kind", "residual", "plain") == 2
    assert "--kind: one kind at a time" in capsys.readouterr().err
    same = files["resnet-8"]
    assert (
        run("--checkpoint", f"a={same}", f"a={same}", "--source", "batchnorm", "--out", tmp_path)
        == 2
    )
    assert (
        "error: two networks are called a: name them, LABEL=PATH LABEL=PATH"
        in capsys.readouterr().err
    )


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        main(
            [
                "--checkpoint",
                str(tmp_path / "gone.pth"),
                "--source",
                "batchnorm",
                "--out",
                str(tmp_path),
                "--debug",
            ]
        )


def test_ctrl_c_writes_nothing(files, images, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("analysis.measuring.measurement.Measurement.add", interrupt)
    assert (
        run("--checkpoint", files["resnet-8"], "--data", images, "--out", tmp_path / "out") == 130
    )
    assert "interrupted: no file is half-written" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_earlier_results(
    files, images, tmp_path, monkeypatch, capsys
):
    words = ("--checkpoint", files["resnet-8"], "--data", images, "--out", tmp_path)
    assert run(*words) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda *a, **o: (_ for _ in ()).throw(OSError(28, "full")),
    )
    assert run(*words, "--images", 10) == 2
    assert "error: " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_help_does_not_wait_for_torch():
    script = (
        "import sys; from analysis.responses import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.splitlines()[-1] == "[]"
    assert "--checkpoint [LABEL=]PATH" in run.stdout


# Shipped networks


@pytest.fixture
def shelf(files, tmp_path, monkeypatch):
    """A zoo of our own: shipped are plain-8 and resnet-8 and -14, of 1,000 iterations."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, path in files.items():
        checkpoint = loading.load(path)
        card = {"iterations": 64_000 if name == "resnet-14" else 1_000}
        loading.save(
            folder / path.name,
            checkpoint.model,
            PRESETS["imagenet"],
            crop_padding="none",
            training=card,
        )
    monkeypatch.setattr(zoo, "__file__", str(folder / "__init__.py"))
    return folder


def drawn(out):
    return pd.read_csv(out / "responses.csv")["network"].drop_duplicates().tolist()


def test_depth_and_kind_choose_among_the_shipped_networks(shelf, images, tmp_path, capsys):
    words = ("--data", images, "--out", tmp_path, "--format", "svg")
    assert run("--depth", 8, 14, 8, *words) == 0
    assert drawn(tmp_path) == ["plain-8", "resnet-8", "resnet-14"]
    shown = capsys.readouterr()
    assert shown.err == (
        "plain-14 is not shipped (there are: plain-8, resnet-8, resnet-14); "
        "python -m models.train --depth 14 --kind plain makes it\n"
    )
    assert "plain-8: network plain-8 (card), trained for 1,000 iterations\n" in shown.out
    note = "plain-8, ResNet-8 trained for 1,000 of the paper's 64,000 iterations"
    assert note in (tmp_path / "fig7.svg").read_text()
    assert run("--depth", 14, 8, "--kind", "residual", *words) == 0
    assert drawn(tmp_path) == ["resnet-14", "resnet-8"]


def test_shipped_networks_beside_a_checkpoint(shelf, files, images, tmp_path, capsys):
    words = ("--data", images, "--out", tmp_path, "--format", "svg")
    assert (
        run("--depth", 8, "--kind", "plain", "--checkpoint", f"mine={files['resnet-14']}", *words)
        == 0
    )
    assert drawn(tmp_path) == ["plain-8", "mine"]
    assert (
        pd.read_csv(tmp_path / "responses.csv").groupby("network")["kind"].first()["mine"]
        == "residual"
    )
    assert run("--depth", 32, "--checkpoint", f"mine={files['resnet-14']}", *words) == 0
    assert drawn(tmp_path) == ["mine"]
    assert "plain-32 is not shipped" in capsys.readouterr().err


def test_of_shipped_networks_only_the_card_says_the_preprocessing(
    shelf, files, images, tmp_path, capsys
):
    words = ("--data", images, "--out", tmp_path, "--format", "svg", "--normalize", "[-1,1]")
    assert (
        run("--depth", 8, "--kind", "plain", "--checkpoint", f"mine={files['resnet-14']}", *words)
        == 0
    )
    known = {
        network: entry["preprocessing"]
        for network, entry in json.loads((tmp_path / "responses.json").read_text()).items()
    }
    assert known["mine"]["name"] == "[-1,1]"
    assert known["mine"]["known"].startswith("given")
    assert known["plain-8"]["known"].startswith("card")


def test_plain_110_is_left_out_unless_it_is_asked_for(shelf, tmp_path, capsys):
    words = ("--source", "batchnorm", "--out", tmp_path)
    assert run("--depth", 8, 110, *words) == 0
    assert "plain-110" not in capsys.readouterr().err
    assert run("--depth", 8, 110, "--kind", "residual", "plain", *words) == 0
    assert "plain-110 is not shipped" in capsys.readouterr().err


def test_none_of_the_networks_is_shipped(shelf, tmp_path, capsys):
    assert run("--depth", 21, "--out", tmp_path / "out") == 2
    assert (
        "error: --depth 21: no CIFAR-10 network has 21 layers: a depth is 6n + 2; the nearest are 20 and 26"
        in (capsys.readouterr().err)
    )
    assert run("--out", tmp_path / "out") == 2  # as with --depth 20 56 110
    assert (
        "error: plain-20 is not shipped (there are: plain-8, resnet-8, resnet-14)"
        in capsys.readouterr().err
    )
    assert list((tmp_path / "out").iterdir()) == []
