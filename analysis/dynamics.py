"""Responses through training, from the checkpoints of a training.

    python -m analysis.dynamics runs/resnet-20-64000-seed0
    python -m analysis.dynamics epoch1.pth epoch2.pth epoch3.pth
    python -m analysis.dynamics dynamics.csv

takes the folder of a run of models.train, finished or not, or the checkpoints of any training, as
files or as a folder, or a dynamics.csv that a Recorder saved. The closed form needs no images and
takes seconds. It writes dynamics.csv (one row a layer and step), dynamics.json (where the numbers
come from) and dynamics.png/.pdf into --out, and with --html a page, dynamics.html.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.command import run_command
from analysis.cli.items import Item, open_networks
from analysis.cli.options import add_options, options_of
from analysis.cli.outputs import (
    add_output_options,
    as_csv,
    as_images,
    as_json,
    check_folder,
    notes_of,
    provenance_of,
    write_files,
    write_notes,
)
from analysis.measuring.networks import Measured, Options, measure_networks
from analysis.measuring.processes import together

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd

    from analysis.measuring.steps import Snapshot
    from models.training.recipe import Recipe

CONFIG, METRICS = "config.json", "metrics.csv"  # in the folder of a run of models.train
CAPTION = "Std of the responses, layer by layer, and its mean, with the steps of the learning rate"
LARGEST = 1e38  # float32 ends there


@dataclass(frozen=True)
class Training:
    """What is known of a training besides its checkpoints.

    recipe: of a run of models.train; None for any other training.
    epochs: columns step, lr, mean_std (closed form); no rows if there are none.
    """

    recipe: Recipe | None
    epochs: pd.DataFrame
    files: dict[str, Any]  # path and digest of the files that it was read from


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.dynamics",
        description="Draw the layer responses of a network through its training.",
    )
    add = parser.add_argument
    add(
        "items",
        nargs="+",
        type=Path,
        metavar="ITEM",
        help="folder of a run of models.train, checkpoints or folders of them, or a dynamics.csv",
    )
    add(
        "--step-regex",
        metavar="REGEX",
        help=r"finds the step in a file's name, such as '_(\d+)k' (default: the step that the file "
        "says, or else the number in its name)",
    )
    add_options(parser, source="batchnorm")
    add_output_options(parser)
    args = parser.parse_args(argv)
    options = options_of(parser, args)
    return run_command(lambda: run(args, options), device=args.device, debug=args.debug)


def run(args: argparse.Namespace, options: Options) -> None:
    """Read, measure, write and print. Raise ValueError or OSError for bad input."""
    from plots import draw_dynamics
    from plots.page import make_page

    with together():
        check_folder(args.out)
        training = read_training(args.items[0])
    if args.items[0].suffix == ".csv":
        frame = read_recorded(args.items)
        provenance: dict[str, Any] = {}
        notes: list[str] = []
    else:
        frame, provenance, notes = measure_snapshots(args, options, training.recipe)
    figure = draw_dynamics(frame, training.epochs, find_rates(training, frame))
    write_notes([figure], notes)
    provenance |= training.files
    files = {"dynamics.csv": as_csv(frame), "dynamics.json": as_json(provenance)}
    files |= as_images("dynamics", figure, args.format)
    if args.html:
        title = f"Layer responses of {frame['network'].iloc[0]} through training"
        page = make_page(title, [(CAPTION, figure)], frame, provenance)
        files["dynamics.html"] = page.encode()
    written = write_files(args.out, files)
    print_table(frame)
    print(written)


def read_training(item: Path) -> Training:
    """Return what the folder of a run of models.train says; nothing of any other item."""
    import pandas as pd

    from models.files import sha256

    epochs = pd.DataFrame(columns=["step", "lr", "mean_std"], dtype=float)
    config, metrics = item / CONFIG, item / METRICS
    if not config.is_file():
        return Training(None, epochs, {})
    try:
        recipe = read_recipe(config)
    except (ValueError, TypeError, RecursionError) as error:
        advice = "restore it: the card of a snapshot holds the same values"
        raise ValueError(f"{config}: damaged ({error}); {advice}") from error
    if not metrics.is_file():
        return Training(recipe, epochs, {})
    try:
        epochs = read_epochs(metrics)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        advice = "move it away, and the snapshots are drawn without it"
        raise ValueError(f"{metrics}: damaged ({error}); {advice}") from error
    return Training(recipe, epochs, {METRICS: {"path": str(metrics), "sha256": sha256(metrics)}})


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a config.json. Raise ValueError or TypeError if it is not one."""
    from models.training.recipe import Recipe

    recipe = Recipe(**json.loads(path.read_text(encoding="utf-8")))
    for name, default in asdict(Recipe("residual", 20)).items():
        if type(getattr(recipe, name)) is not type(default):
            raise ValueError(f"{name} is {getattr(recipe, name)!r}")
    if recipe.kind not in ("residual", "plain") or not 0 < recipe.iterations < 2**62:
        raise ValueError(f"it says {recipe.kind!r} and {recipe.iterations} iterations")
    return recipe


