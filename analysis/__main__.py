"""All commands in one: `layer-responses COMMAND …`, or `python -m analysis COMMAND …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

COMMANDS = {
    "responses": ("analysis.responses", "draw Fig. 7 and judge the paper's claims"),
    "compare": ("analysis.compare", "say how trained networks differ"),
    "dynamics": ("analysis.dynamics", "draw the responses through a training"),
    "branches": ("analysis.branches", "measure how much each residual addition changes the signal"),
    "train": ("models.train", "train the paper's networks by the paper's recipe"),
    "model": ("models.summary", "print shapes, parameters and multiply-adds of a network"),
    "benchmark": ("analysis.benchmark", "measure what measuring costs"),
    "probe": ("analysis.probe", "make a probe set"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return its exit status; 2 for a command that does not exist."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        from analysis import __version__

        print(f"layer-responses {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print("usage: layer-responses COMMAND …\n")
        for name, (_, about) in COMMANDS.items():
            print(f"  {name:<10} {about}")
        print("\nlayer-responses COMMAND --help lists the options of a command.")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": one of {', '.join(COMMANDS)}"
        print(f"error: no command {words[0]!r}{hint}", file=sys.stderr)
        return 2
    status: int = import_module(COMMANDS[words[0]][0]).main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
