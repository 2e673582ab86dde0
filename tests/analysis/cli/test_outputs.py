import argparse
import re

import pytest

from analysis.cli.outputs import finish, write_files


def test_all_files_or_none(tmp_path):
    (tmp_path / "a.csv").mkdir()
    (tmp_path / "b.csv").write_bytes(b"before")
    with pytest.raises(
        ValueError, match=r"a\.csv is a folder, and a result has this name: move it away"
    ):
        write_files(tmp_path, {"b.csv": b"after", "a.csv": b"after"})
    assert (tmp_path / "b.csv").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_what_was_written_is_said(tmp_path):
    assert write_files(tmp_path / "new", {"a.csv": b"1", "b.json": b"2"}) == (
        f"\nwrote {tmp_path}/new/a.csv\nwrote {tmp_path}/new/b.json"
    )
    assert [path.read_bytes() for path in sorted((tmp_path / "new").iterdir())] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "end other programs"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            r"allocate 9 bytes\)",
        ),
    ],
)
def test_want_of_memory_is_one_line(error, said, capsys):
    def run(args):
        raise error

    assert finish(run, argparse.Namespace(device="cpu", debug=False)) == 2
    assert re.fullmatch(
        rf"error: out of memory: take another device, .*{said}\n", capsys.readouterr().err
    )


def test_a_defect_is_not_taken_for_bad_input():
    def run(args):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        finish(run, argparse.Namespace(device="cpu", debug=False))
