"""What holds for the project as a whole: the README, its commands, the layout, style and types."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import README, ROOT, SETUP

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = dict(dependency.split(">=") for dependency in PROJECT["dependencies"])
EXTRAS = set(re.findall(r"\w+(?=>=)", str(PROJECT["optional-dependencies"])))
PACKAGES = ("analysis", "models", "plots")
MODULES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
TOO_LARGE = {
    "analysis/benchmark.py",
    "analysis/probe.py",
    "models/batchnorm.py",
}  # over 330 lines, or over 12 files
TOPICS = {
    "analysis/cli/test_numbers.py",
    "models/checkpoints/test_bit_flips.py",
    "models/test_zoo.py",
}  # tests of no single module
SOURCES = {name.removesuffix(".__init__"): path for name, path in SOURCES.items()}


def run(*words, cwd=ROOT, check=True, **environment):
    command, environment = [sys.executable, *map(str, words)], os.environ | environment
    options = {"capture_output": True, "text": True, "check": check}
    return subprocess.run(command, cwd=cwd, env=environment, **options)


# The README


def test_the_readme_sets_up_in_two_commands_and_ci_runs_the_second():
    main_job, tests = SETUP
    assert "-m analysis.responses" in main_job
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == tests


@pytest.mark.slow
@pytest.mark.process
def test_the_readmes_example_of_the_library_prints_what_the_readme_says(tmp_path):
    [(example, shown)] = re.findall("```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    printed = run("-c", example, cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout
    for word, expected in zip(printed.split(), shown.split(), strict=True):
        try:
            assert float(word) == pytest.approx(float(expected), rel=1e-3)
        except ValueError:
            assert word == expected
    assert (tmp_path / "fig7.png").read_bytes().startswith(b"\x89PNG")


# The layout


def test_no_public_function_bears_the_name_of_a_module():
    modules = {path.stem for path in MODULES} - {"__init__", "__main__"}
    functions = {
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    assert not modules & functions


def imports_of(name, nodes):
    """Return the modules of ours that these statements import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in SOURCES else node.module for part in parts}
    return {module for module in found if module in SOURCES} - {name}


def test_data_flows_one_way():
    """The packages models and plots know nothing of each other nor of analysis."""
    for name, path in SOURCES.items():
        package = name.split(".")[0]
        imported = {module.split(".")[0] for module in imports_of(name, ast.walk(TREES[path]))}
        assert package == "analysis" or imported <= {package}, path


def test_there_is_no_import_cycle():
    """Imports in functions and for type checkers do not count: they are not run when a module is imported."""
    graph = {name: imports_of(name, TREES[path].body) for name, path in SOURCES.items()}
    while leaves := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}


def test_folders_and_files_are_small():
    sizes = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in MODULES}
    long = {name for name, lines in sizes.items() if lines > 330}
    counts = Counter(str(Path(name).parent) for name in sizes)
    full = {folder for folder, count in counts.items() if count > 12}
    assert long | full <= TOO_LARGE
    if found := sorted(long | full):
        pytest.xfail(f"still too large: {', '.join(found)}")


IMPORTING = """
import signal, sys
before = {number: signal.getsignal(number) for number in signal.valid_signals()}
import analysis, models, plots
assert before == {number: signal.getsignal(number) for number in signal.valid_signals()}
assert sys.excepthook is sys.__excepthook__
print(sorted({"torch", "pandas", "matplotlib", "numpy"} & set(sys.modules)))
"""


def test_importing_the_library_changes_and_prints_nothing():
    done = run("-c", IMPORTING)
    assert (done.stdout, done.stderr) == ("[]\n", "")


HELP = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name).main(["--help"])
    except SystemExit as end:
        assert not end.code
print(sorted({"torch", "pandas", "matplotlib"} & set(sys.modules)))
"""


def test_help_does_not_wait_for_torch():
    """Of all commands in one process."""
    names = ("responses", "compare", "dynamics", "benchmark", "probe")
    shown = run("-c", HELP, *(f"analysis.{name}" for name in names), "models.train").stdout
    assert shown.splitlines()[-1] == "[]"
    assert shown.count("usage: ") == 6
    used = set(re.findall(r"(?<!\S)--[a-z-]+", SETUP[0].split("analysis.responses")[1]))
    assert used
    assert all(f"  {option}" in shown for option in used)


def test_every_test_file_mirrors_a_module():
    modules = {path.relative_to(ROOT).with_name(f"test_{path.name}") for path in MODULES}
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob("*/**/test_*.py")}
    tests = {path for path in tests if path.parts[0] != "integration"}
    assert {str(path) for path in tests - modules} <= TOPICS


@pytest.mark.xfail(reason="tests/integration shares `imported` of its test_networks", strict=False)
def test_no_test_imports_from_another():
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert not re.search(r"^from tests\S*\.test_", path.read_text(), re.MULTILINE), path


# Dependencies, style and types


def test_the_lower_bounds_are_those_that_the_tests_were_run_with():
    """All but torch, which the machine has. The file also holds what some of them need of their own time."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()[1:]
    lowest = dict(line.split("==") for line in lines)
    tools = dict(tool.split(">=") for tool in PROJECT["optional-dependencies"]["test"][:2])
    bounds = {name: bound for name, bound in (BOUNDS | tools).items() if name != "torch"}
    assert bounds == {name: lowest.get(name) for name in bounds}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    imported = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    foreign = imported - set(PACKAGES) - sys.stdlib_module_names
    found = {{"PIL": "pillow"}.get(name, name) for name in foreign}
    assert found - EXTRAS == set(BOUNDS)


STYLE = [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)]


@pytest.mark.parametrize("command", STYLE, ids=" ".join)
def test_style_and_types(command):
    done = run("-m", *command, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_has_the_version_of_the_project():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
