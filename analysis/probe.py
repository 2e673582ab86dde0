"""Makes a probe set: synthetic images on which networks respond as they do to CIFAR-10's test set.

    python -m analysis.probe --data path/to/cifar10
    python -m analysis.probe resnet-20 other=checkpoint.pth --held-out third.pth --data path/to/cifar10

takes shipped networks by name and checkpoints (default: all that are shipped), measures them on the
test set, and makes images by optimisation (analysis/probe_set/synthesis.py), in which a shipped one
has more weight. It says how far from the test set's the layers' std on these images are, also for
networks that had no part in it (--held-out), beside the closed form and as many images of the test
set itself. It writes probe.webp (the images with a card), probe.csv (the errors) and probe.png/.pdf
(the images of CIFAR-10 that are nearest to any of them) into --out. The same command goes on where
it was interrupted. What is shipped is models/probe.webp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.items import (
    CIFAR10,
    check_folder,
    check_options,
    find_network,
    place_of,
    positive,
)
from analysis.cli.outputs import as_csv, as_images, finish, versions, write_files

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from analysis.cli.items import Plan
    from analysis.measuring.result import Measurement
    from analysis.probe_set.synthesis import Spectrum
    from models.data.cifar10 import Cifar10

STATE = "state.pt"  # in --out, while the images are made
FIXED = {
    "source": ["hooks"],
    "split": "test",
    "images": None,
    "normalize": "auto",
    "model": None,
    "ema": False,
    "batch_size": None,
    "precision": "float32",
    "verbose": False,
}
SHIPPED = 3.0  # weight of a network that is shipped, for which the set is used most; of another: 1
CANDIDATES = 6  # dead leaves for each image: the first ones are changed, and all are chosen from
SHOWN = 10  # pairs of nearest neighbours
COLUMNS = {
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


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.probe",
        description="Make synthetic images on which networks respond as they do to CIFAR-10's test set.",
    )
    add = parser.add_argument
    add(
        "items",
        nargs="*",
        metavar="[LABEL=]ITEM",
        help="a shipped network's name or a checkpoint, to make them with "
        "(default: all shipped networks)",
    )
    add(
        "--held-out", nargs="+", default=[], metavar="[LABEL=]ITEM", help="networks to test them on"
    )
    add(
        "--data",
        type=Path,
        default=CIFAR10,
        metavar="PATH",
        help="CIFAR-10 (default: $CIFAR10, ./data, cache folder, download)",
    )
    add(
        "--count",
        type=positive,
        default=900,
        metavar="N",
        help="images to make (default: %(default)s)",
    )
    add(
        "--rounds",
        type=positive,
        default=12,
        metavar="N",
        help="times that every network sees all images (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the images to set out from (default: %(default)s)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/probe"), metavar="DIR", help="default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv, argparse.Namespace(**FIXED))
    check_options(parser, args)
    return finish(run, args)


def run(args: argparse.Namespace) -> None:
    """Measure, make, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from analysis.cli.items import prepare
    from analysis.measuring.networks import compute, run_on
    from analysis.measuring.result import Measurement
    from models import zoo
    from models.data.cifar10 import Cifar10
    from models.data.probe import Probe, as_bytes

    check_folder(args.out)
    made_with = [find_network(item) for item in args.items or zoo.shipped()]
    plan = prepare(args, made_with + [find_network(item) for item in args.held_out])
    if not isinstance(plan.data, Cifar10) or not plan.data.exact:
        raise ValueError(
            f"--data {args.data}: not CIFAR-10's test set, complete and exact, which the images stand for"
        )
    by_part = [
        run_on(args, plan.networks, part) for part in parts_of(plan.data, args.count, args.seed)
    ]
    by_network = list(zip(*by_part, strict=True))
    results = [reduce(Measurement.merge, parts) for parts in by_network]
    images = make(args, plan, results[: len(made_with)])
    probe = Probe(images, None, {}, args.out / "probe.webp")
    again = run_on(args, plan.networks, probe)
    formulas = [compute(network) for network in plan.networks]
    rows = []
    for number, (network, *measured) in enumerate(
        zip(plan.networks, results, again, formulas, by_network, strict=True)
    ):
        rows.append(
            {"network": network.label, "made_with": number < len(made_with), **errors(*measured)}
        )
    table = pd.DataFrame(rows)
    figure, distances = compare_pixels(images, args.data)
    files = {"probe.webp": as_bytes(images, describe(args, plan, rows)), "probe.csv": as_csv(table)}
    written = write_files(args.out, files | as_images("probe", figure, ["png", "pdf"]))
    (args.out / STATE).unlink()
    print_table(table, by_network[0])
    print(distances)
    print(written)


