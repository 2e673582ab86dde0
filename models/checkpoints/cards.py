"""Write our own checkpoint files with a card, and check what a card says."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from models.checkpoints.pickles import Unreadable
from models.data.preprocessing import PADDINGS, PER_PIXEL, PRESETS, Preprocessing
from models.files import replacing
from models.resnet import OPTIONS, ResNet

MEAN, STD = "preprocessing.mean", "preprocessing.std"  # tensors in our own files
DIGEST = "sha256"  # in their cards: of the rest of the card and of the tensors
CARD = {**OPTIONS, "preprocessing": (*PRESETS, PER_PIXEL), "crop_padding": PADDINGS}
OURS = {*CARD, "network", "depth", "classes", "training"}  # what a card of ours speaks of


def save(
    path: str | Path,
    model: ResNet,
    preprocessing: Preprocessing,
    *,
    crop_padding: str,
    training: dict[str, Any],
) -> None:
    """Write a network with its preprocessing and its card as .safetensors, whole or not at all.

    crop_padding: how training images were padded, `black`, `zero` or `none`.
    training: what else the card shall say (recipe, seed, test error, ...), as JSON can hold it.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    tensors |= {MEAN: preprocessing.mean.contiguous(), STD: preprocessing.std.contiguous()}
    card = {"network": model.config.name, **asdict(model.config)}
    card |= {
        "preprocessing": preprocessing.name,
        "crop_padding": crop_padding,
        "training": training,
    }
    card[DIGEST] = digest_of(card, tensors)
    with replacing(path) as temporary:
        # not save_file, which has temporary files of its own that a killed process would leave;
        # one entry of metadata, since safetensors writes several in random order
        temporary.write_bytes(serialise(tensors, metadata={"card": json.dumps(card)}))


def digest_of(card: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a card and of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256(json.dumps(card).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_card(metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what our own files say of themselves; nothing of other files' metadata.

    Raises ValueError if a file of ours is damaged, as far as its digest or its card shows it.
    """
    try:
        card = json.loads(metadata.get("card", "{}"))
        json.dumps(card, allow_nan=False)
    except (ValueError, RecursionError) as error:
        if MEAN in tensors:
            raise Unreadable("damaged: its card cannot be read") from error
        return {}
    if not isinstance(card, dict) or not OURS & card.keys():
        return {}
    said = card.pop(DIGEST, None)
    if said is not None and said != digest_of(card, tensors):
        raise Unreadable("damaged: its tensors or its card are not those that were saved")
    return card


def check_card(card: dict[str, Any]) -> None:
    """Raise ValueError if a card says what none of ours does."""
    for key, known in CARD.items():
        if card.get(key) is not None and card[key] not in known:
            raise ValueError(
                f"its card says {key} {str(card[key])[:80]!r}, which is none of {', '.join(known)}"
            )


def stored_preprocessing(tensors: dict[str, Tensor], card: dict[str, Any]) -> Preprocessing | None:
    """Return the preprocessing that a file holds, if it holds one. ValueError if it is impossible."""
    if MEAN not in tensors or STD not in tensors:
        return None
    mean, std = tensors[MEAN], tensors[STD]
    if not all(x.is_floating_point() and x.isfinite().all() for x in (mean, std)):
        raise ValueError("NaN or infinity in the preprocessing: the file is damaged")
    found = Preprocessing(card.get("preprocessing") or PER_PIXEL, mean.float(), std.float())
    named = PRESETS.get(found.name, found)
    if not all(torch.equal(*pair) for pair in ((found.mean, named.mean), (found.std, named.std))):
        raise ValueError(f"its card says {found.name}, and its mean and std are not those: damaged")
    return found
