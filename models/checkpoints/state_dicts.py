"""The tensors in other people's checkpoint files, by the names that our networks have for them.

    from models.checkpoints.state_dicts import read
    tensors, card, note = read("checkpoint.pth")  # note: of several copies, which one this is

Files are read without running code from them. Known are bare state dicts, the usual keys of
training scripts (timm, Lightning, torchvision's references), EMA copies beside the weights, and the
prefixes of DataParallel, torch.compile, FSDP, activation checkpointing and Lightning.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.messages import is_plain

EXPECTED = "a checkpoint is a file of torch.save (.pt, .pth, .th, .ckpt) or a .safetensors file"
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "weights",
    "module",
)
STEPS = ("step", "global_step", "iteration", "epoch")  # how training scripts call their progress
EMA_WRAPPERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
INSIDE = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
)  # anywhere in a name
FIRST_BLOCK = "layer1.0.conv1.weight"  # shows where in a larger state dict one of our networks is
LEAVES = ("weight", "bias", "running_mean", "running_var")
INERT = (  # what training scripts put beside the weights: it is passed over unseen
    *("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path"),
    *(
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "pathlib._local.Path",
    ),  # Python 3.13's
    *(
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
    ),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
)
RENAMES = {
    "linear.": "fc.",
    "last_linear.": "fc.",
    ".shortcut.": ".downsample.",
}  # others' -> torchvision's
EMA = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)  # in the name of a copy of the weights


def read(path: Path, ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors of a file, its card (empty where it has none), and which of several copies of the
    weights these are.

    All tensors but those of other copies; `at_root` gives those of a network like ours among them.

    ema: take the exponential moving average of the weights, where there is one beside them. The
    note is empty where there is nothing to choose. ValueError, with the path, where the file is not
    a checkpoint, or has no such copy.
    """
    tensors, card, note = (
        read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, ema)
    )
    try:
        check_sizes(tensors, path.stat().st_size)
        tensors, chosen = choose_copy(bare(tensors), ema)
        check_tensors(at_root(tensors))
        if ema and not note and not chosen:
            raise ValueError(
                f"no EMA copy in it (looked under {', '.join(EMA_WRAPPERS)}); leave out --ema"
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors, card, note or chosen


class PassedOver:
    """Stands for an object of a class in `INERT`."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    check_archive(path)
    with open(path, "rb") as file:
        try:
            with torch.serialization.safe_globals([(PassedOver, name) for name in INERT]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # garbage makes the unpickler raise anything
            wanted = (
                re.search(r"GLOBAL ([\w.]+)", str(error))
                if isinstance(error, pickle.UnpicklingError)
                else None
            )
            if wanted is None:
                raise ValueError(
                    f"{path}: not a checkpoint, damaged or truncated; {EXPECTED}"
                ) from error
            raise ValueError(
                f"{path}: refused: it asks for {wanted[1]}, which could run code, and only tensors are read; "
                "save it again with torch.save(model.state_dict(), ...)"
            ) from error
    weights, average = find(content, WRAPPERS), find(content, EMA_WRAPPERS)
    state = average if weights is None or (ema and average is not None) else weights
    if state is None:
        keys = type(content).__name__
        if isinstance(content, Mapping):  # str() of nested tuples may be endless
            keys = ", ".join(key if isinstance(key, str) else type(key).__name__ for key in content)
        looked = ", ".join([*WRAPPERS, *EMA_WRAPPERS])
        raise ValueError(f"{path}: no state dict in it; looked under {looked} and found {keys}")
    card = {key: content[key] for key in STEPS if type(content.get(key)) is int}
    if average is None:
        return state, card, ""
    return state, card, "EMA copy" if state is average else "not its EMA copy, which --ema takes"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
        card = json.loads(metadata.get("card", "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error
    if not isinstance(card, dict):
        raise ValueError(
            f"{path}: the card in its metadata is no JSON object, so it is not one of ours"
        )
    return tensors, card, ""


def find(content: Any, wrappers: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The tensors by name under one of the wrappers, or, for the weights themselves, at the top
    level.
    """
    if not isinstance(content, Mapping):
        return None
    for key in wrappers:
        if (state := find(content.get(key), WRAPPERS)) is not None:
            return state
    if wrappers is EMA_WRAPPERS:
        return None
    return {
        key: x for key, x in content.items() if isinstance(key, str) and isinstance(x, Tensor)
    } or None


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """No names of wrappers inside the tensors' names, and no counter of torch's AveragedModel."""
    for inside in INSIDE:
        state = {name.replace(inside, ""): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if name != "n_averaged"}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def roots_in(state: dict[str, Tensor]) -> list[str]:
    """The places in a state dict where networks like ours begin: what their tensors' names begin
    with.

    Where there are none, those of two copies of another network, one of them called an EMA.
    """
    ends = [name.removesuffix(FIRST_BLOCK) for name in state if name.endswith(FIRST_BLOCK)]
    if roots := [root for root in ends if f"{root}conv1.weight" in state]:
        return roots
    norms: dict[str, set[tuple[str, int]]] = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if rest.endswith(".running_var"):
            norms.setdefault(first, set()).add((rest, len(tensor)))
    copies = [first for first in norms if list(norms.values()).count(norms[first]) > 1]
    return [f"{first}." for first in copies] if any(EMA.search(first) for first in copies) else []


def at_root(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the network like ours in a state dict, by their names in it; all, where there
    is none.
    """
    root = next(iter(roots_in(state)), "")
    return {
        name.removeprefix(root): tensor for name, tensor in state.items() if name.startswith(root)
    }


def choose_copy(state: dict[str, Tensor], ema: bool) -> tuple[dict[str, Tensor], str]:
    """Of several copies of a network the tensors of one, which is an EMA copy or not, as is asked
    for; a note says so.

    All tensors where there are not several. ValueError where several are left.
    """
    roots = roots_in(state)
    wanted = [root for root in roots if bool(EMA.search(root)) == ema] or roots
    if len(wanted) > 1:
        raise ValueError(
            f"it holds {len(wanted)} networks: {', '.join(wanted)}; save the one you mean by itself"
        )
    if len(roots) < 2:
        return state, ""
    others = [root for root in roots if root != wanted[0]]
    inner = tuple(root for root in others if root.startswith(wanted[0]))
    chosen = {
        name: x
        for name, x in state.items()
        if name.startswith(wanted[0]) and not name.startswith(inner)
    }
    ours, theirs = (
        ", ".join(root.rstrip(".") or "the top level" for root in some) for some in (wanted, others)
    )
    return chosen, f"from {ours}, not {theirs}"


def check_archive(path: Path) -> None:
    """ValueError for an archive with compressed parts: torch.save makes none, and some bytes could
    become gigabytes.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [
                part.filename
                for part in archive.infolist()
                if part.compress_type != zipfile.ZIP_STORED
            ]
            scripted = any(part.endswith("/constants.pkl") for part in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: damaged or truncated archive ({error})") from error
    if scripted:
        raise ValueError(
            f"{path}: refused: a TorchScript archive, which holds code; save torch.jit.load(...).state_dict() instead"
        )
    if compressed:
        raise ValueError(
            f"{path}: refused: {compressed[0]} in it is compressed, which torch.save never does"
        )


def check_sizes(state: dict[str, Tensor], size: int) -> None:
    """ValueError for names that no table could hold, and for a tensor larger than its file of
    `size` bytes.

    A view of one number may say that it is gigabytes of them.
    """
    for name, tensor in state.items():
        if not is_plain(name):
            raise ValueError(
                f"{name[:80]!r} is no name of a tensor: unprintable, or a formula for a spreadsheet"
            )
        if (
            tensor.layout == torch.strided
            and not (tensor.is_nested or tensor.is_meta)
            and tensor.nbytes > size
        ):
            raise ValueError(
                f"{name} would take {tensor.nbytes:,} bytes, and the file has {size:,}: it is damaged"
            )


def check_tensors(state: dict[str, Tensor]) -> None:
    """ValueError where a tensor is no dense array of numbers, or one that convolutions and BNs have
    is impossible.
    """
    for name, tensor in state.items():
        leaf = name.rpartition(".")[2]
        if (
            tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.is_nested
        ):
            raise ValueError(
                f"{name} is sparse, quantized or without data: only dense tensors are read"
            )
        if (leaf in LEAVES and not tensor.is_floating_point()) or tensor.is_complex():
            raise ValueError(
                f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ValueError(
                f"NaN or infinity in {name}: the training diverged, or the file is damaged"
            )
        if leaf == "running_var" and (tensor.ndim != 1 or (tensor < 0).any()):
            raise ValueError(f"{name} is no vector of variances: the file is damaged")


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of a network, and the weights of a pruned one in place of what they
    are made of.
    """
    masks = {
        name.removesuffix("_mask"): mask for name, mask in state.items() if name.endswith("_mask")
    }
    pruned = {
        name: (x, mask)
        for name, mask in masks.items()
        if (x := state.get(f"{name}_orig")) is not None
    }
    whole = {name: x * mask for name, (x, mask) in pruned.items() if x.shape == mask.shape}
    parts = {f"{name}_{part}" for name in whole for part in ("orig", "mask")}
    state = {name: x for name, x in state.items() if name not in parts} | whole
    for theirs, ours in RENAMES.items():
        state = {
            re.sub(rf"(^|(?=\.)){re.escape(theirs)}", ours, name): tensor
            for name, tensor in state.items()
        }
    return state
