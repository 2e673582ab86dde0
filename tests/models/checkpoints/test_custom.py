"""Networks of other people's code."""

import importlib
import re
import subprocess
import sys

import pytest
import torch

import models
from models.checkpoints.custom import build_from
from tests.conftest import ROOT

NETWORK = "from torch import nn\n\n\ndef tiny():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"


def test_a_function_in_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(NETWORK)
    assert isinstance(build_from(f"{tmp_path}/mine.py:tiny"), torch.nn.Sequential)
    assert str(tmp_path) not in sys.path


def test_a_file_with_a_dataclass(tmp_path):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (tmp_path / "with_dataclass.py").write_text(
        f"{head}{NETWORK}\n\n@dataclass\nclass Options:\n    depth: int = 8\n"
    )
    assert isinstance(build_from(f"{tmp_path}/with_dataclass.py:tiny"), torch.nn.Sequential)


def test_a_function_in_a_module_of_the_working_folder(tmp_path):
    (tmp_path / "zoo_of_mine").mkdir()
    (tmp_path / "zoo_of_mine" / "nets.py").write_text(NETWORK)
    assert isinstance(build_from("zoo_of_mine.nets:tiny"), torch.nn.Sequential)


def test_the_users_own_package_may_be_called_models(tmp_path):
    """Ours is hidden while theirs is imported and run, and is back afterwards."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "resnet.py").write_text(NETWORK)
    (tmp_path / "mine.py").write_text(
        "def lazy():\n    from models.resnet import tiny\n    return tiny()\n"
    )
    ours = sys.modules["models"], importlib.import_module("models.resnet")
    for spec in ("models.resnet:tiny", f"{tmp_path}/mine.py:lazy"):
        assert isinstance(build_from(spec), torch.nn.Sequential)
        assert (sys.modules["models"], sys.modules["models.resnet"]) == ours
    assert models.build("resnet-8").config.depth == 8


def test_without_one_of_their_own_models_is_ours(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def eight():\n    from models import build\n    return build('resnet-8')\n"
    )
    assert type(build_from("mine.py:eight")) is type(models.build("resnet-8"))


def test_the_command_finds_its_own_models_where_the_user_has_one_too(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    script = "import analysis, models.resnet; print(models.resnet.__file__)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(1, {str(ROOT)!r}); {script}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(ROOT / "models" / "resnet.py")


def test_a_package_called_models_that_is_imported_first_is_named(tmp_path):
    (tmp_path / "models.py").write_text("")
    script = f"import sys; sys.path.append({str(ROOT)!r}); import models; import analysis"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.stderr.splitlines()[-1] == (
        f"ImportError: another package called models is imported: {tmp_path}/models.py; "
        "import analysis first"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine", "--model mine: not of the form PACKAGE.MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("mine.py:", "--model mine.py:: not of the form"),
        ("gone.py:tiny", "--model gone.py:tiny: gone.py: no such file"),
        ("mine.py:huge", "--model mine.py:huge: there is no function huge in mine.py"),
        ("mine.py:number", "--model mine.py:number: number() returns int, not a torch.nn.Module"),
        ("mine.py:broken", "--model mine.py:broken: ZeroDivisionError: division by zero"),
        (
            "mine.py:needy",
            "--model mine.py:needy: TypeError: needy() missing 1 required positional argument: 'depth'",
        ),
        ("mine.py:leave", "--model mine.py:leave: SystemExit: 0"),
        ("leaves.py:f", "--model leaves.py:f: SystemExit: "),
        (
            "no_such_module:f",
            "--model no_such_module:f: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("syntax.py:f", "--model syntax.py:f: SyntaxError: "),
    ],
)
def test_what_does_not_work_is_one_line(spec, message, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def number():\n    return 1\n\n\ndef broken():\n    return 1 / 0\n\n\ndef needy(depth):\n    return depth\n"
        "\n\ndef leave():\n    raise SystemExit(0)\n"
    )
    (tmp_path / "leaves.py").write_text("import sys\n\nsys.exit()\n")
    (tmp_path / "syntax.py").write_text("def (:\n")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_from(spec)
    assert "\n" not in str(caught.value)
