"""The display: a bar on a terminal, a line a minute elsewhere, and never an error."""

import io
import sys
from contextlib import nullcontext

import pytest

from models.training import display
from models.training.display import Display, say


class Terminal(io.StringIO):
    isatty = lambda self: True  # noqa: E731


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = Display("run", 12, 4)
    with shown.bar:
        shown.advance("loss 2")
    assert shown.bar.n == 5
    last = sys.stderr.getvalue().split("\r")[-1]
    assert last.startswith("run:  42%")
    assert "5/12" in last
    assert "loss 2" in last


def test_a_line_a_minute_elsewhere(capsys):
    shown = Display("run", 2_000, 1_000)
    shown.advance("loss 2")
    assert capsys.readouterr().err == ""
    for numbers in ("loss 2", ""):
        shown.shown_at -= display.LINE_EVERY
        shown.advance(numbers)
        shown.remind()
    assert capsys.readouterr().err == "run: 1,002 of 2,000, loss 2\nrun: 1,003 of 2,000\n"


@pytest.mark.parametrize("name", [None, "/dev/full"])
def test_a_line_that_cannot_be_printed_ends_nothing(monkeypatch, name):
    monkeypatch.setattr(display, "LINE_EVERY", 0)
    with open(name, "wb", buffering=0) if name else nullcontext() as raw:
        file = name and io.TextIOWrapper(raw, write_through=True)
        monkeypatch.setattr(sys, "stderr", file)
        say("a line", file)
        Display("run", 1).advance()
