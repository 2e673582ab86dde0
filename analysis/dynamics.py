"""Responses through training: every snapshot of a run, as a frame, a figure and a table.

    python -m analysis.dynamics runs/resnet-20-64000-seed0
    python -m analysis.dynamics runs/resnet-20-64000-seed0 --source hooks --data path/to/cifar10

takes the folder of a run that python -m models.train made, finished or not. It writes dynamics.csv
(the frame of analysis/measuring/frame.py for each snapshot, with its iteration and learning rate),
dynamics.json (where the numbers come from) and dynamics.png/.pdf into --out. The closed form needs
no images and takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.items import Found, Network, Plan, add_options, check_folder, check_options
from analysis.cli.outputs import (
    add_page_option,
    as_csv,
    as_images,
    as_json,
    as_page,
    describe_network,
    finish,
    note_stand_in,
    write_files,
)
from analysis.measuring.processes import together

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd

    from models.checkpoints.loading import Checkpoint
    from models.training.recipe import Recipe

CONFIG, METRICS = "config.json", "metrics.csv"  # in a run's folder
CAPTION = "Std of the responses, layer by layer, and its mean, with the steps of the learning rate"
HUGE = 1e38  # float32 ends there
A_RUN = "a run is a folder that python -m models.train makes, such as runs/resnet-20-64000-seed0"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.dynamics",
        description="Draw the layer responses of a network through its training, from the snapshots of a run.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run of python -m models.train"
    )
    add_options(parser, source="batchnorm")
    add_page_option(parser)
    args = parser.parse_args(argv)
    check_options(parser, args)
    return finish(run, args)


def run(args: argparse.Namespace) -> None:
    """Read, measure, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from analysis.measuring.networks import measure_all
    from plots import draw_dynamics

    with together():
        recipe = read_config(args.run)
        epochs = read_metrics(args.run)
        check_folder(args.out)
        plan = read_snapshots(args, recipe)
    frames = measure_all(args, plan)
    frame = make_table(plan, frames)
    known = pd.concat([frame[["iteration", "lr"]], epochs[["iteration", "lr"]]]).sort_values(
        "iteration"
    )
    figure = draw_dynamics(frame, epochs, find_steps(recipe, list(known.itertuples(index=False))))
    provenance = describe_run(args, plan, frames)
    note_stand_in([figure], provenance)
    files = {"dynamics.csv": as_csv(frame), "dynamics.json": as_json(provenance)}
    files |= as_images("dynamics", figure, args.format)
    if args.html:
        title = f"Layer responses of {recipe.network} through training"
        files |= as_page("dynamics", title, [(CAPTION, figure)], frame, provenance)
    written = write_files(args.out, files)
    print_table(frame)
    print(written)


def read_config(folder: Path) -> Recipe:
    """The recipe of the run in a folder."""
    from models.training.recipe import Recipe

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {A_RUN}")
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no {CONFIG} in it; {A_RUN}")
    try:
        recipe = Recipe(**json.loads(path.read_text(encoding="utf-8")))
        check_recipe(recipe)
        return recipe
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); restore it: a snapshot's card holds the same values"
        ) from error


def check_recipe(recipe: Recipe) -> None:
    """ValueError where a value is not of its type, or could be of no run."""
    from models.resnet import KINDS

    for entry in fields(recipe):
        value = getattr(recipe, entry.name)
        largest = 2**64 if entry.name == "seed" else 2**62
        if type(value).__name__ != entry.type or (entry.type != "str" and not abs(value) < largest):
            raise ValueError(f"{entry.name} is {value!r}")
    if recipe.kind not in KINDS.values() or recipe.depth < 8 or recipe.iterations < 1:
        raise ValueError(
            f"it says kind {recipe.kind!r}, depth {recipe.depth} and {recipe.iterations} iterations"
        )


