import io
import os
import re
import subprocess
import sys

import pytest

from analysis.cli.command import Surviving, run_command
from tests.helpers import ROOT

SAY = """
import sys
from analysis.cli.command import run_command
def run():
    for _ in range(20_000):
        print("\u00e9 a line")
    print("a warning", file=sys.stderr)
    open("done", "w").close()
sys.exit(run_command(run, device="cpu", debug=False))
"""


def fail(error):
    def run():
        raise error

    return run_command(run, device="cpu", debug=False)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a.pth: damaged"), r"error: a\.pth: damaged\n"),
        (MemoryError(), r"error: out of memory: take another device, .*end other programs\n"),
        (RuntimeError("can't allocate memory: 9 bytes"), r"error: out of memory: .*9 bytes\)\n"),
    ],
)
def test_bad_input_and_want_of_memory_are_one_line(error, said, capsys):
    assert fail(error) == 2
    assert re.fullmatch(said, capsys.readouterr().err)


def test_a_defect_is_not_taken_for_bad_input():
    with pytest.raises(RuntimeError, match="a defect"):
        fail(RuntimeError("a defect"))


def test_an_interrupt_is_one_line(capsys):
    assert fail(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted: no file is half-written\n"


@pytest.mark.process
@pytest.mark.parametrize("redirection", ["| head -1", "2>&-", ">/dev/full", ">&- 2>&-", "| true"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_line_that_cannot_be_printed_ends_nothing(redirection, encoding, tmp_path):
    (tmp_path / "say.py").write_text(SAY)
    command = f"set -o pipefail; {sys.executable} say.py {redirection}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    command = ["bash", "-c", command]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "done").exists()
    assert "Error" not in ended.stderr


def test_what_the_encoding_lacks_is_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("\u00e9", file=Surviving(stream))
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\n"
