"""From files and options to frames: other people's networks, folders of photographs, both sources
at once.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from analysis.cli.items import CIFAR10, place_of
from analysis.responses import main
from models import build, closed_form
from models.checkpoints import loading
from models.checkpoints.custom import build_from
from models.data.folder import ImageFolder
from models.data.preprocessing import PRESETS
from models.files import sha256
from tests.models.checkpoints.test_recognition import blobs, record


def run(*words):
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def frame_of(out):
    return pd.read_csv(out / "responses.csv")


@pytest.fixture
def photographs(tmp_path):
    """Nine pictures of several sizes in three class folders."""
    folder = tmp_path / "photographs"
    for i, small in enumerate(blobs(9, seed=4)):
        (folder / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((260 + 20 * i, 300)).save(
            folder / f"class{i % 3}" / f"{i}.jpg"
        )
    return folder


@pytest.fixture
def cifar(tmp_path):
    """Twenty images of 32x32 pixels in a class folder."""
    for i, image in enumerate(blobs(20, seed=0)):
        (tmp_path / "cifar" / "cat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "cifar" / "cat" / f"{i}.png")
    return tmp_path / "cifar"


@pytest.fixture
def resnet_18(tmp_path):
    torch.save(build("resnet-18").state_dict(), tmp_path / "resnet18-f37072fd.pth")
    return tmp_path / "resnet18-f37072fd.pth"


# Networks for 224x224 images


def test_a_network_of_table_1_on_a_folder_of_images(resnet_18, photographs, tmp_path, capsys):
    words = ("--data", photographs, "--out", tmp_path / "out", "--format", "svg", "--batch-size", 4)
    assert run("--checkpoint", resnet_18, *words) == 0
    printed = capsys.readouterr().out
    assert (
        f"9 images in 3 class folders ({photographs}), shorter side to 256, central 224x224 pixels"
        in printed
    )
    assert "resnet-18: network resnet-18 (shortcuts)" in printed
    assert "resnet-18: preprocessing imagenet (assumed)" in printed
    frame = frame_of(tmp_path / "out")
    assert len(frame) == 16
    assert set(frame["images"]) == {9}
    assert frame.loc[0, ["height", "width"]].tolist() == [56, 56]
    assert frame["depth"].unique().tolist() == [18]
    assert re.search(
        r"resnet-18 +16 +- ", printed
    )  # three folders are not its 1,000 classes: no accuracy


def test_it_is_what_pillow_and_torch_make_of_the_images(resnet_18, photographs, tmp_path):
    """The first layer of the first image, by hand."""
    assert (
        run(
            "--checkpoint",
            resnet_18,
            "--data",
            photographs,
            "--images",
            1,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    image = Image.open(sorted(photographs.glob("*/*"))[0])  # 260 x 300: the shorter side is 260
    side, left = 260 * 224 / 256, (260 - 260 * 224 / 256) / 2
    top = (300 - side) / 2
    box = (left, top, left + side, top + side)
    x = torch.from_numpy(
        np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box=box)) / 255.0
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network = loading.load(resnet_18).model
    with torch.no_grad():
        y = network.maxpool(
            network.bn1(network.conv1(((x - mean) / std).float().permute(2, 0, 1)[None])).relu()
        )
        block = network.layer1[0]
        expected = block.bn1(block.conv1(y)).double().std(correction=0).item()
    assert frame_of(tmp_path / "out")["std"][0] == pytest.approx(expected, rel=1e-5)


def test_another_scale_of_the_images_is_a_warning(photographs, tmp_path, capsys):
    """Caffe's and older networks of Table 1 were not trained with ImageNet's mean and std."""
    images = ImageFolder.open(photographs).sample(9)
    torch.save(
        record(build("resnet-18"), PRESETS["[0,1]"](images)).state_dict(), tmp_path / "resnet18.pth"
    )
    words = (
        "--checkpoint",
        tmp_path / "resnet18.pth",
        "--data",
        photographs,
        "--out",
        tmp_path / "out",
    )
    assert run(*words, "--format", "svg") == 0
    warned = re.search(
        r"warning: resnet-18: the first BN gets (\d+) times the variance that it recorded: in training images were "
        r"others, or normalised otherwise \(--normalize\)\n",
        capsys.readouterr().err,
    )
    assert 15 <= int(warned[1]) <= 25  # about 1 / 0.225^2
    assert run(*words, "--format", "svg", "--normalize", "[0,1]") == 0
    assert "warning" not in capsys.readouterr().err


def test_some_images_of_class_folders_are_of_all_classes(resnet_18, photographs, tmp_path):
    words = (
        "--data",
        photographs,
        "--out",
        tmp_path / "out",
        "--format",
        "svg",
        "--source",
        "hooks",
        "hooks",
    )
    assert run("--checkpoint", resnet_18, "--images", 3, *words) == 0
    files = sorted(photographs.glob("*/*"))
    assert len({file.parent for file in files[::4]}) == 3
    digests = sorted(sha256(file) for file in files[::4])  # the first, the middle and the last
    read = json.loads((tmp_path / "out" / "responses.json").read_text())["resnet-18"]["data"]
    assert (read["images"], read["sha256"]) == (
        3,
        hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest(),
    )


def test_blocks_are_measured_on_some_of_the_images_that_are_chosen(
    resnet_18, photographs, tmp_path, monkeypatch
):
    decoded = []
    decode = ImageFolder.decode
    monkeypatch.setattr(
        ImageFolder, "decode", lambda self, file: decoded.append(file) or decode(self, file)
    )
    monkeypatch.setattr(
        ImageFolder, "sample", lambda self, count: np.zeros((2, 224, 224, 3), np.uint8)
    )
    monkeypatch.setattr("analysis.measuring.networks.BLOCK_IMAGES", 3)
    words = ("--data", photographs, "--images", 4, "--out", tmp_path / "out", "--format", "svg")
    assert run("--checkpoint", resnet_18, *words) == 0
    files = sorted(photographs.glob("*/*"))
    assert sorted(decoded[:4]) == [files[i] for i in (0, 2, 5, 8)]
    assert sorted(decoded[4:]) == [files[i] for i in (0, 2, 8)]


def test_options_for_images_are_told_where_there_are_none(resnet_18, photographs, tmp_path, capsys):
    words = (
        "--checkpoint",
        resnet_18,
        "--source",
        "batchnorm",
        "batchnorm",
        "--out",
        tmp_path / "out",
    )
    assert run(*words, "--data", photographs, "--batch-size", 3, "--normalize", "auto") == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        "--data, --batch-size: without effect, --source batchnorm takes no images"
    )
    assert run(*words) == 0
    assert "without effect" not in capsys.readouterr().err


def test_without_images_it_is_the_closed_form(resnet_18, tmp_path, capsys):
    assert run("--checkpoint", resnet_18, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err.splitlines() == [
        "no images for networks of 224x224 input: name a folder of them with --data",
        "no images: the closed form from BN's tensors instead (--source batchnorm)",
    ]
    assert len(frame_of(tmp_path / "out")) == 16
    assert run("--checkpoint", resnet_18, "--out", tmp_path / "other", "--source", "hooks") == 2
    assert (
        "error: no images for networks of 224x224 input: name a folder" in capsys.readouterr().err
    )
    assert run("--checkpoint", resnet_18, "--out", tmp_path / "other", "--data", "probe") == 2
    assert (
        "error: --data probe: 32x32 images; these networks take 224x224: name a folder"
        in capsys.readouterr().err
    )


def test_the_stride_of_bottlenecks_is_recognised_on_images(tmp_path):
    """BN's statistics tell: resnet-50 with the stride on the 1x1 and on the 3x3 have the same
    tensors.
    """
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    for stride in ("1x1", "3x3"):
        network = record(build("resnet-50", stride=stride, classes=3), PRESETS["imagenet"](images))
        torch.save(network.state_dict(), tmp_path / "a.pth")
        found = loading.load(tmp_path / "a.pth", images=images)
        assert found.config.stride == stride
        assert re.fullmatch(r"recognised, misfit 0.0\d, next best .*", found.how["kind"])
        assert found.warnings == []


def test_where_the_images_do_not_tell_the_stride_it_is_taken_for_v1_5(
    photographs, tmp_path, capsys
):
    """BN's statistics are those of other images: no stride fits much better than the other."""
    network = build("resnet-50", stride="1x1", classes=3)
    torch.save(network.state_dict(), tmp_path / "resnet50.pth")
    words = (
        "--checkpoint",
        tmp_path / "resnet50.pth",
        "--data",
        photographs,
        "--images",
        2,
        "--kind",
        "residual",
    )
    assert run(*words, "--out", tmp_path / "out", "--format", "svg") == 0
    printed = capsys.readouterr()
    assert (
        "resnet-50: network resnet-50 (assumed v1.5, stride on the 3x3: neither the tensors nor these images tell)\n"
    ) in printed.out
    assert re.fullmatch(
        r"warning: resnet-50: BN's statistics do not tell which network it is: stride on the (1x1|3x3), misfit [.\d]+, "
        r"next best [.\d]+ \(stride on the (1x1|3x3)\); taken for stride on the 3x3; --model builds the other\n",
        printed.err,
    )


