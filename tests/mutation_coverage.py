"""A pytest plugin of tests/mutation.py: which functions of the core each test enters, and how long it takes.

`COVERED` is the file to write, beside it lies `files.json` with the files that matter.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


class Tracer:
    """Notes functions as `file::name`."""

    def __init__(self, out: Path) -> None:
        self.out, self.root = out, str(out.parent) + os.sep
        self.files = set(json.loads((out.parent / "files.json").read_text()))
        self.seen: set[str] = set()
        self.covered: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def enter(self, frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(self.root) and name[len(self.root) :] in self.files:
            self.seen.add(f"{name[len(self.root) :]}::{frame.f_code.co_name}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.seen, started = set(), time.monotonic()
        sys.setprofile(self.enter)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.seconds[item.nodeid] = time.monotonic() - started
            for name in self.seen:
                self.covered.setdefault(name, []).append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the tests of each function, quickest first; those that fail anyhow are left out."""
        tests = {
            name: sorted((test for test in tests if test not in self.failed), key=self.seconds.__getitem__)
            for name, tests in self.covered.items()
        }
        self.out.write_text(json.dumps(tests))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tracer(Path(os.environ["COVERED"])))
