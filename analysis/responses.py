"""Fig. 7 from trained networks: the std of every 3x3 layer's response, as a frame, a figure and a
table.

    python -m analysis.responses --depth 20 56 110
    python -m analysis.responses --checkpoint resnet-20=resnet20-12fca82f.th --data cifar-10-python.tar.gz

writes responses.csv, claims.csv, responses.json (where the numbers come from), fig7.png/.pdf and
decomposition.png/.pdf into --out (with --html also a page to look at, responses.html), says how far
each network is from the paper's curve, and judges the paper's claims. Without CIFAR-10 it measures
on the probe set (models/data/probe.py).
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from analysis.cli.items import (
    Found,
    Network,
    add_options,
    check_folder,
    check_options,
    positive,
    split_label,
    trained,
)
from analysis.cli.outputs import (
    add_page_option,
    as_csv,
    as_images,
    as_json,
    as_page,
    describe_network,
    finish,
    note_stand_in,
    stand_in,
    write_files,
)
from analysis.measuring.processes import together

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd

CAPTIONS = (
    "Std of the layer responses, in original order and sorted by magnitude",
    "What the responses consist of: std² = within² + between²",
)
PAPER_DEPTHS = [20, 56, 110]
PAPER_ITERATIONS = 64_000
MARKS = {
    "holds": "+",
    "does not hold": "-",
    "cannot be judged here": "?",
}  # before the sentence of a number


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.depth is None:
        args.depth = [] if args.checkpoint else PAPER_DEPTHS
    if args.kind and len(args.kind) > 1 and not args.depth:
        parser.error("--kind: one kind at a time where it says what the checkpoints are")
    check_options(parser, args)
    return finish(run, args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.responses",
        description="Measure the std of every 3x3 layer's response, after BN and before ReLU or addition, and draw "
        "Fig. 7 of He et al., CVPR 2016.",
    )
    add = parser.add_argument
    add(
        "--depth",
        type=positive,
        nargs="+",
        metavar="N",
        help="depths of shipped networks (default, where no checkpoint is named: 20 56 110)",
    )
    add(
        "--kind",
        choices=("residual", "plain"),
        nargs="+",
        help="kinds of shipped networks (default: both, but for "
        "plain-110, as in the paper); without any, what the checkpoints are",
    )
    add(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="[LABEL=]PATH",
        help="files of trained networks",
    )
    add_options(parser, both=True)
    add_page_option(parser)
    add("--no-paper", action="store_true", help="leave out the paper's own curves")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from analysis.cli.items import prepare
    from analysis.measuring.networks import measure_all, measure_blocks
    from analysis.paper import curves, judge
    from plots import draw_decomposition, draw_fig7

    with together():
        check_folder(args.out)
        found = [*find_shipped(args), *find_checkpoints(args)]
    plan = prepare(args, found)
    frames = measure_all(args, plan)
    provenance = {
        network.label: describe_network(args, network, frame, plan)
        for network, frame in zip(plan.networks, frames, strict=True)
    }
    accuracies = [frame.attrs.pop("accuracy", None) for frame in frames]
    for part in frames:
        part.attrs.clear()
    frame = pd.concat(frames, ignore_index=True)
    iterations = {network.label: trained(network.checkpoint) for network in plan.networks}
    claims = judge(
        frame[frame["source"] == plan.sources[0]], measure_blocks(args, plan), iterations
    )
    note = "\n".join(filter(None, (short_runs(plan.networks), stand_in(provenance))))
    figures = {
        "fig7": draw_fig7(frame, None if args.no_paper else curves(), note=note),
        "decomposition": draw_decomposition(frame),
    }
    note_stand_in([figures["decomposition"]], provenance)
    files = {
        "responses.csv": as_csv(frame),
        "claims.csv": as_csv(claims),
        "responses.json": as_json(provenance),
    }
    for name, figure in figures.items():
        files |= as_images(name, figure, args.format)
    if args.html:
        shown = zip(CAPTIONS, figures.values(), strict=True)
        files |= as_page("responses", "Layer responses", shown, frame, provenance)
    written = write_files(args.out, files)
    print_table([part[part["source"] == plan.sources[0]] for part in frames], accuracies)
    if len(plan.sources) > 1:
        print_differences(frame)
    print_claims(claims)
    print(written)


def find_shipped(args: argparse.Namespace) -> list[Found]:
    """Every shipped network that is asked for; a line on stderr for each that is not there.

    Raises ValueError where there is none of them, and no checkpoint to draw in their place.
    """
    from models import zoo
    from models.resnet import network_name

    found: list[Found] = []
    missing: list[str] = []
    for kind in dict.fromkeys(args.kind or ("plain", "residual")):
        for depth in dict.fromkeys(args.depth):
            name = network_name(kind, depth)
            if kind == "plain" and depth >= max(PAPER_DEPTHS) and not args.kind:
                continue  # the paper leaves it out: its training error is above 60 %
            if name in zoo.shipped():
                found.append(Found(name, zoo.find(name)))
            else:
                missing.append(not_shipped(name, kind, depth))
    if missing and not found and not args.checkpoint:
        raise ValueError(missing[0])
    for line in missing:
        print(line, file=sys.stderr)
    return found


def not_shipped(name: str, kind: str, depth: int) -> str:
    """A line that says so, and how to come by the network."""
    from models import zoo
    from models.resnet import check_depth

    try:
        check_depth(depth)
    except ValueError as error:
        return f"--depth {depth}: {error}"
    shipped = ", ".join(zoo.shipped()) or "none"
    return f"{name} is not shipped (there are: {shipped}); python -m models.train --depth {depth} --kind {kind} makes it"


def find_checkpoints(args: argparse.Namespace) -> list[Found]:
    """Every checkpoint that is named, with its label and kind, where they are said."""
    kind = args.kind[0] if args.kind and not args.depth else None
    return [Found(*split_label(item), kind) for item in args.checkpoint]


def short_runs(networks: list[Network]) -> str:
    """Which networks were trained for less than the paper's number of iterations, in words for the
    figure.
    """
    from plots.style import display_name

    lengths: dict[int, list[str]] = {}
    for network in networks:
        iterations = trained(network.checkpoint)
        if iterations and iterations < PAPER_ITERATIONS:
            lengths.setdefault(iterations, []).append(display_name(network.label))
    return "\n".join(
        f"{'all networks' if len(labels) == len(networks) else ', '.join(labels)} trained for {iterations:,} "
        f"of the paper's {PAPER_ITERATIONS:,} iterations"
        for iterations, labels in sorted(lengths.items())
    )


def print_table(frames: list[pd.DataFrame], accuracies: list[float | None]) -> None:
    """One line a network: layers, accuracy, std, and how far it is from the paper."""
    import pandas as pd

    from analysis.paper import against_paper

    rows = []
    for frame, accuracy in zip(frames, accuracies, strict=True):
        std = frame["std"]
        [paper] = against_paper(frame).itertuples()
        rows.append(
            {
                "network": paper.network,
                "layers": len(std),
                "accuracy %": "-" if accuracy is None else f"{100 * accuracy:.2f}",
                "mean std": f"{std.mean():.4f}",
                "smallest": f"{std.min():.4f}",
                "largest": f"{std.max():.4f}",
                "paper's r": "-" if pd.isna(paper.r) else f"{paper.r:.3f}",
                "ratio to paper": "-" if pd.isna(paper.ratio) else f"{paper.ratio:.3f}",
            }
        )
    print("\n" + pd.DataFrame(rows).to_string(index=False))


def print_differences(frame: pd.DataFrame) -> None:
    """How far the closed form is from what hooks measured, network by network."""
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
            f"  {network}: mean {100 * difference.mean():.1f} %, largest {100 * difference.max():.1f} % in layer "
            f"{worst['layer']} ({worst['name']}), {len(both)} layers of {len(sources[0])}"
        )


def print_claims(claims: pd.DataFrame) -> None:
    """The paper's statements, each with its verdict and what it rests on."""
    from analysis.paper import verdict_of

    print("\nThe paper's claims, on these networks:")
    for statement, numbers in claims.groupby("statement", sort=False):
        print(f"  {statement}: {verdict_of(numbers)}")
        for verdict, sentence in zip(numbers["verdict"], numbers["sentence"], strict=True):
            print(f"    {MARKS[verdict]} {sentence}")


if __name__ == "__main__":
    sys.exit(main())
