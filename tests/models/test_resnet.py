import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build
from models.resnet import Config, PadShortcut, ResNet, network_name, parse_name, stages

PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}
TABLE_1 = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032}  # torchvision's, option B
TABLE_1 |= {101: 44_549_160, 152: 60_192_808}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def layers(network):
    """Return the layers with weights, shortcuts aside."""
    named = network.named_modules()
    return [m for name, m in named if isinstance(m, nn.Conv2d | nn.Linear) and "down" not in name]


@pytest.mark.parametrize("kind", ["resnet", "plain"])
@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameters_are_the_papers(kind, depth):
    assert count(build(f"{kind}-{depth}")) == PARAMETERS[depth]


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_depth_counts_the_layers_with_weights(depth):
    assert len(layers(build(f"plain-{depth}"))) == depth


def test_long_names_are_the_same_networks():
    assert build("cifar-resnet-20").config == build("resnet-20").config
    assert build("cifar-resnet-50").config == Config("residual", 50)
    assert build("cifar-plain-152").config == Config("plain", 152)


@pytest.mark.parametrize("depth", TABLE_1)
def test_table_1(depth):
    with torch.device("meta"):
        network = build(f"resnet-{depth}")
    assert count(network) == TABLE_1[depth]
    assert network.config == Config("residual", depth, "B", classes=1000, images="imagenet")
    assert len(layers(network)) == depth


@pytest.mark.parametrize("depth", [18, 34])
def test_the_plain_networks_of_table_1(depth):
    with torch.device("meta"):
        network = build(f"plain-{depth}")
        residual = build(f"resnet-{depth}", shortcut="A")
    assert not any("downsample" in name for name in network.state_dict())
    assert list(network.state_dict()) == list(residual.state_dict())


def test_names_and_configs_agree():
    assert [network_name("residual", 56), network_name("plain", 20)] == ["resnet-56", "plain-20"]
    names = [network_name("residual", 50), network_name("residual", 50, "imagenet")]
    assert names == ["cifar-resnet-50", "resnet-50"]
    for name in (*names, "plain-8", "resnet-56", "plain-34", "cifar-plain-152"):
        assert parse_name(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet-21",
            "no CIFAR-10 network has 21 layers: a depth is 6n + 2; the nearest are 20 and 26",
        ),
        (
            "plain-2",
            "no CIFAR-10 network has 2 layers: a depth is 6n + 2; the nearest are 8 and 14",
        ),
        ("vgg-16", "unknown network 'vgg-16': the names are resnet-DEPTH and plain-DEPTH"),
        ("resnet-", "unknown network 'resnet-'"),
        ("plain-50", "the paper has no plain network of 50 layers for ImageNet: plain-18, plain"),
    ],
)
def test_a_name_that_does_not_exist(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config("dense", 20), "unknown kind 'dense': one of residual, plain"),
        (Config("residual", 20, shortcut="D"), "unknown shortcut 'D': one of A, B, C, pool"),
        (Config("residual", 20, padding="before"), "unknown padding 'before': one of both, after"),
        (Config("residual", 20, classes=0), "classes must be 1 to 1,000,000,000, not 0"),
        (Config("residual", 20, classes=10**23), "classes must be 1 to 1,000,000,000, not 1000000"),
        (Config("residual", 20, stride="5x5"), "unknown stride '5x5': one of 1x1, 3x3"),
        (Config("residual", 20, images="mnist"), "unknown images 'mnist': one of cifar, imagenet"),
        (Config("residual", 19), "the nearest are 14 and 20"),
        (Config("residual", 20, images="imagenet"), "Table 1 has no network of 20 layers: 18, 34"),
    ],
)
def test_an_option_that_does_not_exist(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ResNet(config)


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
    ("shortcut", "projections"),
    [("A", []), ("B", ["layer2", "layer3"]), ("C", ["layer1", "layer2", "layer3"])],
)
def test_shortcut_options(shortcut, projections):
    state = build("resnet-14", shortcut=shortcut).state_dict()
    found = [key for key in state if key.endswith("downsample.0.weight")]
    blocks = ["0"] if shortcut != "C" else ["0", "1"]
    assert found == [f"{s}.{block}.downsample.0.weight" for s in projections for block in blocks]


def test_state_dict_keys_are_torchvisions():
    keys = list(build("resnet-8").state_dict())
    assert keys[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert "layer3.0.conv2.weight" in keys
    assert keys[-2:] == ["fc.weight", "fc.bias"]


def test_he_initialisation():
    weight = build("resnet-20").layer3[2].conv2.weight  # 64 x 64 x 3 x 3
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert weight.mean().abs().item() < 1e-3


# The networks of Table 1


def test_state_dict_keys_of_table_1_are_torchvisions():
    with torch.device("meta"):
        keys = list(build("resnet-50").state_dict())
    assert "layer1.0.downsample.0.weight" in keys
    assert "layer1.0.downsample.1.running_var" in keys
    assert "layer1.1.downsample.0.weight" not in keys
    assert [key for key in keys if key.startswith("layer4.2.conv")] == [
        f"layer4.2.conv{i}.weight" for i in (1, 2, 3)
    ]


@pytest.mark.parametrize("stride", ["1x1", "3x3"])
def test_where_a_bottleneck_has_its_stride(stride):
    with torch.device("meta"):
        network = build("resnet-50", stride=stride)
    for stage, expected in (("layer1", (1, 1)), ("layer2", (2, 2)), ("layer4", (2, 2))):
        block = getattr(network, stage)[0]
        strides = {"1x1": block.conv1.stride, "3x3": block.conv2.stride}
        assert strides.pop(stride) == expected
        assert set(strides.values()) == {(1, 1)}
        assert block.conv3.stride == (1, 1)


@pytest.mark.parametrize(("shortcut", "count"), [("A", 0), ("B", 4), ("C", 16)])
def test_shortcut_options_of_bottlenecks(shortcut, count):
    with torch.device("meta"):
        keys = build("resnet-50", shortcut=shortcut).state_dict()
    assert sum(key.endswith("downsample.0.weight") for key in keys) == count


def test_bottleneck_by_hand():
    block = build("resnet-50").eval().layer2[0]
    x = torch.randn(1, 256, 8, 8)
    inner = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2)))
    inner = F.relu(block.bn2(F.conv2d(inner, block.conv2.weight, padding=1)))
    inner = block.bn3(F.conv2d(inner, block.conv3.weight))
    shortcut = block.downsample[1](F.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(inner + shortcut))


@pytest.mark.parametrize(
    ("depth", "channels"), [(18, 512), (34, 512), (50, 2048), (101, 2048), (152, 2048)]
)
def test_the_four_stages_alone(depth, channels):
    with torch.device("meta"):
        assert stages(depth, 64)(torch.zeros(5, 64, 56, 56)).shape == (5, channels, 7, 7)
        assert stages(depth, 32)(torch.zeros(2, 32, 16, 16)).shape == (2, channels, 2, 2)


def test_stages_of_another_depth():
    said = "Table 1 has no network of 20 layers: 18, 34, 50, 101, 152"
    with pytest.raises(ValueError, match=said):
        stages(20, 64)
