"""What measuring costs beside an ordinary forward pass: time, memory and error of several ways,
interleaved.

    python -m analysis.benchmark --networks resnet-56 --data path/to/cifar10
    python -m analysis.benchmark --images 256 --repeats 3

Every way runs the same images in the same batches, one way after the other, round after round; a
ratio is the median of a way's seconds over the median of the plain forward pass's. Memory is the
peak of a process of its own. Errors are the largest relative one of any layer's std, against a
two-pass in float64 over the same network's responses. Writes benchmark.csv and benchmark.png/.pdf
into --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import PIPE
from time import perf_counter
from typing import TYPE_CHECKING, Any

from analysis.cli.items import PROBE, check_folder, place_of, positive
from analysis.cli.outputs import as_csv, as_images, finish, write_files
from analysis.measuring.networks import FEW, default_batch_size

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import numpy as np
    import pandas as pd
    from torch import Tensor, nn

NETWORKS = ["resnet-20", "resnet-56", "resnet-110", "plain-56", "resnet-50"]
IMAGES = 2000
SHARE = 32  # a 224x224 image costs resnet-50 as much as so many 32x32 images cost resnet-56: fewer of them are run
COLUMNS = (
    *(
        "network",
        "way",
        "device",
        "threads",
        "images",
        "batch_size",
        "repeats",
        "seconds",
        "seconds_min",
        "seconds_max",
    ),
    *("ratio", "images_per_s", "peak_mb", "above_plain_mb", "error", "note"),
)


@dataclass(frozen=True)
class Job:
    """A network and its images: all that another process needs to do the same."""

    network: str
    images: int
    batch_size: int
    data: Path | None
    device: str
    threads: int


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    return finish(run, args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.benchmark",
        description="Time, memory and error of measuring, beside a plain forward pass on the same images.",
    )
    add = parser.add_argument
    add(
        "--networks",
        nargs="+",
        default=NETWORKS,
        metavar="NAME",
        help=f"default: {' '.join(NETWORKS)}",
    )
    add(
        "--images",
        type=positive,
        metavar="N",
        help=f"of 32x32 pixels (default: {IMAGES:,}, or all where there are "
        f"fewer); of 224x224 one for {SHARE} of them",
    )
    add(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images at a time (default: as analysis.responses)",
    )
    add("--repeats", type=positive, default=5, metavar="N", help="rounds (default: %(default)s)")
    add(
        "--threads",
        type=positive,
        metavar="N",
        help="threads of torch (default: torch's own choice)",
    )
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="CIFAR-10's test images, or probe: the probe set (default: random pixels)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd
    import torch

    from analysis.measuring.evaluation import without_tf32
    from plots.benchmark import draw_benchmark

    check_folder(args.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no CUDA device on this machine; use --device cpu"
        )
    jobs = [make_job(args, name) for name in dict.fromkeys(args.networks)]
    rows: list[dict[str, Any]] = []
    for job in jobs:
        with without_tf32():  # float32 is float32, whichever way
            part = measure_job(job, args.repeats)
        print(table(pd.DataFrame(part, columns=list(COLUMNS))) + "\n", flush=True)
        rows += part
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    files = {"benchmark.csv": as_csv(frame)} | as_images(
        "benchmark", draw_benchmark(frame), ["png", "pdf"]
    )
    print(write_files(args.out, files).lstrip("\n"))


def make_job(args: argparse.Namespace, name: str) -> Job:
    """What is to be done for one network. ValueError for a network or images that do not exist."""
    import torch

    from models.resnet import SIZES, parse_name

    large = parse_name(name).images == "imagenet"
    images = args.images or IMAGES
    if large:
        images = max(1, images // SHARE)
    elif args.data:
        there = len(named_images(args.data))
        if args.images and there < images:
            raise ValueError(f"--images {images}: there are {there} images in {args.data}")
        images = min(images, there)
    size = SIZES["imagenet" if large else "cifar"]
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    batch_size = args.batch_size or default_batch_size(size, device)
    return Job(
        name,
        images,
        batch_size,
        None if large else args.data,
        device,
        args.threads or torch.get_num_threads(),
    )


def load_network(job: Job) -> nn.Module:
    """The shipped network; where there is none a fresh one, with BN's statistics of random images."""
    import torch

    import models
    from models import zoo

    if job.network in zoo.shipped():
        model = models.load(zoo.find(job.network)).model
        assert model is not None  # a shipped file holds a whole network
        return model.eval().to(job.device)
    torch.manual_seed(0)
    model = models.build(job.network)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a running mean, not one that forgets
    with torch.no_grad():
        model.train()(next(batches_of(job))[:8])
    return model.eval().to(job.device)


