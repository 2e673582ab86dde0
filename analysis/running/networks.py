"""Measure networks on images, compute them by the closed form, or both.

    results = measure_networks(networks, images, options)
    results[0].frame  # one row a layer and source

All networks run on a batch of images before the next batch is read, so that images are read and
decoded once. Each of several processes (analysis.running.processes) measures its own part.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.running.computing import compute, report_missing
from analysis.running.processes import count_processes, exchange, leave, part_of, rank, together
from models.messages import does_not_run, is_out_of_memory, out_of_memory

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import numpy as np
    import pandas as pd
    import torch
    from torch import Tensor, nn

    from analysis.measuring.result import Measurement
    from models.checkpoints.loading import Checkpoint
    from models.data import Batch, ImageSet

RESPONSE = 64  # bytes of a response in the first stage, per pixel of the image, in float32
FIRST = 16  # images in the first batch, which runs unfolded and so costs more
ROUNDING_IMAGES, ROUNDING_BATCHES = 256, 8  # on which bfloat16 is compared with float32


@dataclass(frozen=True)
class Options:
    """What is measured, on what, and how.

    sources: `hooks`, `batchnorm` or both; empty if hooks are to be used if there are images.
    images: measure on so many of them; None for all.
    models: `FILE.py:FUNCTION` by label; the label None is for every network.
    weights: which set of weights in a checkpoint; None for the main one.
    eps: of BN, for closed forms of files, which do not say it; None for torch's default.
    """

    sources: tuple[str, ...] = ()
    data: Path | None = None
    split: str = "test"
    images: int | None = None
    normalize: str = "auto"
    models: dict[str | None, str] = field(default_factory=dict)
    ema: bool = False
    weights: str | None = None
    eps: float | None = None
    batch_size: int | None = None
    device: str = "auto"
    precision: str = "float32"
    fold: bool = True
    verbose: bool = False

    @property
    def only_closed_form(self) -> bool:
        """Whether no image is needed."""
        return self.sources == ("batchnorm",)


@dataclass(frozen=True)
class Network:
    """A checkpoint under the label that it has in frames, figures and messages.

    built_by: the `FILE.py:FUNCTION` that built the network, if one did.
    """

    label: str
    checkpoint: Checkpoint
    built_by: str | None = None

    @property
    def model(self) -> nn.Module:
        """The network; `open_networks` sees to it that there is one if it has to run."""
        assert self.checkpoint.model is not None
        return self.checkpoint.model

    @property
    def kind_and_depth(self) -> tuple[str, int | None]:
        """Such as (`residual`, 56); (`other`, None) for a network that is none of the paper's."""
        config = self.checkpoint.config
        return ("other", None) if config is None else (config.kind, config.depth)


@dataclass(frozen=True)
class Measured:
    """The numbers of one network.

    frame: one row a layer; the rows of a second source follow those of the first.
    measurement: what the images gave; None for the closed form alone.
    rounding: relative difference of bfloat16 from float32 (images, mean, largest), if measured.
    eps: the epsilon that the closed form assumed; None if the network says its own, or if unused.
    missing: convolutions without a row, and why, by name.
    """

    network: Network
    frame: pd.DataFrame
    measurement: Measurement | None = None
    rounding: dict[str, float] | None = None
    eps: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


def measure_networks(
    networks: Sequence[Network], images: ImageSet | None, options: Options
) -> list[Measured]:
    """Return the numbers of each network from the sources that the options name.

    Without images, or with `batchnorm` among the sources, the closed form is computed. Only the
    first of several processes returns.
    """
    import pandas as pd

    sources = options.sources or (("batchnorm",) if images is None else ("hooks",))
    computed: list[pd.DataFrame] = []
    if "batchnorm" in sources:  # before minutes of measuring: it may raise
        with together():
            computed = [
                compute(network.label, network.checkpoint, options.eps) for network in networks
            ]
    measured: list[Measurement] = []
    rounding: list[dict[str, float]] = []
    if "hooks" in sources:
        assert images is not None  # open_networks raises if there are none
        if options.precision == "bfloat16":
            rounding = rounding_errors(networks, images, options)
        measured = run_networks(networks, images, options)
    leave()
    if options.eps is not None and not computed:
        print("--eps: no effect, it is for closed forms (--source batchnorm)", file=sys.stderr)
    results = []
    for number, network in enumerate(networks):
        result = Measured(network, pd.DataFrame())
        if measured:
            result = measured_result(network, measured[number], options.verbose)
        if rounding:
            result = replace(result, rounding=rounding[number])
        if computed:
            result = add_closed_form(result, computed[number])
        results.append(result)
    return results


def measured_result(network: Network, measurement: Measurement, verbose: bool) -> Measured:
    """Return what hooks measured; say what they did not."""
    missing = {**measurement.unpaired, **measurement.unseen}
    report_missing(network.label, "measured", missing)
    if verbose:
        print(f"{network.label}: measured {measurement.method}")
    with named(network):
        frame = measurement.to_frame(network.label)
    return Measured(network, frame, measurement, missing=missing)


