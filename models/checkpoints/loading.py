"""Checkpoint files: recognised, made into networks, and written whole with a card.

    from models import load
    checkpoint = load("resnet20-12fca82f.th", images=cifar10.load().images)
    checkpoint.model(checkpoint.preprocessing(images))  # logits (N, 10)

models.checkpoints.state_dicts reads the files, without running code from them. Depth, classes, the
kind of blocks and the shortcuts of options B and C show in the tensors. The kind (residual with
option A and plain have the same tensors), the stride of bottlenecks and the preprocessing come from
the file's card or from the caller, or models.checkpoints.recognition finds them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from models.checkpoints.recognition import (
    FAR,
    FITS,
    Match,
    NothingRecorded,
    label,
    match_network,
    match_preprocessing,
    stem_variance,
)
from models.checkpoints.state_dicts import EXPECTED, at_root, check_tensors, read, rename
from models.data.preprocessing import (
    PADDINGS,
    PER_PIXEL,
    PRESETS,
    Preprocessing,
    mean_image,
    per_pixel,
)
from models.files import replacing, sha256
from models.resnet import BLOCKS, KINDS, SIZES, Config, ResNet, config_of

MEAN, STD = (
    "preprocessing.mean",
    "preprocessing.std",
)  # the tensors of the preprocessing in our own files
WAYS = "--model FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION builds any other network, --source batchnorm needs none"


class UnknownNetwork(ValueError):
    """The tensors are not those of one of our networks."""


@dataclass(frozen=True)
class Checkpoint:
    """A network made from a file.

    model: in evaluation mode; None where it is none of ours and need not be. state: the tensors of
    the file by name. preprocessing: None where it is not known. crop_padding: how training images
    were padded. how: for kind and preprocessing (and the copy of the weights), how they are known,
    in words. warnings: what does not fit, in words. card: what the file says of itself. digest:
    SHA-256 of the file.
    """

    model: nn.Module | None
    state: dict[str, Tensor]
    preprocessing: Preprocessing | None
    crop_padding: str | None
    how: dict[str, str]
    warnings: list[str]
    card: dict[str, Any]
    path: Path
    digest: str

    @property
    def config(self) -> Config | None:
        """Which of our networks it is, if it is one."""
        return None if self.model is None else config_of(self.model)


def load(
    path: str | Path,
    *,
    kind: str | None = None,
    normalize: str | None = None,
    images: np.ndarray | None = None,
    model: nn.Module | None = None,
    ema: bool = False,
    need_model: bool = True,
) -> Checkpoint:
    """Make a network of a checkpoint file.

    kind: `residual` or `plain`, and normalize: a name of `PRESETS` or `per-pixel`, win over the
    file's card. With images (N, 32, 32, 3) or (N, 224, 224, 3), uint8, what neither says is
    recognised, and all is checked against BN's statistics; without, a network that may be either
    kind is taken for residual, and one whose bottlenecks may have their stride on either
    convolution for torchvision's, as also where images do not tell clearly. model: a network that
    takes the tensors, where it is none of ours. ema: take the average of the weights that lies
    beside them. need_model: raise where the network is unknown. Raises FileNotFoundError or
    ValueError, with the path, for a file that is not there, not a checkpoint, would run code, or
    holds another network.

    >>> from models import zoo
    >>> checkpoint = load(zoo.find("resnet-20"))
    >>> checkpoint.config.name, checkpoint.preprocessing.name, checkpoint.how["kind"]
    ('resnet-20', 'per-pixel', 'card')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {EXPECTED}")
    tensors, card, copy = read(path, ema)
    try:
        check_card(card)
        state = {name: tensor for name, tensor in tensors.items() if name not in (MEAN, STD)}
        models = (
            [adopt(model, state)]
            if model
            else find_networks(rename(at_root(state)), card, kind, need_model)
        )
        if not models:
            check_tensors(state)
        normalisations = known_preprocessing(normalize, tensors, card, images)
    except UnknownNetwork as error:
        raise ValueError(f"{path}: {error}; {WAYS}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    how = {"kind": known_kind(models, card, kind, model), "preprocessing": "unknown"}
    how |= {"weights": copy} if copy else {}
    state = at_root(state) if models and not model else state
    if normalisations:
        how["preprocessing"] = "given" if normalize else "card"
    checkpoint = Checkpoint(
        models[0] if models else None,
        state,
        next(iter(normalisations), None),
        card.get("crop_padding"),
        how,
        [],
        card,
        path,
        sha256(path),
    )
    if images is None or not models:
        return checkpoint
    try:
        return recognise(checkpoint, models, normalisations, images)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def recognise(
    checkpoint: Checkpoint,
    models: list[nn.Module],
    normalisations: list[Preprocessing],
    images: np.ndarray,
) -> Checkpoint:
    """The checkpoint with what of the candidates fits the images (N, 32, 32, 3), and how well."""
    if images.shape[1:3] != (SIZES["cifar"],) * 2:
        return recognise_large(checkpoint, models, normalisations, images)
    how, padding = dict(checkpoint.how), checkpoint.crop_padding
    warnings: list[str] = []
    candidates = normalisations or [*PRESETS.values(), per_pixel(mean_image(images))]
    try:
        inputs = match_preprocessing(
            models[0], images, candidates, (padding,) if padding else PADDINGS
        )
    except NothingRecorded:
        if not normalisations:
            raise
        return checkpoint
    preprocessing, padding = inputs.best
    matches: list[tuple[str, Match[Any]]] = [("preprocessing", inputs)]
    if how["kind"] != "card":
        matches.insert(0, ("kind", match_network(models, images, preprocessing, padding)))
    for what, match in matches:
        known = how[what] if not how[what].startswith(("assumed", "unknown")) else "recognised"
        how[what] = f"{known}, {match.describe()}"
        if not match.fits:
            warnings.append(f"no {what} fits (with a misfit below {FITS}): {match.describe()}")
    if warnings and inputs.fits and matches[0][1].by:
        warnings.append(
            "BN's statistics are not those of these images: few images may make most of the variance"
        )
    elif warnings:
        warnings.append(
            "the images, the preprocessing or the network are not those of the training"
        )
    model = next((match.best for what, match in matches if what == "kind"), models[0])
    return replace(
        checkpoint,
        model=model,
        preprocessing=preprocessing,
        crop_padding=padding,
        how=how,
        warnings=warnings,
    )


def recognise_large(
    checkpoint: Checkpoint,
    models: list[nn.Module],
    normalisations: list[Preprocessing],
    images: np.ndarray,
) -> Checkpoint:
    """The checkpoint with that of several networks which fits the images (N, H, W, 3) clearly
    better than the others.

    ImageNet's training images are crops of random sizes, and there are few images here: neither the
    preprocessing nor the size of a misfit tells anything, and a small difference of misfits does
    not either.
    """
    how, model, warnings = dict(checkpoint.how), models[0], list[str]()
    preprocessing = normalisations[0] if normalisations else PRESETS["imagenet"]
    if not normalisations:
        how["preprocessing"] = "assumed"
    if len(models) > 1:
        match = match_network(models, images, preprocessing, "none")
        if match.clear:
            model, how["kind"] = match.best, f"recognised, {match.describe()}"
        else:
            how["kind"] = (
                f"{how['kind'].partition(':')[0]}: neither the tensors nor these images tell"
            )
            warnings.append(
                f"BN's statistics do not tell which network it is: {label(match.best)}, {match.describe()}; "
                f"taken for {label(model)}; --model builds the other"
            )
    times = stem_variance(model, images, preprocessing)
    if not 1 / FAR < times < FAR:
        warnings.append(
            f"the first BN gets {times:.2g} times the variance that it recorded: in training images were others, or "
            "normalised otherwise (--normalize)"
        )
    return replace(checkpoint, model=model, preprocessing=preprocessing, how=how, warnings=warnings)


def known_kind(
    models: list[nn.Module], card: dict[str, Any], kind: str | None, model: nn.Module | None
) -> str:
    """How it is known which network the first of the candidates is, in words."""
    if model is not None:
        return "built by --model"
    if not models:
        return "unknown"
    config: Any = models[0].config
    if len(models) > 1 and config.images == "imagenet" and config.shortcut != "A":
        return f"assumed v1.5, stride on the {config.stride}: the tensors do not say; --data tells"
    if kind or "kind" in card:
        return "given" if kind else "card"
    return "shortcuts" if len(models) == 1 else "assumed"


def save(
    path: str | Path,
    model: ResNet,
    preprocessing: Preprocessing,
    *,
    crop_padding: str,
    training: dict[str, Any],
) -> None:
    """Write a network with its preprocessing and its card as .safetensors, whole or not at all.

    crop_padding: how training images were padded, `black`, `zero` or `none`. training: what else
    the card shall say (recipe, seed, test error, ...), as JSON can hold it.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    tensors |= {MEAN: preprocessing.mean.contiguous(), STD: preprocessing.std.contiguous()}
    card = {"network": model.config.name, **asdict(model.config)}
    card |= {
        "preprocessing": preprocessing.name,
        "crop_padding": crop_padding,
        "training": training,
    }
    with replacing(path) as temporary:
        # not save_file, which has temporary files of its own: nobody would remove those of a killed
        # process
        temporary.write_bytes(serialise(tensors, metadata={"card": json.dumps(card)}))


def find_networks(
    state: dict[str, Tensor], card: dict[str, Any], kind: str | None, needed: bool
) -> list[nn.Module]:
    """The networks that a state dict can be, the likeliest first; none where it is none of ours and
    need not be.
    """
    try:
        return [network(config, state) for config in configs(state, card, kind)]
    except UnknownNetwork:
        if needed:
            raise
        return []


def configs(state: dict[str, Tensor], card: dict[str, Any], kind: str | None) -> list[Config]:
    """The configs that a state dict can be of, the likeliest first. UnknownNetwork where it is none
    of ours.
    """
    images, depth = layout(state)
    projections = [name.split(".")[0] for name in state if ".downsample." in name]
    kind = kind or card.get("kind")
    if projections and kind == "plain":
        raise ValueError("it has shortcuts with weights (downsample), so it is residual, not plain")
    if projections:
        identity = (
            f"layer1.{BLOCKS[depth][0] - 1 if images == 'imagenet' else 0}.downsample.0.weight"
        )
        kinds, shortcuts = ["residual"], ["C" if identity in state else "B"]
    else:
        kinds, shortcuts = [kind] if kind else list(KINDS.values()), ["A"]
    bottleneck = "layer1.0.conv3.weight" in state
    strides = [card["stride"]] if "stride" in card else ["3x3", "1x1"] if bottleneck else ["1x1"]
    paddings = [card["padding"]] if "padding" in card else ["both", "after"]
    kinds = [k for k in kinds if not (k == "plain" and bottleneck)]
    return [
        Config(k, depth, shortcut, padding, len(state["fc.weight"]), images, stride)
        for k, shortcut, stride, padding in product(kinds, shortcuts, strides, paddings)
        if padding == paddings[0] or (k == "residual" and shortcut == "A")
    ]


def layout(state: dict[str, Tensor]) -> tuple[str, int]:
    """The family and the depth of the network whose tensors these are. UnknownNetwork where it is
    none of ours.
    """
    counts = [
        len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")})
        for i in (1, 2, 3, 4)
    ]
    blocks = tuple(count for count in counts if count)
    bottleneck = "layer1.0.conv3.weight" in state
    stem = state["conv1.weight"].shape if "conv1.weight" in state else None
    candidates = [("imagenet", depth) for depth in BLOCKS] + [("cifar", 6 * counts[0] + 2)] * (
        counts[0] > 0
    )
    for images, depth in candidates:
        config = Config("residual", depth, images=images)
        kernel = (64, 3, 7, 7) if images == "imagenet" else (16, 3, 3, 3)
        if (stem, blocks, bottleneck) == (kernel, config.blocks, config.block.expansion > 1):
            if "fc.weight" not in state:
                raise UnknownNetwork(
                    f"it has the layers of {config.name}, but no classifier called fc or linear"
                )
            return images, depth
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:4])
    found = f"; blocks in its layers: {', '.join(map(str, blocks))}" if blocks else ""
    raise UnknownNetwork(
        "none of the paper's networks (CIFAR-10's: conv1 of 16 channels, layer1 to layer3 with as many blocks each; "
        "ImageNet's: conv1 of 64 channels, layer1 to layer4 as in Table 1); "
        f"it has {len(state)} tensors: {shapes}, ...{found}"
    )


def network(config: Config, state: dict[str, Tensor]) -> ResNet:
    """The network of a config with the tensors of a state dict, in evaluation mode. UnknownNetwork
    unless all match.
    """
    with torch.device("meta"):
        model = ResNet(config)
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):  # old files do not have it
            buffer.zero_()
    if faults := mismatches(model, state):
        raise UnknownNetwork(f"the tensors are not those of {config.name}: {faults}")
    model.load_state_dict(state, strict=False)
    return model.eval()


def adopt(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The user's network with the tensors of a state dict, in evaluation mode. ValueError unless
    all match.
    """
    candidates = [state]
    while prefix := common_prefix(candidates[-1]):
        candidates.append(
            {name.removeprefix(prefix): tensor for name, tensor in candidates[-1].items()}
        )
    candidates.append(at_root(state))
    fitting = [candidate for candidate in candidates if not mismatches(model, candidate)]
    if not fitting:
        faults = mismatches(model, candidates[-1])
        raise ValueError(f"the tensors are not those of the network that --model builds: {faults}")
    check_tensors(fitting[0])
    model.load_state_dict(fitting[0], strict=False)
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.cpu()  # where images are held against it
    return model.eval()


def common_prefix(state: dict[str, Tensor]) -> str:
    """The first part of all names, with its dot, or nothing where they do not begin alike."""
    firsts = {name.partition(".")[0] + name.partition(".")[1] for name in state}
    return firsts.pop() if len(firsts) == 1 and "." in min(firsts) else ""


def mismatches(model: nn.Module, state: dict[str, Tensor]) -> str:
    """What keeps a network from taking the tensors of a state dict, in words; nothing where they
    match.
    """
    own = {
        name: t
        for name, t in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    state = {
        name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is too many" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
    return ", ".join(faults[:3]) + more


def known_preprocessing(
    name: str | None, tensors: dict[str, Tensor], card: dict[str, Any], images: np.ndarray | None
) -> list[Preprocessing]:
    """The preprocessing that was named or that the file holds, or an empty list.

    The name `per-pixel` means the file's own mean image, or else that of the images given.
    """
    stored = None
    if MEAN in tensors and STD in tensors:
        stored = Preprocessing(card.get("preprocessing", PER_PIXEL), tensors[MEAN], tensors[STD])
    if name is None:
        return [stored] if stored else []
    if name in PRESETS:
        return [PRESETS[name]]
    if name != PER_PIXEL:
        raise ValueError(
            f"unknown preprocessing {name!r}: one of {', '.join([*PRESETS, PER_PIXEL])}"
        )
    if stored is not None and stored.name == PER_PIXEL:
        return [stored]
    if images is not None and images.shape[1] != SIZES["cifar"]:
        raise ValueError(
            f"{PER_PIXEL} preprocessing is for 32x32 images: --normalize imagenet, or another preset"
        )
    return [per_pixel(mean_image(images))] if images is not None else []


def check_card(card: dict[str, Any]) -> None:
    """ValueError where a card's preprocessing is none that we know."""
    for key, known in (("preprocessing", (*PRESETS, PER_PIXEL)), ("crop_padding", PADDINGS)):
        if card.get(key, known[0]) not in known:
            raise ValueError(
                f"its card says {key} {card[key]!r}, which is none of {', '.join(known)}"
            )
