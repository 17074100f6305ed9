"""The benchmark scripts run, and report what fails in place of its numbers."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.fixtures.ranks.launch import Launch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare

    return compare


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit('torch.OutOfMemoryError: CUDA out of memory.')", "out of memory"),
        ("import time; time.sleep(60)", "not done within 1 s"),
        ("raise SystemExit('no module trl')", "no module trl\n"),
    ],
)
def test_a_contender_that_fails_says_why(compare: ModuleType, program: str, reason: str) -> None:
    assert compare.run("it", ["-c", program], 1) == {"failed": reason}


def test_a_table_is_of_those_that_ran_every_round(compare: ModuleType) -> None:
    commands = {name: ["-c", f"print('{{\"rate\": {rate}}}')"] for name, rate in (("one", 6), ("two", 2))}
    results = compare.compare(commands | {"none": ["-c", "1 / 0"]}, rounds=2)
    assert compare.table(results, "rate").splitlines()[2:] == [
        "| one | 6.0 | 1.00 times |  |",
        "| two | 2.0 | 3.00 times |  |",
    ]
    assert "| two | 2.0 | 0.33 times |" in compare.table(results, "rate", is_cost=True)


def test_what_was_compared_is_kept_and_drawn(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import plot_peers

    file, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    options = compare.command_line(None, ["one", "two"]).parse_args(["--rounds", "2", "--output", str(file)])
    results = {"one": [{"seconds": 1}, {"seconds": 1}], "two": [{"seconds": 2}, {"seconds": 4}]}
    compare.report(options, "a race", results, "seconds", is_cost=True)
    assert "a race, 2 rounds; " in capsys.readouterr().out
    kept = json.loads(file.read_text())
    assert (kept["results"], kept["is_cost"]) == (results, True)
    monkeypatch.setattr("sys.argv", ["plot_peers.py", str(file), "--plot", str(picture)])
    plot_peers.main()
    assert picture.read_bytes().startswith(b"\x89PNG")


def contend(*words: str) -> None:
    """Run a contender as its command line does."""
    sys.path.insert(0, str(BENCHMARKS))
    sys.argv = list(words)
    import step_contenders

    step_contenders.main()


def test_the_gpu_benchmark_runs_anywhere(compare: ModuleType, launch: Launch) -> None:
    import gpu

    jobs = gpu.plan(["tiny"])
    assert {name for _, name in jobs} == set(gpu.GPU_CONTENDERS)
    job = next(job for job in jobs if job[1] == "ours-eager")
    (ended,) = launch(1, contend, *gpu.command(*job, "tiny"), group=False)
    row = gpu.row_of(*job, json.loads(ended.log.splitlines()[-1]))
    assert row["tokens_per_second"] > 0
    assert row["first_step_seconds"] > 0
    assert gpu.table([row]).splitlines()[2].startswith("| tiny | ours-eager | ")
    [late] = gpu.measure_all(jobs[:1], "tiny", 0)
    assert late["failed"] == "no time left"
