"""Residual networks and their plain counterparts, from one builder.

    >>> from models.resnet import build
    >>> sum(p.numel() for p in build("resnet-20").parameters())  # CIFAR-10
    269722
    >>> sum(p.numel() for p in build("resnet-18").parameters())  # ImageNet, Table 1
    11689512

He et al. (CVPR 2016). CIFAR-10, section 4.2: a 3x3 convolution, three stages of n blocks of two 3x3
convolutions with 16, 32 and 64 channels on maps of 32, 16 and 8 pixels, global average pooling and
a classifier: 6n + 2 layers with weights. ImageNet, Table 1: a 7x7 convolution and max pooling, four
stages of basic or bottleneck blocks, 18 to 152 layers. A plain network is the same network without
the shortcuts. The keys of the state dict are torchvision's (conv1, bn1, layer1.0.conv1,
downsample.0, fc).

    python -m models.resnet resnet-34 --input 5 3 224 224

prints the output shapes, parameters and multiply-adds of any of them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.messages import report

KINDS = {
    "resnet": "residual",
    "plain": "plain",
}  # the first word of a name -> the kind of the network
WIDTHS = {
    "cifar": (16, 32, 64),
    "imagenet": (64, 128, 256, 512),
}  # channels of the 3x3 convolutions, by stage
SIZES = {"cifar": 32, "imagenet": 224}  # pixels on a side of the images
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}  # Table 1
TABLE_1_DEPTHS = tuple(
    BLOCKS
)  # resnet-50 means the ImageNet network; the CIFAR one is cifar-resnet-50
BOTTLENECK_DEPTH = 50  # from here on blocks are bottlenecks
MOST_CLASSES = 10**9  # sizes of tensors overflow beyond some 10^15
OPTIONS = {
    "kind": tuple(KINDS.values()),
    "shortcut": ("A", "B", "C", "pool"),
    "padding": ("both", "after"),
    "images": tuple(SIZES),
    "stride": ("1x1", "3x3"),
}


@dataclass(frozen=True)
class Config:
    """What a network is: everything that is needed to make it again.

    kind: `residual` or `plain`. depth: layers with weights; 6n + 2, or one of Table 1. shortcut:
    `A` (no parameters: strided identity and channels of zeros), `B` (1x1 convolution and BN where
    the shape changes), `C` (on every shortcut), `pool` (`A` with average pooling instead of the stride). padding: where option A puts the channels of zeros,
    half before and half after (`both`) or all `after`. classes: outputs. images: `cifar` (32x32) or
    `imagenet` (224x224). stride: which convolution of a bottleneck makes the map smaller, the first
    `1x1` (the paper) or the `3x3` (v1.5, as torchvision has it). Shortcut and padding have no
    meaning for a plain network, stride only for bottlenecks.
    """

    kind: str
    depth: int
    shortcut: str = "A"
    padding: str = "both"
    classes: int = 10
    images: str = "cifar"
    stride: str = "1x1"

    @property
    def name(self) -> str:
        """The label of the network, such as `resnet-56`."""
        return network_name(self.kind, self.depth, self.images)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks in each stage."""
        return BLOCKS[self.depth] if self.images == "imagenet" else ((self.depth - 2) // 6,) * 3

    @property
    def block(self) -> type[BasicBlock | Bottleneck]:
        """The class of the blocks."""
        return (
            Bottleneck
            if self.images == "imagenet" and self.depth >= BOTTLENECK_DEPTH
            else BasicBlock
        )


def network_name(kind: str, depth: int, images: str = "cifar") -> str:
    """`resnet-56` or `plain-20` for a kind and a depth; `cifar-resnet-50` where the short name is
    one of Table 1.
    """
    word = next(word for word, meaning in KINDS.items() if meaning == kind)
    return f"{'cifar-' if images == 'cifar' and depth in TABLE_1_DEPTHS else ''}{word}-{depth}"


def parse_name(name: str) -> Config:
    """The network that a name means: one of Table 1 with option B for `resnet-50`, CIFAR-10's for
    `cifar-resnet-50`.

    Raises ValueError, naming what is allowed, for any other name.
    """
    match = re.fullmatch(r"(cifar-)?(resnet|plain)-([0-9]{1,6})", name)
    if match is None:
        raise ValueError(
            f"unknown network {name!r}: the names are resnet-DEPTH and plain-DEPTH, for CIFAR-10 with a depth of "
            "6n + 2, such as resnet-20 or plain-56 (cifar-resnet-20 is the same), for ImageNet with "
            f"{', '.join(map(str, TABLE_1_DEPTHS))}"
        )
    kind, depth = KINDS[match[2]], int(match[3])
    if match[1] is None and depth in TABLE_1_DEPTHS:
        config = Config(kind, depth, shortcut="B", classes=1000, images="imagenet")
    else:
        config = Config(kind, depth)
    check(config)
    return config


def check_depth(depth: int) -> None:
    """ValueError, naming the nearest valid depths, unless the depth is 6n + 2 with n of 1 or more."""
    if depth < 8 or depth % 6 != 2:
        below = max(8, depth - (depth - 2) % 6)
        raise ValueError(
            f"no CIFAR-10 network has {depth} layers: a depth is 6n + 2; the nearest are {below} and {below + 6}"
        )


def check(config: Config) -> None:
    """ValueError if there is no such network."""
    for option, values in OPTIONS.items():
        if getattr(config, option) not in values:
            raise ValueError(
                f"unknown {option} {getattr(config, option)!r}: one of {', '.join(values)}"
            )
    if not 1 <= config.classes <= MOST_CLASSES:
        raise ValueError(f"classes must be 1 to {MOST_CLASSES:,}, not {config.classes}")
    if config.images == "cifar":
        check_depth(config.depth)
    elif config.depth not in TABLE_1_DEPTHS:
        raise ValueError(
            f"Table 1 has no network of {config.depth} layers: {', '.join(map(str, TABLE_1_DEPTHS))}"
        )
    elif config.kind == "plain" and config.block is Bottleneck:
        raise ValueError(
            f"the paper has no plain network of {config.depth} layers for ImageNet: plain-18, plain-34"
        )


def config_of(network: nn.Module) -> Config | None:
    """What one of our networks is; None for others, whose `config` has another meaning."""
    config = getattr(network, "config", None)
    return config if isinstance(config, Config) else None


def build(
    name: str,
    *,
    shortcut: str | None = None,
    padding: str = "both",
    classes: int | None = None,
    stride: str = "1x1",
) -> ResNet:
    """Make the named network, freshly initialised (He et al., ICCV 2015) from torch's global random
    state.

    name: `resnet-DEPTH` or `plain-DEPTH`; with 18, 34, 50, 101 or 152 layers a network for ImageNet
    (plain: 18 and 34), else with 6n + 2 (20, 32, 44, 56, 110, 1202, ...) one for CIFAR-10, or the
    long form `cifar-resnet-DEPTH`. The rest: see `Config`; by default option A and 10 classes for
    CIFAR-10, option B and 1,000 classes for ImageNet. Returns a network that maps images (N, 3, 32,
    32) or (N, 3, 224, 224) to logits (N, classes). Raises ValueError for a name or an option that
    does not exist.
    """
    options = {"shortcut": shortcut, "padding": padding, "classes": classes, "stride": stride}
    given: dict[str, Any] = {
        option: value for option, value in options.items() if value is not None
    }
    return ResNet(replace(parse_name(name), **given))


def stages(depth: int, in_channels: int) -> nn.Sequential:
    """The four stages of a residual network of Table 1 alone: (N, in_channels, H, W) -> (N, 512 or
    2048, H/8, W/8).

    ValueError, naming the five depths, for any other.
    """
    config = Config("residual", depth, shortcut="B", images="imagenet")
    check(config)
    return nn.Sequential(*make_stages(config, in_channels))


class PadShortcut(nn.Module):
    """Option A: every second pixel where the map shrinks, and channels of zeros where there are
    more of them.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, padding: str, *, pool: bool = False
    ) -> None:
        super().__init__()
        extra = channels - in_channels
        before = extra // 2 if padding == "both" else 0
        self.stride, self.pool = stride, pool
        self.pad = (0, 0, 0, 0, before, extra - before)  # (W, W, H, H, C before, C after)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride
        x = F.avg_pool2d(x, stride) if self.pool else x[:, :, ::stride, ::stride]
        return F.pad(x, self.pad)  # (N, C_in, H, W) -> (N, C, H/s, W/s)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN; the shortcut `downsample` is added where there is one (a plain
    block has none).
    """

    expansion = 1  # channels that come out, in widths

    def __init__(self, config: Config, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = make_shortcut(config, in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))  # (N, C_in, H, W) -> (N, C, H/s, W/s)
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            y = y + self.downsample(x)
        return F.relu(y)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, which make the channels fewer and then four times as
    many.
    """

    expansion = 4

    def __init__(self, config: Config, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        first, second = (stride, 1) if config.stride == "1x1" else (1, stride)
        self.conv1, self.bn1 = conv(in_channels, width, 1, first), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, second), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = make_shortcut(config, in_channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))  # (N, C, H/s, W/s)
        y = self.bn3(self.conv3(y))  # (N, 4 C, H/s, W/s)
        if self.downsample is not None:
            y = y + self.downsample(x)
        return F.relu(y)


def conv(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the map, but for its stride."""
    return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)


