"""From files and options to frames: other people's networks, folders of photographs, both sources at once."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from models import build, closed_form
from models.checkpoints import loading
from models.checkpoints.custom import build_from
from models.data.folder import ImageFolder
from models.data.preprocessing import PRESETS
from models.files import sha256
from tests.helpers import SMALL, blobs, own, read_table, record, run, succeed

SVG = "--format svg"
TWO_LAYERS = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )
"""


def frame_in(out):
    return read_table(out / "responses.csv")


def provenance(out):
    return json.loads((out / "responses.json").read_text())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Return a folder of nine pictures of several sizes in three class folders."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, small in enumerate(blobs(9, seed=4)):
        (folder / f"class{i % 3}").mkdir(exist_ok=True)
        picture = Image.fromarray(small).resize((260 + 20 * i, 300))
        picture.save(folder / f"class{i % 3}" / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def resnet_18(tmp_path_factory):
    path = tmp_path_factory.mktemp("torchvision") / "resnet18-f37072fd.pth"
    torch.save(build("resnet-18").state_dict(), path)
    return path


# Networks for 224x224 images


def test_a_network_of_table_1_on_a_folder_of_images(resnet_18, photographs, out):
    """The first layer of the first image is computed by hand, with Pillow and torch alone."""
    line = f"responses --checkpoint {resnet_18} --data {photographs} --out {out} {SVG}"
    printed = succeed(f"{line} --batch-size 4").out
    said = (
        f"9 images in 3 class folders ({photographs}), shorter side to 256, central 224x224 pixels"
    )
    assert said in printed
    assert "resnet-18: network resnet-18 (shortcuts)" in printed
    assert "resnet-18: preprocessing imagenet (assumed)" in printed
    # Three folders are not its 1,000 classes: there is no accuracy.
    assert re.search(r"resnet-18 +16 +- ", printed)
    assert printed.count("no accuracy: the class of the folder 'class0' is not known\n") == 1
    frame = frame_in(out)
    assert len(frame) == 16
    assert set(frame["images"]) == {9}
    assert frame.loc[0, ["height", "width"]].tolist() == [56, 56]
    assert frame["depth"].unique().tolist() == [18]

    succeed(f"{line} --images 1")
    image = Image.open(sorted(photographs.glob("*/*"))[0])  # 260 x 300: the shorter side is 260
    side = 260 * 224 / 256
    left, top = (260 - side) / 2, (300 - side) / 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box=box))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (
        ((torch.from_numpy(pixels / 255.0) - mean) / std).float().permute(2, 0, 1)[None]
    )  # (1, 3, H, W)
    network = loading.load(resnet_18).model
    with torch.no_grad():
        y = network.maxpool(network.bn1(network.conv1(x)).relu())
        block = network.layer1[0]
        expected = block.bn1(block.conv1(y)).double().std(correction=0).item()
    assert frame_in(out)["std"][0] == pytest.approx(expected, rel=1e-5)


def test_another_scale_of_the_images_is_a_warning(photographs, tmp_path, out):
    """Caffe's and older networks of Table 1 were not trained with ImageNet's mean and std."""
    images = ImageFolder.open(photographs).sample(9)
    network = record(build("resnet-18"), PRESETS["[0,1]"](images))
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    line = f"responses --checkpoint resnet18.pth --data {photographs} --out {out} {SVG}"
    pattern = r"warning: resnet-18: the first BN gets (\d+) times the variance that it recorded: "
    warned = re.search(pattern, succeed(line).err)
    assert 15 <= int(warned[1]) <= 25  # about 1 / 0.225²
    assert "warning" not in succeed(f"{line} --normalize [0,1]").err


def test_some_images_of_class_folders_are_of_all_classes(resnet_18, photographs, out):
    line = f"responses --checkpoint {resnet_18} --images 3 --data {photographs} --out {out} {SVG}"
    succeed(f"{line} --source hooks hooks")
    chosen = sorted(photographs.glob("*/*"))[::4]  # the first, the middle and the last
    assert len({file.parent for file in chosen}) == 3
    digests = "".join(sorted(sha256(file) for file in chosen))
    read = provenance(out)["resnet-18"]["data"]
    assert read["images"] == 3
    assert read["sha256"] == hashlib.sha256(bytes.fromhex(digests)).hexdigest()


