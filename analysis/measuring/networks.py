"""The numbers of each network, from its sources: measured on images by hooks, or computed from BN's
tensors.

    plan = prepare(args, found)  # analysis.cli.items
    frames = measure_all(args, plan)

All networks run on a batch of images before the next batch is taken: images are read and decoded
once. Of several processes (analysis.measuring.processes) each measures its part of the images.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import reduce
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from analysis.measuring.processes import count_processes, exchange, leave, part_of, rank, together
from models.messages import does_not_run, is_out_of_memory

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd
    import torch
    from torch import Tensor

    from analysis.cli.items import Data, Network, Plan
    from analysis.measuring.result import Measurement

BLOCK_IMAGES = (
    1000  # on which residual blocks are measured: the whole probe set, and enough of others
)
RESPONSE = 64  # bytes a pixel of the image, of the first stage's: 16 channels, or 64 at half the size, in float32
FEW = 16  # images in the first batch, which runs through the network itself: the others are cheaper
SHOWN = 3  # names that a line lists
ERROR_IMAGES, BATCHES = 256, 8  # on which bfloat16 is compared with float32


def default_batch_size(side: int, device: str) -> int:
    """Images of side x side pixels at a time: as many as there is room for, but 8 at least and
    1,024 at most.
    """
    return max(8, min(1024, room(device) // (RESPONSE * side**2)))


def room(device: str) -> int:
    """Bytes for one layer's response: four level 2 caches a core in use, or a 64th of a GPU's free
    memory.

    Four: 128 images at once took 4 % less time than 32 (resnet-56, 2 cores with 1 MB each); more
    was not tried.
    """
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0] // 64
    known = "SC_LEVEL2_CACHE_SIZE" in getattr(os, "sysconf_names", ()) and os.sysconf(
        "SC_LEVEL2_CACHE_SIZE"
    )
    return 4 * (known or 2**20) * torch.get_num_threads()


def device_of(args: argparse.Namespace) -> torch.device:
    """Where networks run; each process of one machine has a GPU of its own (see
    analysis.measuring.processes).
    """
    import torch

    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def measure_all(args: argparse.Namespace, plan: Plan) -> list[pd.DataFrame]:
    """The frame of each network: measured on the images, by the closed form, or both, one below the
    other.
    """
    import pandas as pd

    parts: list[list[pd.DataFrame]] = [[] for _ in plan.networks]
    computed: list[pd.DataFrame] = []
    if "batchnorm" in plan.sources:  # first: what cannot be computed is said before all is measured
        with together():
            computed = [compute(network) for network in plan.networks]
    if "hooks" in plan.sources:
        assert (
            plan.data is not None
        )  # find_data raises where hooks are asked for and there are none
        errors = (
            rounding_errors(args, plan.networks, plan.data) if args.precision == "bfloat16" else []
        )
        measured = measure_on(args, plan.networks, plan.data)
        for network, part, frame, error in zip_longest(plan.networks, parts, measured, errors):
            frame.attrs["rounding"] = error
            part.append(frame)
            if frame.attrs["unpaired"]:
                print(
                    f"{network.label}: not measured, no BN takes in their output: {list_names(frame.attrs['unpaired'])}"
                )
            if frame.attrs["unseen"]:
                print(
                    f"{network.label}: not measured, they did not run as modules: {list_names(frame.attrs['unseen'])}"
                )
            if args.verbose:
                print(f"{network.label}: measured {frame.attrs['path']}")
    leave()
    for part, frame in zip(parts, computed, strict=False):
        part.append(frame)
    result = []
    for frames in parts:
        result.append(pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0])
        result[-1].attrs = dict(frames[0].attrs)
    return result


def list_names(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )


def compute(network: Network) -> pd.DataFrame:
    """The frame of one network by the closed form."""
    from analysis.measuring.frame import make_frame
    from models.batchnorm import closed_form

    checkpoint, config = network.checkpoint, network.checkpoint.config
    try:
        rows = closed_form(checkpoint.state if checkpoint.model is None else checkpoint.model)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    kind, depth = ("other", None) if config is None else (config.kind, config.depth)
    unpaired, ambiguous = rows.attrs.pop("unpaired"), rows.attrs.pop("ambiguous")
    if unpaired:
        print(
            f"{network.label}: not computed, no BN seems to take in their output: {list_names(unpaired)}"
        )
    warnings = []
    if rows.attrs.pop("sorted"):
        warnings.append(
            "the tensors are sorted by name, and so are the layers: --model and a forward pass tell"
        )
    if ambiguous:
        warnings.append(
            f"names and order of the tensors do not agree on {list_names(ambiguous)}: a forward pass tells"
        )
    checkpoint.warnings.extend(warnings)
    for line in warnings:
        print(f"warning: {network.label}: {line}", file=sys.stderr)
    return make_frame(rows, network=network.label, kind=kind, depth=depth, source="batchnorm")


def measure_on(args: argparse.Namespace, networks: list[Network], data: Data) -> list[pd.DataFrame]:
    """The frame of each network, measured on images."""
    frames = []
    for network, result in zip(networks, run_on(args, networks, data), strict=True):
        with named(network):
            frames.append(result.to_frame(network.label))
            frames[-1].attrs |= {
                "accuracy": result.accuracy,
                "unpaired": list(result.unpaired),
                "unseen": list(result.unseen),
                "path": result.method,
            }
    return frames


def run_on(args: argparse.Namespace, networks: list[Network], data: Data) -> list[Measurement]:
    """What measuring each network on images gives; of several processes each measures its part of
    them.

    All networks run on a batch before the next one: images are read and decoded once.
    """
    from tqdm import tqdm

    from analysis.measuring.measurement import measuring
    from analysis.measuring.result import Measurement
    from models.data.folder import ImageFolder
    from models.data.formats import CLASSES

    device = device_of(args)
    classes = data.classes if isinstance(data, ImageFolder) else len(CLASSES)
    digests: dict[Any, bytes] = getattr(
        data, "digests", {}
    )  # of a folder's files, as they are read
    digests.clear()  # those of the sample
    data = data.some(args.images or len(data))
    first, end = part_of(len(data))
    total = (end - first) * len(networks)
    silent = True if rank() else None  # None: where stderr is no terminal
    with together(), ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, unit=" images", leave=False, disable=silent))
        measurements = []
        for network in networks:
            options = {"precision": args.precision, "classes": classes, "first_image": first}
            meter = measuring(network.model.to(device), **options)
            measurements.append(stack.enter_context(meter))
        for batches in stack.enter_context(closing(make_batches(args, data, networks, first, end))):
            for network, measurement, batch in zip(networks, measurements, batches, strict=True):
                bar.set_description(network.label)
                with named(network):
                    bar.update(measurement.add(batch))
    results = [measurement.result() for measurement in measurements]
    parts = exchange((results, digests))
    for _, theirs in parts:
        digests.update(theirs)
    merged = []
    for network, *others in zip(networks, *(results for results, _ in parts), strict=True):
        with named(network):
            merged.append(reduce(Measurement.merge, others))
    return merged


def rounding_errors(
    args: argparse.Namespace, networks: list[Network], data: Data
) -> list[dict[str, float]]:
    """For each network the relative differences of std in bfloat16 from float32, on some images;
    printed too.
    """
    from analysis.measuring.frame import relative_difference

    images = min(ERROR_IMAGES, args.images or len(data))
    size = max(
        1, images // (BATCHES * count_processes())
    )  # several batches each: only the first is not folded
    few = {
        precision: argparse.Namespace(
            **vars(args) | {"images": images, "batch_size": size, "precision": precision}
        )
        for precision in ("float32", "bfloat16")
    }
    exact, rounded = (measure_on(options, networks, data) for options in few.values())
    errors = []
    for network, ours, theirs in zip(networks, rounded, exact, strict=True):
        relative = relative_difference(ours["std"], theirs["std"])
        errors.append({"images": images, "mean": relative.mean(), "largest": relative.max()})
        print(
            f"{network.label}: std in bfloat16 is {100 * relative.mean():.2f} % from float32 in the mean over layers, "
            f"{100 * relative.max():.2f} % in layer {relative.argmax() + 1} ({images} images)"
        )
    return errors


@contextmanager
def named(network: Network) -> Iterator[None]:
    """Errors of the block begin with the network's file; those of a user's network are in one line,
    too.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{network.checkpoint.path}: {error}") from error
    except Exception as error:
        if network.checkpoint.config is not None or is_out_of_memory(error):
            raise
        raise ValueError(f"{network.checkpoint.path}: {does_not_run(error)}") from error


