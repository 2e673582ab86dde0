"""A wheel and an sdist, built, installed and run without network, outside the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.helpers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.process]

PACKAGES = ("analysis", "models", "plots")
SHIPPED = {".py", ".csv", ".safetensors", ".webp", ".html"}  # the pictures there are the README's
RUN = """
import runpy, sys
try:
    runpy.run_module("analysis.responses", run_name="__main__", alter_sys=True)
finally:
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("analysis", "models", "plots")]
    print("\\n".join(sorted(filter(None, (module.__file__ for module in ours)))), file=open("imported.txt", "w"))
"""
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(*words, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "", **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr


def pip(*words, cwd):
    run("-m", "pip", *words, "--no-deps", "--no-index", "--quiet", cwd=cwd)


def wheel(source, folder):
    """A wheel of a folder or of an sdist."""
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder.parent)
    [built] = folder.glob("*.whl")
    return built


def contents(path):
    """What a wheel holds: the checksum of every file by its name."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of what is shipped, its sdist, the wheel of the copy and the wheel of the sdist."""
    for package, lowest in (("setuptools", 77), ("pip", 1)):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "0"
        if int(found.split(".")[0]) < lowest:
            pytest.skip(
                f"{package} {lowest} or newer is not installed here, and nothing is downloaded"
            )
    folder = tmp_path_factory.mktemp("supply")
    checkout = folder / "checkout"  # builds leave folders behind, and take in what former ones left
    for package in (*PACKAGES, "tests"):
        shutil.copytree(
            ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, checkout)
    run("-c", SDIST, folder, cwd=checkout)
    [sdist] = folder.glob("*.tar.gz")
    return (
        checkout,
        sdist,
        wheel(sdist, folder / "from-sdist"),
        wheel(checkout, folder / "from-checkout"),
    )


def test_wheel_and_sdist_hold_the_same_files_and_all_of_them(built):
    checkout, sdist, from_sdist, from_checkout = built
    assert contents(from_sdist) == contents(from_checkout)
    files = [
        path
        for package in PACKAGES
        for path in (checkout / package).rglob("*")
        if path.suffix in SHIPPED
    ]
    needed = {str(path.relative_to(checkout)) for path in files}
    assert {path.suffix for path in files} == SHIPPED
    assert needed <= set(contents(from_sdist))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert needed | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert [
        name for name in names if name.startswith("tests")
    ] == []  # a part of them would not run


def test_what_is_installed_runs_elsewhere_with_its_own_files(built, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--target", installed, built[2], cwd=elsewhere)
    words = ("--depth", 20, "--source", "batchnorm", "--html", "--out", "figures")
    run("-c", RUN, *words, cwd=elsewhere, PYTHONPATH=str(installed))
    assert (elsewhere / "figures" / "fig7.png").read_bytes().startswith(b"\x89PNG")
    assert (elsewhere / "figures" / "responses.html").stat().st_size > 10_000
    imported = (elsewhere / "imported.txt").read_text().splitlines()
    assert len(imported) > 10
    assert [file for file in imported if not file.startswith(str(installed))] == []
