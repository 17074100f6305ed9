"""A pytest plugin of tests/mutation.py: which functions of the core each test enters, and how long it takes.

`COVERED` is the folder to write to, one file of lines for each process: a test on many ranks enters most of what it
covers in theirs. `files.json` in it names the files that matter.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


class Tracer:
    """Notes functions as `file::name`."""

    def __init__(self, out: Path, root: Path) -> None:
        self.out, self.root = out, str(root) + os.sep
        self.files = set(json.loads((out / "files.json").read_text()))
        self.seen: set[str] = set()
        self.main = os.getpid()

    def enter(self, frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(self.root) and name[len(self.root) :] in self.files:
            self.seen.add(f"{name[len(self.root) :]}::{frame.f_code.co_name}")

    def trace(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.seen, started = set(), time.monotonic()
        threading.setprofile(self.enter)
        sys.setprofile(self.enter)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.write({"test": item.nodeid, "seconds": time.monotonic() - started, "seen": sorted(self.seen)})

    def write(self, line: dict[str, Any]) -> None:
        with open(self.out / f"{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        return (yield from self.trace(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        if os.getpid() == self.main:
            return (yield)
        return (yield from self.trace(item))  # a rank: this hook is the outermost that it runs

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write({"test": report.nodeid, "failed": True})


def read(out: Path) -> dict[str, list[tuple[float, str]]]:
    """Return the tests of each function with their seconds, quickest first; those that fail anyhow are left out."""
    seconds: dict[str, float] = {}
    covered: dict[str, set[str]] = {}
    failed = set()
    for file in out.glob("*.jsonl"):
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            test = line["test"]
            if "failed" in line:
                failed.add(test)
                continue
            seconds[test] = max(seconds.get(test, 0.0), line["seconds"])
            for name in line["seen"]:
                covered.setdefault(name, set()).add(test)
    return {name: sorted((seconds[test], test) for test in tests - failed) for name, tests in covered.items()}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tracer(Path(os.environ["COVERED"]), config.rootpath))
