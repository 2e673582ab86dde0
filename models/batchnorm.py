"""Compute every layer's std in closed form from the BN tensors: no data, no forward pass.

    >>> from models import build, closed_form
    >>> closed_form(build("resnet-20"))["std"].mean().round(4)  # a new BN: gamma 1, beta 0, variance 1
    np.float64(1.0)

In evaluation mode BN maps a channel of mean mu and variance sigma^2, as BN recorded them, to one of
mean beta and variance gamma^2 sigma^2 / (sigma^2 + eps). Over the data that BN recorded, a layer's
response therefore has, by the law of total variance,

    std^2 = within^2 + between^2,  within^2 = mean_c(gamma^2 sigma^2 / (sigma^2 + eps)),  between^2 = var_c(beta)

BN records augmented training images, so measurements on other images differ: on two public
checkpoints of 20 and 56 layers by 4.5 and 5.0 % in the mean over layers, and in the worst layer of
the second by 30 % (10,000 test images; tests/analysis/test_responses.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

AFFINE, STATISTICS = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
EPS = 1e-5  # torch's default; a state dict does not say it
OTHER_EPS = (1e-5, 1e-3, 0.0)  # torch's, Keras's and none
WEIGHT = re.compile(r"\.(weight|weight_orig|weight_v|parametrizations\.weight\.original1?)$")


def closed_form(
    network: nn.Module | Mapping[str, Tensor],
    kernel_size: tuple[int, int] = (3, 3),
    *,
    eps: float | None = None,
) -> pd.DataFrame:
    """Return the std of every 3x3 layer's response, computed from BN's tensors.

    network: a network, or the state dict of one.
    kernel_size: of the convolutions.
    eps: of the BNs in a state dict; 1e-5 is assumed if it is not given.

    The frame has one row a layer: layer, name, norm, stage (a new one begins if the number of
    channels changes), channels, mean, std, within, between. Which BN follows a convolution is read
    off names, channels and the order of the tensors (see `Pairs`). `frame.attrs` holds
    unpaired: the convolutions left out, and why, by name;
    ambiguous: the pairs on which names and order do not agree;
    idle: the BNs that never ran, which are left out;
    sorted: whether the tensors are sorted by name, so that the order of the layers is not known;
    eps: the eps that was assumed, None if the modules say it;
    eps_effect: the largest relative change of a layer's std if eps were 1e-5, 1e-3 or 0.
    Raises ValueError if no layer is left, or if the tensors of a BN are not those of a BN.
    """
    import pandas as pd

    state = fetch_vectors(network.state_dict() if isinstance(network, nn.Module) else network)
    modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    pairs = Pairs(state)
    idle = idle_norms(state, pairs.norms)
    assumed = None if modules else EPS if eps is None else eps
    chosen = {
        name: norm
        for name, norm in pairs.certain.items()
        if pairs.convs[name].shape[2:] == kernel_size and norm not in idle
    }
    known = {
        norm: getattr(modules.get(norm), "eps", EPS) if assumed is None else assumed
        for norm in chosen.values()
    }
    spread, effect = spreads(state, known, pairs.leaves)
    rows: list[dict[str, object]] = []
    stage, last_channels = 0, None
    for name, norm in chosen.items():
        channels = len(state[f"{norm}.running_var"])
        stage += channels != last_channels
        last_channels = channels
        place = {"layer": len(rows) + 1, "name": name, "norm": norm, "stage": stage}
        rows.append({**place, "channels": channels, **spread[norm]})
    if not rows:
        kernel = "x".join(map(str, kernel_size))
        raise ValueError(
            f"no {kernel} convolution followed by a BN in this state dict; "
            f"its first keys: {first_keys(state)}"
        )
    frame = pd.DataFrame(rows)
    unpaired = {
        name: pairs.doubtful.get(name, "no BN follows it")
        for name, weight in pairs.convs.items()
        if weight.shape[2:] == kernel_size and name not in pairs.certain
    }
    frame.attrs |= {
        "unpaired": unpaired,
        "ambiguous": [pair for pair in pairs.ambiguous if pair.split(" -> ")[0] in chosen],
        "idle": idle,
        "sorted": pairs.sorted,
        "eps": assumed,
        "eps_effect": 0.0 if assumed is None else effect,
    }
    return frame


def fetch_vectors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose vectors and counters are on the CPU: one transfer for each device."""
    fetched = dict(state)
    # All of them as bytes in one vector, wide dtypes first, so that each one is aligned.
    small = sorted((x for x in state if state[x].ndim < 2), key=lambda x: -state[x].itemsize)
    for device in {state[name].device for name in small}:
        names = [name for name in small if state[name].device == device]
        parts = [state[name].reshape(-1).contiguous().view(torch.uint8) for name in names]
        together = torch.cat(parts).cpu()
        for name, part in zip(names, torch.split(together, [*map(len, parts)]), strict=True):
            fetched[name] = part.view(state[name].dtype).view(state[name].shape)
    return fetched


