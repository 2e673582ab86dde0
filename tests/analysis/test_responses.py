"""The command, from its options to its files."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import analysis
from analysis.cli.items import split_label
from analysis.measuring.frame import COLUMNS
from models import build, closed_form, zoo
from models.checkpoints import loading
from models.data import cifar10, probe
from models.data.preprocessing import PRESETS
from tests.helpers import (
    PAGES,
    ROOT,
    SETUP,
    files_in,
    fitting,
    read_table,
    readme_command,
    run,
    save,
    succeed,
    watching,
)

SVG = "--format svg"
WRITTEN = ["claims.csv", "decomposition.svg", "fig7.svg", "responses.csv", "responses.json"]


def frame_in(out):
    return read_table(out / "responses.csv")


def drawn(out):
    return frame_in(out)["network"].drop_duplicates().tolist()


def provenance(out):
    return json.loads((out / "responses.json").read_text())


# On real input


@pytest.mark.slow
@pytest.mark.real
def test_the_readmes_first_command(shared_cifar10, out):
    """Five networks on some real images. The documentation shows the lines on networks and preprocessing."""
    line = SETUP[0].split("-m analysis.")[1]
    printed = succeed(f"{line} --data {shared_cifar10} --images 256 --out {out} {SVG}").out
    said = printed.partition("\n\n")[0].splitlines()[1:]
    assert len(said) == 10
    assert "\n".join(said) in PAGES
    layers = {"plain-20": 19, "plain-56": 55, "resnet-20": 19, "resnet-56": 55, "resnet-110": 109}
    assert frame_in(out).groupby("network", sort=False).size().to_dict() == layers
    claims = read_table(out / "claims.csv")
    assert claims.groupby("claim").size().tolist() == [4, 3, 3]
    unequal = claims["sentence"].str.contains("; after ")
    assert set(claims["verdict"][~unequal]) <= {"holds", "does not hold"}
    assert set(claims["verdict"][unequal]) == {"cannot be judged here"}
    assert all(sentence in printed for sentence in claims["sentence"])


@pytest.mark.slow
@pytest.mark.real
def test_two_public_checkpoints(akamaster, shared_cifar10, out, monkeypatch):
    """The documentation shows the command and all of its output."""
    monkeypatch.chdir(ROOT)
    printed = succeed(f"{readme_command('responses --checkpoint')} --out {out}").out
    assert f"```text\n{printed.strip()}\n```".replace(str(out), "figures") in PAGES
    frame = frame_in(out)
    parts = [frame[frame["source"] == source].reset_index() for source in ("hooks", "batchnorm")]
    means = parts[0].groupby("network")["std"].mean()
    assert means.tolist() == pytest.approx([0.7324, 0.4539], abs=5e-5)
    difference = (parts[1]["std"] / parts[0]["std"] - 1).abs().groupby(parts[0]["network"])
    assert difference.mean().tolist() == pytest.approx([0.045, 0.050], abs=5e-4)
    entries = provenance(out)
    assert [entry["accuracy"] for entry in entries.values()] == pytest.approx([0.9173, 0.9339])
    for entry in entries.values():
        assert entry["preprocessing"]["name"] == "imagenet"
        assert entry["preprocessing"]["crop_padding"] == "black"
        assert entry["network"]["kind_known"].startswith("recognised, misfit 0.0")
        assert entry["data"]["exact"] is True
        assert entry["warnings"] == []


@pytest.mark.real
def test_the_closed_form_of_the_real_checkpoints(akamaster, out):
    named = " ".join(f"resnet-{depth}={path}" for depth, path in akamaster.items())
    succeed(f"responses --checkpoint {named} --source batchnorm --out {out} {SVG}")
    means = frame_in(out).groupby("network")["std"].mean()
    assert means.tolist() == pytest.approx([0.7318, 0.4536], abs=5e-5)


# The probe set, if there is no CIFAR-10


@pytest.mark.slow
def test_the_probe_set_stands_for_cifar10(out):
    """The terminal, the figures and the provenance say so, and --images does not cut it."""
    shown = succeed(f"responses --depth 20 --images 100 --out {out} {SVG}")
    [line] = shown.err.splitlines()
    assert line.startswith("no CIFAR-10 test images found: tried $CIFAR10 (not set), data, ")
    assert ". The probe set stands for them, all of it whatever --images says" in line
    data = probe.load()
    assert data.describe() in shown.out.splitlines()
    assert drawn(out) == ["plain-20", "resnet-20"]
    note = data.note_for([entry["checkpoint"]["sha256"] for entry in provenance(out).values()])
    for figure in ("fig7", "decomposition"):
        text = (out / f"{figure}.svg").read_text()
        assert all(part in text for part in note.splitlines())
    frame = frame_in(out)
    assert set(frame["source"]) == {"hooks"}
    assert set(frame["images"]) == {len(data)}
    entry = provenance(out)["resnet-20"]
    assert entry["data"]["layout"] == "probe set"
    assert entry["data"]["note"] == data.note
    assert "accuracy" not in entry


def test_the_probe_set_by_name(files, tmp_path):
    """A folder of that name does not hide it. The closed form needs no images, whatever stands for them."""
    line = f"responses --checkpoint {files['resnet-8']} --data probe {SVG}"
    assert "measured on the probe set" in succeed(f"{line} --out probe").out
    assert set(frame_in(tmp_path / "probe")["images"]) == {len(probe.load())}
    assert "measured on the probe set" in succeed(f"{line} --out probe").out
    succeed(f"{line} --source batchnorm --out formula")
    assert "probe" not in (tmp_path / "formula" / "fig7.svg").read_text()


def test_a_wrong_place_in_the_environment_is_an_error(tmp_path, monkeypatch, out):
    """As a wrong --data is: nothing stands in for what was named."""
    monkeypatch.setenv("CIFAR10", str(tmp_path / "typo"))
    error = run(f"responses --depth 20 --out {out}").error
    assert error.startswith(f"error: $CIFAR10: {tmp_path / 'typo'}: no such file or folder; ")


def test_the_closed_form_is_the_fallback_for_training_images(files, out):
    """There is no stand-in for them."""
    line = f"responses --checkpoint {files['resnet-8']} --split train --out {out} {SVG}"
    shown = succeed(line).err.splitlines()
    assert shown[0].startswith("no CIFAR-10 train images found: tried $CIFAR10 (not set), data, ")
    assert shown[1:] == [
        "no images: the closed form from BN's tensors instead (--source batchnorm)"
    ]
    assert set(frame_in(out)["source"]) == {"batchnorm"}
    assert "error: no CIFAR-10 train images found" in run(f"{line} --source hooks").error


# What is measured, printed and written


def test_what_is_written_and_printed(files, images, out):
    names = " ".join(map(str, files.values()))
    printed = succeed(f"responses --checkpoint {names} --data {images} --out {out} {SVG}").out
    frame = frame_in(out)
    assert list(frame.columns)[: len(COLUMNS)] == list(COLUMNS)
    assert drawn(out) == ["resnet-8", "plain-8", "resnet-14"]
    assert set(frame["source"]) == {"hooks"}
    assert set(frame["images"]) == {40}
    data = cifar10.load(images)
    for name, path in files.items():
        network, x = loading.load(path).model, PRESETS["imagenet"](data.images)
        std = analysis.measure(network, [x])["std"]
        assert frame[frame["network"] == name]["std"].tolist() == pytest.approx(
            std.tolist(), rel=1e-6
        )
        hits = (network(x).argmax(1).numpy() == data.labels).mean()
        numbers = [f"{value:.4f}" for value in (std.mean(), std.min(), std.max())]
        numbers.insert(1, "-")  # the sampling error: there are too few images for one
        row = [name, str(len(std)), f"{100 * hits:.2f}", *numbers, "-", "-"]
        assert row in [line.split() for line in printed.splitlines()]
    means = frame.groupby("network")["std"].mean()
    percent = 100 * (means["resnet-8"] / means["plain-8"] - 1)
    words = f"{abs(percent):.1f} % {'less' if percent < 0 else 'more'} than plain-8 ({means['plain-8']:.3f})"
    why = "; on 40 images, fewer than 200"
    assert f"    ? resnet-8 has a mean std of {means['resnet-8']:.3f}, {words}{why}\n" in printed
    assert sorted(files_in(out)) == WRITTEN
    assert printed.count("wrote ") == len(WRITTEN)
    assert ">ResNet-14</text>" in (out / "fig7.svg").read_text()


def test_a_page_to_look_at(files, out):
    names = " ".join(map(str, files.values()))
    line = f"responses --checkpoint {names} --source batchnorm --out {out} {SVG} --html"
    assert succeed(line).out.endswith(f"wrote {out}/responses.html\n")
    page = (out / "responses.html").read_text()
    assert page.count("<figure ") == 2
    assert page.count("<tr>") >= len(frame_in(out))
    assert all(entry["checkpoint"]["sha256"] in page for entry in provenance(out).values())


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes(files, images, tmp_path):
    line = f"responses --checkpoint {files['resnet-8']} {files['plain-8']} --data {images}"
    for out in ("a", "b"):
        succeed(f"{line} --format svg pdf png --html --out {tmp_path / out}")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


def test_labels(files, images, tmp_path, out):
    first, options = files["resnet-8"], f"--data {images} --out {out} {SVG}"
    assert run(
        f"responses --checkpoint a=b={first} {options}"
    ).error  # a is a label, b=PATH no path
    other = tmp_path / "epoch=3-step=100.ckpt"
    torch.save(build("resnet-8").state_dict(), other)
    line = f"responses --checkpoint mine={first} {first} {other} --kind residual"
    succeed(f"{line} --normalize imagenet {options}")
    assert drawn(out) == ["mine", "resnet-8", "epoch=3-step=100"]
    warned = succeed(f"responses --checkpoint plain-8={first} {options}").err
    assert "warning: plain-8: the label says plain-8, the file holds resnet-8" in warned


def test_an_existing_path_wins_over_a_label(tmp_path):
    (tmp_path / "epoch=3.ckpt").touch()
    assert split_label("epoch=3.ckpt") == (None, Path("epoch=3.ckpt"))
    assert split_label("other=3.ckpt") == ("other", Path("3.ckpt"))
    assert split_label("a.ckpt") == (None, Path("a.ckpt"))


def test_images_and_batch_size(files, images, out):
    line = (
        f"responses --checkpoint {files['resnet-8']} --data {images} --images 12 --out {out} {SVG}"
    )
    stds = []
    for options in ("--batch-size 5", ""):
        succeed(f"{line} {options}")
        assert set(frame_in(out)["images"]) == {12}
        stds.append(frame_in(out)["std"].tolist())
    assert stds[0] == pytest.approx(stds[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.process
def test_a_progress_bar_over_all_networks(files, images, out):
    """In a terminal, which a pseudo-terminal stands in for."""
    import pty
    import termios

    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 100))
    paths = [files["resnet-8"], files["plain-8"]]
    words = ["--checkpoint", *paths, "--data", images, "--out", out, "--format", "svg"]
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


def test_the_closed_form_needs_no_images(files, out):
    succeed(f"responses --checkpoint {files['plain-8']} --source batchnorm --out {out} {SVG}")
    frame = frame_in(out)
    assert set(frame["source"]) == {"batchnorm"}
    assert frame[["height", "width", "images", "count"]].isna().all(axis=None)
    expected = closed_form(loading.load(files["plain-8"]).model)["std"]
    assert frame["std"].tolist() == pytest.approx(expected.tolist())
    computed = "closed form from BN's tensors, not measured on images"
    assert computed in (out / "fig7.svg").read_text()
    entry = provenance(out)["plain-8"]
    assert entry["source"] == ["batchnorm"]
    assert "data" not in entry
    assert "accuracy" not in entry


def test_without_images_the_label_says_whether_a_network_is_plain(tmp_path, out):
    torch.save(build("plain-8").state_dict(), tmp_path / "a.pt")
    options = f"--source batchnorm --out {out} {SVG}"
    for label, kind, option in (
        ("plain-8", "plain", ""),
        ("mine", "residual", ""),
        ("mine", "plain", "--kind plain"),
    ):
        printed = succeed(f"responses --checkpoint {label}=a.pt {option} {options}").out
        assert frame_in(out)["kind"].iloc[0] == kind
        assert ("mine: network resnet-8 (assumed)" in printed) == (kind == "residual")


def test_what_does_not_fit_is_a_warning(files, images, out):
    line = f"responses --checkpoint {files['resnet-8']} --data {images} --out {out} {SVG}"
    warned = succeed(f"{line} --normalize [-1,1]").err
    assert "warning: resnet-8: no preprocessing fits (with a misfit below 0.15): misfit " in warned
    assert provenance(out)["resnet-8"]["warnings"]


# Bad input: one line that says what, where and what to do, status 2, and nothing is written


def no_text(path):
    (path / "notes.pt").write_text("hello")


def other_network(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path / "other.pt")


def missing_tensor(path):
    state = build("resnet-8").state_dict()
    del state["bn1.weight"]
    torch.save(state, path / "missing.pt")


def extra_tensor(path):
    extra = {"layer1.0.bn3.weight": torch.ones(16)}
    torch.save(build("resnet-8").state_dict() | extra, path / "extra.pt")


def nan_weights(path):
    network = build("resnet-8")
    network.conv1.weight.data.fill_(float("nan"))
    torch.save(network.state_dict(), path / "nan.pt")


def overflowing(path):
    network = fitting("resnet-8")
    network.layer2[0].bn1.weight.data.fill_(1e38)
    torch.save(network.state_dict(), path / "overflow.pt")


def truncated_archive(path):
    (path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b" + bytes(40))


def empty_folder(path):
    (path / "empty").mkdir()


def blocked(path):
    (path / "file").touch()


def nothing(path):
    pass


BAD = {  # what is there, the options (--checkpoint and --data are good unless named), words of the line
    "missing file": (
        nothing,
        "--checkpoint gone.pth",
        "error: gone.pth: no such file; a checkpoint is",
    ),
    "text": (
        no_text,
        "--checkpoint notes.pt",
        "error: notes.pt: not a checkpoint, damaged or truncated",
    ),
    "other network": (
        other_network,
        "--checkpoint other.pt",
        "error: other.pt: none of the paper's networks",
    ),
    "missing tensor": (
        missing_tensor,
        "--checkpoint missing.pt",
        "bn1.weight is missing; --model ",
    ),
    "extra tensor": (extra_tensor, "--checkpoint extra.pt", "layer1.0.bn3.weight"),
    "NaN in the weights": (
        nan_weights,
        "--checkpoint nan.pt",
        "error: nan.pt: NaN or infinity in conv1.weight",
    ),
    "NaN in a response": (
        overflowing,
        "--checkpoint overflow.pt",
        "error: overflow.pt: NaN or infinity in the response of layer 4 (layer2.0.conv1)",
    ),
    "truncated archive": (
        truncated_archive,
        "--data cifar-10-python.tar.gz",
        "error: cifar-10-python.tar.gz: damaged or truncated archive",
    ),
    "no images": (
        empty_folder,
        "--data empty",
        "error: empty: no CIFAR-10 test images here; looked for",
    ),
    "no data": (nothing, "--data nowhere", "error: nowhere: no such file or folder; --data takes "),
    "too many images": (nothing, "--images 41", "error: --images 41: there are only 40 images"),
    "CIFAR-10 or nothing": (
        nothing,
        "--data cifar10",
        "error: no CIFAR-10 test images found: tried ",
    ),
    "part of the probe set": (
        nothing,
        "--data probe --images 100",
        "error: --images 100: the probe set ",
    ),
    "probe set for training": (
        nothing,
        "--data probe --split train",
        "error: --split train: the probe set ",
    ),
    "out": (
        blocked,
        "--out file/out",
        "error: --out file/out: Not a directory; name a folder that can be",
    ),
    "0 images": (
        nothing,
        "--images 0",
        "argument --images: '0' is not a whole number of 1 or more",
    ),
    "batch size 0": (
        nothing,
        "--batch-size 0",
        "argument --batch-size: '0' is not a whole number of 1",
    ),
    "negative images": (
        nothing,
        "--images -3",
        "argument --images: '-3' is not a whole number of 1",
    ),
    "device": (nothing, "--device tpu", "argument --device: invalid choice: 'tpu' (choose from "),
    "split": (nothing, "--split val", "argument --split: invalid choice: 'val' (choose from "),
    "preset": (
        nothing,
        "--normalize mnist",
        "unknown normalisation 'mnist': one of auto, imagenet, ",
    ),
    "depth": (nothing, "--depth 21", "error: --depth 21: no CIFAR-10 network has 21 layers"),
    "two kinds": (nothing, "--kind residual plain", "--kind: one kind at a time"),
    "two equal labels": (
        nothing,
        "--checkpoint a={good} a={good}",
        "two networks are called a: name them, ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, files, images, tmp_path, out):
    prepare, options, message = BAD[name]
    prepare(tmp_path)
    out.mkdir()
    (out / "responses.csv").write_text("from an earlier run")
    good = "" if "--depth" in options else f"--checkpoint {files['resnet-8']}"
    options = options.format(good=files["resnet-8"])
    error = run(f"responses {good} --data {images} --out {out} {options}").error
    assert message in error
    assert files_in(out) == {"responses.csv": b"from an earlier run"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none(files):
    error = run(f"responses --checkpoint {files['resnet-8']} --device cuda").error
    assert "--device cuda: torch sees no CUDA device here; use --device cpu" in error


def test_debug_shows_the_traceback(out):
    with pytest.raises(FileNotFoundError, match="no such file"):
        run(f"responses --checkpoint gone.pth --source batchnorm --out {out} --debug")


# Shipped networks


@pytest.fixture
def shelf(files, tmp_path, monkeypatch):
    """Ship networks of our own: plain-8 and resnet-8 of 1,000 iterations, resnet-14 of 64,000."""
    for name, path in files.items():
        iterations = 64_000 if name == "resnet-14" else 1_000
        save(tmp_path / "zoo" / path.name, loading.load(path).model, iterations=iterations)
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "zoo" / "__init__.py"))


def test_depth_and_kind_choose_among_the_shipped_networks(shelf, images, out):
    options = f"--data {images} --out {out} {SVG}"
    shown = succeed(f"responses --depth 8 14 8 {options}")
    assert drawn(out) == ["plain-8", "resnet-8", "resnet-14"]
    assert shown.err == (
        "plain-14 is not shipped (shipped: plain-8, resnet-8, resnet-14); "
        "python -m models.train --depth 14 --kind plain makes it\n"
    )
    assert "plain-8: network plain-8 (card), trained for 1,000 iterations\n" in shown.out
    note = "plain-8, ResNet-8 trained for 1,000 of the paper's 64,000 iterations"
    assert note in (out / "fig7.svg").read_text()
    succeed(f"responses --depth 14 8 --kind residual {options}")
    assert drawn(out) == ["resnet-14", "resnet-8"]


def test_shipped_networks_beside_a_checkpoint(shelf, files, images, out):
    """Of a shipped network only the card says the preprocessing, of the checkpoint the option."""
    options = f"--checkpoint mine={files['resnet-14']} --data {images} --out {out} {SVG}"
    succeed(f"responses --depth 8 --kind plain --normalize [-1,1] {options}")
    assert drawn(out) == ["plain-8", "mine"]
    known = {name: entry["preprocessing"]["known"] for name, entry in provenance(out).items()}
    assert known["mine"].startswith("given")
    assert known["plain-8"].startswith("card")
    assert frame_in(out).groupby("network")["kind"].first()["mine"] == "residual"
    assert "plain-32 is not shipped" in succeed(f"responses --depth 32 {options}").err
    assert drawn(out) == ["mine"]


def test_plain_110_is_left_out_unless_it_is_asked_for(shelf, out):
    line = f"responses --depth 8 110 --source batchnorm --out {out} {SVG}"
    assert "plain-110" not in succeed(line).err
    assert "plain-110 is not shipped" in succeed(f"{line} --kind residual plain").err


def test_none_of_the_networks_is_shipped(shelf, out):
    error = run(f"responses --out {out}").error  # as with --depth 20 56 110
    assert "plain-20 is not shipped (shipped: plain-8, resnet-8, resnet-14)" in error
    assert files_in(out) == {}


# How often files and images are read


def test_each_checkpoint_is_read_once_and_each_image_passes_once(files, images, out):
    """Count the openings of files and the images that reach the classifiers.

    Besides, the images are the sample that checks the networks' cards.
    """
    opened, passed = Counter(), Counter()

    def watch(event, args):
        if event == "open" and str(args[0]).endswith(".safetensors"):
            opened[str(args[0])] += 1

    def count(module, args):
        if isinstance(module, torch.nn.Linear):
            passed[module.in_features] += len(args[0])

    paths = [files["resnet-8"], files["plain-8"]]
    with torch.nn.modules.module.register_module_forward_pre_hook(count), watching(watch):
        succeed(f"responses --checkpoint {paths[0]} {paths[1]} --data {images} --out {out} {SVG}")
    assert passed == {64: 2 * (40 + 40)}
    assert opened == dict.fromkeys(map(str, paths), 1)
