"""Residual networks and their plain counterparts, from one builder.

    >>> from models.resnet import build
    >>> network = build("resnet-20")
    >>> sum(p.numel() for p in network.parameters() if p.requires_grad)
    269722

The CIFAR-10 networks of He et al. (CVPR 2016), section 4.2: a 3x3 convolution, three stages of n blocks of two 3x3
convolutions with 16, 32 and 64 channels on maps of 32, 16 and 8 pixels, global average pooling and a classifier:
6n + 2 layers with weights. A plain network is the same network without the shortcuts. The keys of the state dict are
torchvision's (conv1, bn1, layer1.0.conv1, downsample.0, fc).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

KINDS = {"resnet": "residual", "plain": "plain"}  # the first word of a name -> the kind of the network
SHORTCUTS = ("A", "B", "C")
PADDINGS = ("both", "after")
WIDTHS = (16, 32, 64)  # channels of the three stages
TABLE_1_DEPTHS = (18, 34, 50, 101, 152)  # resnet-50 means the ImageNet network; the CIFAR one is cifar-resnet-50


@dataclass(frozen=True)
class Config:
    """What a CIFAR-10 network is: everything that `build` needs to make it again.

    kind: `residual` or `plain`. depth: layers with weights, 6n + 2. shortcut: `A` (no parameters: strided identity
    and channels of zeros), `B` (1x1 convolution and BN where the shape changes), `C` (on every shortcut). padding:
    where option A puts the channels of zeros, half before and half after (`both`) or all `after`. classes: outputs.
    Shortcut and padding have no meaning for a plain network.
    """

    kind: str
    depth: int
    shortcut: str = "A"
    padding: str = "both"
    classes: int = 10

    @property
    def name(self) -> str:
        """The label of the network, such as `resnet-56`."""
        return network_name(self.kind, self.depth)


def network_name(kind: str, depth: int) -> str:
    """`resnet-56` or `plain-20` for a kind and a depth; `cifar-resnet-50` where the short name is one of Table 1."""
    word = next(word for word, meaning in KINDS.items() if meaning == kind)
    short = f"{word}-{depth}"
    return f"cifar-{short}" if depth in TABLE_1_DEPTHS else short


def parse_name(name: str) -> tuple[str, int]:
    """The kind and the depth that a network's name means: `("residual", 56)` for `resnet-56` and `cifar-resnet-56`.

    Raises ValueError, naming what is allowed, for any other name.
    """
    match = re.fullmatch(r"(cifar-)?(resnet|plain)-([0-9]+)", name)
    if match is None:
        raise ValueError(
            f"unknown network {name!r}: the names are resnet-DEPTH and plain-DEPTH with a depth of 6n + 2, "
            "such as resnet-20, resnet-56, plain-20 (cifar-resnet-20 is the same)"
        )
    long, word, depth = match[1], match[2], int(match[3])
    if long is None and depth in TABLE_1_DEPTHS:
        hint = f"; the CIFAR-10 network of {depth} layers is cifar-{name}" if depth % 6 == 2 else ""
        raise ValueError(f"{name} names an ImageNet network (Table 1 of the paper), which is not built here yet{hint}")
    check_depth(depth)
    return KINDS[word], depth


def check_depth(depth: int) -> None:
    """ValueError, naming the nearest valid depths, unless the depth is 6n + 2 with n of 1 or more."""
    if depth < 8 or depth % 6 != 2:
        below = max(8, depth - (depth - 2) % 6)
        raise ValueError(
            f"no CIFAR-10 network has {depth} layers: a depth is 6n + 2; the nearest are {below} and {below + 6}"
        )


def build(name: str, *, shortcut: str = "A", padding: str = "both", classes: int = 10) -> CifarNet:
    """Make the named network, freshly initialised (He et al., ICCV 2015) from torch's global random state.

    name: `resnet-DEPTH` or `plain-DEPTH`, depth 6n + 2 (20, 32, 44, 56, 110, 1202, ...), or the long form
    `cifar-resnet-DEPTH`. shortcut, padding, classes: see `Config`. Returns a network that maps images (N, 3, 32, 32)
    to logits (N, classes). Raises ValueError for a name or an option that does not exist.
    """
    kind, depth = parse_name(name)
    return CifarNet(Config(kind, depth, shortcut, padding, classes))


class PadShortcut(nn.Module):
    """Option A: every second pixel where the map shrinks, and channels of zeros where there are more of them."""

    def __init__(self, in_channels: int, channels: int, stride: int, padding: str) -> None:
        super().__init__()
        extra = channels - in_channels
        before = extra // 2 if padding == "both" else 0
        self.stride = stride
        self.pad = (0, 0, 0, 0, before, extra - before)  # (W, W, H, H, C before, C after)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)  # (N, C_in, H, W) -> (N, C, H/s, W/s)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN; the shortcut `downsample` is added where there is one (a plain block has none)."""

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))  # (N, C_in, H, W) -> (N, C, H/s, W/s)
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            y = y + self.downsample(x)
        return F.relu(y)


class CifarNet(nn.Module):
    """A network for images of 32x32 pixels; `config` says which. Raises ValueError for a config that does not exist."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        check(config)
        self.config = config
        blocks = (config.depth - 2) // 6  # per stage
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = make_stage(config, blocks, WIDTHS[0], WIDTHS[0], stride=1)
        self.layer2 = make_stage(config, blocks, WIDTHS[0], WIDTHS[1], stride=2)
        self.layer3 = make_stage(config, blocks, WIDTHS[1], WIDTHS[2], stride=2)
        self.fc = nn.Linear(WIDTHS[2], config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 3, 32, 32) -> (N, 16, 32, 32)
        x = self.layer1(x)
        x = self.layer2(x)  # (N, 32, 16, 16)
        x = self.layer3(x)  # (N, 64, 8, 8)
        x = x.mean((2, 3))  # (N, 64)
        logits: Tensor = self.fc(x)  # (N, classes)
        return logits


def make_stage(config: Config, blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """The blocks of one stage; only the first changes the shape."""
    stage = nn.Sequential()
    for index in range(blocks):
        if index:
            in_channels, stride = channels, 1
        stage.append(BasicBlock(in_channels, channels, stride, make_shortcut(config, in_channels, channels, stride)))
    return stage


def make_shortcut(config: Config, in_channels: int, channels: int, stride: int) -> nn.Module | None:
    """The shortcut of one block: None for a plain one, the identity where nothing changes (but for option C)."""
    if config.kind == "plain":
        return None
    if config.shortcut == "C" or (config.shortcut == "B" and in_channels != channels):
        return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
    if in_channels != channels:
        return PadShortcut(in_channels, channels, stride, config.padding)
    return nn.Identity()


def check(config: Config) -> None:
    """ValueError if there is no such network."""
    allowed = {"kind": tuple(KINDS.values()), "shortcut": SHORTCUTS, "padding": PADDINGS}
    for option, values in allowed.items():
        if getattr(config, option) not in values:
            raise ValueError(f"unknown {option} {getattr(config, option)!r}: one of {', '.join(values)}")
    if config.classes < 1:
        raise ValueError(f"classes must be 1 or more, not {config.classes}")
    check_depth(config.depth)
