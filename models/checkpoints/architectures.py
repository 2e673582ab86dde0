"""Find out which of our networks a state dict belongs to, from names or from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from models.batchnorm import Pairs
from models.checkpoints.state_dicts import check_tensors
from models.resnet import BLOCKS, KINDS, Config, ResNet

COUNTER = "num_batches_tracked"
WAYS = (
    "--model FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION builds any other network, "
    "--source batchnorm needs none"
)


class UnknownNetwork(ValueError):
    """The tensors are not those of one of our networks."""


class OtherNetwork(UnknownNetwork):
    """The shapes are not those of one of our networks, or only those of its 3x3 convolutions."""


def candidates_for(state: dict[str, Tensor], card: dict[str, Any]) -> list[ResNet]:
    """Return the networks that a state dict can be, the likeliest first.

    Names are tried first, then shapes. A card narrows stride and padding, not the kind. Raises
    UnknownNetwork if there is none, ValueError if a tensor is impossible.
    """
    try:
        return [make_network(config, state) for config in configs(state, card)]
    except UnknownNetwork as error:
        hint = ""
        try:
            renamed = rename_by_shapes(state)
            return [make_network(config, renamed) for config in configs(renamed, card)]
        except OtherNetwork as other:
            hint = str(other)
        except UnknownNetwork:
            pass
        raise UnknownNetwork(f"{error}{hint}; {WAYS}") from error


def configs(state: Mapping[str, Tensor], card: dict[str, Any]) -> list[Config]:
    """Return the configs that tensors with our names can be of, the likeliest first."""
    images, depth = layout(state)
    bottleneck = "layer1.0.conv3.weight" in state
    shortcuts, kinds, paddings = ["A"], [*KINDS.values()], ["both", "after"]
    if any(".downsample." in name for name in state):
        identity = (
            BLOCKS[depth][0] - 1 if images == "imagenet" else 0
        )  # a block that changes nothing
        named = f"layer1.{identity}.downsample.0.weight"
        shortcuts, kinds, paddings = ["C" if named in state else "B"], ["residual"], ["both"]
    elif images == "cifar":
        shortcuts.append("pool")
    strides = ["3x3", "1x1"] if bottleneck else ["1x1"]
    strides = [card["stride"]] if bottleneck and "stride" in card else strides
    return [
        Config(kind, depth, shortcut, padding, len(state["fc.weight"]), images, stride)
        for shortcut, kind, stride, padding in product(shortcuts, kinds, strides, paddings)
        if kind == "residual" or (shortcut, padding, bottleneck) == ("A", "both", False)
    ]


def layout(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return the family and the depth of the network whose tensors these are."""
    blocks: dict[str, set[str]] = {}
    for name in state:
        stage, _, rest = name.partition(".")
        if stage in ("layer1", "layer2", "layer3", "layer4"):
            blocks.setdefault(stage, set()).add(rest.partition(".")[0])
    counts = tuple(len(blocks[stage]) for stage in sorted(blocks))
    bottleneck = "layer1.0.conv3.weight" in state
    stem = state["conv1.weight"].shape if "conv1.weight" in state else None
    known = [("imagenet", depth) for depth in BLOCKS]
    for images, depth in [*known, ("cifar", 6 * counts[0] + 2)] if counts else []:
        config = Config("residual", depth, images=images)
        kernel = (64, 3, 7, 7) if images == "imagenet" else (16, 3, 3, 3)
        if (stem, counts, bottleneck) == (kernel, config.blocks, config.block.expansion > 1):
            if getattr(state.get("fc.weight"), "ndim", 0) != 2:
                raise UnknownNetwork(
                    f"it has the layers of {config.name}, but no classifier called fc or linear"
                )
            return images, depth
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in list(state.items())[:4])
    found = f"; blocks in its layers: {', '.join(map(str, counts))}" if counts else ""
    raise UnknownNetwork(
        "none of the paper's networks (CIFAR-10's: conv1 of 16 channels, layer1 to layer3 with as "
        "many blocks each; ImageNet's: conv1 of 64 channels, layer1 to layer4 as in Table 1); "
        f"it has {len(state)} tensors: {shapes}, ...{found}"
    )


def make_network(config: Config, state: Mapping[str, Tensor]) -> ResNet:
    """Return the network of a config with the tensors of a state dict, in evaluation mode.

    Raises UnknownNetwork unless all match, ValueError if a tensor is impossible.
    """
    with torch.device("meta"):
        model = ResNet(config)
    if faults := mismatches(model, state):
        raise UnknownNetwork(f"the tensors are not those of {config.name}: {faults}")
    check_tensors(state)
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if name.endswith(COUNTER):  # old files do not have it
            buffer.zero_()
    model.load_state_dict(state, strict=False)
    return model.eval()


