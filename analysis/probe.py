"""Make a probe set: synthetic images to which networks respond as to CIFAR-10's test set.

    python -m analysis.probe --data path/to/cifar10
    python -m analysis.probe resnet-20 other=file.pth --held-out third.pth --data path/to/cifar10

measures networks (by default all that are shipped) on the test set and makes images by optimisation
(analysis.probe_set.synthesis); a shipped network has more weight. It says how far the layers' stds
on these images are from those on the test set, also for networks that had no part in it
(--held-out), beside the closed form and as many images of the test set itself. It writes probe.webp
(the images with a card), probe.csv (the errors) and probe.png/.pdf (CIFAR-10's images that are
nearest to any of them) into --out. If it is run again after an interruption, it continues. The set
that is shipped is models/data/probe.webp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.command import run_command
from analysis.cli.items import find_item, open_networks, place_of
from analysis.cli.options import CIFAR10, check_device, positive
from analysis.cli.outputs import as_csv, as_images, check_folder, versions, write_files
from analysis.running.computing import compute
from analysis.running.networks import Network, Options, run_networks

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from analysis.measuring.result import Measurement
    from analysis.probe_set.synthesis import Spectrum
    from models.data.cifar10 import Cifar10

STATE = "state.pt"  # in --out, while the images are made
SHIPPED_WEIGHT = 3.0  # of a shipped network, for which the set is used most; of another: 1
CANDIDATES = 6  # dead leaves for each image: the first are changed, and all are chosen from
SHOWN = 10  # pairs of nearest neighbours
HEADINGS = {
    "mean": "probe: mean %",
    "largest": "probe: largest %",
    "r": "probe: r",
    "closed_form_mean": "closed form: mean %",
    "closed_form_largest": "closed form: largest %",
    "closed_form_r": "closed form: r",
    "real_mean": "real: mean %",
    "real_worst_mean": "real: worst %",
    "real_r": "real: r",
    "real_worst_r": "real: worst r",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.probe",
        description="Make synthetic images to which networks respond as to CIFAR-10's test set.",
    )
    add = parser.add_argument
    add(
        "items",
        nargs="*",
        metavar="[LABEL=]ITEM",
        help="a shipped network's name or a checkpoint to make them with (default: all shipped)",
    )
    add("--held-out", nargs="+", default=[], metavar="[LABEL=]ITEM", help="networks to test on")
    add(
        "--data",
        type=Path,
        default=CIFAR10,
        metavar="PATH",
        help="CIFAR-10 (default: $CIFAR10, ./data, the cache folder, a download)",
    )
    add("--count", type=positive, default=900, metavar="N", help="images to make (default: 900)")
    add(
        "--rounds",
        type=positive,
        default=12,
        metavar="N",
        help="times that every network sees all images (default: 12)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the first images (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--out", type=Path, default=Path("runs/probe"), metavar="DIR", help="default: runs/probe")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    check_device(parser, args.device)
    return run_command(lambda: run(args), device=args.device, debug=args.debug)


def run(args: argparse.Namespace) -> None:
    """Measure, make, write and print. Raise ValueError or OSError for bad input."""
    import pandas as pd

    from analysis.measuring.result import Measurement
    from models import zoo
    from models.data.cifar10 import Cifar10
    from models.data.probe import Probe, as_bytes

    check_folder(args.out)
    options = Options(sources=("hooks",), data=args.data, device=args.device)
    made_with = [find_item(item) for item in args.items or zoo.shipped()]
    held_out = [find_item(item) for item in args.held_out]
    networks, test = open_networks([*made_with, *held_out], options)
    if not isinstance(test, Cifar10) or not test.exact:
        raise ValueError(f"--data {args.data}: not CIFAR-10's test set, complete and exact")
    parts = parts_of(test, args.count, args.seed)
    by_part = [run_networks(networks, part, options) for part in parts]
    by_network = list(zip(*by_part, strict=True))
    results = [reduce(Measurement.merge, measured) for measured in by_network]
    images = make(args, networks[: len(made_with)], test, results[: len(made_with)])
    again = run_networks(networks, Probe(images, None, {}, args.out / "probe.webp"), options)
    rows = [
        {
            "network": network.label,
            "made_with": number < len(made_with),
            **errors(
                results[number],
                again[number],
                compute(network.label, network.checkpoint, None),
                by_network[number],
            ),
        }
        for number, network in enumerate(networks)
    ]
    table = pd.DataFrame(rows)
    figure, distances = compare_pixels(images, args.data)
    files = {"probe.webp": as_bytes(images, describe(args, networks, rows))}
    files |= {"probe.csv": as_csv(table), **as_images("probe", figure, ["png", "pdf"])}
    written = write_files(args.out, files)
    (args.out / STATE).unlink()
    print_table(table, by_network[0])
    print(distances)
    print(written)


def make(
    args: argparse.Namespace,
    networks: Sequence[Network],
    test: Cifar10,
    results: Sequence[Measurement],
) -> np.ndarray:
    """Return the images (N, 32, 32, 3), uint8; continue from the state of an interrupted run."""
    import numpy as np
    from tqdm import tqdm

    from analysis.cli.items import is_shipped
    from analysis.probe_set.synthesis import Goal, Spectrum, Synthesis, choose

    weights = [
        SHIPPED_WEIGHT if is_shipped(network.checkpoint.path) else 1.0 for network in networks
    ]
    goals = []
    for network, result, weight in zip(networks, results, weights, strict=True):
        assert network.checkpoint.preprocessing is not None  # recognised, as there are images
        goals.append(Goal(network.model, network.checkpoint.preprocessing, result, weight))
    asked = {
        "networks": [network.checkpoint.digest for network in networks],
        "weights": weights,
        "count": args.count,
        "rounds": args.rounds,
        "seed": args.seed,
    }
    spectrum, path = Spectrum(test.images), args.out / STATE
    state = read_state(path, asked) or {"waves": first_waves(args, test.images, spectrum)}
    first = state["waves"][: args.count]
    synthesis = Synthesis(goals, spectrum, first, args.rounds, args.seed)
    if "synthesis" in state:
        synthesis.restore(state["synthesis"])
        print(f"{path}: continuing after step {synthesis.step} of {synthesis.steps}")
    every = synthesis.steps // args.rounds
    bar = tqdm(
        total=synthesis.steps, initial=synthesis.step, unit=" steps", leave=False, disable=None
    )
    with bar:
        for loss in synthesis.go_on():
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
            if synthesis.step % every == 0:
                write_state(path, asked, state | {"synthesis": synthesis.state()})
    many = np.concatenate([spectrum.pixels(state["waves"]), spectrum.pixels(synthesis.waves)])
    images: np.ndarray = many[choose(goals, many, args.count, args.seed)]
    return images


def first_waves(args: argparse.Namespace, test: np.ndarray, spectrum: Spectrum) -> Tensor:
    """Return the waves of dead leaves, the first of which are changed."""
    from tqdm import tqdm

    from analysis.probe_set.leaves import dead_leaves

    count = CANDIDATES * args.count
    with tqdm(total=count, desc="dead leaves", leave=False, disable=None) as bar:
        return spectrum.waves(dead_leaves(test, count, args.seed, bar.update))


def write_state(path: Path, asked: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the state of images in the making, whole or not at all."""
    import torch

    from models.files import replacing

    with replacing(path) as temporary:
        torch.save({"asked": asked, "state": state}, temporary)