def spreads(
    state: Mapping[str, Tensor], eps: Mapping[str, float], leaves: Mapping[str, list[str]]
) -> tuple[dict[str, dict[str, float]], float]:
    """Return mean, std, within and between of the outputs of BNs, by name, and the largest relative
    change of a std if eps were another (`OTHER_EPS`).

    eps: of each BN, by name. leaves: what the tensors of each module are called.
    Raises ValueError if the tensors of one are not those of a BN.
    """
    groups: dict[tuple[int, bool], list[str]] = {}  # by channels, and by whether they are affine
    for norm in eps:
        affine = check_norm(state, norm, leaves[norm])
        groups.setdefault((len(state[f"{norm}.running_var"]), affine), []).append(norm)
    result, effect = {}, 0.0
    for (_, affine), norms in groups.items():
        gamma, beta, variance = (
            torch.stack([state[f"{norm}.{leaf}"].double() for norm in norms])  # (layers, C)
            if affine or leaf == "running_var"
            else torch.full((), neutral, dtype=torch.float64)
            for leaf, neutral in (("weight", 1.0), ("bias", 0.0), ("running_var", 0.0))
        )
        beta = beta.expand_as(variance)
        added = torch.tensor([eps[norm] for norm in norms], dtype=torch.float64)[:, None]

        def mean_square(
            eps: Tensor | float, gamma: Tensor = gamma, var: Tensor = variance
        ) -> Tensor:
            return (gamma.square() * torch.where(var > 0, var / (var + eps), 0.0)).mean(1)

        within2 = mean_square(added)
        between2 = beta.var(1, correction=0)
        numbers = (beta.mean(1), (within2 + between2).sqrt(), within2.sqrt(), between2.sqrt())
        std = numbers[1].clamp_min(torch.finfo(torch.float64).tiny)
        changes = [((mean_square(e) + between2).sqrt() / std - 1).abs().max() for e in OTHER_EPS]
        effect = max(effect, *(change.item() for change in changes))
        for norm, row in zip(norms, torch.stack(numbers, 1).tolist(), strict=True):
            if not all(map(math.isfinite, row)):
                raise ValueError(
                    f"NaN or infinity in {norm}, or too large numbers: the training diverged, or the "
                    "file is damaged"
                )
            result[norm] = dict(zip(("mean", "std", "within", "between"), row, strict=True))
    return result, effect


def check_norm(state: Mapping[str, Tensor], norm: str, leaves: list[str]) -> bool:
    """Return whether a BN has gamma and beta.

    leaves: what its tensors are called. Raises ValueError unless they are vectors of one length, and
    no variance is negative or NaN.
    """
    present = [leaf for leaf in AFFINE if leaf in leaves]
    beside = present or [leaf for leaf in leaves if leaf not in STATISTICS]
    if len(present) < 2 and beside:
        missing = " and ".join(leaf for leaf in AFFINE if leaf not in present)
        raise ValueError(
            f"{norm} has no {missing} beside its {', '.join(beside)}: its output is not known"
        )
    variance = state[f"{norm}.running_var"]
    for leaf in leaves:
        tensor = state[f"{norm}.{leaf}"]
        if leaf in (*AFFINE, *STATISTICS[:2]) and (
            tensor.ndim != 1 or len(tensor) != len(variance)
        ):
            words = (
                "vector of variances" if leaf == "running_var" else "vector like its running_var"
            )
            raise ValueError(f"{norm}.{leaf} is no {words}: the file is damaged")
    if not (variance >= 0).all():
        raise ValueError(f"{norm}.running_var is no vector of variances: the file is damaged")
    return len(present) == 2


