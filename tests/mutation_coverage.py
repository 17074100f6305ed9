"""A pytest plugin of tests/mutation.py: how long each test takes; and, of what coverage.py measured beside it, which
tests run each line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from coverage import CoverageData

Covering = dict[str, dict[int, list[tuple[float, str]]]]
"""File -> line -> seconds and name of each test that runs it, quickest first; line 0: of all that run some line."""


def read(out: Path, root: Path, files: list[str]) -> Covering:
    """Return which tests run each line; those that fail anyhow are left out."""
    seconds: dict[str, float] = {}
    failed = set()
    for text in (out / "times.jsonl").read_text(encoding="utf-8").splitlines():
        test, took, has_failed = json.loads(text)
        seconds[test] = seconds.get(test, 0.0) + took
        if has_failed:
            failed.add(test)
    data = CoverageData(out / ".coverage")
    data.read()
    found: Covering = {}
    for file in files:
        lines = found[file] = {}
        of_file: set[str] = set()
        for line, contexts in data.contexts_by_lineno(str(root / file)).items():
            tests = {context.rpartition("|")[0] for context in contexts} & seconds.keys() - failed
            lines[line] = sorted((seconds[test], test) for test in tests)
            of_file |= tests
        lines[0] = sorted((seconds[test], test) for test in of_file)
    return found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    with open(Path(os.environ["COVERAGE_FILE"]).with_name("times.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps([report.nodeid, report.duration, report.failed]) + "\n")
