"""Every layer's std in closed form from the BN tensors alone: no data, no forward pass.

    >>> from models import build, closed_form
    >>> closed_form(build("resnet-20"))["std"].mean().round(4)  # a fresh BN has gamma 1, beta 0, variance 1
    np.float64(1.0)

In evaluation mode BN maps a channel that has mean mu and variance sigma^2 (as BN recorded them) to one with mean beta
and variance gamma^2 sigma^2 / (sigma^2 + epsilon). Over the data whose statistics BN recorded, the response of a layer
therefore has

    std^2 = within^2 + between^2,  within^2 = mean_c(gamma^2 sigma^2 / (sigma^2 + epsilon)),  between^2 = var_c(beta)

by the law of total variance. BN records augmented training images, so measurements on other images differ: on two
public checkpoints of 20 and 56 layers by 4.5 and 5.0 % in the mean over layers, in the worst layer of the latter by
30 % (10,000 test images; tests/analysis/test_responses.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

EPSILON = 1e-5  # torch's default; a state dict does not say it


def closed_form(network: nn.Module | Mapping[str, Tensor]) -> pd.DataFrame:
    """The std of every 3x3 layer's response, computed from BN's tensors.

    network: a network or a state dict whose 3x3 convolutions are each followed by their BN in the order of the state
    dict, as in all ResNets of torchvision's layout. Returns a frame, one row a layer: layer, name, norm, stage (it
    changes where the number of channels does), channels, mean, std, within, between. Raises ValueError where no
    convolution is followed by a BN of as many channels.
    """
    import pandas as pd

    state = network.state_dict() if isinstance(network, nn.Module) else network
    modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    rows: list[dict[str, object]] = []
    stage, last_channels = 0, None
    for layer, (name, norm) in enumerate(conv_norm_names(state), start=1):
        gamma, beta = state[f"{norm}.weight"].double(), state[f"{norm}.bias"].double()  # (C,)
        variance = state[f"{norm}.running_var"].double()
        epsilon = getattr(modules.get(norm), "eps", EPSILON)
        within2 = (gamma.square() * variance / (variance + epsilon)).mean().item()
        between2 = beta.var(correction=0).item()
        stage += len(beta) != last_channels
        last_channels = len(beta)
        row = {"layer": layer, "name": name, "norm": norm, "stage": stage, "channels": len(beta)}
        spread = {"std": (within2 + between2) ** 0.5, "within": within2**0.5, "between": between2**0.5}
        rows.append(row | {"mean": beta.mean().item()} | spread)
    if not rows:
        raise ValueError("no 3x3 convolution followed by a BN in this state dict; its first keys: " + first_keys(state))
    return pd.DataFrame(rows)


def conv_norm_names(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The 3x3 convolutions of a state dict, each with the BN that follows it, in the order of the state dict."""
    pairs = []
    conv: str | None = None
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and tensor.ndim == 4:
            conv = module
        elif leaf == "running_var" and conv is not None:
            kernel = state[f"{conv}.weight"]  # (C, C_in / groups, H, W)
            if kernel.shape[0] == len(tensor) and kernel.shape[2:] == (3, 3):
                pairs.append((conv, module))
            conv = None
    return pairs


def first_keys(state: Mapping[str, Tensor], count: int = 5) -> str:
    """The first keys of a state dict, for messages."""
    keys = list(state)
    return ", ".join(keys[:count]) + (f", ... ({len(keys)} in all)" if len(keys) > count else "")
