from importlib import import_module
from importlib.metadata import version

import pytest

from analysis.__main__ import COMMANDS, main


def test_a_command_runs(capsys):
    assert main(["model", "resnet-20"]) == 0
    assert capsys.readouterr().out.startswith("resnet-20, input (1, 3, 32, 32)\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["resposes"], "error: no command 'resposes'; did you mean responses?\n"),
        (["x.pth"], f"error: no command 'x.pth': one of {', '.join(COMMANDS)}\n"),
    ],
)
def test_no_command_is_guessed(words, line, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == line


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"layer-responses {version('layer-responses')}\n"


def test_every_command_has_a_main():
    for module, _ in COMMANDS.values():
        assert callable(import_module(module).main)
