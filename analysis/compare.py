"""How trained networks differ, and whether a difference means anything.

    python -m analysis.compare resnet-56 other=checkpoint.pth earlier/responses.csv
    python -m analysis.compare --group a=a0.pth,a1.pth,a2.pth,a3.pth --group b=b0.pth,b1.pth

compares checkpoints, shipped networks and frames made earlier. It writes compare.csv (every pair,
layer by layer), compare.json, the curves with their differences (compare.png/.pdf) and the std by
stage (compare-stages.png/.pdf), and with --html a page, compare.html. It prints a table of the
pairs. The networks of a group (seeds of one configuration) are drawn as mean and band, and two
groups come with a permutation test over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from analysis.cli.command import run_command
from analysis.cli.entries import Entry, read_entries, same_tensors
from analysis.cli.options import add_options, options_of
from analysis.cli.outputs import (
    add_output_options,
    as_csv,
    as_images,
    as_json,
    check_folder,
    facts_of,
    notes_of,
    write_files,
    write_notes,
)
from analysis.running.processes import together

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd

    from analysis.running.networks import Options

CAPTIONS = (
    "Std of the layer responses, and what differs from the first",
    "Std by stage: a point a layer, a line at the median",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.compare",
        description="Compare the layer responses of trained networks, or of groups of them.",
    )
    add = parser.add_argument
    add(
        "items",
        nargs="*",
        metavar="[LABEL=]ITEM",
        help="a checkpoint, the name of a shipped network, or a responses.csv",
    )
    add(
        "--group",
        action="append",
        default=[],
        metavar="LABEL=ITEM,ITEM,...",
        help="networks of one configuration",
    )
    add_options(parser)
    add_output_options(parser)
    args = parser.parse_args(argv)
    several = any(item.endswith(".csv") for item in args.items)  # it may hold several networks
    if len([*args.items, *args.group]) < 2 and not several:
        parser.error(
            "name two things to compare, or more: checkpoints, shipped networks, responses.csv or "
            "groups"
        )
    options = options_of(parser, args)
    return run_command(lambda: run(args, options), device=args.device, debug=args.debug)


def run(args: argparse.Namespace, options: Options) -> None:
    """Read, measure, write and print. Raise ValueError or OSError for bad input."""
    import pandas as pd

    from analysis.statistics import compare_frames
    from plots import draw_compare, draw_stages
    from plots.page import make_page

    with together():
        check_folder(args.out)
    found = read_entries(args.items, args.group, options)
    entries = found.entries
    if len(entries) < 2:
        raise ValueError(
            f"{args.items[0]}: it holds one network; name another thing to compare it with"
        )
    pairs = list(combinations(entries, 2))
    differences = [compare_frames(first.curve, second.curve) for first, second in pairs]
    curves = pd.concat(
        [
            frame.assign(entry=entry.label, member=member)
            for entry in entries
            for member, frame in enumerate(entry.frames)
        ],
        ignore_index=True,
    )
    figures = {
        "compare": draw_compare(curves, differences[: len(entries) - 1]),
        "compare-stages": draw_stages(curves),
    }
    write_notes(figures.values(), notes_of(found.images, found.results))
    files = {"compare.csv": as_csv(pd.concat(differences, ignore_index=True))}
    files["compare.json"] = as_json(found.provenance)
    for name, figure in figures.items():
        files |= as_images(name, figure, args.format)
    if args.html:
        title = f"Layer responses: {', '.join(entry.label for entry in entries)}"
        captioned = list(zip(CAPTIONS, figures.values(), strict=True))
        layers, facts = list_layers(entries), facts_of(found.images)
        page = make_page(
            title, captioned, layers, found.provenance, summary=table_of(pairs), facts=facts
        )
        files["compare.html"] = page.encode()
    written = write_files(args.out, files)
    lines = table_of(pairs).to_string(index=False).splitlines()
    table = "\n".join(line.rstrip() for line in lines)
    print("\n" + "\n\n".join([table, *describe_groups(pairs)]) + "\n" + written)


def list_layers(entries: Sequence[Entry]) -> pd.DataFrame:
    """Return every layer of every network under its label, with its difference to the first.

    Networks deeper than the first have no difference: it is known only at the first one's layers,
    which lie between theirs.
    """
    import pandas as pd

    from analysis.statistics import compare_frames

    first = entries[0].curve
    parts = []
    for entry in entries:
        for frame in entry.frames:
            part = frame.assign(network=entry.label)
            if entry.is_group:
                part["member"] = frame["network"]
            if entry is not entries[0] and len(frame) <= len(first):
                part["difference"] = compare_frames(first, frame)["difference"].to_numpy()
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def table_of(pairs: Sequence[tuple[Entry, Entry]]) -> pd.DataFrame:
    """Return a table with one row a pair: the second against the first."""
    import pandas as pd

    from analysis.statistics import summarise_pair

    rows = []
    for first, second in pairs:
        found = summarise_pair(first.curve, second.curve)
        same = "identical" if same_tensors(first, second) else ""
        rows.append(
            {
                "second vs first": f"{second.label} vs {first.label}",
                "mean std": " vs ".join(
                    f"{one.curve['std'].mean():.4f}" for one in (second, first)
                ),
                "ratio": number_or_dash(found["ratio"]),
                "largest difference": f"{found['largest']:+.4f} in {found['layer']} "
                f"({found['name']})",
                "r": number_or_dash(found["r"]),
                "rank r": number_or_dash(found["rho"]),
                "area": f"{found['area']:.4f}",
                "": same or ("same numbers" if found["identical"] else ""),
            }
        )
    return pd.DataFrame(rows)


def number_or_dash(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def describe_groups(pairs: Sequence[tuple[Entry, Entry]]) -> list[str]:
    """Return, for each pair of groups, the networks' values and what they say."""
    lines = []
    for first, second in pairs:
        if first.is_group and second.is_group:
            values = [
                f"{entry.label}: mean std of each network: "
                f"{', '.join(f'{mean:.4f}' for mean in entry.means)}"
                for entry in (first, second)
            ]
            test = f"{second.label} - {first.label}: {describe_test(first, second)}"
            lines.append("\n".join([*values, test]))
    if len(lines) > 1:
        lines.append(
            f"{len(lines)} pairs of groups: p-values are per pair; multiply by {len(lines)} for a "
            "Bonferroni bound"
        )
    return lines


def describe_test(first: Entry, second: Entry) -> str:
    """Return what a permutation test says of the difference of two groups' means."""
    from analysis.statistics import ENOUGH, permutation_test

    sizes = f"{len(first.frames)} and {len(second.frames)}"
    try:
        test = permutation_test(first.means, second.means)
    except ValueError as error:
        means = [sum(entry.means) / len(entry.means) for entry in (first, second)]
        return f"{means[1] - means[0]:+.4f}, no exact test: {error}"
    interval = f"too few networks for an interval (there are enough with {ENOUGH})"
    if test.interval is not None:
        interval = f"95 % interval {test.interval[0]:+.4f} to {test.interval[1]:+.4f}"
    return (
        f"{test.difference:+.4f}, p = {probability(test.p)} (permutation of networks, two-sided; "
        f"the smallest that {sizes} can give is {probability(test.smallest)}); {interval}"
    )


def probability(p: float) -> str:
    """Return a probability as text; an exact test never gives 0."""
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1e}"


if __name__ == "__main__":
    sys.exit(main())
