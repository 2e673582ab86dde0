"""How trained networks differ, and whether a difference means anything.

    python -m analysis.compare resnet-56 other=checkpoint.pth earlier/responses.csv
    python -m analysis.compare --group a=a0.pth,a1.pth,a2.pth,a3.pth --group b=b0.pth,b1.pth,b2.pth,b3.pth

takes checkpoints, shipped networks by name and frames made earlier, in any mixture. It writes
compare.csv (every pair, layer by layer), compare.json, the curves with their difference
(compare.png/.pdf) and the std by stage (compare-stages.png/.pdf), with --html also a page to look
at (compare.html), and prints a table of the pairs. The networks of a group (seeds of one
configuration) are drawn as mean and band, and two groups come with a permutation test over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from analysis.cli.entries import Entry, read_entries, same_tensors
from analysis.cli.items import add_options, check_folder, check_options
from analysis.cli.outputs import (
    add_page_option,
    as_csv,
    as_images,
    as_json,
    as_page,
    finish,
    note_stand_in,
    write_files,
)
from analysis.measuring.processes import together

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd

CAPTIONS = (
    "Std of the layer responses, and what differs from the first",
    "Std by stage: a point a layer, a line at the median",
)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.compare",
        description="Compare the layer responses of trained networks, or of groups of them.",
    )
    add = parser.add_argument
    add(
        "items",
        nargs="*",
        metavar="[LABEL=]ITEM",
        help="a checkpoint, a shipped network's name, or a responses.csv",
    )
    add(
        "--group",
        action="append",
        default=[],
        metavar="LABEL=ITEM,ITEM,...",
        help="networks of one configuration",
    )
    add_options(parser)
    add_page_option(parser)
    args = parser.parse_args(argv)
    things = [*args.items, *args.group]
    if len(things) < 2 and not any(
        item.endswith(".csv") for item in args.items
    ):  # which may hold several networks
        parser.error(
            "name two things to compare, or more: checkpoints, shipped networks, responses.csv or groups"
        )
    check_options(parser, args)
    return finish(run, args)


def run(args: argparse.Namespace) -> None:
    """Read, measure, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from analysis.statistics import compare_frames
    from plots import draw_compare, draw_stages

    with together():
        check_folder(args.out)
    entries, provenance = read_entries(args)
    if len(entries) < 2:
        raise ValueError(
            f"{args.items[0]}: it holds one network; name another thing to compare it with"
        )
    pairs = list(combinations(entries, 2))
    differences = [compare_frames(first.curve, second.curve) for first, second in pairs]
    parts = [
        frame.assign(entry=entry.label, member=i)
        for entry in entries
        for i, frame in enumerate(entry.frames)
    ]
    curves = pd.concat(parts, ignore_index=True)
    files = {
        "compare.csv": as_csv(pd.concat(differences, ignore_index=True)),
        "compare.json": as_json(provenance),
    }
    to_first = differences[: len(entries) - 1]
    figures = {"compare": draw_compare(curves, to_first), "compare-stages": draw_stages(curves)}
    note_stand_in(figures.values(), provenance)
    for name, figure in figures.items():
        files |= as_images(name, figure, args.format)
    if args.html:
        title = f"Layer responses: {', '.join(entry.label for entry in entries)}"
        shown = zip(CAPTIONS, figures.values(), strict=True)
        files |= as_page("compare", title, shown, list_layers(entries), provenance)
    printed = [describe_pairs(pairs), *describe_groups(pairs)]
    written = write_files(args.out, files)
    print("\n" + "\n\n".join(printed) + "\n" + written)


def list_layers(entries: Sequence[Entry]) -> pd.DataFrame:
    """Every layer of every network, under the label of its curve, with its difference to the first
    one's.

    Networks deeper than the first have no difference: it is known at the first one's layers, which
    lie between theirs.
    """
    import pandas as pd

    from analysis.statistics import compare_frames

    first = entries[0].curve
    parts = []
    for entry in entries:
        for frame in entry.frames:
            part = frame.assign(network=entry.label)
            if entry.group:
                part["member"] = frame["network"]
            if entry is not entries[0] and len(frame) <= len(first):
                part["difference"] = compare_frames(first, frame)["difference"].to_numpy()
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def describe_pairs(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    """A table with a row a pair: the second against the first."""
    import pandas as pd

    from analysis.statistics import summarise_pair

    rows = []
    for first, second in pairs:
        found = summarise_pair(first.curve, second.curve)
        verdict = (
            "identical"
            if same_tensors(first, second)
            else "same numbers"
            if found["identical"]
            else ""
        )
        rows.append(
            {
                "second vs first": f"{second.label} vs {first.label}",
                "mean std": f"{second.curve['std'].mean():.4f} vs {first.curve['std'].mean():.4f}",
                "ratio": dash(found["ratio"]),
                "largest difference": f"{found['largest']:+.4f} in {found['layer']} ({found['name']})",
                "r": dash(found["r"]),
                "rank r": dash(found["rho"]),
                "area": f"{found['area']:.4f}",
                "": verdict,
            }
        )
    return "\n".join(
        line.rstrip() for line in pd.DataFrame(rows).to_string(index=False).splitlines()
    )


def dash(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def describe_groups(pairs: Sequence[tuple[Entry, Entry]]) -> list[str]:
    """For each pair of groups the networks' values, and what they say."""
    lines = []
    for first, second in pairs:
        if first.group and second.group:
            values = [
                f"{entry.label}: mean std of each network: {', '.join(f'{mean:.4f}' for mean in entry.means)}"
                for entry in (first, second)
            ]
            lines.append(
                "\n".join(
                    [*values, f"{second.label} - {first.label}: {describe_test(first, second)}"]
                )
            )
    if len(lines) > 1:
        lines.append(
            f"{len(lines)} pairs of groups: each p is of one alone, and times {len(lines)} a bound for all"
        )
    return lines


def describe_test(first: Entry, second: Entry) -> str:
    """What a permutation of the networks of two groups says of the difference of their means."""
    from analysis.statistics import ENOUGH, permutation_test

    sizes = f"{len(first.frames)} and {len(second.frames)}"
    try:
        test = permutation_test(first.means, second.means)
    except ValueError as error:
        difference = sum(second.means) / len(second.means) - sum(first.means) / len(first.means)
        return f"{difference:+.4f}, no exact test: {error}"
    interval = (
        f"too few networks for an interval (there are enough from {ENOUGH} on)"
        if test.interval is None
        else f"95 % interval {test.interval[0]:+.4f} to {test.interval[1]:+.4f}"
    )
    return (
        f"{test.difference:+.4f}, p = {small(test.p)} (permutation of networks, two-sided; the smallest that {sizes} "
        f"can give is {small(test.smallest)}); {interval}"
    )


def small(p: float) -> str:
    """A probability, which an exact test never makes 0."""
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1e}"


if __name__ == "__main__":
    sys.exit(main())