def read_epochs(path: Path) -> pd.DataFrame:
    """Return the rows of a metrics.csv: step, lr and mean_std of each epoch."""
    import pandas as pd

    epochs = pd.read_csv(path).rename(columns={"iteration": "step"})
    epochs = epochs[["step", "lr", "mean_std"]].astype(float)
    ascending = (epochs["step"].diff()[1:] > 0).all()
    if not ascending or not (epochs.abs() < LARGEST).to_numpy().all():
        raise ValueError("the iterations do not ascend, or not all numbers are finite")
    return epochs


def measure_snapshots(
    args: argparse.Namespace, options: Options, recipe: Recipe | None
) -> tuple[pd.DataFrame, dict[str, Any], list[str]]:
    """Return the frame of all checkpoints, where it comes from, and notes for the figure."""
    import pandas as pd

    from analysis.measuring.steps import find_snapshots

    with together():
        folders = [item / "snapshots" if recipe else item for item in args.items]
        snapshots, skipped = find_snapshots(
            folders, args.step_regex, weights=options.weights, ema=options.ema
        )
        for line in skipped:
            print(f"warning: {line}", file=sys.stderr)
        if recipe:
            check_run(snapshots, recipe)
        if options.sources == ("hooks",):
            snapshots = without_first(snapshots)
        last = snapshots[-1].step
        of = f" of {recipe.iterations:,}" if recipe else ""
        print(f"{args.items[0]}: step {last:,}{of}, checkpoints: {len(snapshots)}")
    items = [Item(f"step {one.step:,}", one.path, file=one.file) for one in snapshots]
    networks, images = open_networks(items, options)
    results = measure_networks(networks, images, options)
    frame = pd.concat(
        [at_step(result, one) for result, one in zip(results, snapshots, strict=True)],
        ignore_index=True,
    )
    provenance = {
        result.network.checkpoint.path.stem: provenance_of(result, images, options).to_json()
        for result in results
    }
    return frame, provenance, notes_of(images, results)


def check_run(snapshots: Sequence[Snapshot], recipe: Recipe) -> None:
    """Raise ValueError if a snapshot is not one of the run with this recipe."""
    from models.training.loop import ANYWHERE

    for snapshot in snapshots:
        card = snapshot.file.card.get("training")
        card = card if isinstance(card, dict) else {}
        for name, value in asdict(recipe).items():
            if name not in ANYWHERE and card.get(name) != value:
                raise ValueError(
                    f"{snapshot.path}: a snapshot of another run: {name} is {card.get(name)} in "
                    f"its card and {value} in {CONFIG}; move it away"
                )


