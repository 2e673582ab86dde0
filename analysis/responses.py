"""Fig. 7 from trained networks: the std of every 3x3 layer's response, drawn and judged.

    python -m analysis.responses --depth 20 56 110
    python -m analysis.responses --checkpoint resnet-20=resnet20.th --data cifar-10-python.tar.gz

writes into --out: responses.csv, claims.csv, responses.json (where the numbers come from),
fig7.png/.pdf and decomposition.png/.pdf, and with --html a page, responses.html. It prints how far
each network is from the paper's curve, and what the numbers say of the paper's claims. Without
CIFAR-10 it measures on the probe set (models.data.probe).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.cli.command import run_command
from analysis.cli.items import Item, find_item, open_networks
from analysis.cli.options import add_options, options_of, positive
from analysis.cli.outputs import (
    add_output_options,
    as_csv,
    as_images,
    as_json,
    check_folder,
    facts_of,
    notes_of,
    provenance_of,
    write_files,
    write_notes,
)
from analysis.running.networks import Options, measure_networks
from analysis.running.processes import together

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd

    from analysis.paper import Subject
    from analysis.running.networks import Measured, Network

CAPTIONS = (
    "Std of the layer responses, in original order and sorted by magnitude",
    "What the responses consist of: std² = within² + between²",
)
PAPER_DEPTHS = [20, 56, 110]
PAPER_ITERATIONS = 64_000
MARKS = {"holds": "+", "does not hold": "-", "cannot be judged here": "?"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.depth is None:
        args.depth = [] if args.checkpoint else PAPER_DEPTHS
    if args.kind and len(args.kind) > 1 and not args.depth:
        parser.error("--kind: one kind at a time if it says what the checkpoints are")
    options = options_of(parser, args)
    return run_command(lambda: run(args, options), device=args.device, debug=args.debug)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.responses",
        description="Measure the std of every 3x3 layer's response, after BN and before ReLU or "
        "addition, and draw Fig. 7 of He et al., CVPR 2016.",
    )
    add = parser.add_argument
    add(
        "--depth",
        type=positive,
        nargs="+",
        metavar="N",
        help="depths of shipped networks (default: 20 56 110 if no checkpoint is named)",
    )
    add(
        "--kind",
        choices=("residual", "plain"),
        nargs="+",
        help="kinds of shipped networks (default: both, without plain-110, as in the paper); if "
        "there are none, the kind of the checkpoints",
    )
    add("--checkpoint", nargs="+", default=[], metavar="[LABEL=]PATH", help="trained networks")
    add_options(parser, both=True)
    add("--no-paper", action="store_true", help="leave out the paper's own curves")
    add(
        "--scale",
        choices=("auto", "linear", "log"),
        default="auto",
        help="of fig7's axis; auto is linear, and clips a curve that would flatten all others",
    )
    add("--size", choices=("column", "wide", "slide"), default="column", help="of fig7")
    add("--ylim", type=float, nargs=2, metavar=("LOW", "HIGH"), help="lowest and highest std shown")
    add("--palette", choices=("paper", "colorblind"), default="paper", help="default: paper")
    add("--title", help="a text above fig7")
    add_output_options(parser)
    return parser


def run(args: argparse.Namespace, options: Options) -> None:
    """Measure, write and print. Raise ValueError or OSError for bad input."""
    import pandas as pd

    from analysis.paper import judge, paper_curves
    from plots import draw_decomposition, draw_fig7
    from plots.page import make_page

    with together():
        check_folder(args.out)
        items = [*shipped_items(args), *checkpoint_items(args)]
    networks, images = open_networks(items, options)
    results = measure_networks(networks, images, options)
    frame = pd.concat([result.frame for result in results], ignore_index=True)
    claims = judge([subject for result in results if (subject := subject_of(result))])
    provenance = {
        result.network.label: provenance_of(result, images, options).to_json() for result in results
    }
    notes = notes_of(images, results)
    shown = None if args.no_paper else paper_curves()
    table = table_of(results)
    fig7 = draw_fig7(
        frame,
        shown,
        note="\n".join([*short_runs(networks), *notes]),
        **{name: getattr(args, name) for name in ("scale", "size", "ylim", "palette", "title")},
    )
    decomposition = draw_decomposition(frame)
    write_notes([decomposition], notes)
    figures = {"fig7": fig7, "decomposition": decomposition}
    files = {"responses.csv": as_csv(frame), "claims.csv": as_csv(claims)}
    files["responses.json"] = as_json(provenance)
    for name, figure in figures.items():
        files |= as_images(name, figure, args.format)
    if args.html:
        page = make_page(
            "Layer responses",
            list(zip(CAPTIONS, figures.values(), strict=True)),
            frame,
            provenance,
            summary=table,
            verdicts=claims,
            facts=facts_of(images),
            paper=shown,
        )
        files["responses.html"] = page.encode()
    written = write_files(args.out, files)
    print("\n" + table.to_string(index=False))
    print_dominated(results)
    if len(set(frame["source"])) > 1:
        print_differences(frame)
    print_claims(claims)
    print(written)


def shipped_items(args: argparse.Namespace) -> list[Item]:
    """Return the shipped networks that are asked for; print a line for each that is not there.

    Raises ValueError if none of them is there, and no checkpoint is named.
    """
    from models import zoo
    from models.resnet import network_name

    found: list[Item] = []
    missing: list[str] = []
    for kind in dict.fromkeys(args.kind or ("plain", "residual")):
        for depth in dict.fromkeys(args.depth):
            name = network_name(kind, depth)
            if kind == "plain" and depth >= max(PAPER_DEPTHS) and not args.kind:
                continue  # the paper leaves it out: its training error is above 60 %
            if name in zoo.shipped():
                found.append(Item(name, zoo.find(name)))
            else:
                missing.append(not_shipped(name, kind, depth))
    if missing and not found and not args.checkpoint:
        raise ValueError(missing[0])
    for line in missing:
        print(line, file=sys.stderr)
    return found


def not_shipped(name: str, kind: str, depth: int) -> str:
    """Return a line that says so, and how to get the network."""
    from models import zoo
    from models.resnet import check_depth

    try:
        check_depth(depth)
    except ValueError as error:
        return f"--depth {depth}: {error}"
    shipped = ", ".join(zoo.shipped()) or "none"
    command = f"python -m models.train --depth {depth} --kind {kind}"
    return f"{name} is not shipped (shipped: {shipped}); {command} makes it"


def checkpoint_items(args: argparse.Namespace) -> list[Item]:
    """Return the checkpoints that are named, with their labels and kind if these are given."""
    kind = args.kind[0] if args.kind and not args.depth else None
    return [find_item(item, kind) for item in args.checkpoint]


def subject_of(result: Measured) -> Subject | None:
    """Return what the claims need to know of a network; None if its kind or depth is unknown."""
    from analysis.paper import Subject

    frame, measurement = result.frame, result.measurement
    layers = frame[frame["source"] == frame["source"].iloc[0]].sort_values("layer")
    kind, depth = layers["kind"].iloc[0], layers["depth"].iloc[0]
    if kind not in ("residual", "plain") or depth is None or depth != depth:
        return None
    return Subject(
        label=str(layers["network"].iloc[0]),
        kind=kind,
        depth=int(depth),
        widths=frozenset(layers["channels"]),
        std=layers["std"].to_numpy(float),
        ratio=measurement.ratios() if measurement else None,
        images=measurement.images if measurement else None,
        iterations=result.network.checkpoint.iterations,
        std_without=measurement.std_without_groups() if measurement else None,
        ratio_without=measurement.ratios_without_groups() if measurement else None,
    )


def short_runs(networks: Sequence[Network]) -> list[str]:
    """Return lines for the figure: which networks had less than the paper's training."""
    from plots.style import display_name

    lengths: dict[int, list[str]] = {}
    for network in networks:
        iterations = network.checkpoint.iterations
        if iterations and iterations < PAPER_ITERATIONS:
            lengths.setdefault(iterations, []).append(display_name(network.label))
    return [
        f"{'all networks' if len(labels) == len(networks) else ', '.join(labels)} trained for "
        f"{iterations:,} of the paper's {PAPER_ITERATIONS:,} iterations"
        for iterations, labels in sorted(lengths.items())
    ]


