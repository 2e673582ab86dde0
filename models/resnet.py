"""Residual networks and their plain counterparts, from one builder.

    >>> from models.resnet import build
    >>> sum(p.numel() for p in build("resnet-20").parameters())  # CIFAR-10
    269722
    >>> sum(p.numel() for p in build("resnet-18").parameters())  # ImageNet, Table 1
    11689512

CIFAR-10, section 4.2: a 3x3 convolution, three stages of n blocks of two 3x3 convolutions, with 16,
32 and 64 channels on maps of 32, 16 and 8 pixels, global average pooling and a classifier; 6n + 2
layers with weights. ImageNet, Table 1: a 7x7 convolution and max pooling, four stages of basic or
bottleneck blocks; 18 to 152 layers. A plain network is the same network without the shortcuts.
State dicts have torchvision's keys (conv1, bn1, layer1.0.conv1, downsample.0, fc).

    python -m models.resnet resnet-34 --input 5 3 224 224

prints output shapes, parameters and multiply-adds; see `models.summary`.

Source: He et al., CVPR 2016.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

KINDS = {"resnet": "residual", "plain": "plain"}  # the word in a name: the kind of the network
WIDTHS = {"cifar": (16, 32, 64), "imagenet": (64, 128, 256, 512)}  # channels of 3x3 layers by stage
SIZES = {"cifar": 32, "imagenet": 224}  # pixels on a side of the images
BLOCKS = {  # in each stage, by depth; Table 1
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
TABLE_1_DEPTHS = tuple(BLOCKS)  # resnet-50 is the ImageNet network; CIFAR-10's is cifar-resnet-50
BOTTLENECK_DEPTH = 50  # from this depth on, ImageNet networks have bottleneck blocks
MOST_CLASSES = 10**9  # torch's sizes overflow at about 10^15
OPTIONS = {
    "kind": tuple(KINDS.values()),
    "shortcut": ("A", "B", "C", "pool"),
    "padding": ("both", "after"),
    "images": tuple(SIZES),
    "stride": ("1x1", "3x3"),
}


@dataclass(frozen=True)
class Config:
    """Everything that defines a network.

    kind: `residual` or `plain`.
    depth: layers with weights; 6n + 2, or one of Table 1.
    shortcut: `A` (strided identity, padded with channels of zeros), `B` (1x1 convolution and BN if
        the shape changes), `C` (the same on every shortcut) or `pool` (`A` with average pooling
        instead of the stride). Plain networks have none.
    padding: where option A adds its channels: half before and half after (`both`), or all `after`.
    classes: number of outputs.
    images: `cifar` (32x32) or `imagenet` (224x224).
    stride: the convolution of a bottleneck that downsamples: the first `1x1` (the paper) or the
        `3x3` (torchvision, "v1.5").
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
        """The number of blocks in each stage."""
        return BLOCKS[self.depth] if self.images == "imagenet" else ((self.depth - 2) // 6,) * 3

    @property
    def block(self) -> type[BasicBlock | Bottleneck]:
        """The class of the blocks."""
        deep = self.images == "imagenet" and self.depth >= BOTTLENECK_DEPTH
        return Bottleneck if deep else BasicBlock


def network_name(kind: str, depth: int, images: str = "cifar") -> str:
    """Return the label for a kind and a depth: `resnet-56`, `plain-20` or `cifar-resnet-50`."""
    word = next(word for word, meaning in KINDS.items() if meaning == kind)
    return f"{'cifar-' if images == 'cifar' and depth in TABLE_1_DEPTHS else ''}{word}-{depth}"


def parse_name(name: str) -> Config:
    """Return the network with a name.

    `resnet-50` is that of Table 1, with option B; `cifar-resnet-50` is a network for CIFAR-10.
    Raises ValueError, listing the names, if there is no such network.
    """
    match = re.fullmatch(r"(cifar-)?(resnet|plain)-([0-9]{1,6})", name)
    if match is None:
        raise ValueError(
            f"unknown network {name!r}: the names are resnet-DEPTH and plain-DEPTH; for CIFAR-10 "
            "the depth is 6n + 2, as in resnet-20 or plain-56 (or cifar-resnet-20), for ImageNet "
            f"it is one of {', '.join(map(str, TABLE_1_DEPTHS))}"
        )
    kind, depth = KINDS[match[2]], int(match[3])
    config = Config(kind, depth)
    if match[1] is None and depth in TABLE_1_DEPTHS:
        config = Config(kind, depth, shortcut="B", classes=1000, images="imagenet")
    check(config)
    return config


def check_depth(depth: int) -> None:
    """Raise ValueError, naming the nearest valid depths, unless a depth is 6n + 2 with n >= 1."""
    if depth < 8 or depth % 6 != 2:
        below = max(8, depth - (depth - 2) % 6)
        raise ValueError(
            f"no CIFAR-10 network has {depth} layers: a depth is 6n + 2; "
            f"the nearest are {below} and {below + 6}"
        )


def check(config: Config) -> None:
    """Raise ValueError if there is no such network."""
    depth, depths = config.depth, ", ".join(map(str, TABLE_1_DEPTHS))
    for option, values in OPTIONS.items():
        value = getattr(config, option)
        if value not in values:
            raise ValueError(f"unknown {option} {value!r}: one of {', '.join(values)}")
    if not 1 <= config.classes <= MOST_CLASSES:
        raise ValueError(f"classes must be 1 to {MOST_CLASSES:,}, not {config.classes}")
    if config.images == "cifar":
        check_depth(depth)
    elif depth not in TABLE_1_DEPTHS:
        raise ValueError(f"Table 1 has no network of {depth} layers: {depths}")
    elif config.kind == "plain" and config.block is Bottleneck:
        plain = "plain-18, plain-34"
        raise ValueError(f"the paper has no plain network of {depth} layers for ImageNet: {plain}")


def config_of(network: nn.Module) -> Config | None:
    """Return the config of one of our networks, or None for any other network."""
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
    """Return the named network, initialised from torch's global random state (ICCV 2015).

    name: `resnet-DEPTH` or `plain-DEPTH`. Depths 18, 34, 50, 101 and 152 (plain: 18 and 34) are
        ImageNet's; 6n + 2 (20, 32, 44, 56, 110, 1202, ...) are CIFAR-10's, or use
        `cifar-resnet-DEPTH`.
    shortcut, padding, classes, stride: see `Config`. The defaults are option A and 10 classes for
        CIFAR-10, option B and 1,000 classes for ImageNet.

    The network maps images (N, 3, 32, 32) or (N, 3, 224, 224) to logits (N, classes). Raises
    ValueError if the name or an option does not exist.
    """
    options = {"shortcut": shortcut, "padding": padding, "classes": classes, "stride": stride}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    return ResNet(replace(parse_name(name), **given))


def stages(depth: int, in_channels: int) -> nn.Sequential:
    """Return the four stages alone of a residual network of Table 1.

    They map (N, in_channels, H, W) to (N, 512 or 2048, H/8, W/8). Raises ValueError, naming the
    five depths, for any other depth.
    """
    config = Config("residual", depth, shortcut="B", images="imagenet")
    check(config)
    return nn.Sequential(*make_stages(config, in_channels))


class PadShortcut(nn.Module):
    """Option A: take every second pixel if the map shrinks, and pad with channels of zeros.

    pool: average instead of taking every second pixel.
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
        stride = self.stride  # (N, C_in, H, W) -> (N, C_in, H/s, W/s):
        x = F.avg_pool2d(x, stride) if self.pool else x[:, :, ::stride, ::stride]
        return F.pad(x, self.pad)  # (N, C, H/s, W/s)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN, and the shortcut `downsample`, which a plain block lacks."""

    expansion = 1  # output channels, in widths

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
    """A 3x3 convolution between two of 1x1, which reduce and then expand the channels."""

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
    """Return a convolution that keeps the size of the map, apart from its stride."""
    return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)


def make_shortcut(config: Config, in_channels: int, channels: int, stride: int) -> nn.Module | None:
    """Return the shortcut of one block, None for a plain block."""
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
    """Return the stages. The first block of each, except in the first stage, halves the map."""
    result = []
    for index, (blocks, width) in enumerate(zip(config.blocks, WIDTHS[config.images], strict=True)):
        stage = nn.Sequential()
        for position in range(blocks):
            stride = 2 if index and not position else 1
            stage.append(config.block(config, in_channels, width, stride))
            in_channels = width * config.block.expansion
        result.append(stage)
    return result


class ResNet(nn.Module):
    """A residual network or its plain counterpart. Raises ValueError if it does not exist."""

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
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 3, H, W) -> (N, 16, H, W) or (N, 64, H/2, W/2)
        x = self.maxpool(x)  # CIFAR-10: unchanged; ImageNet: (N, 64, H/4, W/4)
        for name in self.stages:
            x = getattr(self, name)(x)  # all but the first halve H and W
        x = x.mean((2, 3))  # (N, C)
        logits: Tensor = self.fc(x)  # (N, classes)
        return logits


if __name__ == "__main__":
    import runpy

    runpy.run_module("models.summary", run_name="__main__")
