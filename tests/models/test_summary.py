"""Shapes, parameters and multiply-adds of the networks of Table 1."""

import pytest
import torch

from models import build
from models.resnet import Config, parse_name
from models.summary import main, summarise

PAPER = {18: 1.8e9, 34: 3.6e9, 50: 3.8e9, 101: 7.6e9, 152: 11.3e9}  # FLOPs, Table 1


def total(config, size=224):
    return sum(row.multiply_adds for row in summarise(config, (1, 3, size, size)))


@pytest.mark.parametrize("depth", PAPER)
def test_multiply_adds_are_the_papers(depth):
    assert total(parse_name(f"resnet-{depth}")) == pytest.approx(PAPER[depth], rel=0.03)


def test_the_stride_on_the_3x3_costs_more():
    """4.09e9 is what torchvision gives for its ResNet-50."""
    config = Config("residual", 50, shortcut="B", classes=1000, images="imagenet", stride="3x3")
    assert total(config) == pytest.approx(4.09e9, rel=1e-3)


def test_multiply_adds_of_a_small_network_by_hand():
    """CIFAR-10's plain-8: 3x3 convolutions of 16, 32 and 64 channels on maps of 32, 16 and 8
    pixels.
    """
    maps = {16: 32 * 32, 32: 16 * 16, 64: 8 * 8}
    layers = [(3, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    expected = sum(9 * before * after * maps[after] for before, after in layers) + 64 * 10
    assert total(Config("plain", 8), 32) == expected


@pytest.mark.parametrize("depth", PAPER)
def test_the_shapes_of_the_reference(depth):
    """The notebook prints these for 5 images of 224x224."""
    channels = 512 if depth < 50 else 2048
    rows = summarise(parse_name(f"resnet-{depth}"), (5, 3, 224, 224))
    shapes = {row.stage: row.shape for row in rows}
    assert shapes["conv1"] == (5, 64, 112, 112)
    assert shapes["maxpool"] == (5, 64, 56, 56)
    assert shapes["layer4"] == (5, channels, 7, 7)
    assert shapes["average pooling"] == (5, channels, 1, 1)
    assert shapes["flatten"] == (5, channels)
    assert shapes["fc"] == (5, 1000)


def test_shapes_are_those_of_a_real_pass():
    config = parse_name("resnet-18")
    network, seen = build("resnet-18").eval(), {}
    for stage in network.stages:
        getattr(network, stage).register_forward_hook(
            lambda module, args, output, stage=stage: seen.update({stage: tuple(output.shape)})
        )
    with torch.no_grad():
        seen["fc"] = tuple(network(torch.zeros(2, 3, 64, 96)).shape)
    shapes = {row.stage: row.shape for row in summarise(config, (2, 3, 64, 96))}
    assert {stage: shapes[stage] for stage in seen} == seen


@pytest.mark.parametrize("depth", [20, 56])
def test_all_parameters_are_counted(depth):
    rows = summarise(parse_name(f"resnet-{depth}"), (1, 3, 32, 32))
    expected = sum(p.numel() for p in build(f"resnet-{depth}").parameters())
    assert sum(row.parameters for row in rows) == expected


@pytest.mark.parametrize(
    "shape", [(1, 1, 32, 32), (0, 3, 32, 32), (1, 3, 32, 10**20), (10**9, 3, 10**9, 1)]
)
def test_an_input_that_is_none(shape):
    allowed = "an input is N 3 H W, each 1 or more, 1,099,511,627,776 values at most"
    with pytest.raises(ValueError, match=f"^{allowed}, not {' '.join(map(str, shape))}$"):
        summarise(parse_name("resnet-20"), shape)


def test_the_table_of_resnet_34(capsys):
    assert main(["resnet-34", "--input", "5", "3", "224", "224"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "resnet-34, input (5, 3, 224, 224)",
        "stage            output shape       parameters  multiply-adds per image",
        "conv1            (5, 64, 112, 112)       9,536              118,013,952",
        "maxpool          (5, 64, 56, 56)",
        "layer1           (5, 64, 56, 56)       221,952              693,633,024",
        "layer2           (5, 128, 28, 28)    1,116,416              873,463,808",
        "layer3           (5, 256, 14, 14)    6,822,400            1,335,885,824",
        "layer4           (5, 512, 7, 7)     13,114,368              642,252,800",
        "average pooling  (5, 512, 1, 1)",
        "flatten          (5, 512)",
        "fc               (5, 1000)             513,000                  512,000",
        "total                               21,797,672            3,663,761,408",
    ]


def test_options_of_the_command(capsys):
    assert main(["resnet-20", "--classes", "7"]) == 0
    shown = capsys.readouterr().out
    assert "resnet-20, input (1, 3, 32, 32)" in shown
    assert "maxpool" not in shown
    assert "(1, 7)" in shown
    assert main(["resnet-21"]) == 2
    assert capsys.readouterr().err == (
        "error: no CIFAR-10 network has 21 layers: a depth is 6n + 2; the nearest are 20 and 26\n"
    )
    assert main(["resnet-20", "--input", "1", "4", "32", "32"]) == 2
    allowed = "an input is N 3 H W, each 1 or more, 1,099,511,627,776 values at most"
    assert capsys.readouterr().err == f"error: {allowed}, not 1 4 32 32\n"


@pytest.mark.parametrize(
    "name", ["resnet-20", "plain-110", *(f"resnet-{depth}" for depth in PAPER), "plain-18"]
)
def test_the_table_of_any_network(name, capsys):
    assert main([name]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    config = parse_name(name)
    side = 224 if config.images == "imagenet" else 32
    assert title == f"{name}, input {(1, 3, side, side)}"
    stages = [f"layer{number}" for number in range(1, len(config.blocks) + 1)]
    stem = ["conv1", "maxpool"] if config.images == "imagenet" else ["conv1"]
    expected = [*stem, *stages, "average pooling", "flatten", "fc", "total"]
    assert [row[:17].strip() for row in rows] == expected
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(name).parameters())
    assert rows[-1].split()[1] == f"{parameters:,}"