def named_images(path: Path) -> np.ndarray:
    """CIFAR-10's test images, or the probe set (N, 32, 32, 3), uint8."""
    from models.data import cifar10, probe

    if path == PROBE:
        return probe.load().images
    return cifar10.load(place_of(path)).images


def load_images(job: Job) -> np.ndarray:
    """Images (N, H, W, 3) uint8: the first of CIFAR-10's test set, or random pixels."""
    import numpy as np

    from models.resnet import SIZES, parse_name

    if job.data:
        return named_images(job.data)[: job.images]
    size = SIZES[parse_name(job.network).images]
    return np.random.default_rng(0).integers(0, 256, (job.images, size, size, 3), dtype=np.uint8)


def batches_of(job: Job, images: np.ndarray | None = None) -> Iterator[Tensor]:
    """Images, normalised as they are asked for: (n, 3, H, W)."""
    from models.data.preprocessing import PRESETS

    images = load_images(job) if images is None else images
    for part in (images[:FEW], images[FEW:]):
        for start in range(0, len(part), job.batch_size):
            yield PRESETS["cifar10"](part[start : start + job.batch_size])


def measure_job(job: Job, repeats: int) -> list[dict[str, Any]]:
    """The rows of one network."""
    import torch
    from tqdm import tqdm

    from analysis.baselines import WAYS, two_pass
    from analysis.measuring.measurement import measure

    torch.set_num_threads(job.threads)
    model, images = load_network(job), load_images(job)
    layers = measure(model, [next(batches_of(job, images))])  # once before the clocks run
    names = layers["norm"].tolist()
    exact = two_pass(model, names, partial(batches_of, job, images))
    notes = {way: why_not(way, job, layers) for way in WAYS}
    ways = [way for way in WAYS if not notes[way]]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    stds: dict[str, list[float]] = {}
    for _ in tqdm(range(repeats), desc=job.network, unit=" rounds", leave=False, disable=None):
        for way in ways:
            start = now(job)
            stds[way] = WAYS[way](model, names, batches_of(job, images))
            seconds[way].append(now(job) - start)
    peaks: dict[str, float | None] = {}
    for way in ways:
        peaks[way], notes[way] = peak_of(job, way, names)
    facts = {key: value for key, value in asdict(job).items() if key != "data"} | {
        "repeats": repeats
    }
    return [
        facts
        | {"way": way, "note": notes[way]}
        | (summarise(way, seconds, peaks, stds, exact, job) if way in ways else {})
        for way in WAYS
    ]


def now(job: Job) -> float:
    """Seconds, when all that was asked of a GPU is done."""
    import torch

    if job.device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def layer_error(stds: list[float], exact: list[float]) -> float | None:
    """The largest relative error of any layer; None where nothing was measured."""
    return (
        max((abs(std / true - 1) for std, true in zip(stds, exact, strict=True)), default=None)
        if stds
        else None
    )


