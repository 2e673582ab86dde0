"""The frame: one row a layer, with the same columns everywhere.

| column | meaning |
| --- | --- |
| network, kind, depth | label such as resnet-56; `residual`, `plain` or `other`; layers with weights |
| layer | 1-based position of the 3x3 convolution in forward order |
| name, norm | qualified module names of the convolution and of its BN |
| stage | 1-based; a new stage begins if the map size (closed form: the width) changes |
| channels, height, width | shape of one image's response |
| images, count | number of images; number of values: images * channels * height * width |
| mean, std | mean and population std of all values |
| std_error | sampling error of std over images: a jackknife of 20 groups of images |
| within, between | root mean variance of a channel; std of the channel means |
| source | `hooks` (measured on images) or `batchnorm` (closed form) |
| dominated | whether one of the 20 groups makes more than half of the variance |

std^2 = within^2 + between^2. With source `batchnorm`, images, count, height, width, std_error and
dominated are empty; std_error and dominated also on fewer than 640 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

INTEGERS = ("depth", "layer", "stage", "channels", "height", "width", "images", "count")
COLUMNS = (
    *("network", "kind", "depth", "layer", "name", "norm", "stage"),
    *("channels", "height", "width", "images", "count"),
    *("mean", "std", "std_error", "within", "between", "source", "dominated"),
)
COLUMNS_0_1 = tuple(name for name in COLUMNS if name not in ("std_error", "dominated"))

LINE = 4096  # characters of the line with the column names
LARGEST = 64 * 2**20  # bytes of a CSV file; a row is a layer and has some 200


def read_columns(path: Path) -> list[str]:
    """Return the names in the first line of a CSV file.

    Raises ValueError for a file or a line so long that pandas would not end.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    with open(path, encoding="utf-8-sig") as file:
        line = file.readline(LINE)
    if len(line) == LINE:
        raise ValueError(f"its first line has no end within {LINE:,} characters")
    return [name.strip(' "') for name in line.rstrip("\n").split(",")]


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame, of this version or 0.1, with all columns in order and of their types."""
    types = {**dict.fromkeys(INTEGERS, "Int64"), "std_error": "float64", "dominated": "boolean"}
    return frame.reindex(columns=list(COLUMNS)).astype(types)


def make_frame(
    rows: Sequence[dict[str, object]] | pd.DataFrame,
    *,
    network: str,
    kind: str = "other",
    depth: int | None = None,
    **constants: object,
) -> pd.DataFrame:
    """Return a frame of rows that hold some of the columns.

    A network of kind `other` is one of the paper's if its label says so and it has as many
    layers, such as resnet-20 and 19.

    rows: one a layer. network, kind, depth, constants: columns that are the same in every row.
    """
    if kind == "other":
        kind, depth = meant(network, len(rows))
    frame = pd.DataFrame(rows).assign(network=network, kind=kind, depth=depth, **constants)
    return complete(frame)


def meant(network: str, layers: int) -> tuple[str, int | None]:
    """Return kind and depth of the CIFAR-10 network that a label names, or `other` and None.

    >>> meant("resnet-20", 19), meant("resnet-20", 20)
    (('residual', 20), ('other', None))
    """
    from models.resnet import parse_name

    try:
        config = parse_name(network)
    except ValueError:
        return "other", None
    named = config.images == "cifar" and layers == config.depth - 1
    return (config.kind, config.depth) if named else ("other", None)


def relative_difference(std: pd.Series[float], to: pd.Series[float]) -> pd.Series[float]:
    """Return |std / to - 1| layer by layer; 0 if both are 0.

    >>> relative_difference(pd.Series([1.5, 0.0]), pd.Series([1.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    return (std / to - 1).abs().mask(std == to, 0.0)
