"""Networks of timm and of transformers, with the inputs that they are made for.

Weights come from the local cache or a folder, never from the net. How images are normalised, and
how text is cut into tokens, is the network's own configuration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it
    import numpy as np
    from torch import Tensor, nn

    from models.data import ImageSet

PREFIXES = ("timm:", "hf:")
TEXT_BATCH, IMAGE_BATCH = 8, 16  # windows of tokens, and images, at a time


@dataclass(frozen=True)
class HubNetwork:
    """A network of a hub.

    known: the line that says where weights and preprocessing come from.
    images: makes a batch of images (n, H, W, 3) uint8; None for a network that takes text.
    tokenizer: None for a network that takes images.
    """

    name: str
    model: nn.Module
    known: str
    images: Callable[[np.ndarray], Any] | None = None
    tokenizer: Any = None


def load_hub(item: str) -> HubNetwork:
    """Load `timm:NAME` or `hf:NAME_OR_FOLDER`.

    Raises ValueError if the package or the weights are missing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    hub, _, name = item.partition(":")
    return load_timm(name) if hub == "timm" else load_transformers(name)


def import_extra(package: str) -> Any:
    """Import a package of an extra. Raise ValueError, with how to get it, if it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{package} is not installed: pip install layer-responses[{package}] ({error})"
        ) from error


def load_timm(name: str) -> HubNetwork:
    """Load a network with weights of timm's cache, and with its own preprocessing."""
    timm = import_extra("timm")
    if name not in timm.list_models() and name not in timm.list_pretrained():
        raise ValueError(f"timm:{name}: timm {timm.__version__} has no network of this name")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise ValueError(f"timm:{name}: no weights in the local cache ({error})") from error
    config = import_module("timm.data").resolve_model_data_config(model)
    side, mean, std = config["input_size"][-1], config["mean"], config["std"]

    def images(batch: np.ndarray) -> Tensor:
        return normalised(batch, side, mean, std)

    known = f"timm {timm.__version__}, weights of the local cache; preprocessing {side}x{side} "
    return HubNetwork(
        name, model, f"{known}pixels, mean {mean}, std {std} (its configuration)", images
    )


def normalised(
    images: np.ndarray, side: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Scale images (n, H, W, 3) uint8 to (n, 3, side, side), with a channel's mean and std."""
    import torch
    from torch.nn import functional

    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # (n, H, W, 3) -> (n, 3, H, W)
    if x.shape[-1] != side:
        x = functional.interpolate(x, (side, side), mode="bicubic", antialias=True)
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def load_transformers(name: str) -> HubNetwork:
    """Load the network that a configuration names, of a folder or of the local cache."""
    transformers = import_extra("transformers")
    local = {"local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **local)
        [kind] = (config.architectures or ["AutoModel"])[:1]
        model = getattr(transformers, kind).from_pretrained(name, **local)
    except ImportError as error:
        raise ValueError(f"hf:{name}: transformers cannot load it: {error}") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"hf:{name}: no such folder, and no such network in the local cache ({error})"
        ) from error
    known = f"transformers {transformers.__version__}, {kind}"
    try:
        if (Path(name) / "preprocessor_config.json").is_file() or not hasattr(config, "vocab_size"):
            processor = transformers.AutoImageProcessor.from_pretrained(name, **local)
            return HubNetwork(
                Path(name).name,
                model,
                f"{known}; preprocessing {type(processor).__name__} (its configuration)",
                lambda batch: processor(list(batch), return_tensors="pt")["pixel_values"],
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **local)
    except (OSError, ValueError) as error:
        raise ValueError(f"hf:{name}: no preprocessing or tokenizer beside it ({error})") from error
    words = f"{known}; tokenizer {type(tokenizer).__name__} (its configuration)"
    return HubNetwork(Path(name).name, model, words, tokenizer=tokenizer)


def text_batches(
    network: HubNetwork, path: Path, length: int, windows: int | None, size: int | None
) -> Iterator[dict[str, Tensor]]:
    """Cut a text file into windows of `length` tokens, the last and shorter one left out.

    A batch holds the network's keywords, `labels`, and `special_tokens_mask`: the tokens that the
    tokenizer added. Raises ValueError if the text is too short for one window.
    """
    import torch

    text = path.read_text(encoding="utf-8", errors="replace")
    limit = getattr(network.model.config, "max_position_embeddings", None) or length
    options = {"truncation": True, "return_overflowing_tokens": True, "verbose": False}
    cut = network.tokenizer(
        text, max_length=min(length, limit), return_special_tokens_mask=True, **options
    )
    whole = [i for i, ids in enumerate(cut["input_ids"]) if len(ids) == min(length, limit)]
    if not whole:
        raise ValueError(f"{path}: shorter than one window of {length} tokens: set --length")
    size, chosen = size or TEXT_BATCH, whole[:windows]
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        ids, special = (
            torch.tensor([cut[key][i] for i in part])
            for key in ("input_ids", "special_tokens_mask")
        )
        batch = {"input_ids": ids, "special_tokens_mask": special, "labels": ids}
        if getattr(network.model.config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids
        yield batch


def run_text(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """Run a language model on a batch of `text_batches`."""
    device = next(model.parameters()).device
    own = ("labels", "special_tokens_mask")
    return model(**{key: x.to(device) for key, x in batch.items() if key not in own})


def ordinary_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Return which positions (N, T) count: all but the special tokens, which are outliers."""
    return batch["special_tokens_mask"] == 0


def image_batches(
    network: HubNetwork, data: ImageSet, size: int | None
) -> Iterator[tuple[Any, Tensor] | Any]:
    """Yield batches of images as the network takes them, with labels (n,) if these are known."""
    import torch

    assert network.images is not None
    for images, labels in data.batches(size or IMAGE_BATCH):
        x = network.images(images)
        yield x if labels is None else (x, torch.from_numpy(labels))