def test_options_for_images_are_without_effect_on_the_closed_form(resnet_18, photographs, out):
    line = f"responses --checkpoint {resnet_18} --source batchnorm batchnorm --out {out} {SVG}"
    warned = succeed(f"{line} --data {photographs} --batch-size 3 --normalize auto").err
    said = "--data, --batch-size: no effect, --source batchnorm takes no images"
    assert warned.splitlines()[0] == said
    assert "no effect" not in succeed(line).err


def test_without_images_it_is_the_closed_form(resnet_18, out):
    line = f"responses --checkpoint {resnet_18} --out {out} {SVG}"
    assert succeed(line).err.splitlines() == [
        "no images for networks with 224x224 input: name a folder of them with --data",
        "no images: the closed form from BN's tensors instead (--source batchnorm)",
    ]
    assert len(frame_in(out)) == 16
    assert "error: no images for networks with 224x224 input" in run(f"{line} --source hooks").error
    assert "error: --data probe: its images have 32x32 pixels" in run(f"{line} --data probe").error


def test_the_stride_of_bottlenecks_is_recognised_on_images(tmp_path):
    """Resnet-50 with the stride on the 1x1 and on the 3x3 have the same tensors. BN's statistics tell."""
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    for stride in ("1x1", "3x3"):
        network = record(build("resnet-50", stride=stride, classes=3), PRESETS["imagenet"](images))
        torch.save(network.state_dict(), tmp_path / "a.pth")
        found = loading.load(tmp_path / "a.pth", images=images)
        assert found.config.stride == stride
        assert re.fullmatch(r"recognised, misfit 0.0\d, next best .*", found.how_kind())
        assert found.warnings == []


@pytest.mark.slow
def test_if_the_images_do_not_tell_the_stride_it_is_taken_for_v1_5(photographs, tmp_path, out):
    """BN's statistics are those of other images: no stride fits much better than the other."""
    torch.save(build("resnet-50", stride="1x1", classes=3).state_dict(), tmp_path / "resnet50.pth")
    line = f"responses --checkpoint resnet50.pth --data {photographs} --images 2 --kind residual"
    shown = succeed(f"{line} --out {out} {SVG}")
    assert "resnet-50: network resnet-50 (assumed v1.5, stride on the 3x3: " in shown.out
    warned = "warning: resnet-50: BN's statistics do not tell which network it is: "
    assert shown.err.startswith(warned)
    assert shown.err.count("\n") == 1


def test_networks_of_two_sizes_in_one_command(resnet_18, files, images, out):
    line = f"responses --checkpoint {resnet_18} {files['resnet-8']} --data {images} --out {out}"
    assert (
        "error: networks for 32x32 and for 224x224 images: measure them in two" in run(line).error
    )


def test_per_pixel_preprocessing_of_large_images(resnet_18, photographs, out):
    line = f"responses --checkpoint {resnet_18} --data {photographs} --out {out}"
    error = run(f"{line} --normalize per-pixel").error
    assert "per-pixel preprocessing is for 32x32 images: --normalize imagenet" in error


# Networks of the user's own


