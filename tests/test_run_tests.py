"""A lane fails when it cannot run or runs too little; cells that ran on no machine are named."""

from pathlib import Path

import pytest

from tests import report_cells, run_tests
from tests.run_tests import Lane, run_lane

THREE = """
import pytest

@pytest.mark.parametrize("cell", ["gloo-2", "nccl-2", "30-nccl-4-tied"])
def test_cell(cell):
    if "nccl" in cell:
        pytest.skip("not run: nccl needs GPUs, there are 0")

def test_alone(): pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_three.py").write_text(THREE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "at_least", "verdict"),
    [
        (("tests",), 2, "passed"),
        (("tests",), 3, "FAILED (ran 2 tests, at least 3 expected)"),
        (("-k", "nothing", "tests"), 1, "FAILED (ran 0 tests, at least 1 expected)"),
        (("--no-such-option", "tests"), 1, "FAILED (pytest exit code 4)"),
    ],
    ids=["enough", "too few", "none", "cannot run"],
)
def test_a_lane_must_run_what_it_declares(project: Path, words: tuple[str, ...], at_least: int, verdict: str) -> None:
    assert run_lane("lane", Lane(words, at_least), root=project).verdict == verdict


def test_a_failing_test_fails_its_lane(project: Path) -> None:
    (project / "tests/test_wrong.py").write_text("def test_wrong(): assert 0")
    result = run_lane("lane", Lane(("tests",), 1), root=project)
    assert (result.ran, result.failed, result.skipped) == (3, 1, 2)
    assert result.verdict == "FAILED (pytest exit code 1)"


def test_a_lane_without_its_gpus_fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_tests.main(["gpu1", "--", "tests/shape/test_no_pickle.py"]) == 1
    said = capfd.readouterr()
    assert "--gpus=1" in said.err + said.out
    assert "lanes: 0 passed, 1 failed" in said.out


def test_an_unknown_lane_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tests.main(["gpu3"]) == 2
    assert "unknown lane 'gpu3'; one of: default, gloo2" in capsys.readouterr().err


def test_cells_that_ran_nowhere_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_lane("one", Lane(("tests",), 1), reports=project / "reports", root=project)
    run_lane("two", Lane(("-k", "nccl", "tests"), 1), reports=project / "reports", root=project)
    assert report_cells.main([str(project / "reports")]) == 0
    said = capsys.readouterr().out
    assert "| gloo | 2 | 1 | 1 |" in said
    assert said.endswith("ran nowhere: nccl-2, nccl-4\n")


def test_no_reports_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_cells.main([str(tmp_path)]) == 1
    assert "no *.xml" in capsys.readouterr().err
