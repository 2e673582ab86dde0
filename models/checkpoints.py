"""Checkpoint files: read without running code from them, recognised, and written whole with a card.

    from models import load
    checkpoint = load("resnet20-12fca82f.th", images=cifar10.load().images)
    checkpoint.model(checkpoint.preprocessing(images))  # logits (N, 10)

A file is .safetensors, or anything that torch.save wrote (.pt, .pth, .th, .ckpt). Depth, classes and the shortcuts of
options B and C show in the tensors. The kind (residual with option A and plain have the same tensors) and the
preprocessing come from the file's card, or from the caller, or are recognised by models.recognition.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.files import replacing, sha256
from models.preprocess import PADDINGS, PER_PIXEL, PRESETS, Preprocessing, mean_image, per_pixel
from models.recognition import FITS, match_network, match_preprocessing
from models.resnet import KINDS, WIDTHS, CifarNet, Config

EXPECTED = "a checkpoint is a file of torch.save (.pt, .pth, .th, .ckpt) or a .safetensors file"
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "ema",
    "state_dict_ema",
    "model_ema",
)
PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
RENAMES = {"linear.": "fc.", ".shortcut.": ".downsample."}  # akamaster's names -> torchvision's
MEAN, STD = "preprocessing.mean", "preprocessing.std"  # the tensors of the preprocessing in our own files


@dataclass(frozen=True)
class Checkpoint:
    """A network made from a file.

    model: in evaluation mode. preprocessing: None where it is not known. crop_padding: how training images were
    padded. how: for kind and preprocessing, how they are known, in words. warnings: what does not fit, in words.
    card: what the file says of itself. digest: SHA-256 of the file.
    """

    model: CifarNet
    preprocessing: Preprocessing | None
    crop_padding: str | None
    how: dict[str, str]
    warnings: list[str]
    card: dict[str, Any]
    path: Path
    digest: str


def load(
    path: str | Path, *, kind: str | None = None, normalize: str | None = None, images: np.ndarray | None = None
) -> Checkpoint:
    """Make a network of a checkpoint file.

    kind: `residual` or `plain`, and normalize: a name of `PRESETS` or `per-pixel`, win over the file's card. With
    images (N, 32, 32, 3), uint8, what neither says is recognised, and all is checked against BN's statistics; without,
    a network that may be either kind is taken for residual. Raises FileNotFoundError or ValueError, with the path, for
    a file that is not there, not a checkpoint, would run code, or holds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {EXPECTED}")
    tensors, card = read(path)
    try:
        state = clean(tensors)
        models = [network(config, state) for config in configs(state, card, kind)]
        normalisations = known_preprocessing(normalize, tensors, card, images)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    padding = card.get("crop_padding")
    how = {
        "kind": "given" if kind else "card" if "kind" in card else "shortcuts" if len(models) == 1 else "assumed",
        "preprocessing": "given" if normalize else "card" if normalisations else "unknown",
    }
    model, warnings = models[0], []
    preprocessing = normalisations[0] if normalisations else None
    if images is not None:
        candidates = normalisations or [*PRESETS.values(), per_pixel(mean_image(images))]
        inputs = match_preprocessing(model, images, candidates, (padding,) if padding else PADDINGS)
        preprocessing, padding = inputs.best
        networks = match_network(models, images, preprocessing, padding)
        model = networks.best
        for what, match in (("kind", networks), ("preprocessing", inputs)):
            known = how[what] if how[what] not in ("assumed", "unknown") else "recognised"
            how[what] = f"{known}, {match.describe()}"
            if not match.fits:
                warnings.append(f"no {what} fits: {match.describe()}, where a fit is below {FITS}")
        if warnings:
            warnings.append("the images, the preprocessing or the network are not those of the training")
    return Checkpoint(model, preprocessing, padding, how, warnings, card, path, sha256(path))


