"""Find the weights in what a checkpoint file holds, and give them the names that our networks have.

Known are bare state dicts, the usual keys of training scripts (timm, Lightning, mmengine and
torchvision's references), several copies of the weights in one file, and the prefixes of
DataParallel, torch.compile, FSDP, activation checkpointing and Lightning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.batchnorm import check_norm
from models.checkpoints.pickles import Described, Unreadable
from models.messages import is_plain

Weights = Mapping[str, Tensor | Described]

WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights"),
    "module",
)
EMA_WRAPPERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of a name
COUNTERS = ("n_averaged", "steps")  # of torch's and mmengine's averaged models
FIRST_BLOCK = "layer1.0.conv1.weight"  # shows where in a larger state dict one of our networks is
LEAVES = ("weight", "bias", "running_mean", "running_var")
RENAMES = {"linear.": "fc.", "last_linear.": "fc.", ".shortcut.": ".downsample."}  # theirs: ours
EMA = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)  # in the name of a copy of the weights
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (*REAL, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DEPTH = 4  # how deep the weights may lie in mappings
SHOWN = 10  # names in a message


@dataclass(frozen=True)
class Chosen:
    """One copy of the weights: its tensors, and a note on which one it is if there is more to say."""

    tensors: Weights
    note: str


def choose_weights(tree: Any, weights: str | None, ema: bool) -> Chosen:
    """Return one copy of the weights in a file.

    tree: what the file holds. weights: the name of the copy. ema: take the average of the weights.
    Without either, the copy that the usual keys hold. Raises Unreadable if there is no such copy.
    """
    copies = find_copies(tree)
    if not copies:
        keys = type(tree).__name__
        if isinstance(tree, Mapping):
            keys = ", ".join(map(str, list(tree)[:SHOWN]))
        looked = ", ".join([*WRAPPERS, *EMA_WRAPPERS])
        raise Unreadable(f"no state dict in it; looked under {looked} and found {keys}")
    averages = find_averages(tree, copies)
    name = choose_copy(copies, averages, weights, ema)
    tensors = bare(copies[name])
    others = [other for other in copies if other != name and is_copy(bare(copies[other]), tensors)]
    if weights:
        whole = matches(name, weights)
    else:
        whole = name in averages or (ema and bool(EMA.search(name.replace("_", "."))))
    part, rest = ("", []) if whole else choose_root(tensors, weights, ema)
    if weights and not part and not whole:
        known = ", ".join([*filter(None, copies), *(root.rstrip(".") for root in rest)]) or "one"
        raise Unreadable(f"no weights called {weights} in it; there are: {known}")
    if ema and not whole and not (part and EMA.search(part)):
        raise Unreadable(
            f"no EMA copy in it (looked under {', '.join(EMA_WRAPPERS)}); leave out --ema"
        )
    if part or rest:
        inner = tuple(root for root in rest if root.startswith(part))
        tensors = {
            key: x
            for key, x in tensors.items()
            if key.startswith(part) and not key.startswith(inner)
        }
    others += [root.rstrip(".") or "the top level" for root in rest]
    return Chosen(tensors, describe_choice(part.rstrip(".") or name, averages.get(name), others))


def find_copies(tree: Any) -> dict[str, Weights]:
    """Return every mapping of names to tensors in a file that may be weights, by its path.

    Others, such as the state of an optimizer, are returned only if there is nothing else.
    """
    found: dict[str, Weights] = {}
    level: list[tuple[str, Any]] = [("", tree)]
    seen: set[int] = set()
    for _ in range(DEPTH):
        following: list[tuple[str, Any]] = []
        for path, mapping in level:
            if not isinstance(mapping, Mapping) or id(mapping) in seen:
                continue
            seen.add(id(mapping))
            named = [(key, value) for key, value in mapping.items() if isinstance(key, str)]
            following += [(f"{path}.{key}".lstrip("."), x) for key, x in named]
            tensors = {key: x for key, x in named if isinstance(x, Tensor | Described)}
            if tensors:
                found[path] = tensors
        level = following
    ends = ("weight", "running_var", "weight_orig", "weight_v", "original", "original1")
    likely = {
        path: tensors
        for path, tensors in found.items()
        if any(name.rpartition(".")[2] in ends for name in tensors)
    }
    return likely or found


def find_averages(tree: Any, copies: Mapping[str, Weights]) -> dict[str, bool]:
    """Return which copies of the weights are averages, as far as the file says it, by path.

    mmengine saves the average as the state_dict, and the weights themselves as ema_state_dict;
    Lightning's WeightAveraging as the state_dict and current_model_state. Torch's averaged models
    have a counter.
    """
    says = {path: True for path, tensors in copies.items() if "n_averaged" in tensors}
    if not isinstance(tree, Mapping):
        return says
    meta = tree.get("meta")
    mmengine = "message_hub" in tree or (isinstance(meta, Mapping) and "mmengine_version" in meta)
    if mmengine and "ema_state_dict" in tree:
        says |= {"state_dict": True, "ema_state_dict": False}
    if "averaging_state" in tree and "current_model_state" in tree:
        says |= {"state_dict": True, "current_model_state": False}
    return {path: average for path, average in says.items() if path in copies}


def choose_copy(
    copies: Mapping[str, Weights], averages: Mapping[str, bool], weights: str | None, ema: bool
) -> str:
    """Return the path of the copy of the weights that is wanted, or of the one that may hold it."""

    def rank(path: str) -> tuple[bool, list[int]]:
        parts = path.split(".") if path else []
        known = [*WRAPPERS, *EMA_WRAPPERS]
        place = [known.index(part) if part in known else len(known) + 1 for part in parts]
        return max(place, default=0) > len(known), [*place, len(WRAPPERS)]

    ordered = sorted(copies, key=rank)
    if weights:
        return next((path for path in ordered if matches(path, weights)), ordered[0])
    if ema:
        named = [path for path in ordered if averages.get(path, EMA.search(path.replace("_", ".")))]
        if named:
            return max(named, key=lambda path: averages.get(path, False))
    if rank(ordered[0])[0] and len(ordered) > 1:
        raise Unreadable(
            f"it holds {len(ordered)} sets of weights: {', '.join(ordered[:SHOWN])}; "
            "--weights NAME chooses one"
        )
    return ordered[0]


def matches(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def is_copy(tensors: Weights, chosen: Weights) -> bool:
    """Return whether most names of a set of tensors are those of the chosen one."""
    names = {name.rpartition("module.")[2] for name in chosen}
    return 2 * sum(name.rpartition("module.")[2] in names for name in tensors) > len(tensors)


def describe_choice(name: str, average: bool | None, others: list[str]) -> str:
    """Return which copy of the weights was taken, or nothing if there is only one."""
    said = {None: "", True: ", an average as the file says", False: ", not the average"}[average]
    beside = f"; also in the file: {', '.join(others[:SHOWN])}, which --weights takes"
    if not others and average is None:
        return ""
    return (name or "the top level") + said + (beside if others else "")


def bare(state: Weights) -> Weights:
    """Return tensors without the prefixes of wrappers in their names, and without counters.

    Raises Unreadable if two tensors would have one name.
    """
    names = {name: name for name in state if name not in COUNTERS}
    for inside in INSIDE:
        names = {name: short.replace(inside, "") for name, short in names.items()}
    while names and all(short.startswith("module.") for short in names.values()):
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    result = {short: state[name] for name, short in names.items()}
    if len(result) < len(names):
        twice = next(short for name, short in names.items() if short != name and short in state)
        raise Unreadable(
            f"two tensors in it are called {twice}, apart from the prefixes of wrappers"
        )
    return result


def roots_in(state: Weights) -> list[str]:
    """Return the prefixes of the networks like ours in a state dict.

    If there is none, return those of the copies of another network, one of them called an EMA.
    """
    ends = [name.removesuffix(FIRST_BLOCK) for name in state if name.endswith(FIRST_BLOCK)]
    if roots := [root for root in ends if f"{root}conv1.weight" in state]:
        return roots
    norms: dict[str, list[str]] = {}
    for name in state:
        first, _, rest = name.partition(".")
        if rest.endswith(".running_var"):
            norms.setdefault(first, []).append(rest)
    if len(norms) < 2 or not any(EMA.search(first) for first in norms):
        return []
    alike: dict[tuple[str, ...], list[str]] = {}
    for first, names in norms.items():
        alike.setdefault(tuple(sorted(names)), []).append(first)
    return [f"{first}." for copies in alike.values() if len(copies) > 1 for first in copies]


def choose_root(state: Weights, weights: str | None, ema: bool) -> tuple[str, list[str]]:
    """Return the prefix of the network that is wanted in a state dict, and those of the others.

    The prefix is empty if there are not several. Raises Unreadable if several are left.
    """
    roots = roots_in(state)
    if weights:
        wanted = [f"{weights}."] if any(name.startswith(f"{weights}.") for name in state) else []
        return next(iter(wanted), ""), [root for root in roots if root not in wanted]
    wanted = [root for root in roots if bool(EMA.search(root)) == ema] or roots
    if len(wanted) > 1:
        names = ", ".join(sorted(wanted))
        raise Unreadable(f"it holds {len(wanted)} networks: {names}; --weights NAME chooses one")
    if len(roots) < 2:
        return "", []
    return wanted[0], [root for root in roots if root != wanted[0]]


def at_root(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the network like ours in a state dict by their names in it, or all."""
    root = next(iter(roots_in(state)), "")
    return {name.removeprefix(root): x for name, x in state.items() if name.startswith(root)}


