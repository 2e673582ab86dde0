"""Fig. 7 from trained networks: the std of every 3x3 layer's response, as a frame, a figure and a table.

    python -m analysis.responses --depth 20 56 110
    python -m analysis.responses --checkpoint resnet-20=resnet20-12fca82f.th --data cifar-10-python.tar.gz

writes responses.csv, responses.json (where the numbers come from) and fig7.png/.pdf into --out, and says how far each
network is from the paper's curve. Without images it computes the closed form from BN's tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and pandas are imported when they are needed: --help does without
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from models.checkpoints import Checkpoint
    from models.cifar10 import Cifar10
    from models.preprocess import Preprocessing

PAPER_DEPTHS = [20, 56, 110]
PAPER_ITERATIONS = 64_000
UNDATED = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # the same figure gives the same bytes


@dataclass(frozen=True)
class Network:
    """A checkpoint under the label that the frame and the figure give it."""

    label: str
    checkpoint: Checkpoint


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_options(parser, args)
    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.responses",
        description="Measure the std of every 3x3 layer's response, after BN and before ReLU or addition, and draw "
        "Fig. 7 of He et al., CVPR 2016.",
    )
    add = parser.add_argument
    add("--depth", type=positive, nargs="+", metavar="N", help="depths of shipped networks (default, where no "
        "checkpoint is named: 20 56 110)")  # fmt: skip
    add("--kind", choices=("residual", "plain"), nargs="+", help="kinds of shipped networks (default: both, but for "
        "plain-110, as in the paper); without any, what the checkpoints are")  # fmt: skip
    add("--checkpoint", nargs="+", default=[], metavar="[LABEL=]PATH", help="files of trained networks")
    add("--source", choices=("hooks", "batchnorm"), help="measure on images, or compute from BN's tensors alone "
        "(default: hooks, and batchnorm where there are no images)")  # fmt: skip
    add("--data", type=Path, metavar="PATH", help="CIFAR-10: parquet, official version, archive or folder of images "
        "(default: $CIFAR10, ./data, the cache folder, a download)")  # fmt: skip
    add("--split", choices=("test", "train"), default="test", help="default: %(default)s")
    add("--images", type=positive, metavar="N", help="measure on the first N images (default: all)")
    add("--normalize", default="auto", metavar="PRESET", help="imagenet, cifar10, cifar10-2, [-1,1], [0,1], per-pixel "
        "or auto (the file's card, else what fits; the default)")  # fmt: skip
    add("--batch-size", type=positive, default=128, metavar="N", help="images at a time (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: %(default)s")
    add("--format", choices=("png", "pdf", "svg"), nargs="+", default=["png", "pdf"], help="default: png pdf")
    add("--no-paper", action="store_true", help="leave out the paper's own curves")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def positive(text: str) -> int:
    """A whole number of 1 or more; argparse says so where it is not."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with argparse's usage line and status 2 where options do not go together."""
    if args.depth is None:
        args.depth = [] if args.checkpoint else PAPER_DEPTHS
    if args.kind and len(args.kind) > 1 and not args.depth:
        parser.error("--kind: one kind at a time where it says what the checkpoints are")
    from models.preprocess import PER_PIXEL, PRESETS

    presets = ["auto", *PRESETS, PER_PIXEL]
    if args.normalize not in presets:
        parser.error(f"--normalize: unknown preset {args.normalize!r}; one of {', '.join(presets)}")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device on this machine; use --device cpu")


def run(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises ValueError or OSError, with what to do, for bad input."""
    import pandas as pd

    from analysis.paper import curves
    from plots import draw_fig7

    check_folder(args.out)
    data = find_data(args)
    networks = load_networks(args, data)
    frames = measure_all(args, networks, data)
    provenance = {
        network.label: describe_network(args, network, frame, data)
        for network, frame in zip(networks, frames, strict=True)
    }
    accuracies = [frame.attrs.pop("accuracy", None) for frame in frames]
    frame = pd.concat(frames, ignore_index=True)
    figure = draw_fig7(frame, None if args.no_paper else curves(), note=short_runs(networks))
    written = write_all(args.out, args.format, frame, provenance, figure)
    print_table(frames, accuracies)
    print_claims(frame)
    print("\n" + "\n".join(f"wrote {path}" for path in written))


def check_folder(folder: Path) -> None:
    """Make the folder for the results, before the work. ValueError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder}: {error.strerror}; name a folder that can be written") from error