def idle_norms(state: Mapping[str, Tensor], norms: list[str]) -> list[str]:
    """Return the BNs that never ran: they counted no batch, or their statistics are as in a new BN.

    None is returned if this holds for all: then the network is new, or its counters were lost.
    """
    counted = {norm: state.get(f"{norm}.num_batches_tracked") for norm in norms}
    zero = {norm for norm, count in counted.items() if count is not None and not count.any()}
    new = {
        norm
        for norm in norms
        if (state[f"{norm}.running_var"] == 1).all()
        and not state.get(f"{norm}.running_mean", torch.zeros(())).any()
    }
    idle = set()
    for some, known in (
        (zero, [norm for norm in norms if counted[norm] is not None]),
        (new, norms),
    ):
        idle |= some if len(some) < len(known) else set()
    return [norm for norm in norms if norm in idle]


@dataclass
class Pairs:
    """The convolutions of a state dict, each with the BN that follows it.

    A BN's convolution has as many channels. By name it is the one called alike in the same module
    (conv2 and bn2 or norm2, convs.0 and bns.0, 3 and 4 in a sequence); by order the last one with no
    BN between, which says nothing if the tensors are sorted by name. Names win over the order. A
    pair is doubtful, and left out, if
    - another convolution without a BN of its own stands between the two,
    - only the order speaks for it, and the two stand in different blocks,
    - names alone or names and order speak for it, but a BN of the same name in another block of the
      kind has other channels than its convolution, as in networks of pre-activation.

    certain: the names of convolution and BN. doubtful: why a convolution is left out, by name.
    ambiguous: the pairs on which names and order do not agree. convs: weights by name.
    """

    state: Mapping[str, Tensor]
    certain: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)
    ambiguous: list[str] = field(default_factory=list)
    convs: dict[str, Tensor] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    leaves: dict[str, list[str]] = field(default_factory=dict)
    children: dict[str, list[str]] = field(default_factory=dict)  # convolutions, by their module

    def __post_init__(self) -> None:
        self.sorted = is_sorted(self.state)
        keys = sorted(self.state, key=natural) if self.sorted else list(self.state)
        self.children: dict[str, list[str]] = {}  # the convolutions in each module
        self.place: dict[str, int] = {}  # of convolutions and BNs, in the order of the file
        for key in keys:
            module, _, leaf = key.rpartition(".")
            self.leaves.setdefault(module, []).append(leaf)
            if (name := convolution_of(key, self.state[key])) is not None:
                self.convs[name] = self.state[key]
                self.place[name] = len(self.place)
                self.children.setdefault(name.rpartition(".")[0], []).append(name)
            elif leaf == "running_var":
                self.norms.append(module)
                self.place[module] = len(self.place)
        self.parents = {norm[:end] for norm in self.norms for end in dots(norm)}  # modules with BNs
        self.named = {norm: self.find_namesake(norm) for norm in self.norms}
        owned = {name for name, fits in self.named.values() if name and fits}
        contrary = {group(norm) for norm, (name, fits) in self.named.items() if name and not fits}
        pending: list[str] = []  # convolutions since the last BN
        orphans: list[str] = []
        for name in self.place:
            if name in self.convs:
                pending.append(name)
                continue
            conv, reason = self.choose(name, pending, owned, contrary)
            if conv is None:
                orphans.append(name)
            elif reason:
                self.doubtful[conv] = reason
            else:
                self.certain[conv] = name
            pending = []
        self.leave_out_pre_activation(orphans)

    def find_namesake(self, norm: str) -> tuple[str | None, bool]:
        """Return the convolution called like a BN, and whether it has as many channels."""
        channels = len(self.state[f"{norm}.running_var"])
        known = [
            name
            for name in namesakes(norm)
            if name in self.convs and (self.sorted or self.place[name] < self.place[norm])
        ]
        fitting = [name for name in known if len(self.convs[name]) == channels]
        return next(iter(fitting or known), None), bool(fitting)

    def choose(
        self, norm: str, pending: list[str], owned: set[str], contrary: set[str]
    ) -> tuple[str | None, str]:
        """Return the convolution before a BN, if any, and why the pair is doubtful, if it is."""
        name, fits = self.named[norm]
        channels = len(self.state[f"{norm}.running_var"])
        last = pending[-1] if pending and not self.sorted else None
        ordered = last if last is not None and len(self.convs[last]) == channels else None
        if not fits:
            if ordered is None or ordered in self.certain:
                return None, ""
            return ordered, "" if self.is_near(
                ordered, norm
            ) else f"the next BN, {norm}, is elsewhere"
        assert name is not None
        if group(norm) in contrary:
            return name, f"BNs called like {norm} do not follow their convolutions in other blocks"
        between = pending[pending.index(name) + 1 :] if name in pending else []
        if self.sorted:  # any of the BN's module may come between
            home = norm.rpartition(".")[0]
            between = [conv for conv in self.children.get(home, []) if conv != name]
        if extra := [conv for conv in between if conv not in owned]:
            return name, f"{extra[0]} stands between it and {norm}"
        if ordered is not None and ordered != name:
            self.ambiguous.append(f"{name} -> {norm}")
        return name, ""

    def leave_out_pre_activation(self, orphans: list[str]) -> None:
        """Leave out all pairs by name if the last BN is alone and the first convolution has no BN.

        So it is in networks of pre-activation whose blocks register the convolution first.
        """
        stems = [name for name, weight in self.convs.items() if weight.shape[1] == 3]  # of RGB
        if not orphans or next(iter([*stems, *self.convs]), None) in self.certain:
            return
        end = self.place[orphans[-1]]
        before = [conv for conv in self.convs if self.sorted or self.place[conv] < end]
        channels = len(self.state[f"{orphans[-1]}.running_var"])
        if not before or len(self.convs[before[-1]]) != channels:
            return
        for name, norm in list(self.certain.items()):
            if self.named[norm][0] == name and (self.sorted or self.place[norm] < end):
                self.doubtful[name] = f"{orphans[-1]} comes last, as in networks of pre-activation"
                del self.certain[name]

    def is_near(self, conv: str, norm: str) -> bool:
        """Return whether a convolution stands in the BN's module, or there in one without BNs or
        with a name like the BN's; or the BN in the convolution's module.
        """
        if norm.startswith(f"{conv}."):
            return True
        home = norm[: norm.rfind(".") + 1]  # with its dot
        inner = home + conv.removeprefix(home).partition(".")[0]
        return conv.startswith(home) and (inner in namesakes(norm) or inner not in self.parents)


