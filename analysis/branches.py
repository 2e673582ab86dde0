"""How much each residual addition changes the signal, in any network.

    python -m analysis.branches resnet-20 resnet-56 resnet-110
    python -m analysis.branches hf:path/to/gpt2 --data text.txt --positions
    python -m analysis.branches timm:vit_tiny_patch16_224 --data folder/of/images --lesion 500

finds the residual additions of each network by its data flow and measures them while the input
runs through. It writes branches.csv, branches.json (where the numbers come from) and
branches.png/.pdf into --out, and with --html a page, branches.html. It prints the ratio
std(branch) / std(shortcut) by network, stage and kind of branch, and judges the paper's claim that
an individual layer changes the signal less if there are more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.cli.command import run_command
from analysis.cli.options import add_options, options_of, positive
from analysis.cli.outputs import (
    add_output_options,
    as_csv,
    as_images,
    as_json,
    check_folder,
    facts_of,
    write_files,
    write_notes,
)
from analysis.running.networks import Options, device_of
from analysis.running.processes import leave, together
from models.messages import does_not_run, is_out_of_memory, one_line

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd

    from analysis.cli.subjects import Subject

LENGTH = 128  # tokens of a window of text
CAPTION = "Std of each branch over std of its shortcut, and std of the stream after it"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.source != ["hooks"]:
        parser.error("--source batchnorm: additions are measured on input, not computed")
    options = options_of(parser, args)
    return run_command(lambda: run(args, options), device=args.device, debug=args.debug)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
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
    add("--batches", metavar="FILE.py:FUNCTION", help="returns the batches, for any other input")
    add("--length", type=positive, default=LENGTH, metavar="N", help="tokens of a window of text")
    add("--positions", action="store_true", help="measure norms and angles at each position, too")
    add(
        "--lesion",
        type=positive,
        metavar="N",
        help="also measure what is lost on N inputs with labels if one branch is left out",
    )
    add_output_options(parser)
    return parser


def run(args: argparse.Namespace, options: Options) -> None:
    """Measure, write and print. Raise ValueError or OSError for bad input."""
    import pandas as pd

    from analysis.cli.subjects import find_subjects
    from analysis.responses import print_claims
    from plots import draw_branches
    from plots.page import make_page

    with together():
        check_folder(args.out)
    leave()  # additions are measured by one process
    measured: list[tuple[Subject, pd.DataFrame]] = []
    for subject in find_subjects(args.items, options, batches=args.batches, length=args.length):
        frame = measure_subject(subject, options, positions=args.positions, lesion=args.lesion)
        if frame is not None:
            others = {"other_sums": frame.attrs.pop("others")}
            subject.provenance |= {"precision": options.precision} | others
            measured.append((subject, frame))
    if not measured:
        raise ValueError("none of the networks has a residual addition")
    frame = pd.concat([frame for _, frame in measured], ignore_index=True)
    claim, table = judge_steps(measured), table_of(frame)
    provenance = {subject.label: subject.provenance for subject, _ in measured}
    figure = draw_branches(frame)
    write_notes([figure], dict.fromkeys(subject.note for subject, _ in measured if subject.note))
    files = {"branches.csv": as_csv(frame), "branches.json": as_json(provenance)}
    files |= as_images("branches", figure, args.format)
    if args.html:
        data = "; ".join(dict.fromkeys(subject.data for subject, _ in measured))
        page = make_page(
            "Residual additions",
            [(CAPTION, figure)],
            frame,
            provenance,
            summary=table,
            verdicts=claim,
            facts=facts_of(None) | {"data": data},
        )
        files["branches.html"] = page.encode()
    written = write_files(args.out, files)
    print("\n" + table.to_string(index=False))
    print_claims(claim)
    print(written)


def measure_subject(
    subject: Subject, options: Options, *, positions: bool, lesion: int | None
) -> pd.DataFrame | None:
    """Return the frame of a network. Print a line, and return None, if it has no additions."""
    from tqdm import tqdm

    from analysis.additions.lesion import add_lesions
    from analysis.additions.measurement import NoAdditions, measure_branches

    model, label, forward = subject.model.to(device_of(options)), subject.label, subject.forward
    how: dict[str, Any] = {"precision": options.precision, "positions": positions}
    how |= {"network": label, "forward": forward, "mask": subject.mask}
    try:
        with tqdm(unit=" inputs", desc=label, leave=False, disable=None) as bar:
            frame = measure_branches(model, subject.batches(), progress=bar.update, **how)
        if lesion is None:
            return frame
        words = f"{label}, one branch left out"
        with tqdm(unit=" passes", desc=words, leave=False, disable=None) as bar:
            more: dict[str, Any] = {"forward": forward, "progress": bar.update}
            return add_lesions(frame, model, subject.batches(), images=lesion, **more)
    except NoAdditions as reason:
        print(one_line(reason))
        return None
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{label}: {does_not_run(error)}") from error


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


def judge_steps(measured: Sequence[tuple[Subject, pd.DataFrame]]) -> pd.DataFrame:
    """Judge the paper's claim about additions, in each family of networks; see `paper.judge`.

    A family has one class of network and one sequence of shapes. Its members differ in their number
    of additions, which stands for the depth.
    """
    import pandas as pd

    from analysis import paper
    from analysis.measuring.result import unwrapped

    families: dict[tuple[object, ...], list[paper.Subject]] = {}
    for subject, frame in measured:
        key = (type(unwrapped(subject.model)), *frame["shape"].unique())
        member = paper.Subject(
            label=subject.label,
            kind="residual",
            depth=len(frame),
            widths=frozenset(),
            std=frame["after_std"].to_numpy(float),
            ratio=frame["ratio"].to_numpy(float),
            images=int(frame["images"].iloc[0]),
            iterations=subject.iterations,
        )
        families.setdefault(key, []).append(member)
    claims = pd.concat([paper.judge(members) for members in families.values()], ignore_index=True)
    claim = claims[claims["statement"] == paper.CLAIMS[2]]
    found = claim[claim["networks"] != ""]
    return claim.head(1) if found.empty else found


if __name__ == "__main__":
    sys.exit(main())
