"""What holds for the project as a whole: the README, its commands, the layout, style and types."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = dict(dependency.split(">=") for dependency in PROJECT["dependencies"])
MODULES = [
    path for package in ("analysis", "models", "plots") for path in (ROOT / package).rglob("*.py")
]


def test_the_readme_sets_up_in_two_commands_and_ci_runs_the_second():
    main_job, tests = COMMANDS
    assert "-m analysis.responses" in main_job
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == tests


def test_the_readmes_options_exist():
    from analysis.responses import make_parser

    options = {option for action in make_parser()._actions for option in action.option_strings}
    used = set(re.findall(r"(?<!\S)--[a-z-]+", COMMANDS[0].split("analysis.responses")[1]))
    assert used
    assert used <= options


def test_the_readmes_example_of_the_library_runs(tmp_path):
    """In the tests' folder, with a network of somebody's own."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\nloader = torch.randn(2, 8, 3, 9, 9)\n"
    )
    [example] = re.findall("```python\n(.*?)```", README, re.DOTALL)
    command = [sys.executable, "-c", example]
    subprocess.run(
        command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    )
    assert (tmp_path / "fig7.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "responses.csv").read_text().count("\n") == 2


def test_no_function_bears_the_name_of_a_module():
    modules = {path.stem for path in MODULES} - {"__init__"}
    functions = {
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    assert not modules & functions


def test_data_flows_one_way():
    """models and plots know nothing of each other nor of analysis."""
    for path in MODULES:
        imported = set(
            re.findall(
                r"^\s*(?:from|import) (analysis|models|plots)\b", path.read_text(), re.MULTILINE
            )
        )
        package = path.relative_to(ROOT).parts[0]
        if package != "analysis":
            assert imported <= {package}, path


def test_every_test_file_mirrors_a_module():
    modules = {path.relative_to(ROOT).with_name(f"test_{path.name}") for path in MODULES}
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob("*/**/test_*.py")}
    tests = {path for path in tests if path.parts[0] != "integration"}
    assert tests <= modules | {Path("models/test_zoo.py")}


def test_the_lower_bounds_are_those_that_the_tests_were_run_with():
    """All but torch, which the machine has. The file also holds what some of them need of their own
    time.
    """
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()[1:]
    lowest = dict(line.split("==") for line in lines)
    tools = dict(tool.split(">=") for tool in PROJECT["optional-dependencies"]["test"][:2])
    bounds = {name: bound for name, bound in (BOUNDS | tools).items() if name != "torch"}
    assert bounds == {name: lowest.get(name) for name in bounds}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    imported = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    ours = {"analysis", "models", "plots"}
    assert {
        {"PIL": "pillow"}.get(name, name) for name in imported - ours - sys.stdlib_module_names
    } == set(BOUNDS)


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join
)
def test_style_and_types(command):
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