def mismatches(model: torch.nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return what keeps a network from taking the tensors of a state dict, or nothing."""
    own = {name: x.shape for name, x in model.state_dict().items() if not name.endswith(COUNTER)}
    theirs = {name: x.shape for name, x in state.items() if not name.endswith(COUNTER)}
    faults = [f"{name} is missing" for name in own if name not in theirs]
    faults += [f"{name} is unexpected" for name in theirs if name not in own]
    faults += [
        f"{name} has shape {tuple(theirs[name])} instead of {tuple(shape)}"
        for name, shape in own.items()
        if name in theirs and theirs[name] != shape
    ]
    more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
    return ", ".join(faults[:3]) + more


def rename_by_shapes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under our names if its tensors have the shapes of one of our networks.

    Convolutions are told by kernel and shape, in their order; 1x1 convolutions are shortcuts, so
    that bottlenecks are not known. A convolution's bias is taken off BN's running mean. Raises
    OtherNetwork, with what is alike in words if there is any, for another network.
    """
    pairs = Pairs(state)
    convs = sorted(pairs.convs, key=lambda name: pairs.convs[name].shape[1] != 3)  # the stem first
    wide = [name for name in convs if pairs.convs[name].shape[-1] > 1]
    narrow = [name for name in convs if pairs.convs[name].shape[-1] == 1]
    linear = [name for name, x in state.items() if x.ndim == 2]
    for config in configs_by_shape(len(wide), len(narrow)):
        with torch.device("meta"):
            model = ResNet(config)
        ours = dict(model.named_modules())
        names = [name for name in ours if isinstance(ours[name], torch.nn.Conv2d)]
        names = [n for n in names if "down" not in n] + [n for n in names if "down" in n]
        theirs = wide + narrow
        shapes = [model.get_parameter(f"{name}.weight").shape for name in names]
        if [pairs.convs[name].shape for name in theirs[: len(wide)]] != shapes[: len(wide)]:
            continue
        hint = (
            f"; its {len(wide)} 3\N{MULTIPLICATION SIGN}3 convolutions have the shapes of {config.name}: "
            f"{config.name}=FILE as its label draws the paper's curve beside it"
        )
        same = [pairs.convs[name].shape for name in theirs] == shapes
        if not same or len(linear) != 1 or any(name not in pairs.certain for name in theirs):
            raise OtherNetwork(hint)
        renamed: dict[str, Tensor] = {}
        used = {linear[0]}
        for name, our in zip(theirs, names, strict=True):
            norm = our.replace("conv", "bn") if "conv" in our else f"{our[:-1]}1"
            renamed |= take_pair(state, pairs, name, our, norm)
            used |= {f"{name}.weight", f"{name}.bias"}
            used |= {f"{pairs.certain[name]}.{leaf}" for leaf in pairs.leaves[pairs.certain[name]]}
        renamed["fc.weight"] = state[linear[0]]
        bias = f"{linear[0].rpartition('.')[0]}.bias"
        renamed |= {"fc.bias": state[bias]} if bias in state else {}
        if not state.keys() <= used | {bias}:
            raise OtherNetwork(hint)
        return renamed
    raise OtherNetwork("")


def configs_by_shape(wide: int, narrow: int) -> list[Config]:
    """Return the networks with so many convolutions that are wide, and so many of 1x1."""
    found = [Config("residual", wide + 1)] if wide % 6 == 1 and wide > 1 else []
    found += [
        Config("residual", depth, images="imagenet") for depth in (18, 34) if wide == depth - 1
    ]
    if not narrow:
        return found
    return [
        Config(c.kind, c.depth, shortcut, images=c.images)
        for c in found
        for shortcut, count in (("B", len(c.blocks) - 1), ("C", sum(c.blocks)))
        if count == narrow or count == narrow + 1
    ] or found


def take_pair(
    state: Mapping[str, Tensor], pairs: Pairs, conv: str, our: str, our_norm: str
) -> dict[str, Tensor]:
    """Return the tensors of a convolution and its BN by our names, without the bias."""
    norm = pairs.certain[conv]
    taken = {f"{our}.weight": pairs.convs[conv]}
    taken |= {f"{our_norm}.{leaf}": state[f"{norm}.{leaf}"] for leaf in pairs.leaves[norm]}
    if f"{conv}.bias" in state:
        mean = f"{our_norm}.running_mean"
        taken[mean] = taken[mean] - state[f"{conv}.bias"]
    return taken