def test_networks_of_two_sizes_in_one_command(resnet_18, cifar, tmp_path, capsys):
    torch.save(build("resnet-8").state_dict(), tmp_path / "a.pt")
    assert (
        run(
            "--checkpoint", resnet_18, tmp_path / "a.pt", "--data", cifar, "--out", tmp_path / "out"
        )
        == 2
    )
    message = (
        "error: networks for 32x32 and for 224x224 images in one command: measure them in two\n"
    )
    assert capsys.readouterr().err == message


# Networks of the user's own


OWN = """
from torch import nn


def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
"""


@pytest.fixture
def own(tmp_path):
    """A network that is none of ours: its checkpoint, and the file that builds it."""
    (tmp_path / "mynet.py").write_text(OWN)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
    ]
    network = nn.Sequential(*layers)
    torch.save(
        {"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}},
        tmp_path / "own.ckpt",
    )
    return network.eval()


def test_a_network_of_ones_own(own, cifar, tmp_path, capsys):
    words = ("--checkpoint", tmp_path / "own.ckpt", "--data", cifar, "--out", tmp_path / "out")
    assert run(*words, "--model", f"{tmp_path}/mynet.py:tiny", "--normalize", "[0,1]") == 0
    assert "own: network Sequential (built by --model, misfit " in capsys.readouterr().out
    frame = frame_of(tmp_path / "out")
    assert frame[["network", "kind", "name", "norm"]].astype(str).to_numpy().tolist() == [
        ["own", "other", "0", "1"],
        ["own", "other", "3", "4"],
    ]
    with torch.no_grad():
        x = PRESETS["[0,1]"](blobs(20, seed=0))
        expected = [own[:2](x).std(correction=0).item(), own(x).std(correction=0).item()]
    assert frame["std"].tolist() == pytest.approx(expected, rel=1e-5)


def test_without_recorded_statistics_the_preprocessing_must_be_said(tmp_path, cifar, capsys):
    norm = nn.BatchNorm2d(
        4, track_running_stats=False
    )  # it takes the batch's own, also in evaluation mode
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    nn.init.normal_(norm.bias)
    torch.save(network.state_dict(), tmp_path / "own.pt")
    builder = f"def tiny():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.{norm})\n"
    (tmp_path / "mynet.py").write_text(f"from torch import nn\n\n\n{builder}")
    words = (
        "--checkpoint",
        tmp_path / "own.pt",
        "--model",
        f"{tmp_path}/mynet.py:tiny",
        "--data",
        cifar,
    )
    assert run(*words, "--out", tmp_path / "none") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'own.pt'}: no BN with recorded statistics ran in this network, so its preprocessing "
        "cannot be recognised: say --normalize\n"
    )
    assert run(*words, "--normalize", "[0,1]", "--out", tmp_path / "out") == 0
    assert "own: preprocessing [0,1] (given)\n" in capsys.readouterr().out
    expected = network(PRESETS["[0,1]"](blobs(20, seed=0))).std(correction=0).item()
    assert frame_of(tmp_path / "out")["std"].tolist() == pytest.approx(
        [expected], rel=1e-3
    )  # in other batches