def table_of(results: Sequence[Measured]) -> pd.DataFrame:
    """Return one row a network: layers, accuracy, std, and how far it is from the paper."""
    import pandas as pd

    from analysis.paper import against_paper

    rows = []
    for result in results:
        frame = result.frame
        layers = frame[frame["source"] == frame["source"].iloc[0]]
        std = layers["std"]
        accuracy = result.measurement.accuracy if result.measurement else None
        [paper] = against_paper(layers).itertuples()
        rows.append(
            {
                "network": paper.network,
                "layers": len(std),
                "accuracy %": "-" if accuracy is None else f"{100 * accuracy:.2f}",
                "mean std": f"{std.mean():.4f}",
                "± error": error_of_mean(result),
                "smallest": f"{std.min():.4f}",
                "largest": f"{std.max():.4f}",
                "paper's r": "-" if pd.isna(paper.r) else f"{paper.r:.3f}",
                "ratio to paper": "-" if pd.isna(paper.ratio) else f"{paper.ratio:.3f}",
            }
        )
    return pd.DataFrame(rows)


def print_dominated(results: Sequence[Measured]) -> None:
    """Print the layers in which one group of images makes more than half of the variance."""
    for result in results:
        if result.measurement is None:
            continue
        flags = zip(result.frame["layer"], result.measurement.dominated, strict=False)
        layers = [str(layer) for layer, flag in flags if flag]
        if layers:
            words = f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"
            print(f"{result.network.label}: few images make most of the variance of {words}")


