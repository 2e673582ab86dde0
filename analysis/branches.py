"""How much each residual addition changes the signal, in any network.

    python -m analysis.branches resnet-20 resnet-56 resnet-110
    python -m analysis.branches hf:path/to/gpt2 --data text.txt --positions
    python -m analysis.branches timm:vit_tiny_patch16_224 --data folder/of/images --lesion 500

finds the residual additions of each network by data flow (analysis.measuring.dataflow), measures
them while the input runs through, and writes branches.csv, branches.json (where the numbers come
from) and branches.png/.pdf into --out. It prints the ratio std(branch) / std(shortcut) by network,
stage and kind of branch, and judges the paper's claim that an individual layer changes the signal
less if there are more.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from typing import TYPE_CHECKING, Any

from analysis.cli.items import add_options, check_folder, check_options, positive
from analysis.cli.outputs import (
    add_page_option,
    as_csv,
    as_images,
    as_json,
    as_page,
    finish,
    write_files,
)
from analysis.cli.subjects import Subject, find_subjects
from models.messages import does_not_run, is_out_of_memory, one_line

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd

LENGTH = 128  # tokens of a window of text
CAPTION = "Std of each branch over std of its shortcut, and std of the stream after it"
CLAIM = "an individual layer of a ResNet modifies the signal less when there are more"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.source != ["hooks"]:
        parser.error("--source batchnorm: additions are measured on input, not computed")
    check_options(parser, args)
    return finish(run, args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.branches",
        description="Measure how much each residual addition of a network changes the signal.",
    )
    add = parser.add_argument
    add(
        "items",
        nargs="+",
        metavar="[LABEL=]ITEM",
        help="a shipped network such as resnet-20, a checkpoint, timm:NAME, or hf:NAME_OR_FOLDER",
    )
    add_options(parser, source="hooks")
    add_page_option(parser)
    add("--batches", metavar="FILE.py:FUNCTION", help="returns the batches, for any other input")
    add("--length", type=positive, default=LENGTH, metavar="N", help="tokens of a window of text")
    add("--positions", action="store_true", help="measure norms and angles at each position, too")
    add(
        "--lesion",
        type=positive,
        metavar="N",
        help="also measure what is lost on N inputs with labels if one branch is left out",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from plots import draw_branches

    check_folder(args.out)
    frames, provenance, families, iterations = [], {}, {}, {}
    for subject in find_subjects(args):
        frame = measure_subject(args, subject)
        if frame is None:
            continue
        frames.append(frame)
        others = frame.attrs.pop("others")
        provenance[subject.label] = subject.provenance | {"other_sums": others}
        families[subject.label] = subject.family, tuple(frame["shape"].unique())
        iterations[subject.label] = subject.iterations
    if not frames:
        raise ValueError("none of the networks has a residual addition")
    frame = pd.concat(frames, ignore_index=True)
    files = {"branches.csv": as_csv(frame), "branches.json": as_json(provenance)}
    figure = draw_branches(frame)
    files |= as_images("branches", figure, args.format)
    if args.html:
        table = frame.rename(columns={"addition": "layer"})  # to which the figure's points refer
        files |= as_page("branches", "Residual additions", [(CAPTION, figure)], table, provenance)
    written = write_files(args.out, files)
    print("\n" + table_of(frame).to_string(index=False))
    print_claim(frame, families, iterations)
    print(written)


def measure_subject(args: argparse.Namespace, subject: Subject) -> pd.DataFrame | None:
    """Return the frame of a network; None, with a line, if it has no residual additions."""
    from tqdm import tqdm

    from analysis.measuring.branch_measurement import NoAdditions, measure_branches

    model = subject.model.to(device_of(args))
    options: dict[str, Any] = {"forward": subject.forward, "mask": subject.mask}
    options |= {"precision": args.precision, "positions": args.positions}
    with tqdm(unit=" inputs", desc=subject.label, leave=False, disable=None) as bar:
        try:
            frame = measure_branches(
                model, subject.batches(), network=subject.label, progress=bar.update, **options
            )
        except NoAdditions as reason:
            print(one_line(reason))
            return None
        except ValueError as error:
            raise ValueError(f"{subject.label}: {error}") from error
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{subject.label}: {does_not_run(error)}") from error
    return add_lesion_columns(args, subject, frame) if args.lesion else frame


def add_lesion_columns(
    args: argparse.Namespace, subject: Subject, frame: pd.DataFrame
) -> pd.DataFrame:
    """Return the frame with the columns of --lesion."""
    from tqdm import tqdm

    from analysis.measuring.lesion import add_lesions

    options: dict[str, Any] = {"images": args.lesion, "forward": subject.forward}
    words = f"{subject.label}, one branch left out"
    with tqdm(unit=" passes", desc=words, leave=False, disable=None) as bar:
        try:
            return add_lesions(
                frame, subject.model, subject.batches(), progress=bar.update, **options
            )
        except ValueError as error:
            raise ValueError(f"{subject.label}: {error}") from error


def device_of(args: argparse.Namespace) -> str:
    import torch

    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"


def table_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return median and range of the ratio by network, stage and kind of branch."""
    import pandas as pd

    rows = []
    for network, additions in frame.groupby("network", sort=False):
        groups = [("all", additions)]
        for column, word in (("stage", "stage {}"), ("branch_kind", "{}")):
            if len(set(additions[column])) > 1:
                parts = additions.groupby(column, sort=False)
                groups += [(word.format(key), part) for key, part in parts]
        for words, part in groups:
            ratio = part["ratio"]
            rows.append(
                {"network": network, "of": words, "additions": len(part)}
                | {"median ratio": f"{ratio.median():.3f}", "smallest": f"{ratio.min():.3f}"}
                | {"largest": f"{ratio.max():.3f}"}
            )
    return pd.DataFrame(rows)


def print_claim(
    frame: pd.DataFrame, families: dict[str, tuple[Any, ...]], iterations: dict[str, int | None]
) -> None:
    """Judge the claim on any two networks of one family and different depth.

    Networks that were trained for different numbers of iterations are shown, but not judged.
    """
    ratios = {str(name): part["ratio"] for name, part in frame.groupby("network", sort=False)}
    lines = []
    for first, second in combinations(ratios, 2):
        shallow, deep = sorted((first, second), key=lambda name: len(ratios[name]))
        same = families[first] == families[second]
        if not same or len(ratios[shallow]) == len(ratios[deep]):
            continue
        less = ratios[deep].median() < ratios[shallow].median()
        known = iterations[deep], iterations[shallow]
        unequal = None not in known and known[0] != known[1]
        lines.append(
            f"    {'?' if unequal else '+' if less else '-'} a branch has "
            f"{ratios[deep].median():.3f} times the std of its shortcut in {deep}, "
            f"{ratios[shallow].median():.3f} times in {shallow} (medians over additions)"
            + (f"; after {known[0]:,} and {known[1]:,} iterations" if unequal else "")
        )
    marks = {line.strip()[0] for line in lines} - {"?"}
    words = {"+": "holds", "-": "does not hold"}
    verdict = "holds in part" if len(marks) > 1 else words[marks.pop()] if marks else None
    print(f"\n{CLAIM}: {verdict or 'cannot be judged here'}")
    print("\n".join(lines) or "    ? no two networks of one family and different depth")


if __name__ == "__main__":
    sys.exit(main())
