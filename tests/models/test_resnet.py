import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build
from models.resnet import CifarNet, Config, PadShortcut, network_name, parse_name

PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}


@pytest.mark.parametrize("kind", ["resnet", "plain"])
@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameters_are_the_papers(kind, depth):
    assert sum(p.numel() for p in build(f"{kind}-{depth}").parameters() if p.requires_grad) == PARAMETERS[depth]


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_depth_counts_the_layers_with_weights(depth):
    layers = [module for module in build(f"plain-{depth}").modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_long_names_are_the_same_networks():
    assert build("cifar-resnet-20").config == build("resnet-20").config
    assert build("cifar-resnet-50").config == Config("residual", 50)
    assert build("cifar-plain-152").config == Config("plain", 152)


def test_names_and_configs_agree():
    assert [network_name("residual", 56), network_name("plain", 20)] == ["resnet-56", "plain-20"]
    assert network_name("residual", 50) == "cifar-resnet-50"
    assert parse_name(network_name("residual", 50)) == ("residual", 50)
    assert build("plain-8").config.name == "plain-8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet-21", "no CIFAR-10 network has 21 layers: a depth is 6n + 2; the nearest are 20 and 26"),
        ("plain-2", "no CIFAR-10 network has 2 layers: a depth is 6n + 2; the nearest are 8 and 14"),
        ("vgg-16", "unknown network 'vgg-16': the names are resnet-DEPTH and plain-DEPTH"),
        ("resnet-", "unknown network 'resnet-'"),
        ("resnet-50", "ImageNet network (Table 1 of the paper), which is not built here yet; the CIFAR-10 network of "
         "50 layers is cifar-resnet-50"),
        ("plain-34", "plain-34 names an ImageNet network"),
    ],
)  # fmt: skip
def test_a_name_that_does_not_exist(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config("dense", 20), "unknown kind 'dense': one of residual, plain"),
        (Config("residual", 20, shortcut="D"), "unknown shortcut 'D': one of A, B, C"),
        (Config("residual", 20, padding="before"), "unknown padding 'before': one of both, after"),
        (Config("residual", 20, classes=0), "classes must be 1 or more, not 0"),
        (Config("residual", 19), "the nearest are 14 and 20"),
    ],
)
def test_an_option_that_does_not_exist(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CifarNet(config)


def test_shapes_of_the_stages():
    network = build("resnet-8", classes=7).eval()
    shapes = []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


@pytest.mark.parametrize(("padding", "first"), [("both", 8), ("after", 0)])
def test_option_a_slices_and_pads_with_zeros(padding, first):
    x = torch.randn(2, 16, 32, 32)
    y = PadShortcut(16, 32, 2, padding)(x)
    assert torch.equal(y[:, first : first + 16], x[:, :, ::2, ::2])
    assert y.count_nonzero() == x[:, :, ::2, ::2].count_nonzero()
    assert y.shape == (2, 32, 16, 16)


def test_plain_and_residual_share_their_tensors_and_differ_in_the_addition():
    residual, plain = build("resnet-8").eval(), build("plain-8").eval()
    plain.load_state_dict(residual.state_dict())  # strict
    x = torch.randn(2, 16, 32, 32)
    branch = plain.layer1[0]
    inner = branch.bn2(branch.conv2(F.relu(branch.bn1(branch.conv1(x)))))
    assert torch.equal(branch(x), F.relu(inner))
    assert torch.equal(residual.layer1[0](x), F.relu(inner + x))


@pytest.mark.parametrize(
    ("shortcut", "projections"), [("A", []), ("B", ["layer2", "layer3"]), ("C", ["layer1", "layer2", "layer3"])]
)
def test_shortcut_options(shortcut, projections):
    keys = [key for key in build("resnet-14", shortcut=shortcut).state_dict() if key.endswith("downsample.0.weight")]
    blocks = ["0"] if shortcut != "C" else ["0", "1"]
    assert keys == [f"{stage}.{block}.downsample.0.weight" for stage in projections for block in blocks]


def test_state_dict_keys_are_torchvisions():
    keys = list(build("resnet-8").state_dict())
    assert keys[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert "layer3.0.conv2.weight" in keys
    assert keys[-2:] == ["fc.weight", "fc.bias"]


def test_he_initialisation():
    weight = build("resnet-20").layer3[2].conv2.weight  # 64 x 64 x 3 x 3
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert weight.mean().abs().item() < 1e-3
