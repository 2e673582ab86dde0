"""What the commands of this package write: frames, figures, pages, provenance; all files or none."""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.measuring.processes import joined
from models.messages import is_out_of_memory, out_of_memory, report

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.cli.items import Network, Plan

UNDATED = {
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}  # the same figure gives the same bytes


def finish(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command. Returns its exit status: 0, 2 with one line for bad input, 130 after Ctrl-C."""
    try:
        with joined(args.device), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", module="PIL"
            )  # of a damaged image the error says enough
            run(args)
    except KeyboardInterrupt:
        print("interrupted: no file is half-written", file=sys.stderr)
        return 130
    except Exception as error:
        short = is_out_of_memory(error)
        if args.debug or not (short or isinstance(error, ValueError | OSError)):
            raise
        return report(out_of_memory(error) if short else error)
    return 0


def write_files(folder: Path, files: Mapping[str, bytes]) -> str:
    """Write files into a folder, all of them or none. Returns lines that say so; ValueError where
    it cannot be.
    """
    from models.files import replacing, uninterrupted

    for name in files:
        if (folder / name).is_dir():
            raise ValueError(
                f"{folder / name} is a folder, and a result has this name: move it away, or name another --out"
            )
    try:
        with uninterrupted(), ExitStack() as stack:
            for name, content in files.items():
                stack.enter_context(replacing(folder / name)).write_bytes(content)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot write: {error.strerror}; make room, or name another --out"
        ) from error
    return "\n" + "\n".join(f"wrote {folder / name}" for name in files)


def as_csv(frame: pd.DataFrame) -> bytes:
    """A frame as a file: numbers in full."""
    return str(frame.to_csv(index=False, lineterminator="\n")).encode()


def as_json(document: Mapping[str, Any]) -> bytes:
    """A document as a file."""
    return (json.dumps(document, indent=2) + "\n").encode()


def as_images(name: str, figure: Figure, formats: list[str]) -> dict[str, bytes]:
    """A figure as a file of each format, by file name."""
    import matplotlib as mpl

    from plots.style import RC

    files = {}
    for suffix in dict.fromkeys(formats):
        content = io.BytesIO()
        with mpl.rc_context(RC):
            figure.savefig(content, format=suffix, dpi=300, metadata=UNDATED.get(suffix))
        files[f"{name}.{suffix}"] = content.getvalue()
    return files


def stand_in(provenance: Mapping[str, Any]) -> str:
    """On which images the numbers rest, where these stand for others (`describe_network`); else
    empty.
    """
    notes = (
        entry["data"]["note"] for entry in provenance.values() if "note" in entry.get("data", {})
    )
    return "\n".join(dict.fromkeys(notes))


def note_stand_in(figures: Iterable[Figure], provenance: Mapping[str, Any]) -> None:
    """Write this below figures."""
    from plots.style import write_note

    for figure in figures:
        if note := stand_in(provenance):
            write_note(figure, note)


def add_page_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--html",
        action="store_true",
        help="write a page to look at, too: one file that needs no "
        "network, with the figures, every layer and where the numbers come from",
    )


def as_page(
    name: str,
    title: str,
    figures: Iterable[tuple[str, Figure]],
    table: pd.DataFrame,
    provenance: dict[str, Any],
) -> dict[str, bytes]:
    """Figures with their captions, a table of layers and the provenance as one HTML file, by file
    name.
    """
    from plots.page import make_page

    return {f"{name}.html": make_page(title, list(figures), table, provenance).encode()}


def describe_network(
    args: argparse.Namespace, network: Network, frame: pd.DataFrame, plan: Plan
) -> dict[str, Any]:
    """Where a network's numbers come from, as JSON can hold it."""
    checkpoint, data = network.checkpoint, plan.data
    name = None if checkpoint.config is None else checkpoint.config.name
    known = checkpoint.how_kind()
    builder = args.model if known.startswith("built by --model") else None
    entry: dict[str, Any] = {
        "checkpoint": {
            "path": str(checkpoint.path),
            "sha256": checkpoint.digest,
            "card": checkpoint.card,
        },
        "network": {"name": name, "kind_known": known, "model": builder},
        "source": plan.sources,
        "warnings": checkpoint.warnings,
        "versions": versions(),
    }
    if "hooks" in plan.sources and data is not None and checkpoint.preprocessing is not None:
        entry["preprocessing"] = {
            "name": checkpoint.preprocessing.name,
            "known": checkpoint.how_preprocessing(),
            "crop_padding": checkpoint.crop_padding,
        }
        entry["data"] = {**data.provenance(), "images": int(frame["images"].max())}
        device = str(next(network.model.parameters()).device)
        entry |= {
            "device": device,
            "precision": args.precision,
            "accuracy": frame.attrs["accuracy"],
        }
        entry |= {"path": frame.attrs["path"], "rounding": frame.attrs["rounding"]}
        entry |= {"unpaired": frame.attrs["unpaired"], "unseen": frame.attrs["unseen"]}
    return entry


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    known = {"python": python_version()} | {
        package: version(package) for package in ("torch", "numpy", "pandas")
    }
    try:
        return {"layer-responses": version("layer-responses")} | known
    except PackageNotFoundError:  # run from a checkout
        return {"layer-responses": "not installed"} | known
