"""Record the responses of a network while it trains, in anybody's loop; see docs/training.md."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from itertools import chain
from operator import index
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import distributed, nn

from analysis.measuring.batches import device_of
from analysis.measuring.frame import make_frame
from analysis.measuring.measurement import measuring
from analysis.measuring.norms import is_norm
from analysis.measuring.pairs import list_reasons
from analysis.measuring.result import Measurement, name_of, network_in, unwrapped
from models.batchnorm import closed_form
from models.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Recorder:
    """Record the std of every layer's response at chosen steps of a training.

    Without `images` a record is the closed form (models.batchnorm): no forward pass, one transfer
    from a GPU. Recording leaves weights, buffers, training flags and random numbers as they were,
    and no hook stays in the network: the losses of the training are the same to the last bit.

    With torch.distributed, create the recorder and call `record` on every rank. Rank 0 returns the
    numbers, the other ranks return {}. With `images`, the ranks' images are merged.

    model: the network that is trained, as it is or wrapped by torch.compile or DDP.
    every: steps from one record to the next.
    images: a fixed batch, normalised as for training: a tensor (N, C, H, W), (images, labels), or a
        dict of tensors. The network runs on it in evaluation mode, measured by hooks.
    layers: patterns such as "layer3.*" for the names of the convolutions to record; None for all.
    network: the label in the frame and the figure; by default resnet-20 or the class of the model.
    kernel_size: of the convolutions to record.

    Raises ValueError if there is nothing to record: no BN, no such convolution before a BN, or no
    layer that matches a pattern. Later, if a record fails, `record` warns and returns {}.

    >>> from models import build
    >>> recorder = Recorder(build("resnet-8"), every=10, layers="layer1.*")
    >>> recorder.record(5)
    {}
    >>> list(recorder.record(10))
    ['response_std/layer1.0.conv1', 'response_std/layer1.0.conv2', 'response_std/mean']
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        images: Any = None,
        layers: str | Sequence[str] | None = None,
        network: str | None = None,
        kernel_size: tuple[int, int] = (3, 3),
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: the number of steps between records is 1 or more")
        self.model, self.every, self.images = unwrapped(model), every, images
        self.layers = [layers] if isinstance(layers, str) else layers
        self.network, self.kernel_size = network or name_of(model), kernel_size
        self.records: dict[int, pd.DataFrame] = {}  # by step, in ascending order
        self.doubts: dict[str, str] = {}  # why convolutions are not recorded or in doubt, by name
        if not any(is_norm(module) for module in self.model.modules()):
            raise ValueError(
                f"{self.network} has no BN, so it has no response to record; "
                "analysis.measure_branches(model, batches) measures residual additions instead"
            )
        if images is None:
            self._compute()  # raises now, not at the first record

    def record(self, step: int) -> dict[str, float]:
        """Record the responses if `step` is a multiple of `every`.

        Returns `response_std/NAME` for each convolution NAME (`NAME:2` for its second call in a
        pass) and `response_std/mean` over them; {} at other steps, and if `step` was the last one
        recorded. An earlier step means that the training went back: later records are dropped.
        """
        step = index(step)
        if step % self.every or step == next(reversed(self.records), None):
            return {}
        if self.images is None and ranks()[0]:
            return {}
        try:
            frame = self._compute() if self.images is None else self._measure()
        except ValueError as error:  # a diverged network: the training decides what to do about it
            warnings.warn(f"step {step} is not recorded: {error}", stacklevel=2)
            return {}
        earlier = {past: kept for past, kept in self.records.items() if past < step}
        self.records = earlier | {step: frame}
        return {} if ranks()[0] else as_values(frame)

    def frame(self) -> pd.DataFrame:
        """Return one row a layer and step: `step`, then the columns of analysis.measuring.frame."""
        if not self.records:
            raise ValueError(
                f"nothing is recorded yet; only multiples of {self.every} are recorded"
            )
        return pd.concat(self.records, names=["step"]).reset_index("step").reset_index(drop=True)

    def plot(self) -> Figure:
        """Draw the std of every layer at every recorded step, and the mean over layers below it."""
        from plots import draw_dynamics

        return draw_dynamics(self.frame().rename(columns={"step": "iteration"}))

    def save(self, path: str | Path) -> None:
        """Write the frame as a CSV file, whole or not at all; ranks other than 0 write nothing."""
        if ranks()[0]:
            return
        with replacing(path) as temporary:
            self.frame().to_csv(temporary, index=False, lineterminator="\n")

    def _compute(self) -> pd.DataFrame:
        """Return the frame by the closed form."""
        rows = closed_form(self.model, self.kernel_size)
        kind, depth = network_in(self.model)
        doubts = dict.fromkeys(rows.attrs["ambiguous"], "names and order do not agree on this pair")
        return self._select(
            make_frame(rows, network=self.network, kind=kind, depth=depth, source="batchnorm"),
            {**rows.attrs["unpaired"], **doubts},
        )

    def _measure(self) -> pd.DataFrame:
        """Return the frame measured on the images, those of all ranks together."""
        try:
            with undisturbed(self.model), measuring(self.model, kernel_size=self.kernel_size) as m:
                m.add(self.images)
            own: Measurement | ValueError = m.result()
        except ValueError as error:
            own = error
        result = merge_ranks(own)
        return self._select(result.to_frame(self.network), {**result.unpaired, **result.unseen})

    def _select(self, frame: pd.DataFrame, doubts: dict[str, str]) -> pd.DataFrame:
        """Return the rows that match a pattern, and warn of doubts if they are new."""
        if doubts != self.doubts:
            words = f"{self.network}: not recorded, or in doubt: {list_reasons(doubts)}"
            hint = "; images= tells by a forward pass" if self.images is None else ""
            warnings.warn(words + hint, stacklevel=4)
        self.doubts, frame.attrs = doubts, {}
        if self.layers is None:
            return frame
        matching = [fnmatch.filter(frame["name"], pattern) for pattern in self.layers]
        if [] in matching:
            pattern = self.layers[matching.index([])]
            names = shorten(", ".join(frame["name"]), width=80)
            raise ValueError(f"layers: {pattern!r} matches none of {self.network}'s: {names}")
        return frame[frame["name"].isin(chain(*matching))].reset_index(drop=True)


def as_values(frame: pd.DataFrame) -> dict[str, float]:
    """Return the std of each layer by name, and their mean, as a logger takes them."""
    calls = frame.groupby("name").cumcount() + 1
    names = frame["name"] + calls.map(lambda call: f":{call}" if call > 1 else "")
    stds = [*frame["std"].tolist(), float(frame["std"].mean())]
    return {f"response_std/{name}": std for name, std in zip([*names, "mean"], stds, strict=True)}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Keep a forward pass from changing random numbers or the choice of cuDNN's algorithms."""
    device = device_of(model)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        cudnn: Any = torch.backends.cudnn
        stack.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = False
        yield


def ranks() -> tuple[int, int]:
    """Return the number of this process in torch.distributed's group, and how many there are."""
    joined = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if joined else (0, 1)


def merge_ranks(result: Measurement | ValueError) -> Measurement:
    """Return what all ranks measured, or raise the error of one of them; every rank calls this."""
    results: list[Any] = [result] * ranks()[1]
    if len(results) > 1:
        distributed.all_gather_object(results, result)
    if errors := [each for each in results if isinstance(each, ValueError)]:
        raise errors[0]
    merged: Measurement = reduce(Measurement.merge, results)
    return merged