@pytest.mark.parametrize("source", ["hooks", "batchnorm"])
def test_a_network_with_a_config_of_its_own(source, own, cifar, tmp_path):
    text = (
        OWN.replace("return nn.Sequential(", "net = nn.Sequential(")
        + "    net.config = {'depth': 2}\n    return net\n"
    )
    (tmp_path / "mynet.py").write_text(text)
    words = (
        "--checkpoint",
        tmp_path / "own.ckpt",
        "--data",
        cifar,
        "--out",
        tmp_path / "out",
        "--source",
        source,
    )
    assert run(*words, "--model", f"{tmp_path}/mynet.py:tiny") == 0
    assert frame_of(tmp_path / "out")["kind"].tolist() == ["other"] * 2


def test_a_network_of_ones_own_has_an_accuracy_where_it_has_as_many_classes(
    tmp_path, cifar, capsys
):
    for classes in (10, 100):
        text = f"nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, {classes}))"
        (tmp_path / f"own{classes}.py").write_text(
            f"from torch import nn\n\n\ndef net():\n    return {text}\n"
        )
        torch.save(build_from(f"{tmp_path}/own{classes}.py:net").state_dict(), tmp_path / "own.pt")
        words = ("--checkpoint", tmp_path / "own.pt", "--data", cifar, "--out", tmp_path / "out")
        assert (
            run(*words, "--model", f"{tmp_path}/own{classes}.py:net", "--normalize", "[0,1]") == 0
        )
        [row] = [
            line.split()
            for line in capsys.readouterr().out.splitlines()
            if line.split()[:2] == ["own", "1"]
        ]
        assert (row[2] == "-") == (classes == 100)


