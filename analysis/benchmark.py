"""What measuring costs beside a plain forward pass: time, memory and error of several methods.

    python -m analysis.benchmark --networks resnet-56 --data path/to/cifar10
    python -m analysis.benchmark --images 256 --repeats 3

Every method runs the same images in the same batches, one method after the other, round after
round. A ratio is the median of a method's seconds over the median of the plain forward pass's.
Memory is the peak of a process of its own. The error is the largest relative error of any layer's
std, against a two-pass computation in float64 over the same network's responses. The command writes
benchmark.csv and benchmark.png/.pdf into --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from analysis.cli.command import run_command
from analysis.cli.items import place_of
from analysis.cli.options import PROBE, check_device, positive
from analysis.cli.outputs import as_csv, as_images, check_folder, write_files
from analysis.running.networks import FIRST, default_batch_size

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import numpy as np
    import pandas as pd
    from torch import Tensor, nn

NETWORKS = ["resnet-20", "resnet-56", "resnet-110", "plain-56", "resnet-50"]
IMAGES = 2000
SHARE = 32  # resnet-50 on a 224x224 image costs about as much as resnet-56 on 32 of 32x32 pixels
COLUMNS = (
    *("network", "method", "device", "threads", "images", "batch_size", "repeats"),
    *("seconds", "seconds_min", "seconds_max", "ratio", "images_per_s"),
    *("peak_mb", "above_plain_mb", "error", "note"),
)
HEADINGS = {
    "method": "method",
    "seconds": "seconds",
    "ratio": "ratio",
    "images_per_s": "images/s",
    "peak_mb": "peak MB",
    "above_plain_mb": "above plain",
    "error": "error",
    "note": "note",
}
FORMATS = {
    "ratio": "{:.2f}",
    "images_per_s": "{:.0f}",
    "peak_mb": "{:.0f}",
    "above_plain_mb": "{:+.0f}",
    "error": "{:.0e}",
}


@dataclass(frozen=True)
class Job:
    """A network and its images: all that another process needs to do the same."""

    network: str
    images: int
    batch_size: int
    data: Path | None
    device: str
    threads: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.benchmark",
        description="Time, memory and error of measuring, beside a plain forward pass.",
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
        help=f"of 32x32 pixels (default: {IMAGES:,}, or all if there are fewer); one image of "
        f"224x224 pixels for {SHARE} of them",
    )
    add("--batch-size", type=positive, metavar="N", help="images per batch (default: what fits)")
    add("--repeats", type=positive, default=5, metavar="N", help="rounds (default: 5)")
    add("--threads", type=positive, metavar="N", help="threads of torch (default: torch's choice)")
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="CIFAR-10's test images, or `probe` for the probe set (default: random pixels)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: figures")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    check_device(parser, args.device)
    return run_command(lambda: run(args), device=args.device, debug=args.debug)


def run(args: argparse.Namespace) -> None:
    """Measure, print and write. Raise ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from analysis.measuring.eval_mode import without_tf32
    from plots.benchmark import draw_benchmark

    check_folder(args.out)
    parts = []
    for job in [make_job(args, name) for name in dict.fromkeys(args.networks)]:
        with without_tf32():
            parts.append(pd.DataFrame(run_job(job, args.repeats), columns=list(COLUMNS)))
        print(table_of(parts[-1]) + "\n", flush=True)
    frame = pd.concat(parts, ignore_index=True)
    files = {"benchmark.csv": as_csv(frame)}
    files |= as_images("benchmark", draw_benchmark(frame), ["png", "pdf"])
    print(write_files(args.out, files).lstrip("\n"))


