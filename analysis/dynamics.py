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
from dataclasses import asdict
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
from analysis.running.networks import Measured, Options, measure_networks
from analysis.running.processes import together

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd

    from analysis.running.steps import Snapshot
    from models.training.recipe import Recipe

CONFIG, METRICS = "config.json", "metrics.csv"  # in the folder of a run of models.train
CAPTION = "Std of the responses, layer by layer, and its mean, with the steps of the learning rate"


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
        recipe, epochs, sources = read_training(args.items[0])
    notes: list[str] = []
    if args.items[0].suffix == ".csv":
        frame, provenance = read_recorded(args.items), file_facts(args.items[0])
    else:
        frame, provenance, notes = measure_snapshots(args, options, recipe)
    drawn, line = (table.rename(columns={"step": "iteration"}) for table in (frame, epochs))
    figure = draw_dynamics(drawn, line, find_rates(recipe, frame, epochs))
    if recipe is None:
        figure.axes[1].set_xlabel("step")  # or an epoch: the checkpoints do not say
    write_notes([figure], notes)
    provenance |= sources
    files = {"dynamics.csv": as_csv(frame), "dynamics.json": as_json(provenance)}
    files |= as_images("dynamics", figure, args.format)
    if args.html:
        title = f"Layer responses of {frame['network'].iloc[0]} through training"
        page = make_page(title, [(CAPTION, figure)], drawn, provenance)
        files["dynamics.html"] = page.encode()
    written = write_files(args.out, files)
    print_table(frame)
    print(written)