def find_data(args: argparse.Namespace) -> Cifar10 | None:
    """The images to measure on, or None for the closed form."""
    from models import cifar10
    from models.layouts import NoData

    if args.source == "batchnorm":
        return None
    try:
        data = cifar10.load(args.data, args.split)
    except NoData as error:
        if args.data or args.source == "hooks":
            raise
        print(f"{error}\nno images: the closed form from BN's tensors instead (--source batchnorm)", file=sys.stderr)
        return None
    if args.images and args.images > len(data.images):
        raise ValueError(f"--images {args.images}: there are {len(data.images)} {args.split} images in {data.path}")
    print(data.describe())
    return data


def load_networks(args: argparse.Namespace, data: Cifar10 | None) -> list[Network]:
    """Read all checkpoints, say what each is and how that is known, and give each a label of its own."""
    networks: list[Network] = []
    for label, path, kind in [*find_shipped(args), *find_checkpoints(args)]:
        checkpoint = load_checkpoint(args, label, path, kind, data)
        taken = {network.label for network in networks}
        if label is None:
            label = checkpoint.model.config.name
            label = path.stem if label in taken else label
        if label in taken:
            raise ValueError(f"two networks are called {label}: name them, --checkpoint LABEL=PATH LABEL=PATH")
        networks.append(Network(label, checkpoint))
        config, how = checkpoint.model.config, checkpoint.how
        iterations = trained(checkpoint)
        length = "" if iterations is None else f", trained for {iterations:,} iterations"
        print(f"{label}: network {config.name} ({how['kind']}){length}")
        if data is not None and checkpoint.preprocessing is not None:
            name, padding = checkpoint.preprocessing.name, checkpoint.crop_padding
            print(f"{label}: preprocessing {name}, {padding} padding in training ({how['preprocessing']})")
        for warning in checkpoint.warnings:
            print(f"warning: {label}: {warning}", file=sys.stderr)
    return networks


def find_shipped(args: argparse.Namespace) -> list[tuple[str | None, Path, str | None]]:
    """The label, the file and the kind of every shipped network that is asked for; a line for each that is not there.

    Raises ValueError where there is none of them, and no checkpoint to draw in their place.
    """
    from models import zoo
    from models.resnet import network_name

    found: list[tuple[str | None, Path, str | None]] = []
    missing: list[str] = []
    for kind in dict.fromkeys(args.kind or ("plain", "residual")):
        for depth in dict.fromkeys(args.depth):
            name = network_name(kind, depth)
            if kind == "plain" and depth >= max(PAPER_DEPTHS) and not args.kind:
                continue  # the paper leaves it out: its training error is above 60 %
            if name in zoo.shipped():
                found.append((name, zoo.find(name), None))
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
    return (
        f"{name} is not shipped (there are: {shipped}); python -m models.train --depth {depth} --kind {kind} makes it"
    )


def find_checkpoints(args: argparse.Namespace) -> list[tuple[str | None, Path, str | None]]:
    """The label, the file and the kind of every checkpoint, where they are said."""
    kind = args.kind[0] if args.kind and not args.depth else None
    return [(*split_label(item), kind) for item in args.checkpoint]


def split_label(item: str) -> tuple[str | None, Path]:
    """LABEL=PATH or PATH. A path that exists wins: Lightning's files are called epoch=3-step=100.ckpt."""
    label, equals, path = item.partition("=")
    if not equals or Path(item).exists():
        return None, Path(item)
    return label or None, Path(path)


def load_checkpoint(
    args: argparse.Namespace, label: str | None, path: Path, kind: str | None, data: Cifar10 | None
) -> Checkpoint:
    """Read one checkpoint; where nothing else says whether it is residual or plain, its label does."""
    from models.checkpoints import load
    from models.resnet import parse_name

    normalize = None if args.normalize == "auto" else args.normalize
    checkpoint = load(path, kind=kind, normalize=normalize, images=None if data is None else data.images)
    try:
        named = parse_name(label or "")
    except ValueError:
        return checkpoint  # a label of the user's own
    if checkpoint.how["kind"] == "assumed" and named[0] != checkpoint.model.config.kind:
        checkpoint = load(path, kind=named[0], normalize=normalize)
    config = checkpoint.model.config
    if named != (config.kind, config.depth):
        checkpoint.warnings.append(f"the label says {label}, the file holds {config.name}")
    return checkpoint


def trained(checkpoint: Checkpoint) -> int | None:
    """For how many iterations, where the file has a card of our trainer that says so."""
    training = checkpoint.card.get("training")
    iterations = training.get("iterations") if isinstance(training, dict) else None
    return iterations if isinstance(iterations, int) else None