def read_state(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state in a file, if there is one. Raise ValueError if it is another command's."""
    import torch

    if not path.exists():
        return None
    try:
        kept = torch.load(path, weights_only=True)
        other = [name for name, value in asked.items() if kept["asked"].get(name) != value]
        state: dict[str, Any] = kept["state"]
    except Exception as error:  # torch.load raises anything
        advice = "move it away, and the images are made from the beginning"
        raise ValueError(f"{path}: damaged; {advice}") from error
    if other:
        message = f"{path}: made with other {', '.join(other)}; name another --out"
        raise ValueError(message)
    return state


def parts_of(test: Cifar10, count: int, seed: int) -> list[Cifar10]:
    """Split the test set, without labels, into at least two random parts of `count` or more."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(test))
    pieces = np.array_split(order, max(2, len(test) // count))
    return [replace(test, images=test.images[piece], labels=None) for piece in pieces]


def errors(
    test: Measurement, probe: Measurement, formula: pd.DataFrame, parts: Sequence[Measurement]
) -> dict[str, float]:
    """Return how far the layers' stds are from those on the test set, relatively.

    The probe set's errors stand beside those of the closed form, and the median and worst of the
    parts: so far off are as many images of the test set itself.
    """
    import numpy as np

    truth = test.to_frame("")["std"].to_numpy()

    def apart(frame: pd.DataFrame) -> dict[str, float]:
        std = frame["std"].to_numpy()
        relative = np.abs(std / truth - 1)
        r = np.corrcoef(std, truth)[0, 1]
        return {"mean": float(relative.mean()), "largest": float(relative.max()), "r": float(r)}

    real = [apart(part.to_frame("")) for part in parts]
    means, rs = [part["mean"] for part in real], [part["r"] for part in real]
    found = {
        **apart(probe.to_frame("")),
        **{f"closed_form_{name}": value for name, value in apart(formula).items()},
        "real_mean": float(np.median(means)),
        "real_worst_mean": max(means),
        "real_r": float(np.median(rs)),
        "real_worst_r": min(rs),
    }
    return {name: round(value, 6) for name, value in found.items()}


def describe(
    args: argparse.Namespace, networks: Sequence[Network], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the card: how the images were made, and their errors for each network."""
    described = {}
    for network, row in zip(networks, rows, strict=True):
        facts = {name: value for name, value in row.items() if name != "network"}
        iterations = network.checkpoint.iterations
        known = {"sha256": network.checkpoint.digest, "iterations": iterations}
        described[network.label] = {**known, **facts}
    made = {"count": args.count, "rounds": args.rounds, "seed": args.seed}
    return {"networks": described, **made, "versions": versions()}


def load_all(path: Path) -> np.ndarray:
    """Return CIFAR-10's images (N, 32, 32, 3): the test set, then the training set, if there."""
    import numpy as np

    from models.data import cifar10
    from models.data.formats import NoData

    place = place_of(path)
    test = cifar10.load(place).images
    try:
        return np.concatenate([test, cifar10.load(place, "train", download=False).images])
    except NoData:
        return test


def nearest(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return distances to, and numbers of, the two nearest others of each image: (n, 2) each.

    The distance is the root mean squared difference of values from 0 to 255, to the image or to its
    mirror image, whichever is smaller.
    """
    import torch

    flat = torch.from_numpy(others).flatten(1).float()  # (N, 3072)
    squares = flat.square().sum(1)
    found = []
    for image in torch.from_numpy(images):
        both = torch.stack([image, image.flip(1)]).flatten(1).float()  # (2, 3072)
        distances = both.square().sum(1, keepdim=True) - 2 * both @ flat.T + squares  # (2, N)
        found.append(distances.amin(0).clamp_min(0).topk(2, largest=False))
    values, numbers = (torch.stack(part) for part in zip(*found, strict=True))
    return (values / flat.shape[1]).sqrt().numpy(), numbers.numpy()


def compare_pixels(images: np.ndarray, path: Path) -> tuple[Figure, str]:
    """Return a figure of the images that are nearest to one of CIFAR-10, and how near they are."""
    import numpy as np

    from plots import draw_neighbours

    others = load_all(path)
    distances, numbers = nearest(images, others)
    usual = float(np.median(nearest(others[: len(images)], others)[0][:, 1]))  # [:, 0] is itself
    order = np.argsort(distances[:, 0])[:SHOWN]
    figure = draw_neighbours(images[order], others[numbers[order, 0]], distances[order, 0])
    return figure, (
        f"the nearest of CIFAR-10's {len(others):,} images is {distances[order[0], 0]:.1f} away "
        f"(RMS, of 255); for the first {min(len(images), len(others))} test images the nearest "
        f"other one is {usual:.1f} away in the median"
    )


def print_table(table: pd.DataFrame, parts: Sequence[Measurement]) -> None:
    """Print one line a network: its errors on the images, and what to compare them with."""
    import pandas as pd

    made_with = table["made_with"].map({True: "yes", False: "no"})
    shown = pd.DataFrame({"network": table["network"], "made with": made_with})
    for column, heading in HEADINGS.items():
        percent = heading.endswith("%")
        values = table[column] * 100 if percent else table[column]
        shown[heading] = values.map(("{:.1f}" if percent else "{:.3f}").format)
    real = f"of its {len(parts)} parts of up to {parts[0].images} images, the median and the worst"
    print(f"\nRelative differences of the layers' std to the test set's (real: {real}):")
    print(shown.to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
