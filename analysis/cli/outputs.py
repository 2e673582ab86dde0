"""What the commands write: frames, figures, pages and provenance; all files or none."""

from __future__ import annotations

import argparse
import csv
import errno
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.running.networks import Measured, Options
    from models.data import ImageSet

UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}  # equal figures give equal bytes


def add_output_options(parser: argparse.ArgumentParser, *, page: bool = True) -> None:
    """Add the options that say what is written, and where."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: figures")
    add(
        "--format",
        choices=("png", "pdf", "svg"),
        nargs="+",
        default=["png", "pdf"],
        help="of figures (default: png pdf)",
    )
    if page:
        add(
            "--html",
            action="store_true",
            help="also write a page: one file with the figures, every layer and where the numbers "
            "come from",
        )
    add("--debug", action="store_true", help="show the traceback of an error")


def check_folder(folder: Path) -> None:
    """Make the folder for the results before the work. Raise ValueError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"--out {folder}: {error.strerror}; name a folder that can be written"
        raise ValueError(message) from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> str:
    """Write files into a folder, all of them or none. Return lines that name them.

    Raises ValueError, with what to do, if one cannot be written.
    """
    from models.files import replacing, uninterrupted

    try:
        for name in files:
            check_replaceable(folder / name)
        with uninterrupted(), ExitStack() as stack:
            for name, content in files.items():
                stack.enter_context(replacing(folder / name)).write_bytes(content)
    except OSError as error:
        advice = "make room, or name another --out"
        raise ValueError(f"{folder}: cannot write: {error.strerror}; {advice}") from error
    return "\n" + "\n".join(f"wrote {folder / name}" for name in files)


def check_replaceable(path: Path) -> None:
    """Raise an error if a file of this name cannot be put in the place of what is there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a result has this name: name another --out")
    try:
        with open(path, "r+b"):
            pass
    except OSError as error:
        if error.errno == errno.EPERM:  # immutable; one that is only read-only can be replaced
            raise


def as_csv(frame: pd.DataFrame) -> bytes:
    """Return a frame as a CSV file, with numbers in full.

    Text is quoted if some of it holds a semicolon, which separates cells in some countries: what
    follows it could be a formula.
    """
    text = frame.select_dtypes(["object", "string"])
    split = any(";" in str(value) for value in text.to_numpy().flat)
    quoting = csv.QUOTE_NONNUMERIC if split else csv.QUOTE_MINIMAL
    return str(frame.to_csv(index=False, lineterminator="\n", quoting=quoting)).encode()


def as_json(document: Mapping[str, Any]) -> bytes:
    """Return a document as a JSON file; NaN becomes null."""
    return (json.dumps(finite(document), indent=2, allow_nan=False) + "\n").encode()


def finite(value: Any) -> Any:
    """Return a document with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def as_images(name: str, figure: Figure, formats: Sequence[str]) -> dict[str, bytes]:
    """Return a figure as a file of each format, by file name."""
    files = {}
    for suffix in dict.fromkeys(formats):
        content = io.BytesIO()
        figure.savefig(content, format=suffix, dpi=300, metadata=UNDATED.get(suffix))
        files[f"{name}.{suffix}"] = content.getvalue()
    return files


def facts_of(images: ImageSet | None) -> dict[str, str]:
    """Return what to know first about a page: on which images, when, and by which command."""
    data = "none: computed from BN's tensors" if images is None else images.describe()
    return {"images": data, "date": date.today().isoformat(), "command": command_line()}


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of one network come from.

    network: its name, how its kind is known, and what built it (`--model`).
    unpaired: convolutions without a row, and why, by name.
    data: where the images come from, and how many were used.
    The fields from `preprocessing` on are None if nothing was measured on images.
    """

    checkpoint: dict[str, Any]
    network: dict[str, Any]
    source: list[str]
    warnings: list[str]
    versions: dict[str, str]
    command: str
    unpaired: dict[str, str]
    eps: float | None = None
    preprocessing: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    device: str | None = None
    precision: str | None = None
    accuracy: float | None = None
    method: str | None = None
    rounding: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def provenance_of(measured: Measured, images: ImageSet | None, options: Options) -> Provenance:
    """Return where the numbers of one network come from."""
    checkpoint, result = measured.network.checkpoint, measured.measurement
    config = checkpoint.config
    facts: dict[str, Any] = {
        "checkpoint": {
            "path": str(checkpoint.path),
            "sha256": checkpoint.digest,
            "card": checkpoint.card,
        },
        "network": {
            "name": None if config is None else config.name,
            "kind_known": checkpoint.how_kind(),
            "model": measured.network.built_by,
        },
        "source": list(dict.fromkeys(measured.frame["source"])),
        "warnings": checkpoint.warnings,
        "versions": versions(),
        "command": command_line(),
        "eps": measured.eps,
        "unpaired": measured.missing,
    }
    if result is not None and images is not None and checkpoint.preprocessing is not None:
        facts["preprocessing"] = {
            "name": checkpoint.preprocessing.name,
            "known": checkpoint.how_preprocessing(),
            "crop_padding": checkpoint.crop_padding,
        }
        facts["data"] = {**images.provenance(), "images": result.images}
        facts["device"] = str(next(measured.network.model.parameters()).device)
        facts |= {"precision": options.precision, "rounding": measured.rounding}
        facts |= {"accuracy": result.accuracy, "method": result.method}
    return Provenance(**facts)


def command_line() -> str:
    """Return the command that runs, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = Path(sys.argv[0]).name
    if spec is not None:
        program = f"python -m {spec.name.removesuffix('.__main__')}"
    return f"{program} {shlex.join(sys.argv[1:])}".rstrip()


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    packages = {package: version(package) for package in ("torch", "numpy", "pandas")}
    try:
        own = version("layer-responses")
    except PackageNotFoundError:  # run from a checkout
        own = "not installed"
    return {"layer-responses": own, "python": python_version(), **packages}


def notes_of(images: ImageSet | None, results: Sequence[Measured]) -> list[str]:
    """Return what has to stand under figures: which images these are, and what is missing."""
    from models.data.probe import Probe

    notes = missing_layers(results)
    if images is None or not any(result.measurement for result in results):
        return notes
    if isinstance(images, Probe):
        return [images.note_for([r.network.checkpoint.digest for r in results]), *notes]
    if len(images) < images.total:
        return [f"measured on {len(images):,} of {images.total:,} images", *notes]
    return notes


def missing_layers(results: Sequence[Measured]) -> list[str]:
    """Return lines that name the layers without a row, one for all networks that lack the same."""
    from analysis.running.computing import list_names
    from plots.style import display_name

    labels: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        labels.setdefault(tuple(result.missing), []).append(display_name(result.network.label))
    return [
        f"{list_names(names)}: without {len(missing)} layer{'s' * (len(missing) > 1)} that could "
        f"not be measured: {list_names(missing)}"
        for missing, names in labels.items()
        if missing
    ]


def write_notes(figures: Iterable[Figure], notes: Iterable[str]) -> None:
    """Write notes under figures."""
    from plots.style import write_note

    for figure in figures:
        for note in notes:
            write_note(figure, note)