def short_runs(networks: list[Network]) -> str:
    """Which networks were trained for less than the paper's number of iterations, in words for the figure."""
    lengths: dict[int, list[str]] = {}
    for network in networks:
        iterations = trained(network.checkpoint)
        if iterations and iterations < PAPER_ITERATIONS:
            lengths.setdefault(iterations, []).append(network.label)
    return "\n".join(
        f"{'all networks' if len(labels) == len(networks) else ', '.join(labels)} trained for {iterations:,} "
        f"of the paper's {PAPER_ITERATIONS:,} iterations"
        for iterations, labels in sorted(lengths.items())
    )


def measure_all(args: argparse.Namespace, networks: list[Network], data: Cifar10 | None) -> list[pd.DataFrame]:
    """The frame of each network, measured on the images, or by the closed form where there are none."""
    import torch
    from tqdm import tqdm

    from analysis.frame import make_frame
    from analysis.hooks import measure
    from models.batchnorm import closed_form

    if data is None:
        return [
            make_frame(closed_form(model), network=network.label, kind=c.kind, depth=c.depth, source="batchnorm")
            for network in networks
            for model in [network.checkpoint.model]
            for c in [model.config]
        ]
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    total = args.images or len(data.images)
    frames = []
    with tqdm(total=total * len(networks), unit=" images", leave=False, disable=None) as bar:
        for network in networks:
            bar.set_description(network.label)
            checkpoint = network.checkpoint
            assert checkpoint.preprocessing is not None  # recognised at the latest, as there are images
            batches = make_batches(data, total, args.batch_size, checkpoint.preprocessing)
            model = checkpoint.model.to(device)
            options = {"network": network.label, "precision": args.precision, "progress": bar.update}
            try:
                frames.append(measure(model, batches, **options))
            except ValueError as error:
                raise ValueError(f"{checkpoint.path}: {error}") from error
    return frames


def make_batches(
    data: Cifar10, total: int, size: int, normalise: Preprocessing
) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """The first `total` images, normalised, in batches (n, 3, 32, 32) with labels (n,) where there are labels."""
    import torch

    for start in range(0, total, size):
        part = slice(start, min(start + size, total))
        images = normalise(data.images[part])
        yield images if data.labels is None else (images, torch.from_numpy(data.labels[part]))


def describe_network(
    args: argparse.Namespace, network: Network, frame: pd.DataFrame, data: Cifar10 | None
) -> dict[str, Any]:
    """Where a network's numbers come from, as JSON can hold it."""
    checkpoint = network.checkpoint
    entry: dict[str, Any] = {
        "checkpoint": {"path": str(checkpoint.path), "sha256": checkpoint.digest, "card": checkpoint.card},
        "network": {"name": checkpoint.model.config.name, "kind_known": checkpoint.how["kind"]},
        "source": frame["source"].iloc[0],
        "warnings": checkpoint.warnings,
        "versions": versions(),
    }
    if data is not None and checkpoint.preprocessing is not None:
        entry["preprocessing"] = {
            "name": checkpoint.preprocessing.name,
            "known": checkpoint.how["preprocessing"],
            "crop_padding": checkpoint.crop_padding,
        }
        entry["data"] = {"path": str(data.path), "layout": data.layout, "split": data.split}
        entry["data"] |= {"sha256": data.digest, "exact": data.exact, "images": int(frame["images"].iloc[0])}
        device = str(next(checkpoint.model.parameters()).device)
        entry |= {"device": device, "precision": args.precision, "accuracy": frame.attrs["accuracy"]}
    return entry


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    known = {"python": python_version()} | {package: version(package) for package in ("torch", "numpy", "pandas")}
    try:
        return {"layer-responses": version("layer-responses")} | known
    except PackageNotFoundError:  # run from a checkout
        return {"layer-responses": "not installed"} | known


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


def print_claims(frame: pd.DataFrame) -> None:
    """The paper's two claims, judged on these networks."""
    from analysis.paper import judge

    print("\nThe paper's claims, in means over layers:")
    for claim in judge(frame):
        print(f"  {claim.statement}: {claim.verdict} ({claim.evidence})")


def write_all(
    folder: Path, formats: list[str], frame: pd.DataFrame, provenance: dict[str, Any], figure: Figure
) -> list[Path]:
    """Write the frame, its provenance and the figure: all of them, or none. Returns their paths."""
    import matplotlib as mpl

    from models.files import replacing
    from plots.style import RC

    names = ["responses.csv", "responses.json", *(f"fig7.{suffix}" for suffix in dict.fromkeys(formats))]
    with ExitStack() as files, mpl.rc_context(RC):
        csv, document, *images = [files.enter_context(replacing(folder / name)) for name in names]
        frame.to_csv(csv, index=False, lineterminator="\n")
        document.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        for image in images:
            figure.savefig(image, dpi=300, metadata=UNDATED.get(image.suffix))
    return [folder / name for name in names]


if __name__ == "__main__":
    sys.exit(main())
