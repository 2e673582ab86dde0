"""Read the frames that an earlier command wrote: the networks in a responses.csv."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.cli.items import check_label
from models.messages import is_plain

if TYPE_CHECKING:  # torch and pandas take seconds to import, and --help needs neither
    import pandas as pd

LARGEST = 1e38  # float32 ends there
TEXT = ("network", "kind", "name", "norm", "source")
REAL = ("mean", "std", "within", "between")
KINDS, SOURCES = ("residual", "plain", "other"), ("hooks", "batchnorm")


def read_frames(path: Path, sources: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the networks of a responses.csv by label, each from one source.

    sources: the one that is wanted comes first; empty for the first that each network has.

    Raises ValueError, with the path, if the file is not whole or was edited.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a frame is what analysis.responses writes")
    try:
        frame = read_frame(path)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a frame of analysis.responses: {error}") from error
    networks: dict[str, pd.DataFrame] = {}
    for name, rows in frame.groupby("network", sort=False):
        label = check_label(str(name))
        there = set(rows["source"])
        source = sources[0] if sources and sources[0] in there else rows["source"].iloc[0]
        if sources and source != sources[0]:
            line = f"{path} has no numbers from {sources[0]}, only from {source}"
            print(f"warning: {label}: {line}", file=sys.stderr)
        layers = rows[rows["source"] == source].reset_index(drop=True)
        if layers["layer"].tolist() != list(range(1, len(layers) + 1)):
            raise ValueError(
                f"{path}: the layers of {label} are not 1 to {len(layers)}: rows are missing, or "
                "were added"
            )
        networks[label] = layers
    return networks


def read_frame(path: Path) -> pd.DataFrame:
    """Return the frame in a CSV file. Raise ValueError, with what is wrong, for any other file."""
    import numpy as np
    import pandas as pd

    from analysis.measuring.frame import COLUMNS, COLUMNS_0_1, INTEGERS, read_columns

    columns = read_columns(path)
    if tuple(columns) not in (COLUMNS, COLUMNS_0_1):
        raise ValueError(f"its columns are {', '.join(columns)[:200]}")
    real = [*REAL, *(["std_error"] if "std_error" in columns else [])]
    types = dict.fromkeys([*TEXT, *real], str)
    frame = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
    if frame.empty:
        raise ValueError("it has no rows")
    check_text(frame)
    frame = frame.astype(dict.fromkeys(INTEGERS, "Int64"))
    frame = frame.astype(dict.fromkeys(real, float))  # exactly what was written
    numbers = frame[list(REAL)].to_numpy()
    _, std, within, between = numbers.T
    sound = np.isclose(std, np.hypot(within, between), rtol=1e-6)
    sound &= (np.minimum(within, between) >= 0) & (np.abs(numbers) < LARGEST).all(axis=1)
    if not sound.all():
        row = frame[~sound].iloc[0]
        raise ValueError(
            f"std, within and between of {row['network']}, layer {row['layer']} do not belong "
            f"together ({row['std']}, {row['within']}, {row['between']}): the file was edited; "
            "measure again"
        )
    return frame.reindex(columns=list(COLUMNS))


def check_text(frame: pd.DataFrame) -> None:
    """Raise ValueError for an empty cell, an unknown word, or text that could be a formula."""
    import numpy as np

    empty = frame[[*TEXT, "layer", "stage", "channels"]].isna()
    if empty.to_numpy().any():
        row, column = np.argwhere(empty.to_numpy())[0]
        raise ValueError(f"no {empty.columns[column]} in line {row + 2}")
    for column in TEXT:
        for word in frame[column].unique():
            if not is_plain(word):
                what = "is unprintable, or a formula for a spreadsheet"
                raise ValueError(f"{word[:80]!r} in column {column} {what}")
    for column, known in (("kind", KINDS), ("source", SOURCES)):
        if unknown := set(frame[column]) - set(known):
            raise ValueError(f"{sorted(unknown)[0][:80]!r} in column {column}: not one of {known}")