def make_shortcut(config: Config, in_channels: int, channels: int, stride: int) -> nn.Module | None:
    """The shortcut of one block: None for a plain one, the identity where nothing changes (but for
    option C).
    """
    if config.kind == "plain":
        return None
    changes = stride != 1 or in_channels != channels
    if config.shortcut == "C" or (config.shortcut == "B" and changes):
        return nn.Sequential(conv(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))
    if not changes:
        return nn.Identity()
    pool = config.shortcut == "pool"
    return PadShortcut(in_channels, channels, stride, config.padding, pool=pool)


def make_stages(config: Config, in_channels: int) -> list[nn.Sequential]:
    """The stages; the first block of each but the first makes the map half as large."""
    result = []
    for index, (blocks, width) in enumerate(zip(config.blocks, WIDTHS[config.images], strict=True)):
        stage = nn.Sequential()
        for position in range(blocks):
            stage.append(
                config.block(config, in_channels, width, 2 if index and not position else 1)
            )
            in_channels = width * config.block.expansion
        result.append(stage)
    return result


class ResNet(nn.Module):
    """A residual network, or its plain counterpart; `config` says which. ValueError for one that
    does not exist.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        check(config)
        self.config = config
        width, *_, last = WIDTHS[config.images]
        large = config.images == "imagenet"
        self.conv1 = conv(3, width, 7, 2) if large else conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.stages = [f"layer{number}" for number in range(1, len(config.blocks) + 1)]
        for name, stage in zip(self.stages, make_stages(config, width), strict=True):
            self.add_module(name, stage)
        self.fc = nn.Linear(last * config.block.expansion, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(
            F.relu(self.bn1(self.conv1(x)))
        )  # (N, 3, H, W) -> (N, 16, H, W) or (N, 64, H/4, W/4)
        for name in self.stages:
            x = getattr(self, name)(x)  # each but the first halves H and W
        x = x.mean((2, 3))  # (N, C)
        logits: Tensor = self.fc(x)  # (N, classes)
        return logits


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    from models.summary import table

    parser = argparse.ArgumentParser(
        prog="python -m models.resnet",
        description="Output shapes, parameters and multiply-adds of a network.",
    )
    add = parser.add_argument
    add(
        "name",
        help="resnet-DEPTH or plain-DEPTH: 6n + 2 layers for CIFAR-10, 18, 34, 50, 101 or 152 for ImageNet",
    )
    add(
        "--input",
        type=int,
        nargs=4,
        metavar=("N", "C", "H", "W"),
        help="default: 1 3 32 32 or 1 3 224 224",
    )
    add("--shortcut", choices=OPTIONS["shortcut"], help="default: A for CIFAR-10, B for ImageNet")
    add(
        "--stride",
        choices=OPTIONS["stride"],
        default="1x1",
        help="in a bottleneck (default: 1x1, as in the paper)",
    )
    add("--classes", type=int, help="default: 10 or 1000")
    args = parser.parse_args(argv)
    try:
        config = parse_name(args.name)
        for option in ("shortcut", "stride", "classes"):
            if getattr(args, option) is not None:
                config = replace(config, **{option: getattr(args, option)})
        size = SIZES[config.images]
        print(table(config, args.input or (1, 3, size, size)))
    except ValueError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