def measure_blocks(args: argparse.Namespace, plan: Plan) -> pd.DataFrame | None:
    """Branch and shortcut of every residual block, on some images; None where nothing runs on
    images.
    """
    import pandas as pd

    from analysis.measuring.batches import run
    from analysis.measuring.blocks import recording_blocks
    from analysis.measuring.evaluation import evaluation

    if plan.data is None:
        return None
    some = replace(plan.data.some(args.images or len(plan.data)).some(BLOCK_IMAGES), labels=None)
    with ExitStack() as stack:
        records = []
        for network in plan.networks:
            stack.enter_context(evaluation(network.model))
            record = stack.enter_context(recording_blocks(network.model))
            if record.blocks:
                records.append((network, record))
        networks = [network for network, _ in records]
        for batches in make_batches(args, some, networks, 0, len(some)) if networks else ():
            for (network, _), batch in zip(records, batches, strict=True):
                with named(network):
                    run(network.model, batch)
    frames = []
    for network, record in records:
        with named(network):
            frames.append(record.to_frame(network.label))
    return pd.concat(frames) if frames else None


def make_batches(
    args: argparse.Namespace, data: Data, networks: list[Network], first: int, end: int
) -> Generator[list[Tensor | tuple[Tensor, Tensor]]]:
    """The images from `first` to before `end`: for every network a batch (n, 3, H, W), normalised
    as it wants them.

    With labels (n,), where there are some.
    """
    import torch

    from models.data.folder import ImageFolder
    from models.resnet import SIZES

    def normalise(part: Sequence[Tensor]) -> list[Tensor | tuple[Tensor, Tensor]]:
        batches: list[Tensor | tuple[Tensor, Tensor]] = []
        for network in networks:
            assert (
                network.checkpoint.preprocessing is not None
            )  # recognised at the latest, as there are images
            x = network.checkpoint.preprocessing(part[0])
            batches.append((x, part[1]) if len(part) > 1 else x)
        return batches

    side = SIZES["imagenet" if isinstance(data, ImageFolder) else "cifar"]
    size = args.batch_size or default_batch_size(side, device_of(args).type)
    few = min(first + FEW, end)
    for images, labels in chain(data.batches(size, first, few), data.batches(size, few, end)):
        arrays = [images] if labels is None else [images, labels]
        yield normalise([torch.from_numpy(array) for array in arrays])