def error_of_mean(result: Measured) -> str:
    """Return the sampling error of the mean std over images, as a cell of the table."""
    from analysis.statistics import jackknife_error

    if result.measurement is None:
        return "-"
    error = jackknife_error(result.measurement.std_without_groups().mean(axis=1))
    return "-" if error != error else f"{error:.4f}"


def print_differences(frame: pd.DataFrame) -> None:
    """Print how far the closed form is from what hooks measured, network by network."""
    from analysis.measuring.frame import relative_difference

    print("\nThe closed form against hooks, relative differences of std:")
    for network, layers in frame.groupby("network", sort=False):
        sources = [layers[layers["source"] == source] for source in ("hooks", "batchnorm")]
        both = sources[0].merge(sources[1], on=["name", "norm"], suffixes=("", "_formula"))
        if both.empty:
            print(f"  {network}: no layer in both")
            continue
        difference = relative_difference(both["std_formula"], both["std"])
        worst = both.loc[difference.idxmax()]
        print(
            f"  {network}: mean {100 * difference.mean():.1f} %, largest "
            f"{100 * difference.max():.1f} % in layer {worst['layer']} ({worst['name']}), "
            f"{len(both)} layers of {len(sources[0])}"
        )


def print_claims(claims: pd.DataFrame) -> None:
    """Print the paper's claims, each with its verdict and what it rests on."""
    from analysis.paper import verdict_of

    print("\nThe paper's claims, on these networks:")
    for statement, numbers in claims.groupby("statement", sort=False):
        print(f"  {statement}: {verdict_of(numbers)}")
        for verdict, sentence in zip(numbers["verdict"], numbers["sentence"], strict=True):
            print(f"    {MARKS[verdict]} {sentence}")


if __name__ == "__main__":
    sys.exit(main())