def make(args: argparse.Namespace, plan: Plan, results: list[Measurement]) -> np.ndarray:
    """The images (N, 32, 32, 3), uint8, from where an interrupted run has left them. The state is
    saved every round.
    """
    import numpy as np
    from tqdm import tqdm

    from analysis.probe_set.synthesis import Goal, Spectrum, Synthesis, choose
    from models import zoo
    from models.data.cifar10 import Cifar10
    from models.files import sha256

    assert isinstance(plan.data, Cifar10)  # see run
    networks = plan.networks[: len(results)]
    shipped = {sha256(zoo.find(name)) for name in zoo.shipped()}
    weights = [SHIPPED if network.checkpoint.digest in shipped else 1.0 for network in networks]
    goals = []
    for network, result, weight in zip(networks, results, weights, strict=True):
        assert (
            network.checkpoint.preprocessing is not None
        )  # recognised at the latest, as there are images
        goals.append(Goal(network.model, network.checkpoint.preprocessing, result, weight))
    asked = {
        "networks": [network.checkpoint.digest for network in networks],
        "weights": weights,
        "count": args.count,
        "rounds": args.rounds,
        "seed": args.seed,
    }
    spectrum, path = Spectrum(plan.data.images), args.out / STATE
    state = read_state(path, asked) or {"waves": first_waves(args, plan.data.images, spectrum)}
    synthesis = Synthesis(goals, spectrum, state["waves"][: args.count], args.rounds, args.seed)
    if "synthesis" in state:
        synthesis.restore(state["synthesis"])
        print(f"{path}: going on after step {synthesis.step} of {synthesis.steps}")
    every = synthesis.steps // args.rounds
    with tqdm(
        total=synthesis.steps, initial=synthesis.step, unit=" steps", leave=False, disable=None
    ) as bar:
        for loss in synthesis.go_on():
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
            if synthesis.step % every == 0:
                write_state(path, asked, state | {"synthesis": synthesis.state()})
    many = np.concatenate([spectrum.pixels(state["waves"]), spectrum.pixels(synthesis.waves)])
    images: np.ndarray = many[choose(goals, many, args.count, args.seed)]
    return images


def first_waves(args: argparse.Namespace, test: np.ndarray, spectrum: Spectrum) -> Tensor:
    """Those of dead leaves, of which the first are changed."""
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
    """The state in a file, if there is one. ValueError where it is another command's, or damaged."""
    import torch

    if not path.exists():
        return None
    try:
        kept = torch.load(path, weights_only=True)
        other = [name for name, value in asked.items() if kept["asked"].get(name) != value]
        state: dict[str, Any] = kept["state"]
    except Exception as error:  # torch.load raises anything
        raise ValueError(
            f"{path}: damaged; move it away, and the images are made from the beginning"
        ) from error
    if other:
        raise ValueError(
            f"{path}: images in the making with other {', '.join(other)}; name another --out"
        )
    return state