def read_metrics(folder: Path) -> pd.DataFrame:
    """The epochs of the run in a folder: columns iteration, lr, mean_std; no rows where there are
    none yet.
    """
    import pandas as pd

    from analysis.measuring.frame import read_columns

    columns = ["iteration", "lr", "mean_std"]
    path = folder / METRICS
    if not path.exists():
        return pd.DataFrame(columns=columns, dtype=float)
    try:
        there = (
            read_columns(path) if path.stat().st_size else columns
        )  # of an empty file pandas says that it is
        if missing := [column for column in columns if column not in there]:
            raise ValueError(f"no column {missing[0]}")
        epochs = pd.read_csv(path)[columns].astype(float)
        if (
            not (epochs.abs() < HUGE).all(axis=None)
            or not (epochs["iteration"].diff()[1:] > 0).all()
        ):
            raise ValueError("the iterations do not ascend, or not all numbers are finite")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); move it away, and the snapshots are drawn without it"
        ) from error
    return epochs


def read_snapshots(args: argparse.Namespace, recipe: Recipe) -> Plan:
    """The snapshots in the order of their iterations, and images, where they are to be measured on
    some.

    Their cards say which networks they hold, and their preprocessing. Whether that fits what BN
    recorded, as other commands look, is not asked: early in training BN's moving averages lag
    behind the weights.
    """
    from analysis.cli.items import find_data, load_checkpoint

    folder = args.run / "snapshots"
    paths = sorted(folder.glob("iteration-*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no snapshots; python -m models.train --snapshots 9 makes a run with some"
        )
    checkpoints = [load_checkpoint(args, Found(None, path), None) for path in paths]
    for checkpoint in checkpoints:
        check_snapshot(checkpoint, recipe)
    checkpoints.sort(key=lambda checkpoint: training_card(checkpoint)["iteration"])
    check_order(checkpoints)
    if args.source == ["hooks"]:
        checkpoints = leave_out_first(checkpoints, folder)
    data = find_data(args, checkpoints)
    last = training_card(checkpoints[-1])["iteration"]
    print(
        f"{args.run}: {recipe.network}, iteration {last:,} of {recipe.iterations:,}, snapshots: {len(checkpoints)}"
    )
    labels = [
        f"{recipe.network}, iteration {training_card(checkpoint)['iteration']:,}"
        for checkpoint in checkpoints
    ]
    return Plan(
        [Network(*pair) for pair in zip(labels, checkpoints, strict=True)], data, args.source
    )


def training_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a snapshot says of the training: the recipe, iteration, current_lr; nothing where it is
    none of ours.
    """
    card = checkpoint.card.get("training")
    return (
        {"warm_up": False} | card if isinstance(card, dict) else {}
    )  # cards of before it was a choice


def check_snapshot(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """ValueError unless a file is a snapshot of the run with this recipe, which may have gone on
    elsewhere.
    """
    from models.training.loop import ANYWHERE

    card = training_card(checkpoint)
    if not (type(card.get("iteration")) is int and type(card.get("current_lr")) is float):
        raise ValueError(
            f"{checkpoint.path}: no snapshot: its card does not say iteration and learning rate; move it away"
        )
    if not (0 <= card["iteration"] <= recipe.iterations and 0 <= card["current_lr"] < inf):
        raise ValueError(
            f"{checkpoint.path}: damaged: its card says iteration {card['iteration']} of {recipe.iterations} at a "
            f"learning rate of {card['current_lr']}; move it away"
        )
    for name, value in asdict(recipe).items():
        if name not in ANYWHERE and card.get(name) != value:
            raise ValueError(
                f"{checkpoint.path}: a snapshot of another run: {name} is {card.get(name)} in its card and {value} in "
                f"{CONFIG}; move it away"
            )
    held = "another network" if checkpoint.config is None else checkpoint.config.name
    if held != recipe.network:
        raise ValueError(
            f"{checkpoint.path}: it holds {held}, and {CONFIG} says {recipe.network}; move it away"
        )


def leave_out_first(checkpoints: list[Checkpoint], folder: Path) -> list[Checkpoint]:
    """Without iteration 0: in evaluation mode responses grow from block to block while BN has
    recorded nothing.
    """
    trained = [
        checkpoint for checkpoint in checkpoints if training_card(checkpoint)["iteration"] > 0
    ]
    if not trained:
        raise ValueError(
            f"{folder}: only iteration 0, where BN has recorded nothing yet: --source batchnorm computes it; or wait "
            "for the next snapshot"
        )
    if len(trained) < len(checkpoints):
        print(
            "iteration 0 is left out: BN has recorded nothing yet (--source batchnorm shows it)",
            file=sys.stderr,
        )
    return trained


def check_order(checkpoints: Sequence[Checkpoint]) -> None:
    """ValueError where two snapshots are of one iteration."""
    for first, second in pairwise(checkpoints):
        iteration = training_card(first)["iteration"]
        if iteration == training_card(second)["iteration"]:
            raise ValueError(
                f"{second.path}: of iteration {iteration}, as is {first.path.name}; move one of them away"
            )


def make_table(plan: Plan, frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The frames one below the other, each with its iteration and learning rate in front."""
    import pandas as pd

    parts = []
    for network, frame in zip(plan.networks, frames, strict=True):
        card = training_card(network.checkpoint)
        assert network.checkpoint.config is not None  # check_snapshot
        part = frame.assign(network=network.checkpoint.config.name)
        part.attrs.clear()
        part.insert(0, "iteration", card["iteration"])
        part.insert(1, "lr", card["current_lr"])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def find_steps(recipe: Recipe, known: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """From which iteration on which learning rate holds, in order.

    known: iterations, ascending, and the learning rate of the step that led there. The recipe says
    when it drops, but not when a warm-up ends: that is taken for the first known iteration after
    it.

    >>> from models.training.recipe import Recipe
    >>> find_steps(Recipe("residual", 110, iterations=4000), [(0, 0.01), (391, 0.01), (782, 0.1)])
    [(0, 0.01), (782, 0.1), (2000, 0.01), (3000, 0.001)]
    """
    warm = [iteration for iteration, rate in known if rate < recipe.learning_rate(iteration, False)]
    later = [iteration for iteration, _ in known if warm and iteration > max(warm)]
    end = ceil(min(later, default=recipe.iterations)) if warm else 0
    drops = -(-recipe.iterations // 2), -(-3 * recipe.iterations // 4)
    starts = sorted(start for start in {0, end, *drops} if start < recipe.iterations)
    rates = [(start, recipe.learning_rate(start, start < end)) for start in starts]
    return [rates[0], *(after for before, after in pairwise(rates) if after[1] != before[1])]


def describe_run(
    args: argparse.Namespace, plan: Plan, frames: Sequence[pd.DataFrame]
) -> dict[str, Any]:
    """Where the numbers come from, as JSON can hold it: each snapshot by the name of its file, and
    the epochs' file.
    """
    from models.files import sha256

    document: dict[str, Any] = {
        network.checkpoint.path.stem: describe_network(args, network, frame, plan)
        for network, frame in zip(plan.networks, frames, strict=True)
    }
    path = args.run / METRICS
    return document | (
        {METRICS: {"path": str(path), "sha256": sha256(path)}} if path.exists() else {}
    )


def print_table(frame: pd.DataFrame) -> None:
    """One line a snapshot."""
    rows = frame.groupby("iteration")
    table = rows["std"].agg(["mean", "min", "max"]).map("{:.4f}".format)
    table.insert(0, "lr", rows["lr"].first().map("{:g}".format))
    table.columns = ["lr", "mean std", "smallest", "largest"]
    print(
        "\n" + table.reset_index().to_string(index=False, formatters={"iteration": "{:,}".format})
    )


if __name__ == "__main__":
    sys.exit(main())