def make_job(args: argparse.Namespace, name: str) -> Job:
    """Return what to do for one network. Raise ValueError if it does not exist."""
    import torch

    from models.resnet import SIZES, parse_name

    family = parse_name(name).images
    images, data = args.images or IMAGES, args.data
    if family == "imagenet":
        images, data = max(1, images // SHARE), None
    elif data:
        there = len(named_images(data))
        if args.images and there < images:
            raise ValueError(f"--images {images}: there are {there} images in {data}")
        images = min(images, there)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    batch_size = args.batch_size or default_batch_size(SIZES[family], device)
    threads = args.threads or torch.get_num_threads()
    return Job(name, images, batch_size, data, device, threads)


def load_network(job: Job) -> nn.Module:
    """Return the shipped network, or else a fresh one with BN's statistics of random images."""
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
            module.momentum = None  # a cumulative mean
    with torch.no_grad():
        model.train()(next(batches_of(job, load_images(job)))[:8])
    return model.eval().to(job.device)


def named_images(path: Path) -> np.ndarray:
    """Return CIFAR-10's test images, or the probe set: (N, 32, 32, 3), uint8."""
    from models.data import cifar10, probe

    return probe.load().images if path == PROBE else cifar10.load(place_of(path)).images


def load_images(job: Job) -> np.ndarray:
    """Return images (N, H, W, 3), uint8: the first of a data set, or random pixels."""
    import numpy as np

    from models.resnet import SIZES, parse_name

    if job.data:
        return named_images(job.data)[: job.images]
    size = SIZES[parse_name(job.network).images]
    return np.random.default_rng(0).integers(0, 256, (job.images, size, size, 3), dtype=np.uint8)


def batches_of(job: Job, images: np.ndarray) -> Iterator[Tensor]:
    """Yield normalised images (n, 3, H, W); the first batch is as small as in measuring."""
    from models.data.preprocessing import PRESETS

    for part in (images[:FIRST], images[FIRST:]):
        for start in range(0, len(part), job.batch_size):
            yield PRESETS["cifar10"](part[start : start + job.batch_size])


def run_job(job: Job, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each method on one network."""
    import torch
    from tqdm import tqdm

    from analysis.baselines import METHODS, PLAIN, two_pass
    from analysis.measuring.measurement import measure

    torch.set_num_threads(job.threads)
    model, images = load_network(job), load_images(job)
    batches = partial(batches_of, job, images)
    layers = measure(model, [next(batches())])  # once before the clocks run
    names = layers["norm"].tolist()
    exact = two_pass(model, names, batches)
    notes = {method: why_not(method) for method in METHODS}
    methods = [method for method in METHODS if not notes[method]]
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    stds: dict[str, list[float]] = {}
    for _ in tqdm(range(repeats), desc=job.network, unit=" rounds", leave=False, disable=None):
        for method in methods:
            start = now(job)
            stds[method] = METHODS[method](model, names, batches())
            seconds[method].append(now(job) - start)
    peaks: dict[str, float | None] = {}
    for method in methods:
        peaks[method], notes[method] = peak_of(job, method, names)
    facts = {key: value for key, value in asdict(job).items() if key != "data"}
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        rows.append({**facts, "repeats": repeats, "method": method, "note": notes[method]})
        if method in methods:
            rows[-1] |= times(seconds[method], seconds[PLAIN], job.images)
            rows[-1] |= {"peak_mb": peaks[method], "error": largest_error(stds[method], exact)}
            if (peak := peaks[method]) is not None and (plain := peaks[PLAIN]) is not None:
                rows[-1]["above_plain_mb"] = peak - plain
    return rows


def now(job: Job) -> float:
    """Return the time in seconds, once a GPU has done all that was asked of it."""
    import torch

    if job.device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def largest_error(stds: Sequence[float], exact: Sequence[float]) -> float | None:
    """Return the largest relative error of any layer; None if nothing was measured."""
    errors = [abs(std / true - 1) for std, true in zip(stds, exact, strict=False)]
    return max(errors, default=None)


def times(seconds: Sequence[float], plain: Sequence[float], images: int) -> dict[str, float]:
    """Return the columns of a method's time; the ratio is of medians."""
    typical = median(seconds)
    return {
        "seconds": typical,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "ratio": typical / median(plain),
        "images_per_s": images / typical,
    }


def why_not(method: str) -> str:
    """Return why a method is left out on this machine; empty if it is not."""
    missing = method == "torchlens" and importlib.util.find_spec("torchlens") is None
    return "not installed" if missing else ""


def peak_of(job: Job, method: str, names: list[str]) -> tuple[float | None, str]:
    """Return the peak memory of a method in MB, or None and why it is not known.

    On a GPU it is what torch allocates; else what a process of its own has resident. That process
    is not multiprocessing's: torchlens refuses to work there.
    """
    command = [sys.executable, "-c", "from analysis import benchmark; benchmark.run_alone()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    task = pickle.dumps((asdict(job), method, names))
    ended = subprocess.run(command, input=task, capture_output=True, env=environment, check=False)
    if ended.returncode < 0:
        return None, "out of memory in a process of its own"
    if ended.returncode:
        return None, ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return float(ended.stdout.split()[-1]), ""


def run_alone() -> None:
    """Run the method that stdin names once, and print the peak memory of this process in MB."""
    import torch

    from analysis.baselines import METHODS

    facts, method, names = pickle.load(sys.stdin.buffer)
    job = Job(**facts)  # a Job itself could be of another process's __main__
    torch.set_num_threads(job.threads)
    METHODS[method](load_network(job), names, batches_of(job, load_images(job)))
    cuda = job.device == "cuda"
    print(torch.cuda.max_memory_allocated() / 1e6 if cuda else resident_peak())


def resident_peak() -> float:
    """Return the peak of this process's resident memory so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts from the size of the parent process
        lines = status.read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6  # from KiB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def table_of(frame: pd.DataFrame) -> str:
    """Return the rows of one network as a table."""
    first = frame.iloc[0]
    shown = frame.assign(seconds=[spread(row) for row in frame.to_dict("records")])
    for column, form in FORMATS.items():
        shown[column] = frame[column].map(form.format, na_action="ignore")
    table = shown[list(HEADINGS)].rename(columns=HEADINGS).fillna("-").to_string(index=False)
    return (
        f"{first['network']}: {first['images']:,} images, {first['batch_size']} at a time, "
        f"{first['repeats']} rounds, {first['device']}, {first['threads']} threads\n{table}"
    )


def spread(row: dict[Any, Any]) -> str | None:
    """Return median and range, such as `5.25 (5.10-5.80)`; None for a method left out."""
    if row["seconds"] != row["seconds"]:  # NaN
        return None
    return f"{row['seconds']:.2f} ({row['seconds_min']:.2f}-{row['seconds_max']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
