"""Other people's files: whatever they are wrapped in, the tensors come out under our names."""

import re
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import build, load
from models.checkpoints import loading
from models.checkpoints.loading import read
from models.checkpoints.state_dicts import at_root, rename
from models.data.preprocessing import PRESETS


@pytest.fixture
def network():
    return build("resnet-8")


@pytest.fixture
def other():
    """The averaged copy."""
    torch.manual_seed(7)
    return build("resnet-8")


def same(state, network):
    expected = network.state_dict()
    return set(state) == set(expected) and all(
        torch.equal(state[name], expected[name]) for name in state
    )


def weights(path, ema=False):
    """The tensors of a network like ours in a file."""
    return at_root(read(path, ema=ema).tensors)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def lightning(state, other):
    return {
        "state_dict": prefixed("model.", state)
        | {"criterion.weight": torch.ones(10), "metric.total": torch.zeros(())},
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.1",
        "callbacks": {},
        "optimizer_states": [],
    }


LAYOUTS = {
    "torchvision's references": lambda s, o: {
        "model": s,
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": Namespace(output_dir=Path("runs"), lr=0.1),
    },
    "timm": lambda s, o: {
        "epoch": 3,
        "arch": "resnet",
        "state_dict": s,
        "args": Namespace(),
        "version": 2,
    },
    "numbers of numpy": lambda s, o: {
        "model": s,
        "metric": np.float64(0.5),
        "best": {"epoch": np.int64(3)},
    },
    "arrays of numpy": lambda s, o: {
        "model": s,
        "confusion": np.ones((2, 2)),
        "seeds": np.arange(9, dtype=np.uint32),
    },
    "timm with EMA": lambda s, o: {"state_dict": s, "state_dict_ema": o},
    "torchvision with EMA": lambda s, o: {
        "model": s,
        "model_ema": prefixed("module.", o) | {"n_averaged": torch.ones(())},
    },
    "Lightning": lightning,
    "Lightning, other names": lambda s, o: {"state_dict": prefixed("net.backbone.", s)},
    "Lightning with EMA inside": lambda s, o: {
        "state_dict": prefixed("model.", s) | prefixed("ema_model.module.", o)
    },
    "FSDP": lambda s, o: {
        name.replace("layer1.", "layer1._fsdp_wrapped_module."): t for name, t in s.items()
    },
    "FSDP around all": lambda s, o: {"model": prefixed("_fsdp_wrapped_module.", s)},
    "activation checkpointing": lambda s, o: {
        name.replace("layer2.0.", "layer2.0._checkpoint_wrapped_module."): t
        for name, t in s.items()
    },
    "compiled blocks": lambda s, o: {
        name.replace("layer2.0.", "layer2.0._orig_mod."): t for name, t in s.items()
    },
    "DDP, compiled": lambda s, o: {"model_state_dict": prefixed("module._orig_mod.", s)},
    "compiled, DDP": lambda s, o: {"model_state": prefixed("_orig_mod.module.", s)},
    "PyTorch's tutorial, with a loss": lambda s, o: {
        "epoch": 3,
        "model_state_dict": s,
        "loss": torch.ones(()),
    },
    "PyTorch's ImageNet example, with an accuracy": lambda s, o: {
        "state_dict": s,
        "best_acc1": torch.ones(()),
    },
    "with an EMA copy beside the network": lambda s, o: s | prefixed("ema.", o),
    "nested": lambda s, o: {"checkpoint": 1, "model": {"module": s}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_come_out(layout, network, other, tmp_path):
    torch.save(LAYOUTS[layout](network.state_dict(), other.state_dict()), tmp_path / "a.pth")
    file = read(tmp_path / "a.pth")
    assert same(at_root(file.tensors), network)
    assert file.card == {}
    assert ("ema" in file.weights_note) == ("EMA" in layout)
    assert same(load(tmp_path / "a.pth").model.state_dict(), network)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "EMA" in layout])
def test_the_averaged_copy_comes_out_where_it_is_asked_for(layout, network, other, tmp_path):
    torch.save(LAYOUTS[layout](network.state_dict(), other.state_dict()), tmp_path / "a.pth")
    file = read(tmp_path / "a.pth", ema=True)
    assert same(at_root(file.tensors), other)
    assert "ema" in file.weights_note
    checkpoint = load(tmp_path / "a.pth", ema=True)
    assert same(checkpoint.model.state_dict(), other)
    assert checkpoint.weights_note == file.weights_note


def test_the_notes(network, other, tmp_path):
    state, average = network.state_dict(), other.state_dict()
    notes = {}
    for layout in ("timm with EMA", "Lightning with EMA inside"):
        torch.save(LAYOUTS[layout](state, average), tmp_path / "a.pth")
        notes[layout] = [read(tmp_path / "a.pth", ema=ema).weights_note for ema in (False, True)]
    assert notes == {
        "timm with EMA": [
            "state_dict; also in the file: state_dict_ema, which --weights takes",
            "state_dict_ema; also in the file: state_dict, which --weights takes",
        ],
        "Lightning with EMA inside": [
            "model; also in the file: ema_model.module, which --weights takes",
            "ema_model.module; also in the file: model, which --weights takes",
        ],
    }