def parts_of(test: Cifar10, count: int, seed: int) -> list[Cifar10]:
    """The test set, without labels, in random parts: of at least `count` images each, but two parts
    at least.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(test))
    pieces = np.array_split(order, max(2, len(test) // count))
    return [replace(test, images=test.images[piece], labels=None) for piece in pieces]


def errors(
    test: Measurement, probe: Measurement, formula: pd.DataFrame, parts: Sequence[Measurement]
) -> dict[str, float]:
    """How far from the layers' std on the test set those on the images are, and those of the closed
    form, relatively.

    Beside them those on the parts, the median and the worst: so far off are as many images of the
    test set itself.
    """
    import numpy as np

    truth = test.to_frame("")["std"].to_numpy()

    def apart(frame: pd.DataFrame) -> dict[str, float]:
        std = frame["std"].to_numpy()
        relative = np.abs(std / truth - 1)
        r = np.corrcoef(std, truth)[0, 1]
        return {"mean": float(relative.mean()), "largest": float(relative.max()), "r": float(r)}

    ours, closed, *real = map(
        apart, [probe.to_frame(""), formula, *(part.to_frame("") for part in parts)]
    )
    means, rs = [part["mean"] for part in real], [part["r"] for part in real]
    found = {
        **ours,
        **{f"closed_form_{name}": value for name, value in closed.items()},
        **{"real_mean": float(np.median(means)), "real_worst_mean": max(means)},
        **{"real_r": float(np.median(rs)), "real_worst_r": min(rs)},
    }
    return {name: round(value, 6) for name, value in found.items()}


def describe(args: argparse.Namespace, plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The card: how the images were made, and how far from the test set's the responses to them
    are.
    """
    from analysis.cli.items import trained

    networks = {}
    for network, row in zip(plan.networks, rows, strict=True):
        checkpoint = network.checkpoint
        networks[network.label] = {
            "sha256": checkpoint.digest,
            "iterations": trained(checkpoint),
            **{k: row[k] for k in row if k != "network"},
        }
    return {
        "networks": networks,
        "count": args.count,
        "rounds": args.rounds,
        "seed": args.seed,
        "versions": versions(),
    }


def load_all(path: Path) -> np.ndarray:
    """All images of CIFAR-10 (N, 32, 32, 3): the test set's, then the training set's, where that is
    at hand.
    """
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
    """For each of n images, mirrored or not, the two nearest others: their distances and their
    numbers, (n, 2).

    The distance is the root of the mean squared difference of values from 0 to 255.
    """
    import torch

    flat = torch.from_numpy(others).flatten(1).float()  # (N, 3072)
    squares = flat.square().sum(1)
    found = []
    for image in torch.from_numpy(images):
        both = (
            torch.stack([image, image.flip(1)]).flatten(1).float()
        )  # (2, 3072): as it is, and mirrored
        distances = both.square().sum(1, keepdim=True) - 2 * both @ flat.T + squares  # (2, N)
        found.append(distances.amin(0).clamp_min(0).topk(2, largest=False))
    values, numbers = (torch.stack(part) for part in zip(*found, strict=True))
    return (values / flat.shape[1]).sqrt().numpy(), numbers.numpy()


def compare_pixels(images: np.ndarray, path: Path) -> tuple[Figure, str]:
    """The images that are nearest to one of CIFAR-10, as a figure, and a line that says how near
    they are.
    """
    import numpy as np

    from plots import draw_neighbours

    others = load_all(path)
    distances, numbers = nearest(images, others)
    usual = float(
        np.median(nearest(others[: len(images)], others)[0][:, 1])
    )  # the nearest one is the image itself
    order = np.argsort(distances[:, 0])[:SHOWN]
    figure = draw_neighbours(images[order], others[numbers[order, 0]], distances[order, 0])
    return figure, (
        f"the nearest of CIFAR-10's {len(others):,} images is {distances[order[0], 0]:.1f} away (RMS, of 255); for the "
        f"first {min(len(images), len(others))} test images the nearest other one is {usual:.1f} away, in the median"
    )


def print_table(table: pd.DataFrame, parts: Sequence[Measurement]) -> None:
    """One line a network: how far from the test set's its stds are on the images, and what to hold
    that against.
    """
    import pandas as pd

    shown = pd.DataFrame(
        {
            "network": table["network"],
            "made with": table["made_with"].map({True: "yes", False: "no"}),
        }
    )
    for column, name in COLUMNS.items():
        values = table[column] * 100 if name.endswith("%") else table[column]
        shown[name] = values.map(("{:.1f}" if name.endswith("%") else "{:.3f}").format)
    real = f"of its {len(parts)} parts of up to {parts[0].images} images, the median and the worst"
    print(
        f"\nRelative differences of the layers' std to the test set's (real: {real}):\n{shown.to_string(index=False)}"
    )


if __name__ == "__main__":
    sys.exit(main())