def add_closed_form(result: Measured, rows: pd.DataFrame) -> Measured:
    """Return a result with the rows of the closed form; beside hooks, those of the same layers."""
    import pandas as pd

    from analysis.measuring.frame import make_frame

    label, (kind, depth) = result.network.label, result.network.kind_and_depth
    if result.measurement is None:
        missing = rows.attrs["unpaired"] | dict.fromkeys(rows.attrs["idle"], "it never ran")
        report_missing(label, "computed", missing)
        frame = make_frame(rows, network=label, kind=kind, depth=depth, source="batchnorm")
        return replace(result, frame=frame, eps=rows.attrs["eps"], missing=missing)
    pairs = result.frame[["name", "norm"]]
    kept = pairs.merge(rows)  # in the order in which they ran
    kept["layer"] = range(1, len(kept) + 1)
    kept["stage"] = (kept["channels"] != kept["channels"].shift()).cumsum()
    if lost := [name for name in rows["name"] if name not in set(kept["name"])]:
        report_missing(label, "computed", dict.fromkeys(lost, "hooks saw no such layer"))
    known = {name: result.frame[name].iloc[0] for name in ("kind", "depth")}
    frame = make_frame(kept, network=label, source="batchnorm").assign(**known)
    both = pd.concat([result.frame, frame.astype(result.frame.dtypes)], ignore_index=True)
    return replace(result, frame=both, eps=rows.attrs["eps"])


def run_networks(
    networks: Sequence[Network], images: ImageSet, options: Options
) -> list[Measurement]:
    """Run each network once on every image, and return what was measured, merged over processes."""
    from tqdm import tqdm

    from analysis.measuring.measurement import measuring
    from analysis.measuring.result import Measurement

    device = device_of(options)
    digests: dict[Path, bytes] = getattr(images, "digests", {})  # of files, as they are read
    digests.clear()  # those of the sample
    first, end = part_of(len(images))
    total = (end - first) * len(networks)
    with together(), ExitStack() as stack:
        bar = tqdm(total=total, unit=" images", leave=False, disable=True if rank() else None)
        stack.enter_context(bar)
        meters = [
            stack.enter_context(
                measuring(
                    network.model.to(device),
                    precision=options.precision,
                    fold=options.fold,
                    classes=images.classes,
                    first_image=first,
                    additions=True,
                )
            )
            for network in networks
        ]
        batches = stack.enter_context(closing(make_batches(images, first, end, options)))
        for raw, labels in batches:
            for network, meter in zip(networks, meters, strict=True):
                bar.set_description(network.label)
                with named(network):
                    bar.update(meter.add(normalised(network, raw, labels)))
    parts = exchange(([meter.result() for meter in meters], digests))
    merged = []
    for network, *others in zip(networks, *(results for results, _ in parts), strict=True):
        with named(network):
            merged.append(reduce(Measurement.merge, others))
    for _, theirs in parts:
        digests.update(theirs)
    return merged


def normalised(network: Network, raw: np.ndarray, labels: np.ndarray | None) -> Any:
    """Return a batch as the network wants it: images (n, 3, H, W), with labels (n,) if known."""
    import torch

    preprocessing = network.checkpoint.preprocessing
    assert preprocessing is not None  # recognised at the latest, as there are images
    x: Tensor = preprocessing(raw)
    return x if labels is None else (x, torch.from_numpy(labels))


def make_batches(images: ImageSet, first: int, end: int, options: Options) -> Generator[Batch]:
    """Yield images (n, H, W, 3), uint8, and labels (n,); the first batch is a small one."""
    size = options.batch_size or default_batch_size(images.side, device_of(options).type)
    few = min(first + FIRST, end)
    yield from images.batches(size, first, few)
    yield from images.batches(size, few, end)


def default_batch_size(side: int, device: str) -> int:
    """Return how many images of side x side pixels to run at a time: from 8 to 1,024."""
    return max(8, min(1024, room(device) // (RESPONSE * side**2)))


def room(device: str) -> int:
    """Return the bytes for one layer's response: four level-2 caches a core, 1/64 of a free GPU.

    With four caches, 128 images at once took 4 % less time than 32 (resnet-56, 2 cores, 1 MB each).
    """
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0] // 64
    known = "SC_LEVEL2_CACHE_SIZE" in getattr(os, "sysconf_names", ())
    cache = os.sysconf("SC_LEVEL2_CACHE_SIZE") if known else 0
    return 4 * (cache or 2**20) * torch.get_num_threads()


def device_of(options: Options) -> torch.device:
    """Return the device that networks run on; each process of a machine has a GPU of its own."""
    import torch

    cuda = options.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def rounding_errors(
    networks: Sequence[Network], images: ImageSet, options: Options
) -> list[dict[str, float]]:
    """Return, and print, how far the stds in bfloat16 are from float32 on some of the images."""
    from analysis.measuring.frame import relative_difference

    some = images.some(min(ROUNDING_IMAGES, len(images)))
    size = max(1, len(some) // (ROUNDING_BATCHES * count_processes()))  # only the first is unfolded
    exact, rounded = (
        run_networks(networks, some, replace(options, batch_size=size, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    errors = []
    for network, ours, theirs in zip(networks, rounded, exact, strict=True):
        stds = [part.to_frame(network.label)["std"] for part in (ours, theirs)]
        relative = relative_difference(*stds)
        errors.append({"images": len(some), "mean": relative.mean(), "largest": relative.max()})
        print(
            f"{network.label}: std in bfloat16 is {100 * relative.mean():.2f} % from float32 in "
            f"the mean over layers, {100 * relative.max():.2f} % in layer "
            f"{relative.argmax() + 1} ({len(some)} images)"
        )
    return errors


@contextmanager
def named(network: Network) -> Iterator[None]:
    """Put the network's file in front of errors, and any error of a user's network in one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{network.checkpoint.path}: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise ValueError(f"{network.checkpoint.path}: {out_of_memory(error)}") from error
        if network.checkpoint.config is not None:
            raise
        raise ValueError(f"{network.checkpoint.path}: {does_not_run(error)}") from error