def without_first(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Leave out step 0: before BN has recorded anything, evaluation mode makes responses grow."""
    trained = [snapshot for snapshot in snapshots if snapshot.step > 0]
    if not trained:
        raise ValueError(
            f"{snapshots[0].path}: only step 0 is there, when BN has recorded nothing: wait for the "
            "next checkpoint, or use --source batchnorm"
        )
    if len(trained) < len(snapshots):
        reason = "BN has recorded nothing yet (--source batchnorm shows it)"
        print(f"step 0 is left out: {reason}", file=sys.stderr)
    return trained


def at_step(result: Measured, snapshot: Snapshot) -> pd.DataFrame:
    """Return the frame of one checkpoint, with its step and learning rate in front."""
    checkpoint = result.network.checkpoint
    config, training = checkpoint.config, checkpoint.card.get("training")
    name = config.name if config else type(checkpoint.model).__name__
    rate = training.get("current_lr") if isinstance(training, dict) else None
    frame = result.frame.assign(network=name)
    frame.insert(0, "step", snapshot.step)
    frame.insert(1, "lr", rate if isinstance(rate, float) else None)
    return frame.astype({"lr": float})


def read_recorded(paths: Sequence[Path]) -> pd.DataFrame:
    """Return the frame in a dynamics.csv. Raise ValueError, with the path, for any other file."""
    import pandas as pd

    from analysis.measuring.frame import COLUMNS

    path, *others = paths
    if others:
        raise ValueError(f"{others[0]}: a dynamics.csv is drawn by itself; leave the others out")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; Recorder.save writes a dynamics.csv")
    try:
        frame = pd.read_csv(path)
        if frame.columns[0] != "step" or not set(COLUMNS) <= set(frame.columns):
            raise ValueError(f"its columns are {', '.join(frame.columns)[:200]}")
        if frame.empty or not frame["std"].abs().lt(LARGEST).all():
            raise ValueError("it has no rows, or a std is missing")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a frame that Recorder.save wrote: {error}") from error
    return frame


def find_rates(training: Training, frame: pd.DataFrame) -> list[tuple[int, float]]:
    """Return from which step on which learning rate holds; empty if no rate is known."""
    import pandas as pd

    if training.recipe is None:
        return []
    pairs = pd.concat([frame[["step", "lr"]], training.epochs[["step", "lr"]]])
    known = pairs.drop_duplicates().sort_values("step").itertuples(index=False)
    return rates_of(training.recipe, known)


def rates_of(recipe: Recipe, known: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return from which iteration on which learning rate holds, in order.

    known: iterations, ascending, and the learning rate of the step that led there. The recipe says
        when the rate drops, but not when a warm-up ends: that is the first known iteration after it.

    >>> from models.training.recipe import Recipe
    >>> recipe = Recipe("residual", 110, iterations=4000)
    >>> rates_of(recipe, [(0, 0.01), (391, 0.01), (782, 0.1)])
    [(0, 0.01), (782, 0.1), (2000, 0.01), (3000, 0.001)]
    """
    known = list(known)
    warm = [step for step, rate in known if rate < recipe.learning_rate(int(step), False)]
    later = [step for step, _ in known if warm and step > max(warm)]
    end = ceil(min(later, default=recipe.iterations)) if warm else 0
    drops = -(-recipe.iterations // 2), -(-3 * recipe.iterations // 4)
    starts = sorted(start for start in {0, end, *drops} if start < recipe.iterations)
    rates = [(start, recipe.learning_rate(start, start < end)) for start in starts]
    return [rates[0], *(after for before, after in pairwise(rates) if after[1] != before[1])]


def print_table(frame: pd.DataFrame) -> None:
    """Print one line a step."""
    rows = frame.groupby("step")
    table = rows["std"].agg(["mean", "min", "max"]).map("{:.4f}".format)
    table.columns = ["mean std", "smallest", "largest"]
    if "lr" in frame and frame["lr"].notna().any():
        table.insert(0, "lr", rows["lr"].first().map("{:g}".format))
    print("\n" + table.reset_index().to_string(index=False, formatters={"step": "{:,}".format}))


if __name__ == "__main__":
    sys.exit(main())