def save(
    path: str | Path, model: CifarNet, preprocessing: Preprocessing, *, crop_padding: str, training: dict[str, Any]
) -> None:
    """Write a network with its preprocessing and its card as .safetensors, whole or not at all.

    crop_padding: how training images were padded, `black`, `zero` or `none`. training: what else the card shall say
    (recipe, seed, test error, ...), as JSON can hold it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {MEAN: preprocessing.mean.contiguous(), STD: preprocessing.std.contiguous()}
    card = {"network": model.config.name, **asdict(model.config)}
    card |= {"preprocessing": preprocessing.name, "crop_padding": crop_padding, "training": training}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"card": json.dumps(card)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and its card (empty where it has none). ValueError where the file is not a checkpoint."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # garbage makes the unpickler raise anything
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if wanted is None:
                raise ValueError(f"{path}: not a checkpoint, damaged or truncated; {EXPECTED}") from error
            raise ValueError(
                f"{path}: refused: it asks for {wanted[1]}, which could run code, and only tensors are read; "
                "save it again with torch.save(model.state_dict(), ...)"
            ) from error
    state = find_state_dict(content)
    if state is None:
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: no state dict in it; looked under {', '.join(WRAPPERS)} and found {keys}")
    return state, {}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
        card = json.loads(metadata.get("card", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path}: the card in its metadata is no JSON object, so it is not one of ours")
    return tensors, card


def find_state_dict(content: Any) -> dict[str, Tensor] | None:
    """The tensors by name at the top level of what torch.save saved, or under one of the usual keys."""
    if not isinstance(content, Mapping):
        return None
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        return tensors
    found = (find_state_dict(content.get(key)) for key in WRAPPERS)
    return next((state for state in found if state is not None), None)


def clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of a network: no wrappers' prefixes. ValueError where a number is not finite."""
    state = {name: tensor for name, tensor in state.items() if name not in (MEAN, STD)}
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for theirs, ours in RENAMES.items():
        state = {re.sub(rf"(^|(?=\.)){re.escape(theirs)}", ours, name): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"NaN or infinity in {name}: the training diverged, or the file is damaged")
    return state


def configs(state: dict[str, Tensor], card: dict[str, Any], kind: str | None) -> list[Config]:
    """The networks that a state dict can be, the likeliest first. ValueError where it is none of ours."""
    blocks = [len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in (1, 2, 3)]
    stem, classifier = state.get("conv1.weight"), state.get("fc.weight")
    if (
        stem is None
        or stem.shape != (WIDTHS[0], 3, 3, 3)
        or classifier is None
        or classifier.shape[1:] != WIDTHS[2:]
        or blocks[0] == 0
        or len(set(blocks)) > 1
    ):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:4])
        raise ValueError(
            "not a CIFAR-10 network of He et al. (conv1 of 16 channels, layer1 to layer3 with as many blocks each, "
            f"fc with 64 inputs); it has {len(state)} tensors: {shapes}, ..."
        )
    depth, classes = 6 * blocks[0] + 2, len(classifier)
    if kind is None:
        kind = card.get("kind")
    projections = [name.split(".")[0] for name in state if ".downsample." in name]
    if projections:
        if kind == "plain":
            raise ValueError("it has shortcuts with weights (downsample), so it is residual, not plain")
        return [Config("residual", depth, "C" if "layer1" in projections else "B", classes=classes)]
    kinds = [kind] if kind else list(KINDS.values())
    paddings = [card["padding"]] if "padding" in card else ["both", "after"]
    return [Config(k, depth, "A", p, classes) for k in kinds for p in (paddings if k == "residual" else paddings[:1])]


def network(config: Config, state: dict[str, Tensor]) -> CifarNet:
    """The network of a config with the tensors of a state dict, in evaluation mode. ValueError unless all match."""
    with torch.device("meta"):
        model = CifarNet(config)
    model.to_empty(device="cpu")
    own = model.state_dict()
    state = {name: torch.zeros_like(t) for name, t in own.items() if name.endswith("num_batches_tracked")} | state
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is too many" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"the tensors are not those of a network of {config.depth} layers: {', '.join(faults[:3])}{more}"
        )
    model.load_state_dict(state)
    return model.eval()


def known_preprocessing(
    name: str | None, tensors: dict[str, Tensor], card: dict[str, Any], images: np.ndarray | None
) -> list[Preprocessing]:
    """The preprocessing that was named or that the file holds, or an empty list.

    The name `per-pixel` means the file's own mean image, or else that of the images given.
    """
    stored = None
    if MEAN in tensors and STD in tensors:
        stored = Preprocessing(str(card.get("preprocessing", PER_PIXEL)), tensors[MEAN], tensors[STD])
    if name is None:
        return [stored] if stored else []
    if name in PRESETS:
        return [PRESETS[name]]
    if name != PER_PIXEL:
        raise ValueError(f"unknown preprocessing {name!r}: one of {', '.join([*PRESETS, PER_PIXEL])}")
    if stored is not None and stored.name == PER_PIXEL:
        return [stored]
    return [per_pixel(mean_image(images))] if images is not None else []