def test_what_cannot_be_computed_is_said_before_all_is_measured(
    tmp_path, cifar, monkeypatch, capsys
):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return self[0](self[1](x))\n\n\n"
        "def net():\n"
        "    return Net(nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3))\n"
    )
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3))
    torch.save(network.state_dict(), tmp_path / "own.pt")
    monkeypatch.setattr(
        "analysis.measuring.networks.measure_on", lambda *words: pytest.fail("it was measured")
    )
    words = (
        "--checkpoint",
        tmp_path / "own.pt",
        "--data",
        cifar,
        "--model",
        f"{tmp_path}/own.py:net",
    )
    assert (
        run(
            *words,
            "--normalize",
            "[0,1]",
            "--source",
            "hooks",
            "batchnorm",
            "--out",
            tmp_path / "out",
        )
        == 2
    )
    assert "own.pt: no 3x3 convolution followed by a BN" in capsys.readouterr().err


def test_a_network_of_ones_own_comes_to_the_cpu_where_it_is_recognised(own, cifar, tmp_path):
    """Its builder may have put it on a GPU."""
    text = OWN.replace(
        "def tiny",
        "class Net(nn.Sequential):\n    def cpu(self):\n        self.here = True\n"
        "        return super().cpu()\n\n\ndef tiny",
    ).replace("return nn.Sequential(", "return Net(")
    (tmp_path / "mynet.py").write_text(text)
    checkpoint = loading.load(tmp_path / "own.ckpt", model=build_from(f"{tmp_path}/mynet.py:tiny"))
    assert checkpoint.model.here


def test_per_pixel_preprocessing_of_large_images(resnet_18, photographs, tmp_path, capsys):
    words = (
        "--checkpoint",
        resnet_18,
        "--data",
        photographs,
        "--out",
        tmp_path / "out",
        "--normalize",
        "per-pixel",
    )
    assert run(*words) == 2
    message = (
        "per-pixel preprocessing is for 32x32 images: --normalize imagenet, or another preset\n"
    )
    assert capsys.readouterr().err.endswith(message)


def test_only_what_the_builder_built_says_so(own, cifar, tmp_path):
    words = (
        "--checkpoint",
        tmp_path / "own.ckpt",
        "--depth",
        20,
        "--kind",
        "residual",
        "--data",
        cifar,
    )
    builder = f"{tmp_path}/mynet.py:tiny"
    assert run(*words, "--out", tmp_path / "out", "--model", builder, "--source", "batchnorm") == 0
    provenance = json.loads((tmp_path / "out" / "responses.json").read_text())
    assert {name: entry["network"]["model"] for name, entry in provenance.items()} == {
        "resnet-20": None,
        "own": builder,
    }


def test_without_its_builder_there_are_two_ways_on(own, cifar, tmp_path, capsys):
    words = ("--checkpoint", tmp_path / "own.ckpt", "--out", tmp_path / "out")
    assert run(*words, "--data", cifar) == 2
    shown = capsys.readouterr().err
    assert "own.ckpt: none of the paper's networks" in shown
    assert "it has 14 tensors: model.0.weight (4, 3, 3, 3), model.0.bias (4,)" in shown
    ways = "; --model FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION builds any other network, --source batchnorm needs none"
    assert shown.endswith(ways + "\n")
    assert run(*words, "--source", "batchnorm") == 0
    expected = closed_form(own)["std"]
    assert frame_of(tmp_path / "out")["std"].tolist() == pytest.approx(expected.tolist())
    assert "own: network none of the paper's (unknown)" in capsys.readouterr().out


BAD_BUILDERS = {
    "gone.py:tiny": "gone.py",
    "mynet.py:huge": "huge",
    "mynet": "FILE.py:FUNCTION",
    "mynet.py:wrong": "the tensors are not those of the network that --model builds: ",
}


