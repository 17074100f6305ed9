"""Runs lanes of the suite as subprocesses and prints one table; a lane that cannot run, or runs nothing, fails.

python tests/run_tests.py                     the default lane and the comparison of the packing algorithms
python tests/run_tests.py gloo2 -- -k loop    one lane, with words for pytest behind --
python tests/run_tests.py gloo2 --reports DIR keep DIR/gloo2.xml, from which tests/report_cells.py tells what never ran
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Lane:
    """What one lane runs: words for pytest, and the fewest tests that make it worth its name."""

    words: tuple[str, ...]
    at_least: int
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a lane."""

    name: str
    ran: int
    failed: int
    skipped: int
    seconds: float
    verdict: str


OPTIONAL = (  # tests that most machines skip: of packages that are extras
    "tests/ranks/test_notebook.py",
    "tests/test_optimizers.py",
    "tests/test_schedules.py",
    "tests/trainer/test_trainer_hyperparameter.py",
    "tests/trainer/test_trainer_optimizers.py",
    "tests/trainer/test_trainer_peft.py",
    "tests/trainer/test_trainer_reporting.py",
    "tests/trainer/test_trainer_seq2seq.py",
)
WORKERS = str(min(os.cpu_count() or 1, 8) + 1)  # some tests wait: for a hang to be noticed
LANES = {
    "default": Lane(("-n", WORKERS, "--dist", "worksteal", "tests"), at_least=300),
    "extras": Lane(("-n", WORKERS, "--dist", "worksteal", *OPTIONAL), at_least=400),
    "gloo2": Lane(("--ranks", "2", "--backends", "gloo", "-m", "world_size", "tests"), at_least=20),
    "gloo4": Lane(("--ranks", "4", "--backends", "gloo", "-m", "world_size", "tests"), at_least=5),
    # Two hosts with a network between them, on this machine: needs root and iproute2.
    "nodes2": Lane(("tests/system/test_nodes.py",), at_least=2, environment={"RUN_SLOW": "1"}),
    # On GPUs only what asks for them: nccl cells, as many as there were at the last change of this number, or more.
    **{
        f"gpu{count}": Lane(
            ("--ranks", str(count), "--backends", "nccl", "--gpus", str(count), "-m", "world_size", "tests"), at_least
        )
        for count, at_least in ((1, 8), (2, 10), (4, 1), (8, 1))
    },
}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # workers and ranks share the cores; more threads would spin against each other
# Every worker and every process that a test starts would else compile all sources and rewrite all assertions anew.
COMPILED_ONCE = {"PYTHONDONTWRITEBYTECODE": ""}
COMPARISON = (sys.executable, "tests/test_batch_lengths_to_minibatches.py")


def main(words: Sequence[str]) -> int:
    """Run the named lanes (default: `default` and the comparison) and give the exit code."""
    before, extra = split_words(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lanes", nargs="*", metavar="LANE")
    parser.add_argument("--reports", type=Path)
    arguments = parser.parse_args(before)
    names = arguments.lanes
    unknown = [name for name in names if name not in LANES]
    if unknown:
        print(f"unknown lane {unknown[0]!r}; one of: {', '.join(LANES)}", file=sys.stderr)
        return 2
    results = [run_lane(name, LANES[name], extra, arguments.reports) for name in names or ["default"]]
    print_table(results)
    compared = subprocess.run(COMPARISON, cwd=ROOT).returncode if not names else 0
    return int(compared != 0 or any(result.verdict != "passed" for result in results))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split lane names from the words for pytest behind `--`."""
    if "--" not in words:
        return list(words), []
    border = list(words).index("--")
    return list(words[:border]), list(words[border + 1 :])


def run_lane(
    name: str, lane: Lane, extra: Sequence[str] = (), reports: Path | None = None, root: Path = ROOT
) -> Result:
    """Run one lane; extra words take the place of the whole `tests` folder when they name tests themselves."""
    names_tests = any(word.split("::")[0].startswith("tests") for word in extra)
    words = [word for word in lane.words if not (names_tests and word == "tests")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(reports or folder, f"{name}.xml").absolute()
        report.unlink(missing_ok=True)
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", *words, *extra, f"--junitxml={report}"]
        code = subprocess.run(
            command, cwd=root, env={**ONE_THREAD, **os.environ, **COMPILED_ONCE, **lane.environment}
        ).returncode
        counts = count(report)
    ran = counts["tests"] - counts["skipped"]
    return Result(
        name,
        ran,
        counts["failures"] + counts["errors"],
        counts["skipped"],
        time.monotonic() - started,
        judge(code, ran, 1 if extra else lane.at_least),
    )


def count(report: Path) -> dict[str, int]:
    """Read the totals of a JUnit report; all zero where pytest could not write one."""
    names = ("tests", "failures", "errors", "skipped")
    if not report.exists():
        return dict.fromkeys(names, 0)
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def judge(code: int, ran: int, at_least: int) -> str:
    """Say whether a lane passed, and if not, why."""
    if code not in (0, 5):
        return f"FAILED (pytest exit code {code})"
    if ran < at_least:
        return f"FAILED (ran {ran} tests, at least {at_least} expected)"
    return "passed"


def print_table(results: Sequence[Result]) -> None:
    """Print one line a lane."""
    print(f"\n{'lane':<10}{'ran':>7}{'failed':>8}{'skipped':>9}{'seconds':>9}  verdict")
    for result in results:
        numbers = f"{result.ran:>7}{result.failed:>8}{result.skipped:>9}{result.seconds:>9.0f}"
        print(f"{result.name:<10}{numbers}  {result.verdict}")
    failed = sum(result.verdict != "passed" for result in results)
    print(f"lanes: {len(results) - failed} passed, {failed} failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
