"""The harness and the fixtures install from this distribution, as `trainer_testing`, and work in any project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks.inner import HEADER, ROOT

WHAT_IS_BUILT = ("trainer", "tests/fixtures", "pyproject.toml", "setup.py", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
TESTS = """
import trainer_testing
from trainer_testing.datasets import RegressionDataset
from trainer_testing.ranks.faults import kill

@pytest.fixture(scope="module")
def points(): return RegressionDataset(length=4)

@pytest.mark.world_size(2)
def test_ranks(ranks, points):
    assert reduce()[0] == ranks.world_size
    assert len(points) == 4

@pytest.mark.world_size(2)
def test_fails(ranks):
    assert ranks.rank == 0

def test_launches(launch):
    assert launch(2, reduce, faults=[kill(1, at=("collective", 1))]).died == [1]

def test_is_the_installed_one():
    assert trainer_testing.__file__.startswith(INSTALLED_IN)
    assert "tests" not in sys.modules
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, so that no build folder is left here, and installed without its dependencies."""
    work = tmp_path_factory.mktemp("install")
    for name in WHAT_IS_BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (work / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, work / "source" / name)
    options = ("--no-build-isolation", "--no-compile", f"--target={work / 'installed'}")
    subprocess.run([*PIP, *options, work / "source"], check=True)
    return work / "installed"


def run_pytest(target: Path, folder: Path, *words: str) -> str:
    """What a pytest that sees the installed plugin writes in this folder."""
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_the_installed_plugin_runs_ranks_in_an_empty_project(target: Path, tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(f"{HEADER}\nINSTALLED_IN = {str(target)!r}\n{TESTS}")
    said = run_pytest(target, tmp_path, "-Werror", "-o", "rank_preload=")
    assert "1 failed, 3 passed" in said
    assert "test_fails[gloo-2]" in said
    assert "rank 1 of 2 (gloo)" in said
    assert "assert 1 == 0" in said


def test_where_the_conftest_names_the_plugin_the_installed_one_stays_out(target: Path) -> None:
    """Two of them would both add the options."""
    said = run_pytest(target, ROOT, "--collect-only", "-q", "-k", "every_package", str(Path(__file__)))
    assert "test_installed.py::test_every_package_is_built" in said


def test_every_package_is_built() -> None:
    """A folder without __init__.py would be left out of the distribution in silence."""
    folders = {path.parent for name in ("trainer", "tests/fixtures") for path in (ROOT / name).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests/fixtures").rglob("*.py")), ids=lambda path: path.stem)
def test_fixtures_import_each_other_by_relative_names(path: Path) -> None:
    """What is `tests.fixtures` here is `trainer_testing` elsewhere."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.lstrip().startswith(("from tests", "import tests"))] == []
