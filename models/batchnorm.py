"""Every layer's std in closed form from the BN tensors alone: no data, no forward pass.

    >>> from models import build, closed_form
    >>> closed_form(build("resnet-20"))["std"].mean().round(4)  # a fresh BN has gamma 1, beta 0, variance 1
    np.float64(1.0)

In evaluation mode BN maps a channel that has mean mu and variance sigma^2 (as BN recorded them) to
one with mean beta and variance gamma^2 sigma^2 / (sigma^2 + epsilon). Over the data whose
statistics BN recorded, the response of a layer therefore has

    std^2 = within^2 + between^2,  within^2 = mean_c(gamma^2 sigma^2 / (sigma^2 + epsilon)),  between^2 = var_c(beta)

by the law of total variance. BN records augmented training images, so measurements on other images
differ: on two public checkpoints of 20 and 56 layers by 4.5 and 5.0 % in the mean over layers, in
the worst layer of the latter by 30 % (10,000 test images; tests/analysis/test_responses.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

AFFINE, STATISTICS = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
EPSILON = 1e-5  # torch's default; a state dict does not say it


def closed_form(
    network: nn.Module | Mapping[str, Tensor], kernel_size: tuple[int, int] = (3, 3)
) -> pd.DataFrame:
    """The std of every 3x3 layer's response, computed from BN's tensors.

    network: a network, or a state dict of any network whose convolutions and BNs bear the usual
    names. kernel_size: of the convolutions. Returns a frame, one row a layer: layer, name, norm,
    stage (it changes where the number of channels does), channels, mean, std, within, between.
    Which BN follows a convolution is read off names, channels and the order of the tensors (see
    `pair_by_name`); `frame.attrs["ambiguous"]` lists the pairs for which these do not agree,
    `frame.attrs["unpaired"]` the convolutions that no BN seems to follow. `frame.attrs["sorted"]`
    is True where the tensors are sorted by name, as in a .safetensors file, and their order says
    nothing. Raises ValueError where no convolution of that kernel is followed by a BN of as many
    channels, or where a BN has only one of weight and bias, or others in their place.
    """
    import pandas as pd

    state = fetch_vectors(network.state_dict() if isinstance(network, nn.Module) else network)
    modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    rows: list[dict[str, object]] = []
    ambiguous: list[str] = []
    stage, last_channels = 0, None
    kernels = convolutions(state)
    for name, norm, certain in pair_by_name(state):
        if kernels[name].shape[2:] != kernel_size:
            continue
        channels, spread = describe(state, norm, getattr(modules.get(norm), "eps", EPSILON))
        stage += channels != last_channels
        last_channels = channels
        rows.append(
            {
                "layer": len(rows) + 1,
                "name": name,
                "norm": norm,
                "stage": stage,
                "channels": channels,
            }
            | spread
        )
        if not certain:
            ambiguous.append(f"{name} -> {norm}")
    if not rows:
        kernel = "x".join(map(str, kernel_size))
        raise ValueError(
            f"no {kernel} convolution followed by a BN in this state dict; its first keys: {first_keys(state)}"
        )
    frame = pd.DataFrame(rows)
    paired = {row["name"] for row in rows}
    unpaired = [
        name
        for name, tensor in kernels.items()
        if tensor.shape[2:] == kernel_size and name not in paired
    ]
    frame.attrs |= {"ambiguous": ambiguous, "unpaired": unpaired, "sorted": is_sorted(state)}
    return frame


def fetch_vectors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose vectors of numbers are on the CPU: one transfer from each device."""
    fetched = dict(state)
    vectors = {name: x for name, x in state.items() if x.ndim == 1 and x.is_floating_point()}
    for device in {x.device for x in vectors.values()}:
        names = [name for name, x in vectors.items() if x.device == device]
        together = torch.cat([vectors[name] for name in names]).cpu()
        parts = torch.split(together, [len(vectors[name]) for name in names])
        fetched |= zip(names, parts, strict=True)
    return fetched


def describe(
    state: Mapping[str, Tensor], norm: str, epsilon: float
) -> tuple[int, dict[str, float]]:
    """The number of channels of a BN, and the mean, std, within and between of its output."""
    check_affine(state, norm)
    variance = state[f"{norm}.running_var"].double()  # (C,)
    gamma, beta = (
        state[key].double()
        if (key := f"{norm}.{leaf}") in state
        else torch.full_like(variance, neutral)
        for leaf, neutral in (("weight", 1.0), ("bias", 0.0))  # of a BN without affine parameters
    )
    within2 = (gamma.square() * variance / (variance + epsilon)).mean().item()
    between2 = beta.var(correction=0).item()
    spread = {"std": (within2 + between2) ** 0.5, "within": within2**0.5, "between": between2**0.5}
    return len(beta), spread | {"mean": beta.mean().item()}


def check_affine(state: Mapping[str, Tensor], norm: str) -> None:
    """ValueError unless a BN has gamma and beta, or neither of them, nor anything that may be them."""
    affine = [leaf for leaf in AFFINE if f"{norm}.{leaf}" in state]
    if len(affine) == 2:
        return
    leaves = [key.removeprefix(f"{norm}.") for key in state if key.startswith(f"{norm}.")]
    beside = affine or [leaf for leaf in leaves if "." not in leaf and leaf not in STATISTICS]
    if beside:
        missing = " and ".join(leaf for leaf in AFFINE if leaf not in affine)
        raise ValueError(
            f"{norm} has no {missing} beside its {', '.join(beside)}: what it puts out cannot be told"
        )