def read_training(item: Path) -> tuple[Recipe | None, pd.DataFrame, dict[str, Any]]:
    """Return the recipe, the epochs (step, lr, mean_std) and their file of a run of models.train.

    Of any other item: None and no rows.
    """
    import pandas as pd

    from models.training.recipe import Recipe

    epochs = pd.DataFrame(columns=["step", "lr", "mean_std"], dtype=float)
    config, metrics = item / CONFIG, item / METRICS
    if not config.is_file():
        return None, epochs, {}
    try:
        recipe = Recipe(**json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        advice = "restore it: the card of a snapshot holds the same values"
        raise ValueError(f"{config}: damaged ({error}); {advice}") from error
    if not metrics.is_file():
        return recipe, epochs, {}
    try:
        return recipe, read_epochs(metrics), file_facts(metrics)
    except (ValueError, TypeError, OverflowError) as error:
        advice = "move it away, and the snapshots are drawn without it"
        raise ValueError(f"{metrics}: damaged ({error}); {advice}") from error


def file_facts(path: Path) -> dict[str, Any]:
    """Return which file was read, for the provenance."""
    from models.files import sha256

    return {path.name: {"path": str(path), "sha256": sha256(path)}}


def read_epochs(path: Path) -> pd.DataFrame:
    """Return the rows of a metrics.csv: step, lr and mean_std of each epoch."""
    import pandas as pd

    from analysis.cli.frames import LARGEST
    from analysis.measuring.frame import read_columns

    read_columns(path)  # raises for a line without end
    epochs = pd.read_csv(path, usecols=["iteration", "lr", "mean_std"])
    epochs = epochs.rename(columns={"iteration": "step"}).astype(float)
    ascending = (epochs["step"].diff()[1:] > 0).all()
    if not ascending or not (epochs.abs() < LARGEST).to_numpy().all():
        raise ValueError("the iterations do not ascend, or not all numbers are finite")
    return epochs


def measure_snapshots(
    args: argparse.Namespace, options: Options, recipe: Recipe | None
) -> tuple[pd.DataFrame, dict[str, Any], list[str]]:
    """Return the frame of all checkpoints, where it comes from, and notes for the figure."""
    import pandas as pd

    from analysis.running.steps import find_snapshots

    with together():
        items = [args.items[0] / "snapshots", *args.items[1:]] if recipe else args.items
        snapshots, skipped = find_snapshots(
            items, args.step_regex, weights=options.weights, ema=options.ema
        )
        for line in skipped:
            print(f"warning: {line}", file=sys.stderr)
        if recipe:
            check_run(snapshots, recipe)
        if options.sources == ("hooks",):
            snapshots = without_untrained(snapshots)
        of = f" of {recipe.iterations:,}" if recipe else ""
        print(f"checkpoints: {len(snapshots)}, last step: {snapshots[-1].step:,}{of}")
    steps = [Item(f"step {one.step}", one.path, file=one.file) for one in snapshots]
    networks, images = open_networks(steps, options)
    results = measure_networks(networks, images, options)
    frame = pd.concat(
        [at_step(result, one) for result, one in zip(results, snapshots, strict=True)],
        ignore_index=True,
    )
    if len(names := frame["network"].unique()) > 1:
        raise ValueError(
            f"{args.items[0]}: some checkpoints are taken for {names[0]}, some for {names[1]}; "
            "--model FILE.py:FUNCTION says which network they are of"
        )
    provenance = {
        result.network.label: provenance_of(result, images, options).to_json() for result in results
    }
    return frame, provenance, notes_of(images, results)


def check_run(snapshots: Sequence[Snapshot], recipe: Recipe) -> None:
    """Raise ValueError if a snapshot is not one of the run with this recipe."""
    from models.training.loop import ANYWHERE

    for snapshot in snapshots:
        card = {"warm_up": False} | snapshot.facts  # 0.1 had no such choice
        for name, value in asdict(recipe).items():
            if name not in ANYWHERE and card.get(name) != value:
                raise ValueError(
                    f"{snapshot.path}: a snapshot of another run: {name} is {card.get(name)} in "
                    f"its card and {value} in {CONFIG}; move it away"
                )


def without_untrained(snapshots: list[Snapshot]) -> list[Snapshot]:
    """Leave out an untrained network: without BN's statistics, responses grow in evaluation mode."""
    first, *others = snapshots
    tensors = first.file.tensors.items()
    means = [tensor for name, tensor in tensors if name.endswith("running_mean")]
    if not means or any(mean.any() for mean in means):
        return snapshots
    reason = "BN has recorded nothing yet (--source batchnorm shows it)"
    if not others:
        raise ValueError(f"{first.path}: {reason}; wait for the next checkpoint")
    print(f"step {first.step} is left out: {reason}", file=sys.stderr)
    return others


def at_step(result: Measured, snapshot: Snapshot) -> pd.DataFrame:
    """Return the frame of one checkpoint, with its step and learning rate in front."""
    config, model = result.network.checkpoint.config, result.network.checkpoint.model
    name = config.name if config else "network" if model is None else type(model).__name__
    rate = snapshot.facts.get("current_lr")
    frame = result.frame.assign(network=name)
    frame.insert(0, "step", snapshot.step)
    frame.insert(1, "lr", rate if isinstance(rate, float) else None)
    return frame.astype({"lr": float})


def read_recorded(paths: Sequence[Path]) -> pd.DataFrame:
    """Return the frame in a dynamics.csv. Raise ValueError, with the path, for any other file."""
    import pandas as pd

    from analysis.cli.frames import LARGEST, REAL, TEXT, check_text
    from analysis.measuring.frame import COLUMNS, complete, read_columns

    path, *others = paths
    if others:
        raise ValueError(f"{others[0]}: a dynamics.csv is drawn by itself; leave the others out")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; Recorder.save writes a dynamics.csv")
    try:
        columns = read_columns(path)
        if columns[0] != "step" or not set(COLUMNS) <= set(columns):
            raise ValueError(f"its columns are {', '.join(columns)[:200]}")
        real = [name for name in ("lr", *REAL, "std_error") if name in columns]
        types = dict.fromkeys([*TEXT, *real], str)
        frame = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
        check_text(frame)
        frame = frame.astype(dict.fromkeys(real, float))  # exactly what was written
        frame = pd.concat([frame[columns[: columns.index("network")]], complete(frame)], axis=1)
        whole = frame["step"].dtype == "int64" and frame["std"].abs().lt(LARGEST).all()
        if frame.empty or not whole or frame.duplicated(["step", "layer"]).any():
            raise ValueError("no rows, a step or std that is no number, or a layer twice at a step")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a frame that Recorder.save wrote: {error}") from error
    return frame


def find_rates(
    recipe: Recipe | None, frame: pd.DataFrame, epochs: pd.DataFrame
) -> list[tuple[int, float]]:
    """Return from which step on which learning rate holds; empty if no rate is known."""
    import pandas as pd

    if recipe is None:
        return []
    known = pd.concat([table[["step", "lr"]] for table in (frame, epochs)])
    pairs = known.drop_duplicates().sort_values("step").itertuples(index=False)
    return rates_of(recipe, pairs)


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
