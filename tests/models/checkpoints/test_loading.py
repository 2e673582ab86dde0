import copy
import json
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import build, load
from models.checkpoints import loading
from models.data.preprocessing import PRESETS, per_pixel


@pytest.fixture
def network():
    return build("resnet-8")


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_saved_network_comes_back_with_its_card(tmp_path):
    network = build("resnet-14", shortcut="A", padding="after", classes=7)
    preprocessing = per_pixel(torch.rand(3, 32, 32))
    path = tmp_path / "runs" / "a.safetensors"
    loading.save(
        path, network, preprocessing, crop_padding="zero", training={"seed": 3, "iterations": 64000}
    )
    found = load(path)
    assert same_tensors(found.model, network)
    assert found.model.config == network.config
    assert not found.model.training
    assert found.preprocessing.name == "per-pixel"
    assert torch.equal(found.preprocessing.mean, preprocessing.mean)
    assert found.crop_padding == "zero"
    assert found.card["training"] == {"seed": 3, "iterations": 64000}
    assert (found.how_kind(), found.how_preprocessing()) == ("card", "card")
    assert found.warnings == []


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, network, monkeypatch):
    path = tmp_path / "a.safetensors"
    loading.save(path, network, PRESETS["[0,1]"], crop_padding="none", training={})
    before = path.read_bytes()
    monkeypatch.setattr(
        os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        loading.save(path, build("resnet-8"), PRESETS["[0,1]"], crop_padding="none", training={})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def wrapped(network, how):
    state = network.state_dict()
    prefixed = lambda prefix: {prefix + name: tensor for name, tensor in state.items()}  # noqa: E731
    return {
        "bare": state,
        "state_dict": {"epoch": 3, "state_dict": state},
        "DataParallel": {"state_dict": prefixed("module."), "best_prec1": 91.7},
        "compiled": {"model": prefixed("_orig_mod.")},
        "compiled DataParallel": {"net": prefixed("module._orig_mod.")},
        "Lightning": {
            "state_dict": prefixed("model."),
            "pytorch-lightning_version": "2.1",
            "hyper_parameters": {},
        },
        "ema": {"optimizer": {"state": {}}, "ema": state},
        "nested": {"model": {"state_dict": state}},
        "akamaster": {
            "state_dict": {
                f"module.{name}".replace("module.fc", "module.linear"): tensor
                for name, tensor in state.items()
                if "num_batches" not in name
            }
        },
    }[how]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt"])
def test_suffixes_of_torch_save(tmp_path, network, suffix):
    torch.save(network.state_dict(), tmp_path / f"a{suffix}")
    assert same_tensors(load(tmp_path / f"a{suffix}").model, network)


@pytest.mark.parametrize(
    "how",
    [
        "bare",
        "state_dict",
        "DataParallel",
        "compiled",
        "compiled DataParallel",
        "Lightning",
        "ema",
        "nested",
        "akamaster",
    ],
)
def test_where_the_state_dict_is(tmp_path, network, how):
    torch.save(wrapped(network, how), tmp_path / "a.pth")
    assert same_tensors(load(tmp_path / "a.pth").model, network)


def test_a_legacy_file(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same_tensors(load(tmp_path / "a.pth").model, network)


def test_akamasters_names_of_projections(tmp_path):
    network = build("resnet-8", shortcut="B")
    state = {
        name.replace(".downsample.", ".shortcut."): tensor
        for name, tensor in network.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pth")
    found = load(tmp_path / "a.pth")
    assert found.model.config.shortcut == "B"
    assert found.how_kind() == "shortcuts"
    assert same_tensors(found.model, network)


def test_a_safetensors_file_of_others(tmp_path, network):
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors")
    assert same_tensors(found.model, network)
    assert (found.how_kind(), found.how_preprocessing()) == ("assumed", "unknown")
    assert found.preprocessing is None


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("depth", [8, 14, 20])
def test_depth_classes_and_shortcuts_show_in_the_tensors(tmp_path, shortcut, depth):
    network = build(f"resnet-{depth}", shortcut=shortcut, classes=100)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").model.config == network.config


def test_what_the_caller_says_wins_over_the_card(tmp_path, network):
    path = tmp_path / "a.safetensors"
    loading.save(path, network, PRESETS["imagenet"], crop_padding="black", training={})
    found = load(path, kind="plain", normalize="[-1,1]")
    assert found.model.config.kind == "plain"
    assert found.preprocessing.name == "[-1,1]"
    assert (found.how_kind(), found.how_preprocessing()) == ("given", "given")


# Bad input: what, where, and what to do


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def save_as(name):
    def write(path, content):
        torch.save(content, path / name)
        return path / name

    return write


def changed(network, **changes):
    """The state dict with some tensors changed, or left out where the change is None."""
    state = network.state_dict() | {
        name.replace("__", "."): tensor for name, tensor in changes.items()
    }
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def nan_weights(path, network):
    network.layer1[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    return save_as("a.pt")(path, network.state_dict())


def text_file(path, network):
    (path / "a.pt").write_text("these are not tensors\n")
    return path / "a.pt"


def empty_file(path, network):
    (path / "a.pt").touch()
    return path / "a.pt"


def cut_file(path, network):
    file = save_as("a.pt")(path, network.state_dict())
    file.write_bytes(file.read_bytes()[:20_000])
    return file


def cut_safetensors(path, network):
    save_file(network.state_dict(), path / "a.safetensors")
    (path / "a.safetensors").write_bytes((path / "a.safetensors").read_bytes()[:20_000])
    return path / "a.safetensors"


def projections_called_plain(path, network):
    return save_as("a.pt")(path, build("resnet-8", shortcut="B").state_dict())


BAD = {
    "gone": (
        lambda p, n: p / "gone.pth",
        "gone.pth: no such file; a checkpoint is a file of torch.save (.pt, .pth,",
    ),
    "folder": (lambda p, n: p, "no such file; a checkpoint is"),
    "text": (
        text_file,
        "a.pt: not a checkpoint, damaged or truncated; a checkpoint is a file of torch.save",
    ),
    "empty": (
        empty_file,
        "a.pt: not a checkpoint, damaged or truncated; a checkpoint is a file of torch.save",
    ),
    "truncated": (cut_file, "a.pt: not a checkpoint, damaged or truncated"),
    "truncated safetensors": (
        cut_safetensors,
        "a.safetensors: damaged or truncated safetensors file",
    ),
    "code": (
        lambda p, n: save_as("a.pt")(p, {"state_dict": Evil()}),
        "a.pt: refused: it asks for posix.system, which could run code, and only tensors are read; save it again "
        "with torch.save(model.state_dict(), ...)",
    ),
    "whole module": (
        lambda p, n: save_as("a.pt")(p, n),
        "a.pt: refused: it asks for models.resnet.ResNet, which could run code",
    ),
    "no state dict": (
        lambda p, n: save_as("a.pt")(p, {"epoch": 3, "weight": [1.0]}),
        "a.pt: no state dict in it; looked under state_dict, model_state_dict, model_state, model, net, "
        "network, weights, module, state_dict_ema, ema_state_dict, model_ema, ema_model, ema and found "
        "epoch, weight",
    ),
    "a tensor": (
        lambda p, n: save_as("a.pt")(p, torch.zeros(3)),
        "no state dict in it; looked under state_dict",
    ),
    "other network": (
        lambda p, n: save_as("a.pt")(p, torch.nn.Linear(2, 3).state_dict()),
        "a.pt: none of the paper's networks (CIFAR-10's: conv1 of 16 channels, layer1 to layer3 with as "
        "many blocks each; ImageNet's: conv1 of 64 channels, layer1 to layer4 as in Table 1); it has 2 "
        "tensors: weight (3, 2), bias (3,), ...; --model FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION "
        "builds any other network, --source batchnorm needs none",
    ),
    "other blocks": (
        lambda p, n: save_as("a.pt")(p, changed(n, layer2__1__conv1__weight=torch.zeros(3))),
        "blocks in its layers: 1, 2, 1; its 7 3\N{MULTIPLICATION SIGN}3 convolutions have the shapes of "
        "resnet-8: resnet-8=FILE as its label draws the paper's curve beside it; --model FILE.py:FUNCTION",
    ),
    "missing": (
        lambda p, n: save_as("a.pt")(p, changed(n, bn1__bias=None)),
        "a.pt: the tensors are not those of resnet-8: bn1.bias is missing",
    ),
    "extra": (
        lambda p, n: save_as("a.pt")(p, changed(n, bn9__bias=torch.zeros(1))),
        "bn9.bias is unexpected",
    ),
    "shape": (
        lambda p, n: save_as("a.pt")(p, changed(n, bn1__bias=torch.zeros(3))),
        "bn1.bias has shape (3,) instead of (16,); --model FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION builds "
        "any other network, --source batchnorm needs none",
    ),
    "many": (
        lambda p, n: save_as("a.pt")(
            p, {k: v for k, v in n.state_dict().items() if "bias" not in k}
        ),
        "bn1.bias is missing, layer1.0.bn1.bias is missing, layer1.0.bn2.bias is missing, and 5 more",
    ),
    "NaN": (
        nan_weights,
        "a.pt: NaN or infinity in layer1.0.conv1.weight: the training diverged, or the file is "
        "damaged",
    ),
}


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_bad_input(write, message, tmp_path, network):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(write(tmp_path, network))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["conv1.weight", "fc.weight"])
def test_where_none_is_needed_a_file_gives_its_tensors_alone(name, tmp_path, network):
    state = network.state_dict() | {name: torch.zeros(3)}
    found = load(save_as("a.pt")(tmp_path, state), need_model=False)
    assert (found.model, found.config, found.how_kind()) == (None, None, "unknown")
    assert list(found.state) == list(state)


def test_a_network_with_projections_is_not_plain(tmp_path, network):
    with pytest.raises(
        ValueError,
        match=r"it has shortcuts with weights \(downsample\), so it is residual, not plain",
    ):
        load(projections_called_plain(tmp_path, network), kind="plain")


def test_unknown_preprocessing_and_a_mean_image_that_is_nowhere(tmp_path, network):
    file = save_as("a.pt")(tmp_path, network.state_dict())
    with pytest.raises(ValueError, match="unknown normalisation 'none': one of auto, imagenet"):
        load(file, normalize="none")
    assert load(file, normalize="per-pixel").preprocessing is None
    images = np.full((2, 32, 32, 3), 51, np.uint8)
    assert load(
        file, normalize="per-pixel", images=images
    ).preprocessing.mean.mean().item() == pytest.approx(0.2)


def test_the_card_is_json_in_the_metadata_and_the_mean_image_a_tensor(tmp_path, network):
    path = tmp_path / "a.safetensors"
    loading.save(
        path, network, per_pixel(torch.ones(3, 32, 32)), crop_padding="zero", training={"seed": 0}
    )
    assert load_file(path)["preprocessing.mean"].shape == (3, 32, 32)
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    card = json.loads(json.loads(header)["__metadata__"]["card"])
    assert card["network"] == "resnet-8"
    assert (card["kind"], card["depth"], card["preprocessing"]) == ("residual", 8, "per-pixel")


# Foreign files


class Other(nn.Module):
    """A resnet-8 under names of somebody else's, with biases in its convolutions."""

    def __init__(self, ours, names):
        super().__init__()
        for module, theirs in names.items():
            layer = copy.deepcopy(ours.get_submodule(module))
            if isinstance(layer, nn.Conv2d):
                layer.bias = nn.Parameter(torch.randn(layer.out_channels))
            self.put(theirs, layer)

    def put(self, path, layer):
        *parents, last = path.split(".")
        home = self
        for parent in parents:
            if parent not in home._modules:
                home.add_module(parent, nn.Module())
            home = home._modules[parent]
        home.add_module(last, layer)


def names_of(stem, block, end):
    names = dict(zip(("conv1", "bn1"), stem, strict=True))
    for stage in (1, 2, 3):
        for our, their in zip(("conv1", "bn1", "conv2", "bn2"), block, strict=True):
            names[f"layer{stage}.0.{our}"] = their.format(stage)
    return names | {"fc": end}


STYLES = [
    names_of(("conv", "bn"), ("s{}.conv_a", "s{}.bn_a", "s{}.conv_b", "s{}.bn_b"), "head"),
    names_of(("conv0", "bn0"), ("b.{}.c.0", "b.{}.c.1", "b.{}.c.3", "b.{}.c.4"), "out"),
    names_of(("stem.0", "stem.1"), ("s.{}.0.conv", "s.{}.0.bn", "s.{}.1.conv", "s.{}.1.bn"), "y.0"),
    names_of(("net.conv1", "net.bn1"), ("l{}.conv1", "l{}.bn1", "l{}.conv2", "l{}.bn2"), "fc"),
]


@pytest.mark.parametrize("names", STYLES)
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_the_papers_networks_under_other_names(names, save, tmp_path, network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    state = Other(network, names).state_dict()
    for ours, theirs in names.items():
        if "conv" in ours:
            norm = names[ours.replace("conv", "bn")]
            state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] + state[f"{theirs}.bias"]
    path = tmp_path / ("a.pt" if save is torch.save else "a.safetensors")
    save(state, path)
    found = load(path)
    assert found.config == network.config
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(found.model(images), network.eval()(images), atol=1e-4)


@pytest.mark.parametrize(
    "extra",
    [{"se.weight": torch.ones(3)}, {"layer1.0.alpha": torch.ones(())}, {"fc2.bias": torch.ones(2)}],
)
def test_a_refusal_says_whose_shapes_these_are(extra, tmp_path, network):
    torch.save(network.state_dict() | extra, tmp_path / "a.pt")
    words = (
        "its 7 3\N{MULTIPLICATION SIGN}3 convolutions have the shapes of resnet-8: resnet-8=FILE as"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        load(tmp_path / "a.pt")


FOREIGN = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0", "an ONNX model; save the state_dict()"),
    "web page": (b"<!DOCTYPE html><html></html>", "a web page, not the file itself; download"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file; save the state_dict()"),
    "index": (
        b'{"metadata": {}, "weight_map": {"a": "b"}}',
        "the index of a checkpoint in several",
    ),
}


@pytest.mark.parametrize(("content", "words"), FOREIGN.values(), ids=FOREIGN)
def test_what_else_is_called_a_checkpoint(content, words, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "a.pth")


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=r"a\.pth: no such file"):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["resnet-20", "ResNet-20", "resnet20", "RESNET_20"])
def test_shipped_networks_by_any_spelling(name):
    assert load(name).config.name == "resnet-20"


def test_a_file_wins_over_a_shipped_network(tmp_path, network):
    torch.save(network.state_dict(), "resnet20")
    assert load("resnet20").config.name == "resnet-8"


def test_the_label_decides_if_nothing_else_does(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "a.pt")
    candidates = loading.read(tmp_path / "a.pt").candidates()
    assert candidates.choose().kind_known is loading.Known.ASSUMED
    chosen = candidates.choose(likely_kind="plain")
    assert (chosen.config.kind, chosen.how_kind()) == ("plain", "given")
    assert candidates.choose(likely_kind="residual").how_kind() == "assumed"


def test_a_file_is_read_once(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "a.pt")
    file = loading.read(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    assert file.candidates(normalize="[0,1]").choose(images).kind_fit is not None
    assert file.digest == file.candidates().choose().digest


# Cards

INTACT = {"kind": "residual", "depth": 8, "classes": 10}


@pytest.mark.parametrize(
    "card", ["# A model card", "[1]", "3", '{"license": "mit"}', "[" * 100_000]
)
def test_a_card_of_others_is_no_damage(card, tmp_path, network):
    save_file(network.state_dict(), tmp_path / "a.safetensors", metadata={"card": card})
    found = load(tmp_path / "a.safetensors")
    assert (found.card, found.how_kind()) == ({}, "assumed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "<script>"}, "its card says kind '<script>', which is none of residual, plain"),
        ({"kind": ["plain"]}, "its card says kind"),
        ({"depth": 56}, "its card says another depth than 8"),
        ({"classes": 7}, "its card says another classes than 10"),
        (
            {"crop_padding": {}},
            "its card says crop_padding '{}', which is none of black, zero, none",
        ),
        ({"kind": "plain", "shortcut": "D"}, "its card says shortcut 'D'"),
    ],
)
def test_impossible_cards(change, words, tmp_path, network):
    metadata = {"card": json.dumps(INTACT | change)}
    save_file(network.state_dict(), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("count", [-1, 10**12, True, 3.5, "64000", None])
def test_impossible_iterations_are_not_said(count, tmp_path, network):
    metadata = {"card": json.dumps(INTACT | {"training": {"iterations": count}})}
    save_file(network.state_dict(), tmp_path / "a.safetensors", metadata=metadata)
    assert load(tmp_path / "a.safetensors").iterations is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_the_preprocessing_is_finite_and_is_what_the_card_says(number, tmp_path, network):
    path = tmp_path / "a.safetensors"
    loading.save(
        path, network, PRESETS["imagenet"], crop_padding="zero", training={"iterations": 5}
    )
    file = loading.read(path)
    assert load(path).iterations == 5
    metadata = {"card": json.dumps(file.card)}
    for name, value in (("mean", number), ("std", number), ("mean", 0.5)):
        tensors = file.tensors | {f"preprocessing.{name}": torch.full((3, 1, 1), value)}
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"a\.safetensors: .*(preprocessing|damaged)"):
            load(path)


def test_a_damaged_card_of_ours_is_said(tmp_path, network):
    path = tmp_path / "a.safetensors"
    loading.save(path, network, PRESETS["imagenet"], crop_padding="zero", training={})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"residual", b"resyduak", 1))
    with pytest.raises(
        ValueError, match="damaged: its tensors or its card are not those that were"
    ):
        load(path)


def test_a_network_of_100_classes_is_said_on_ten(tmp_path):
    torch.save(build("resnet-8", classes=100).state_dict(), tmp_path / "a.pt")
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    found = load(tmp_path / "a.pt", images=images, normalize="[0,1]")
    assert found.warnings[-1].startswith("it tells 100 classes apart, and these images have 10")


@pytest.mark.parametrize("text", ["0.5,0.5,0.5/0.25,0.25,0.25", "0,0,0/1,1,1", "-1,0.5,2/0.1,3,1"])
def test_numbers_of_ones_own_normalise(text, tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "a.pt")
    found = load(tmp_path / "a.pt", normalize=text).preprocessing
    assert f"{','.join(f'{x:g}' for x in found.mean.ravel().tolist())}/" == text.split("/")[0] + "/"
    for bad in ("1,1/1,1,1", "a,b,c/1,1,1", "1,1,1/0,1,1", "1e999,1,1/1,1,1"):
        with pytest.raises(ValueError, match="unknown normalisation"):
            load(tmp_path / "a.pt", normalize=bad)