def summarise(
    way: str,
    seconds: dict[str, list[float]],
    peaks: dict[str, float | None],
    stds: dict[str, list[float]],
    exact: list[float],
    job: Job,
) -> dict[str, Any]:
    """What was measured of one way, as columns. Ratios are of medians, beside the plain forward
    pass.
    """
    from analysis.baselines import PLAIN

    typical, peak, plain = median(seconds[way]), peaks[way], peaks[PLAIN]
    return {
        "seconds": typical,
        "seconds_min": min(seconds[way]),
        "seconds_max": max(seconds[way]),
        "ratio": typical / median(seconds[PLAIN]),
        "images_per_s": job.images / typical,
        "peak_mb": peak,
        "above_plain_mb": None if peak is None or plain is None else peak - plain,
        "error": layer_error(stds[way], exact),
    }


def why_not(way: str, job: Job, layers: pd.DataFrame) -> str:
    """Why a way is left out on this machine; empty where it is not."""
    gigabytes = (
        layers["count"].sum() / layers["images"].iloc[0] * job.images * 4 / 1e9
    )  # of float32
    if way == "store, then std" and gigabytes > memory_of_machine() / 3:
        return f"would store {gigabytes:.0f} GB"
    if way == "torchlens" and importlib.util.find_spec("torchlens") is None:
        return "not installed"
    return ""


def memory_of_machine() -> float:
    """In GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def peak_of(job: Job, way: str, names: list[str]) -> tuple[float | None, str]:
    """The peak of a way's memory in MB: on a GPU what torch allocates, else what a process of its
    own has resident.

    Where that process fails, None and why; it is killed for want of memory.
    """
    command = [sys.executable, "-c", "from analysis import benchmark; benchmark.run_alone()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT}
    )  # Ctrl-C is for this process to answer
    try:
        process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with process:
        try:
            said, failed = process.communicate(pickle.dumps((asdict(job), way, names)))
        except BaseException:
            process.kill()  # to wait for what it measures could take minutes
            raise
    if process.returncode < 0:
        return None, "out of memory in a process of its own"
    if process.returncode:
        return None, failed.decode(errors="replace").strip().rpartition("\n")[2]
    return float(said.split()[-1]), ""


def run_alone() -> None:
    """In a process of its own: run the way once that stdin names, and print its peak memory in MB."""
    import torch

    from analysis.baselines import WAYS

    facts, way, names = pickle.load(sys.stdin.buffer)
    job = Job(**facts)  # a Job of another process could be of its __main__
    torch.set_num_threads(job.threads)
    WAYS[way](load_network(job), names, batches_of(job))
    print(torch.cuda.max_memory_allocated() / 1e6 if job.device == "cuda" else resident_peak())


def resident_peak() -> float:
    """The peak of this process's resident memory so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins with the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6  # from KiB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1e3
    )


def table(frame: pd.DataFrame) -> str:
    """The rows of one network as text."""
    first = frame.iloc[0]
    shown = frame.assign(
        seconds=[spread(row) for row in frame.to_dict("records")],
        ratio=frame["ratio"].map("{:.2f}".format, na_action="ignore"),
        images_per_s=frame["images_per_s"].map("{:.0f}".format, na_action="ignore"),
        peak_mb=frame["peak_mb"].map("{:.0f}".format, na_action="ignore"),
        above_plain_mb=frame["above_plain_mb"].map("{:+.0f}".format, na_action="ignore"),
        error=frame["error"].map("{:.0e}".format, na_action="ignore"),
    )[["way", "seconds", "ratio", "images_per_s", "peak_mb", "above_plain_mb", "error", "note"]]
    head = (
        f"{first['network']}: {first['images']:,} images, {first['batch_size']} at a time, {first['repeats']} rounds, "
        f"{first['device']}, {first['threads']} threads"
    )
    names = {"images_per_s": "images/s", "peak_mb": "peak MB", "above_plain_mb": "above plain"}
    return f"{head}\n{shown.rename(columns=names).fillna('-').to_string(index=False)}"


def spread(row: dict[Any, Any]) -> str | None:
    """Median and range, such as `5.25 (5.10-5.80)`; None for a way that was left out."""
    if row["seconds"] != row["seconds"]:  # NaN
        return None
    return f"{row['seconds']:.2f} ({row['seconds_min']:.2f}-{row['seconds_max']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