def test_torchs_averaged_model(network, tmp_path):
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torch.save(averaged.state_dict(), tmp_path / "a.pth")
    assert same(weights(tmp_path / "a.pth"), network)


def test_torchs_averaged_model_of_another_network(tmp_path):
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(AveragedModel(other).state_dict(), tmp_path / "a.pth")
    assert same(read(tmp_path / "a.pth").tensors, other)


def test_data_parallel_itself(network, tmp_path):
    torch.save(nn.DataParallel(network).state_dict(), tmp_path / "a.pth")
    assert same(weights(tmp_path / "a.pth"), network)


def test_no_averaged_copy(network, tmp_path):
    torch.save({"state_dict": network.state_dict()}, tmp_path / "a.pth")
    message = (
        f"{tmp_path}/a.pth: no EMA copy in it (looked under state_dict_ema, ema_state_dict, model_ema, ema_model, "
        "ema); leave out --ema"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / "a.pth", ema=True)


def test_two_networks_in_one_file(network, other, tmp_path):
    both = prefixed("student.", network.state_dict()) | prefixed("teacher.", other.state_dict())
    save_file(both, tmp_path / "a.safetensors")
    message = "a.safetensors: it holds 2 networks: student., teacher.; --weights NAME chooses one"
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / "a.safetensors")


def test_two_copies_of_another_network_in_one_file(tmp_path):
    plain, average = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    both = prefixed("model.", plain.state_dict()) | prefixed("model_ema.", average.state_dict())
    torch.save({"state_dict": both | {"loss.weight": torch.ones(3)}}, tmp_path / "a.pt")
    for ema, copy, note in (
        (False, prefixed("model.", plain.state_dict()), "model; also in the file: model_ema,"),
        (True, prefixed("model_ema.", average.state_dict()), "model_ema; also in the file: model,"),
    ):
        file = read(tmp_path / "a.pt", ema=ema)
        state = file.tensors
        assert file.weights_note == f"{note} which --weights takes"
        assert state.keys() == copy.keys()
        assert all(torch.equal(state[name], copy[name]) for name in copy)
    streams = prefixed("rgb.", plain.state_dict()) | prefixed("schema.", average.state_dict())
    torch.save(streams, tmp_path / "b.pt")
    assert (
        read(tmp_path / "b.pt").tensors.keys() == streams.keys()
    )  # no EMA: two parts of one network


def test_a_pruned_network(network, tmp_path):
    prune.l1_unstructured(network.layer1[0].conv1, "weight", 0.5)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    found = load(tmp_path / "a.pth").model
    expected = network.layer1[0].conv1.weight
    assert (expected == 0).sum() == expected.numel() // 2
    assert torch.equal(found.layer1[0].conv1.weight, expected)
    state = network.state_dict() | {"layer1.0.conv1.weight_mask": torch.ones(1)}
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(
        ValueError,
        match=r"b\.pth: the tensors are not those of resnet-8: layer1\.0\.conv1\.weight is mis",
    ):
        load(tmp_path / "b.pth")