def convolutions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the convolutions, by the module's name."""
    return {
        name: state[key] for key in state if (name := convolution_of(key, state[key])) is not None
    }


def convolution_of(key: str, tensor: Tensor) -> str | None:
    """The name of the convolution whose weight this is, also of a pruned or re-parametrised one;
    None of other tensors.

    Of torch.nn.utils: prune and spectral_norm, weight_norm, and the parametrizations that have
    followed them.
    """
    module = re.sub(
        r"\.(weight|weight_orig|weight_v|parametrizations\.weight\.original1?)$", "", key
    )
    return module if module != key and tensor.ndim == 4 else None


def is_sorted(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are in the order of their names; modules register their weight before
    their bias.

    Without BN's counters: safetensors' load_file puts these before all others.
    """
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    return names == sorted(names)


def in_order(state: Mapping[str, Tensor]) -> list[str]:
    """The keys as modules registered them; where they are sorted by name, as modules probably did.

    That is by number, with a BN right behind the convolution that is called alike, or right before
    it, if there are such pairs of different channels: in networks of pre-activation BN has those of
    the convolution's input.
    """
    if not is_sorted(state):
        return list(state)
    convs = convolutions(state)
    norms = {
        key.removesuffix(".running_var"): len(x)
        for key, x in state.items()
        if key.endswith(".running_var")
    }
    before = any(
        name in convs and len(convs[name]) != norms[norm]
        for norm in norms
        for name in namesakes(norm)
    )

    def place(key: str) -> list[tuple[list[str | int], int]]:
        parts = [
            (part, re.sub("bn|normalization|norm|convolution", "conv", part))
            for part in key.split(".")[:-1]
        ]
        return [
            (natural(alike), (-1 if before else 1) * bool(re.search("bn|norm", part)))
            for part, alike in parts
        ]

    return sorted(state, key=place)


def natural(name: str) -> list[str | int]:
    """A name as a key to sort by, with its numbers as numbers: every second part is one."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def pair_by_name(state: Mapping[str, Tensor]) -> list[tuple[str, str, bool]]:
    """The convolutions of a state dict, each with the BN that follows it and whether that is
    certain, in order.

    A BN's convolution has as many channels and comes before it. By name it is the one called alike
    in the same module (conv2 and bn2 or norm2, convolution and normalization, convs.0 and bns.0, 3
    and 4 in a sequence); by order the last one with no BN between. The name wins over the order. It
    is certain where both say the same, or where only one says anything and it is near.
    """
    convs: dict[str, int] = {}
    pairs: list[tuple[str, str, bool]] = []
    last: str | None = None  # the last convolution, until a BN comes
    for key in in_order(state):
        tensor = state[key]
        module, _, leaf = key.rpartition(".")
        if (convolution := convolution_of(key, tensor)) is not None:
            convs[convolution] = len(tensor)
            last = convolution
        elif leaf == "running_var":
            named = next(
                (name for name in namesakes(module) if convs.get(name) == len(tensor)), None
            )
            ordered = last if last is not None and convs[last] == len(tensor) else None
            chosen = named or ordered
            if chosen is not None:
                alone = named is None or ordered is None
                pairs.append(
                    (chosen, module, is_near(chosen, module, state) if alone else named == ordered)
                )
            last = None
    return pairs


def is_near(conv: str, norm: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a convolution stands in the BN's module, or there in one without BNs or with a name
    like the BN's.

    Or the BN stands in the convolution's. Else it may be the last of a pre-activation block, which
    feeds an addition whatever BN comes next in the file.
    """
    if norm.startswith(f"{conv}."):
        return True
    home = norm[: norm.rfind(".") + 1]  # with its dot
    inner = (
        home + conv.removeprefix(home).partition(".")[0]
    )  # the convolution itself, or the module that it is in
    norms = (key for key in state if key.startswith(f"{inner}.") and key.endswith(".running_var"))
    return conv.startswith(home) and (inner in namesakes(norm) or not any(norms))


def namesakes(norm: str) -> list[str]:
    """The names that a convolution before this BN may have: the usual ones, the likeliest first."""
    parent, dot, leaf = norm.rpartition(".")
    alike = [
        re.sub("bn|norm", "conv", norm.replace("normalization", "convolution"))
    ]  # lists, too: bns.0 and convs.0
    if leaf.isdecimal():
        alike.append(f"{parent}{dot}{int(leaf) - 1}")
    elif re.search("bn|norm", leaf):
        alike.append(parent + dot + re.sub("bn|norm", "conv", leaf))
    return [name for name in alike if name != norm]


def first_keys(state: Mapping[str, Tensor], count: int = 5) -> str:
    """The first keys of a state dict, for messages."""
    keys = list(state)
    return ", ".join(keys[:count]) + (f", ... ({len(keys)} in all)" if len(keys) > count else "")
