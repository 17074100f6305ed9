"""The harness installs as `pytest-ranks` alone, and with the fixtures as `trainer_testing`: it works in any project."""

import os
import re
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
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that no build folder is left in the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in WHAT_IS_BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def target(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions, built and installed without their dependencies: the trainer's, and the harness's own."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-build-isolation", "--no-compile", f"--target={folder}")
    subprocess.run([*PIP, *options, source, source / "tests/fixtures/ranks"], check=True)
    return folder


@pytest.fixture(scope="module")
def harness(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installed for the harness alone."""
    folder = tmp_path_factory.mktemp("harness")
    for part in target.glob("pytest_ranks*"):
        shutil.copytree(part, folder / part.name)
    return folder


def run_pytest(target: Path, folder: Path, *words: str, beside: tuple[Path, ...] = ()) -> str:
    """What a pytest that sees the installed plugin writes in this folder."""
    path = os.pathsep.join(map(str, [target, *beside]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    former = ("-p", "no:trainer_ranks")  # the plugin's name in an editable installation of some days ago
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *former, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_the_installed_plugin_runs_ranks_in_an_empty_project(target: Path, tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(f"{HEADER}\nINSTALLED_IN = {str(target)!r}\n{TESTS}")
    said = run_pytest(target, tmp_path, "-Werror", "-o", "rank_preload=")
    assert "1 failed, 3 passed" in said
    assert "test_fails[gloo-2]" in said
    assert "rank 1 of 2 (gloo)" in said
    assert "assert 1 == 0" in said


ALONE = """
import sys
from importlib.machinery import ModuleSpec

REFUSED = ("transformers", "trainer", "trainer_testing", "tests", "hypothesis", "safetensors", "pyarrow")

class OnlyPytestAndTorch:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in REFUSED else None

    def create_module(self, spec):
        raise ModuleNotFoundError(f"not installed here: {spec.name}")

sys.meta_path.insert(0, OnlyPytestAndTorch())
"""

CLONE = """
import unittest
import pytest, torch, torch.distributed as dist

class Base(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(2, 2)

@pytest.mark.world_size(2)
class TestTraining(Base):
    def test_gradients_are_the_same_on_all_ranks(self):
        self.model(torch.full((1, 2), float(self.ranks.rank))).sum().backward()
        dist.all_reduce(self.model.weight.grad)
        self.assertEqual(self.model.weight.grad[0, 0].item(), 1.0)

    def test_one_rank_fails(self):
        self.assertEqual(self.ranks.rank, 0, "bad rank")

    @pytest.mark.world_size(1, 3)
    def test_the_method_is_asked_before_the_class(self):
        self.assertIn(dist.get_world_size(), (1, 3))

    @unittest.skip("not here")
    def test_skipped(self): pass

    @unittest.expectedFailure
    def test_expected(self): self.assertEqual(self.ranks.rank, 0)

class TestOther(Base):
    def test_without_ranks(self): self.assertFalse(dist.is_initialized())
"""


def first_test_of_the_readme() -> str:
    readme = (ROOT / "tests/fixtures/ranks/README.md").read_text(encoding="utf-8")
    return readme.partition("<!-- first test -->\n```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def said(harness: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says in a project that has pytest, torch and the harness: the README's first test, and TestCases."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "test_first.py").write_text(first_test_of_the_readme())
    (folder / "tests/distributed").mkdir(parents=True)
    (folder / "tests/distributed/test_training.py").write_text(CLONE)
    (folder / "alone.py").write_text(ALONE)
    others = ("-p", "no:hypothesispytest", "-p", "no:trainer_conformance")  # plugins of what is not installed there
    words = ("-v", "-o", "rank_preload=", *others, "-p", "alone")
    return run_pytest(harness, folder, *words, beside=(folder,))


def test_the_first_test_of_the_readme_runs_with_pytest_and_torch_alone(said: str) -> None:
    assert "test_first.py::test_gradients_are_summed[gloo-2] PASSED" in said, said
    assert "test_first.py::test_gradients_are_summed[gloo-3] PASSED" in said


def test_test_cases_of_a_project_run_on_ranks(said: str) -> None:
    assert "1 failed, 6 passed, 1 skipped, 1 xfailed" in said, said
    assert "::TestTraining::test_the_method_is_asked_before_the_class[gloo-1] PASSED" in said
    assert "::TestTraining::test_the_method_is_asked_before_the_class[gloo-3] PASSED" in said
    assert "TestTraining.test_one_rank_fails[gloo-2]" in said
    assert "rank 1 of 2 (gloo)" in said
    assert "bad rank" in said


def test_the_harness_alone_is_small_and_needs_pytest_and_torch(harness: Path) -> None:
    (metadata,) = harness.glob("pytest_ranks-*.dist-info/METADATA")
    needs = re.findall(r"^Requires-Dist: ([\w-]+)", metadata.read_text(encoding="utf-8"), re.M)
    assert sorted(needs) == ["pytest", "torch"]
    packed = [path for path in harness.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in packed) < 300_000
    assert {path.name for path in harness.iterdir()} == {"pytest_ranks", metadata.parent.name}


@pytest.mark.slow
def test_the_harness_is_enough_where_the_trainer_is_not_first(target: Path, harness: Path, tmp_path: Path) -> None:
    """One of the two plugins is loaded, whichever is found first; faults of the other are understood."""
    (tmp_path / "test_inner.py").write_text(f"{HEADER}\nINSTALLED_IN = {str(target)!r}\n{TESTS}")
    said = run_pytest(harness, tmp_path, "-Werror", "-o", "rank_preload=", beside=(target,))
    assert "1 failed, 3 passed" in said, said


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
