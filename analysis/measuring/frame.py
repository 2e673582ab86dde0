"""The frame: one row a layer, the same columns everywhere.

| column | meaning |
| --- | --- |
| network, kind, depth | label such as resnet-56; `residual`, `plain` or `other`; layers with weights |
| layer | 1-based position of the 3x3 convolution in forward order |
| name, norm | qualified module names of the convolution and of its BN |
| stage | 1-based; a new one begins where the size of the maps changes (closed form: the number of channels) |
| channels, height, width | shape of one image's response |
| images, count | how many images; how many values: images * channels * height * width |
| mean, std | of all values, std as a population's |
| within, between | root of the channels' mean variance; std of the channels' means: std^2 = within^2 + between^2 |
| source | `hooks` (measured on images) or `batchnorm` (closed form; height, width, images and count are empty) |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

INTEGERS = ("depth", "layer", "stage", "channels", "height", "width", "images", "count")
COLUMNS = (
    *("network", "kind", "depth", "layer", "name", "norm", "stage"),
    *("channels", "height", "width", "images", "count"),
    *("mean", "std", "within", "between", "source"),
)

LINE = 4096  # characters: of the names of the columns
LARGEST = 64 * 2**20  # bytes of a CSV file: a row is a layer, and has some 200


def read_columns(path: Path) -> list[str]:
    """The names in the first line of a CSV file. ValueError for a file or a line with which pandas
    would not end.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    with open(path, encoding="utf-8-sig") as file:
        line = file.readline(LINE)
    if len(line) == LINE:
        raise ValueError(f"its first line has no end within {LINE:,} characters")
    return [name.strip(' "') for name in line.rstrip("\n").split(",")]


def make_frame(
    rows: Sequence[dict[str, object]] | pd.DataFrame,
    *,
    network: str,
    kind: str = "other",
    depth: int | None = None,
    **constants: object,
) -> pd.DataFrame:
    """A frame of rows that hold some of the columns; the arguments are the same in every row, the
    rest is empty.

    A network of kind `other` is one of the paper's if it is called so and has as many layers:
    resnet-20 and 19.
    """
    if kind == "other":
        kind, depth = meant(network, len(rows))
    frame = pd.DataFrame(rows).assign(network=network, kind=kind, depth=depth, **constants)
    return frame.reindex(columns=list(COLUMNS)).astype(dict.fromkeys(INTEGERS, "Int64"))


def meant(network: str, layers: int) -> tuple[str, int | None]:
    """Kind and depth of the network for CIFAR-10 that a label names, if that has as many layers;
    else `other`.

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
    """|std / to - 1|, layer by layer; 0 where both are 0.

    >>> relative_difference(pd.Series([1.5, 0.0]), pd.Series([1.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    return (std / to - 1).abs().mask(std == to, 0.0)