def test_a_network_of_ones_own(images, tmp_path, out):
    """Also if it lies in a checkpoint of Lightning's, under other names."""
    options = own(tmp_path, TWO_LAYERS)
    state = torch.load(tmp_path / "own.pth")
    state = {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
    torch.save(state, tmp_path / "own.pth")
    printed = succeed(f"responses {options} --data {images} --out {out} {SVG}").out
    assert "own: network Sequential (built by --model, misfit " in printed
    names = frame_in(out)[["network", "kind", "name", "norm"]].astype(str).to_numpy().tolist()
    assert names == [["own", "other", "0", "1"], ["own", "other", "3", "4"]]
    network = loading.load(tmp_path / "own.pth", model=build_from(f"{tmp_path}/mine.py:net")).model
    with torch.no_grad():
        x = PRESETS["[0,1]"](blobs(40))
        expected = [y.std(correction=0).item() for y in (network[:2](x), network(x))]
    assert frame_in(out)["std"].tolist() == pytest.approx(expected, rel=1e-5)


def test_without_recorded_statistics_the_preprocessing_must_be_said(images, tmp_path, out):
    """This BN takes the batch's own statistics, also in evaluation mode."""
    options = own(tmp_path, SMALL.replace("2d(4)", "2d(4, track_running_stats=False)"))
    line = f"responses {options} --data {images} --out {out} {SVG}"
    error = run(line.replace("--normalize [0,1]", "")).error
    assert error.startswith(f"error: {tmp_path / 'own.pth'}: no BN with recorded statistics ran in")
    assert error.endswith("say --normalize")
    assert "own: preprocessing [0,1] (given)\n" in succeed(line).out
    assert len(frame_in(out)) == 1


@pytest.mark.parametrize("source", ["hooks", "batchnorm"])
def test_a_network_with_a_config_of_its_own(source, images, tmp_path, out):
    text = TWO_LAYERS.replace("return nn.Sequential(", "net = nn.Sequential(")
    options = own(tmp_path, text + "    net.config = {'depth': 2}\n    return net\n")
    succeed(f"responses {options} --data {images} --source {source} --out {out} {SVG}")
    assert frame_in(out)["kind"].tolist() == ["other"] * 2


def test_a_network_has_an_accuracy_if_it_has_as_many_classes(images, tmp_path, out):
    for classes in (10, 100):
        options = own(
            tmp_path,
            SMALL.replace("2d(4))", f"2d(4), nn.Flatten(), nn.Linear(3600, {classes}))"),
        )
        printed = succeed(f"responses {options} --data {images} --out {out} {SVG}").out
        [row] = [line.split() for line in printed.splitlines() if line.split()[:2] == ["own", "1"]]
        assert (row[2] == "-") == (classes == 100)


def test_what_cannot_be_computed_is_said_before_all_is_measured(images, tmp_path, out):
    text = """
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        assert len(x) != 7, "it was measured"
        return self[0](self[1](x))

def net():
    return Net(nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3))
"""
    line = f"responses {own(tmp_path, text)} --data {images} --out {out} --batch-size 7"
    error = run(f"{line} --source hooks batchnorm").error
    assert "own.pth: no 3x3 convolution followed by a BN" in error


def test_a_network_whose_builder_put_it_on_a_gpu_comes_to_the_cpu(tmp_path):
    text = TWO_LAYERS.replace("nn.Sequential(", "Net(") + "\n\nclass Net(nn.Sequential):\n"
    text += "    def cpu(self):\n        self.here = True\n        return super().cpu()\n"
    own(tmp_path, text)
    network = build_from(f"{tmp_path}/mine.py:net")
    assert loading.load(tmp_path / "own.pth", model=network).model.here


def test_only_what_the_builder_built_says_so(tmp_path, out):
    options = own(tmp_path, TWO_LAYERS)
    line = f"responses {options} --depth 20 --kind residual --source batchnorm --out {out} {SVG}"
    succeed(line.replace("--normalize [0,1]", ""))
    builders = {name: entry["network"]["model"] for name, entry in provenance(out).items()}
    assert builders == {"resnet-20": None, "own": f"{tmp_path / 'mine.py'}:net"}


def test_without_its_builder_there_are_two_ways_on(images, tmp_path, out):
    own(tmp_path, TWO_LAYERS)
    line = f"responses --checkpoint own.pth --out {out} {SVG}"
    error = run(f"{line} --data {images}").error
    assert "own.pth: none of the paper's networks" in error
    assert "it has 14 tensors: 0.weight (4, 3, 3, 3), 0.bias (4,)" in error
    assert "; --model FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION builds any other network" in error
    assert "own: network none of the paper's (unknown)" in succeed(f"{line} --source batchnorm").out
    expected = closed_form(loading.load("own.pth", need_model=False).state)["std"]
    assert frame_in(out)["std"].tolist() == pytest.approx(expected.tolist())


BAD_BUILDERS = {
    "gone.py:net": "gone.py",
    "mine.py:huge": "huge",
    "mine": "FILE.py:FUNCTION",
    "mine.py:wrong": "the tensors are not those of the network that --model builds: ",
}


@pytest.mark.parametrize("builder", BAD_BUILDERS)
def test_builders_that_do_not_fit(builder, images, tmp_path, out):
    own(tmp_path, TWO_LAYERS + "\n\ndef wrong():\n    return nn.Conv2d(3, 4, 3)\n")
    line = f"responses --checkpoint own.pth --data {images} --out {out} --model {builder}"
    assert BAD_BUILDERS[builder] in run(line).error


# Both sources, averaged copies, names of places


def test_both_sources_and_their_differences(files, images, out):
    line = f"responses --checkpoint {files['resnet-8']} --data {images} --out {out} {SVG}"
    printed = succeed(f"{line} --source hooks batchnorm").out
    frame = frame_in(out)
    sources = [frame[frame["source"] == source] for source in ("hooks", "batchnorm")]
    measured, formula = (part.reset_index() for part in sources)
    expected = closed_form(loading.load(files["resnet-8"]).model)["std"]
    assert formula["std"].tolist() == pytest.approx(expected.tolist())
    difference = 100 * (formula["std"] / measured["std"] - 1).abs()
    worst = difference.idxmax()
    place = f"in layer {worst + 1} ({measured['name'][worst]}), 7 layers of 7"
    line = f"  resnet-8: mean {difference.mean():.1f} %, largest {difference.max():.1f} % {place}\n"
    assert line in printed
    assert ">closed form</text>" in (out / "fig7.svg").read_text()


def test_the_averaged_copy(images, tmp_path, out):
    weights, average = build("resnet-8").state_dict(), build("resnet-8").state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": average}, tmp_path / "a.pth")
    line = f"responses --checkpoint a.pth --data {images} --kind residual --out {out} {SVG}"
    stds = []
    names = ["state_dict", "state_dict_ema"]
    for option, (name, other) in (
        ("", names),
        ("--ema", names[::-1]),
        ("--weights state_dict_ema", names[::-1]),
    ):
        printed = succeed(f"{line} --normalize [0,1] {option}").out
        assert f", weights: {name}; also in the file: {other}, which --weights takes\n" in printed
        stds.append(frame_in(out)["std"].tolist())
    assert stds[0] != stds[1] == stds[2]
    assert "a.pth: no weights called teacher in it" in run(f"{line} --weights teacher").error
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    assert "a.pth: no EMA copy in it" in run(f"{line} --ema").error


def test_names_and_order_that_do_not_agree_are_a_warning(tmp_path, out):
    state = {f"conv{i}.weight": torch.ones(4, 3 + (i > 1), 3, 3) for i in (1, 2, 3)}
    for i in (1, 2):
        norm = nn.BatchNorm2d(4).state_dict()
        norm.pop("num_batches_tracked")
        state |= {f"bn{i}.{name}": tensor for name, tensor in norm.items()}
    state["head.last.weight"] = state.pop("conv3.weight")
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "b.safetensors")
    options = f"--source batchnorm --out {out} {SVG}"
    shown = succeed(f"responses --checkpoint a.pt {options}")
    warned = "warning: a: names and order of the tensors disagree on conv1 -> bn1; a forward pass"
    assert shown.err.startswith(warned)
    assert "a: not computed, no BN follows it: head.last\n" in shown.out
    warned = "warning: b: the tensors are sorted by name, so the order of the layers is a guess"
    assert succeed(f"responses --checkpoint b.safetensors {options}").err.startswith(warned)
    assert frame_in(out)["norm"].tolist() == ["bn1", "bn2"]


def test_a_folder_of_the_name_that_asks_for_the_real_images_wins(files, out):
    Path("cifar10").mkdir()
    line = f"responses --checkpoint {files['resnet-8']} --data cifar10 --out {out}"
    assert "error: cifar10: no CIFAR-10 test images here" in run(line).error
