"""A lane fails when it cannot run or runs too little; cells that ran on no machine are named."""

from pathlib import Path

import pytest

from tests import report_cells, run_tests
from tests.run_tests import Lane, Result, judge, run_lane

THREE = """
import pytest

@pytest.mark.parametrize("cell", ["gloo-2", "nccl-2", "30-nccl-4-tied"])
def test_cell(cell):
    if "nccl" in cell:
        pytest.skip("not run: nccl needs GPUs, there are 0")

def test_alone(): pass
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "tests").mkdir()
    (folder / "tests/test_three.py").write_text(THREE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


@pytest.fixture(scope="module")
def lanes(project: Path) -> dict[str, Result]:
    """One lane that runs something and one that does not; their reports stay in the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        words = {"one": ("tests",), "two": ("-k", "nccl", "tests")}
        return {name: run_lane(name, Lane(words[name], 1), reports=project / "reports", root=project) for name in words}


def test_a_lane_that_runs_what_it_declares_passes(lanes: dict[str, Result]) -> None:
    assert (lanes["one"].verdict, lanes["one"].ran, lanes["one"].skipped) == ("passed", 2, 2)


def test_a_lane_that_runs_nothing_fails(lanes: dict[str, Result]) -> None:
    assert lanes["two"].verdict == "FAILED (ran 0 tests, at least 1 expected)"


@pytest.mark.parametrize(
    ("code", "ran", "at_least", "verdict"),
    [
        (0, 2, 2, "passed"),
        (0, 2, 3, "FAILED (ran 2 tests, at least 3 expected)"),
        (5, 0, 1, "FAILED (ran 0 tests, at least 1 expected)"),
        (4, 0, 1, "FAILED (pytest exit code 4)"),
    ],
    ids=["enough", "too few", "none", "cannot run"],
)
def test_a_lane_must_run_what_it_declares(code: int, ran: int, at_least: int, verdict: str) -> None:
    assert judge(code, ran, at_least) == verdict


def test_a_failing_test_fails_its_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_wrong.py").write_text("def test_wrong(): assert 0")
    result = run_lane("lane", Lane(("test_wrong.py",), 1), root=tmp_path)
    assert (result.ran, result.failed, result.skipped) == (1, 1, 0)
    assert result.verdict == "FAILED (pytest exit code 1)"


def test_a_lane_without_its_gpus_fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_tests.main(["gpu1", "--", "tests/shape/test_no_pickle.py"]) == 1
    said = capfd.readouterr()
    assert "--gpus=1" in said.err + said.out
    assert "lanes: 0 passed, 1 failed" in said.out


def test_an_unknown_lane_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tests.main(["gpu3"]) == 2
    assert "unknown lane 'gpu3'; one of: default, extras" in capsys.readouterr().err


@pytest.mark.usefixtures("lanes")
def test_cells_that_ran_nowhere_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_cells.main([str(project / "reports")]) == 0
    said = capsys.readouterr().out
    assert "| gloo | 2 | 1 | 1 |" in said
    assert said.endswith("ran nowhere: nccl-2, nccl-4\n")


def test_no_reports_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_cells.main([str(tmp_path)]) == 1
    assert "no *.xml" in capsys.readouterr().err


def test_gpu_lanes_declare_the_cells_that_there_are(request: pytest.FixtureRequest) -> None:
    items = request.session.items
    if len(items) < 1000:
        pytest.skip("needs the whole suite collected")
    for count in (1, 2, 4, 8):
        cells = [item.nodeid for item in items if f"[nccl-{count}" in item.nodeid]
        assert len(cells) >= run_tests.LANES[f"gpu{count}"].at_least, f"cells of nccl-{count}: {cells}"