@pytest.mark.parametrize("builder", BAD_BUILDERS)
def test_builders_that_do_not_fit(builder, own, cifar, tmp_path, capsys):
    (tmp_path / "mynet.py").write_text(OWN + "\n\ndef wrong():\n    return nn.Conv2d(3, 4, 3)\n")
    words = (
        "--checkpoint",
        tmp_path / "own.ckpt",
        "--data",
        cifar,
        "--out",
        tmp_path / "out",
        "--model",
        builder,
    )
    assert run(*words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert BAD_BUILDERS[builder] in shown
    assert len(shown.splitlines()) == 1


# Both sources, and averaged copies


def test_both_sources_and_their_differences(cifar, tmp_path, capsys):
    network = record(build("resnet-8"), PRESETS["imagenet"](blobs(20, seed=0)))
    loading.save(
        tmp_path / "a.safetensors", network, PRESETS["imagenet"], crop_padding="none", training={}
    )
    words = ("--checkpoint", tmp_path / "a.safetensors", "--data", cifar, "--out", tmp_path / "out")
    assert run(*words, "--source", "hooks", "batchnorm", "--format", "svg") == 0
    frame = frame_of(tmp_path / "out")
    measured, formula = (
        frame[frame["source"] == source].reset_index() for source in ("hooks", "batchnorm")
    )
    assert formula["std"].tolist() == pytest.approx(closed_form(network)["std"].tolist())
    difference = (formula["std"] / measured["std"] - 1).abs()
    worst = difference.idxmax()
    assert (
        f"  resnet-8: mean {100 * difference.mean():.1f} %, largest {100 * difference.max():.1f} % in layer "
        f"{worst + 1} ({measured['name'][worst]}), 7 layers of 7\n"
    ) in capsys.readouterr().out
    assert ">closed form</text>" in (tmp_path / "out" / "fig7.svg").read_text()


def test_the_averaged_copy(cifar, tmp_path, capsys):
    weights, average = build("resnet-8"), build("resnet-8")
    torch.save(
        {"state_dict": weights.state_dict(), "state_dict_ema": average.state_dict()},
        tmp_path / "a.pth",
    )
    words = (
        "--checkpoint",
        tmp_path / "a.pth",
        "--data",
        cifar,
        "--out",
        tmp_path / "out",
        "--kind",
        "residual",
    )
    stds = {}
    for ema in ([], ["--ema"]):
        assert run(*words, *ema, "--normalize", "[0,1]") == 0
        stds[bool(ema)] = frame_of(tmp_path / "out")["std"].tolist()
        note = "EMA copy" if ema else "not its EMA copy, which --ema takes"
        assert f", weights: {note}\n" in capsys.readouterr().out
    assert stds[True] != stds[False]
    torch.save({"state_dict": weights.state_dict()}, tmp_path / "a.pth")
    assert run(*words, "--ema") == 2
    assert "a.pth: no EMA copy in it (looked under state_dict_ema, " in capsys.readouterr().err


def test_names_and_order_that_do_not_agree_are_a_warning(tmp_path, capsys):
    state = {
        "conv1.weight": torch.ones(4, 3, 3, 3),
        "conv2.weight": torch.ones(4, 4, 3, 3),
        **{
            f"bn1.{name}": torch.ones(4)
            for name in ("weight", "bias", "running_mean", "running_var")
        },
    }
    torch.save(state, tmp_path / "a.pt")
    assert (
        run("--checkpoint", tmp_path / "a.pt", "--source", "batchnorm", "--out", tmp_path / "out")
        == 0
    )
    shown = capsys.readouterr()
    line = "warning: a: names and order of the tensors do not agree on conv1 -> bn1: a forward pass tells\n"
    assert shown.err == line
    assert "a: not computed, no BN seems to take in their output: conv2\n" in shown.out
    save_file(state, tmp_path / "b.safetensors")
    assert (
        run(
            "--checkpoint",
            tmp_path / "b.safetensors",
            "--source",
            "batchnorm",
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    line = "warning: b: the tensors are sorted by name, and so are the layers: --model and a forward pass tell\n"
    assert capsys.readouterr().err == line
    assert frame_of(tmp_path / "out")["norm"].tolist() == ["bn1"]


def test_a_folder_of_the_name_that_asks_for_the_real_images_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_of(Path("cifar10")) is None
    (tmp_path / "cifar10").mkdir()
    assert place_of(Path("cifar10")) == CIFAR10
