import json
import math

import pandas as pd
import pytest

from analysis.cli.outputs import as_csv, as_json, write_files


def test_all_files_or_none(tmp_path):
    (tmp_path / "a.csv").mkdir()
    (tmp_path / "b.csv").write_bytes(b"before")
    with pytest.raises(ValueError, match=r"a\.csv is a folder, and a result has this name"):
        write_files(tmp_path, {"b.csv": b"after", "a.csv": b"after"})
    assert (tmp_path / "b.csv").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_a_file_that_is_only_read_only_is_replaced(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"before")
    (tmp_path / "a.csv").chmod(0o444)
    write_files(tmp_path, {"a.csv": b"after"})
    assert (tmp_path / "a.csv").read_bytes() == b"after"


def test_what_was_written_is_said(tmp_path):
    assert write_files(tmp_path / "new", {"a.csv": b"1", "b.json": b"2"}) == (
        f"\nwrote {tmp_path}/new/a.csv\nwrote {tmp_path}/new/b.json"
    )
    assert [path.read_bytes() for path in sorted((tmp_path / "new").iterdir())] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("label", "line"), [("a", "a,1.5"), ("a;=1+1", '"a;=1+1",1.5'), ("a,b", '"a,b",1.5')]
)
def test_text_that_a_semicolon_would_split_is_quoted(label, line):
    frame = pd.DataFrame({"network": [label], "std": [1.5]})
    assert as_csv(frame).decode().splitlines()[1] == line


def test_json_has_null_for_what_is_no_number():
    document = {"a": [math.nan, 1.0], "b": {"c": math.inf}}
    assert json.loads(as_json(document)) == {"a": [None, 1.0], "b": {"c": None}}