def convolution_of(key: str, tensor: Tensor) -> str | None:
    """Return the name of the convolution whose weight this is, None for other tensors.

    The weights of torch.nn.utils are known: prune, spectral_norm, weight_norm and the
    parametrizations that have followed them.
    """
    return WEIGHT.sub("", key) if tensor.ndim == 4 and WEIGHT.search(key) else None


def is_sorted(state: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors are in the order of their names, as in .safetensors files.

    Modules register their weight before their bias. The counters of BN do not matter: safetensors
    puts these before all others.
    """
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    return names == sorted(names)


def natural(name: str) -> list[str | int]:
    """Return a key that sorts the numbers in a name as numbers: every second part is one."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def dots(name: str) -> list[int]:
    return [position for position, character in enumerate(name) if character == "."]


def group(norm: str) -> str:
    """Return what the modules of blocks of one kind have in common: their name without numbers."""
    return re.sub("[0-9]+", "#", norm.rpartition(".")[0])


def namesakes(norm: str) -> list[str]:
    """Return the usual names of the convolution before a BN, the likeliest first."""
    parent, dot, leaf = norm.rpartition(".")
    whole = norm.replace("normalization", "convolution")
    alike = [re.sub("bn|norm", "conv", whole)]  # lists, too: bns.0 and convs.0
    if leaf.isdecimal():
        alike.append(f"{parent}{dot}{int(leaf) - 1}")
    elif re.search("bn|norm", leaf):
        alike.append(parent + dot + re.sub("bn|norm", "conv", leaf))
    if leaf in ("bn", "norm"):
        alike.append(parent)  # the BN stands in its convolution
    return [name for name in alike if name not in (norm, "")]


def first_keys(state: Mapping[str, Tensor], count: int = 5) -> str:
    """Return the first keys of a state dict, for messages."""
    keys = list(state)
    return ", ".join(keys[:count]) + (f", ... ({len(keys)} in all)" if len(keys) > count else "")