def check_plain(state: Mapping[str, Tensor]) -> None:
    """Raise Unreadable unless all tensors are dense, real, and have names that a table can hold."""
    for name, tensor in state.items():
        if not is_plain(name):
            raise Unreadable(
                f"{name[:80]!r} is no name of a tensor: unprintable, or a formula for a spreadsheet"
            )
        if tensor.dtype not in PLAIN:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise Unreadable(f"{name} holds {dtype}, not floating-point numbers")


def check_tensors(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors of a network can be computed with: finite, and BN's
    vectors as `check_norm` wants them.
    """
    leaves: dict[str, list[str]] = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
        if leaf in LEAVES and tensor.dtype not in REAL:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} holds {dtype}, not floating-point numbers")
        if tensor.dtype in REAL and not torch.isfinite(tensor).all():
            raise ValueError(
                f"NaN or infinity in {name}: the training diverged, or the file is damaged"
            )
    for module, names in leaves.items():
        if "running_var" in names:
            check_norm(state, module, [leaf for leaf in names if leaf in LEAVES])


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by our names, and the weights of a pruned network in place of their parts."""
    masks = {name.removesuffix("_mask"): x for name, x in state.items() if name.endswith("_mask")}
    whole = {
        name: state[f"{name}_orig"] * mask
        for name, mask in masks.items()
        if f"{name}_orig" in state and state[f"{name}_orig"].shape == mask.shape
    }
    parts = {f"{name}_{part}" for name in whole for part in ("orig", "mask")}
    result = {name: x for name, x in state.items() if name not in parts} | whole
    for theirs, ours in RENAMES.items():
        pattern = re.compile(rf"(^|(?=\.)){re.escape(theirs)}")
        result = {pattern.sub(ours, name): tensor for name, tensor in result.items()}
    return result
