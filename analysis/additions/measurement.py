"""Measuring the residual additions of a network on batches: `analysis.measure_branches`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.additions.finding import recording_additions
from analysis.additions.moments import additions_frame
from analysis.measuring.batches import count_images, device_of, run
from analysis.measuring.eval_mode import evaluation
from analysis.measuring.measurement import PRECISIONS
from analysis.measuring.result import network_in


class NoAdditions(ValueError):
    """A network has no residual additions; the message lists its other sums."""


def measure_branches(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    network: str = "network",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    positions: bool = False,
    mask: Callable[[Any], Tensor] | None = None,
    precision: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """Measure how much each residual addition of a network changes the signal.

    model: any network, on a CPU or a CUDA GPU; it is left as it was.
    batches: tensors (N, ...), (inputs, labels), or dicts of tensors that the network takes as
        keywords.
    network: the label in the frame.
    forward: runs the model on one batch of any other type.
    positions: add the columns `norm_ratio, growth, cosine, block_influence, angle`.
    mask: returns for a batch which positions count, (N, T) bool: not padding, not the
        begin-of-sequence token, which are outliers. It needs additions of shape (N, T, C).
    precision: `float32`, or `bfloat16` for autocast.
    progress: called with the number of images after each batch.

    Returns the frame, one row an addition (see `additions_frame`), with the sums that are no
    residual additions in `frame.attrs["others"]`. Raises ValueError if there are no batches or no
    additions, and then lists the sums that were seen; and for NaN or infinity.

    >>> layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    >>> frame = measure_branches(layer, [torch.randn(2, 5, 16)])
    >>> frame[["branch", "branch_kind", "shape"]].values.tolist()
    [['self_attn', 'attention', '5x16'], ['linear2', 'mlp', '5x16']]
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: one of {', '.join(PRECISIONS)}")
    run_batch = forward or run
    autocast = torch.autocast(
        device_of(model).type,
        PRECISIONS[precision],
        enabled=precision != "float32",
        cache_enabled=False,
    )
    images = 0
    with evaluation(model), recording_additions(model, positions=positions) as record:
        for batch in batches:
            if not (count := count_images(batch)):
                continue
            record.mask = mask(batch) if mask else None
            with autocast:
                run_batch(model, batch)
            record.end_pass()
            images += count
            if progress:
                progress(count)
    if not images:
        raise ValueError("no images: there is nothing to measure")
    if not record.additions:
        raise NoAdditions(f"{network}: no residual additions; {record.list_others()}")
    kind, depth = network_in(model)
    frame = additions_frame(
        record.additions, network=network, kind=kind, depth=depth, images=images
    )
    frame.attrs["others"] = {f"{name}: {why}": k for (name, why), k in record.others.items()}
    return frame