def test_a_classifier_of_another_name(network, tmp_path):
    state = {
        name.replace("fc.", "last_linear."): tensor for name, tensor in network.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pth")
    assert same(load(tmp_path / "a.pth").model.state_dict(), network)
    torch.save({name: x for name, x in state.items() if "linear" not in name}, tmp_path / "b.pth")
    with pytest.raises(
        ValueError,
        match=r"b\.pth: it has the layers of resnet-8, but no classifier called fc or linear; its 7",
    ):
        load(tmp_path / "b.pth")


def test_a_torchscript_archive(network, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:  # torch.jit.save is deprecated
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/code/__torch__.py", b"")
    with pytest.raises(
        ValueError,
        match=r"a\.pt: refused: a TorchScript archive, which holds code; save torch\.jit\.load",
    ):
        read(tmp_path / "a.pt")


class Segmenter(nn.Module):
    """A network of the user's own around one of ours."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = (
            build("resnet-8"),
            nn.Sequential(nn.Conv2d(10, 4, 3), nn.BatchNorm2d(4)),
        )


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["pt", "safetensors"])
def test_a_network_of_ones_own_around_one_of_ours_keeps_its_head(save, tmp_path):
    network = Segmenter()
    path = tmp_path / ("a.pt" if save is torch.save else "a.safetensors")
    save(network.state_dict(), path)
    found = load(path, model=Segmenter())
    assert same(found.model.state_dict(), network)
    assert same(found.state, network)
    assert load(path).config.name == "resnet-8"


def test_nan_in_the_head_counts_where_the_head_does(tmp_path):
    state = Segmenter().state_dict()
    state["head.1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").config.name == "resnet-8"
    with pytest.raises(ValueError, match=r"NaN or infinity in head\.1\.weight"):
        load(tmp_path / "a.pt", model=Segmenter())
    torch.save(
        {name: x for name, x in state.items() if ".fc." not in name}, tmp_path / "b.pt"
    )  # none of ours
    with pytest.raises(ValueError, match=r"NaN or infinity in head\.1\.weight"):
        load(tmp_path / "b.pt", need_model=False)


def test_names_of_akamaster_become_ours():
    ones = torch.ones(1)
    theirs = {"linear.weight": ones, "layer1.0.shortcut.0.weight": ones, "nonlinear.weight": ones}
    assert list(rename(theirs)) == ["fc.weight", "layer1.0.downsample.0.weight", "nonlinear.weight"]


# Layouts of whole networks


def test_chenyaofo(tmp_path):
    """pytorch-cifar-models: CIFAR-10 and -100, projections (option B) called downsample, `fc`."""
    for classes in (10, 100):
        network = build("resnet-20", shortcut="B", classes=classes)
        torch.save(network.state_dict(), tmp_path / "a.pt")
        found = load(tmp_path / "a.pt")
        assert (found.config, found.how_kind()) == (network.config, "shortcuts")


@pytest.mark.parametrize("depth", [18, 34])
def test_torchvisions_basic_networks(depth, tmp_path):
    network = build(f"resnet-{depth}")
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    found = load(tmp_path / "resnet.pth")
    assert (found.config, found.how_kind()) == (network.config, "shortcuts")


def test_torchvisions_bottlenecks_are_taken_for_v1_5(tmp_path):
    torch.save(build("resnet-50").state_dict(), tmp_path / "resnet50.pth")
    for kind in (None, "residual"):
        found = load(tmp_path / "resnet50.pth", kind=kind)
        assert (found.config.name, found.config.stride) == ("resnet-50", "3x3")
        assert (
            found.how_kind()
            == "assumed v1.5, stride on the 3x3: the tensors do not say; --data tells"
        )


def test_a_card_says_where_the_stride_is(tmp_path):
    loading.save(
        tmp_path / "a.safetensors",
        build("resnet-50"),
        PRESETS["imagenet"],
        crop_padding="none",
        training={},
    )
    found = load(tmp_path / "a.safetensors")
    assert (found.config.stride, found.how_kind()) == ("1x1", "card")


def test_old_files_without_counters(network, tmp_path):
    state = {
        name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name
    }
    torch.save(state, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth").config == network.config


# Which copy of the weights


def mmengine(state, average):
    return {
        "meta": {"mmengine_version": "0.10.4", "epoch": 3},
        "state_dict": average,
        "ema_state_dict": prefixed("module.", state) | {"steps": torch.tensor(3)},
        "message_hub": {},
    }


def weight_averaging(state, average):
    return {
        "pytorch-lightning_version": "2.6",
        "state_dict": average,
        "current_model_state": state,
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }


def averaged_model(state, average):
    counted = prefixed("module.", average) | {"n_averaged": torch.tensor(3)}
    return {"model": state, "swa_state_dict": counted}


SAYS = [
    (mmengine, "ema_state_dict"),
    (weight_averaging, "current_model_state"),
    (averaged_model, "model"),
]


@pytest.mark.parametrize(("layout", "raw"), SAYS)
def test_the_file_says_which_weights_are_the_average(layout, raw, network, other, tmp_path):
    torch.save(layout(network.state_dict(), other.state_dict()), tmp_path / "a.pth")
    file = read(tmp_path / "a.pth", ema=True)
    assert same(at_root(file.tensors), other)
    assert "an average as the file says" in file.weights_note
    assert raw in file.weights_note
    assert same(at_root(read(tmp_path / "a.pth", weights=raw).tensors), network)


@pytest.mark.parametrize("name", ["swa_state_dict", "teacher", "best_state_dict", "state_dict_ema"])
def test_every_other_set_of_weights_is_said_and_can_be_chosen(name, network, other, tmp_path):
    content = {"state_dict": network.state_dict(), name: other.state_dict(), "loss": torch.ones(1)}
    torch.save(content, tmp_path / "a.pth")
    file = read(tmp_path / "a.pth")
    assert same(file.tensors, network)
    assert file.weights_note == f"state_dict; also in the file: {name}, which --weights takes"
    assert same(read(tmp_path / "a.pth", weights=name).tensors, other)
    with pytest.raises(
        ValueError, match=f"no weights called gone in it; there are: state_dict, {name}"
    ):
        read(tmp_path / "a.pth", weights="gone")


def test_a_prefix_chooses_too(network, other, tmp_path):
    both = prefixed("student.", network.state_dict()) | prefixed("teacher.", other.state_dict())
    torch.save(both, tmp_path / "a.pth")
    assert same(at_root(read(tmp_path / "a.pth", weights="teacher").tensors), other)


def test_the_state_of_an_optimizer_is_no_set_of_weights(network, tmp_path):
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    sum(x.sum() for x in network.parameters()).backward()
    optimizer.step()
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a")
    assert read(tmp_path / "a").weights_note == ""


def test_two_tensors_of_one_name(network, tmp_path):
    twice = {"_orig_mod.conv1.weight": torch.ones(16, 3, 3, 3)}
    torch.save(network.state_dict() | twice, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"two tensors in it are called conv1\.weight"):
        read(tmp_path / "a.pth")
