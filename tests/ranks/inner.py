"""Runs pytest inside pytest: a project of its own that loads the harness as a plugin."""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
from pathlib import Path

import pytest
from filelock import FileLock

from tests.fixtures.ranks import rank_process
from tests.fixtures.ranks.launch import Launch

ROOT = Path(__file__).parents[2]
PLUGIN = "tests.fixtures.ranks.plugin"
INSTALLED = (
    "-p",
    "no:pytest_ranks",
    "-p",
    "no:trainer_ranks",
    "-p",
    "no:trainer_conformance",
)  # conftest.py names them
LOAD = (*INSTALLED, "-p", PLUGIN, "-p", "no:cacheprovider")
OPTIONS = ("-v", "-Werror", *LOAD, "-o", "rank_preload=")
HEADER = """
import os, signal, sys, threading, time
import pytest, torch
import torch.distributed as dist

def reduce(n=2):
    x = torch.ones(n)
    dist.all_reduce(x)
    return x
"""


@dataclasses.dataclass
class Run:
    """One finished inner pytest: what it wrote, and what pytest knows about it where it ran in this process."""

    text: str
    result: pytest.RunResult | None = None

    def outcome(self, name: str) -> str:
        """passed, failed, error, skipped, xfailed: what the inner pytest says about one test."""
        match = re.search(rf"::{re.escape(name)} (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", self.text)
        assert match, f"no verdict on {name} in\n{self.text}"
        return match.group(1).lower()

    def block(self, name: str) -> str:
        """The failure report of one test."""
        match = re.search(
            rf"^_+ (?:ERROR at \w+ of )?{re.escape(name)} _+$(.*?)(?=^_{{3,}} |^={{3,}})", self.text, re.M | re.S
        )
        assert match, f"no failure block of {name} in\n{self.text}"
        return match.group(1)

    def seconds(self, name: str) -> list[float]:
        """What the table of ranks says about each rank's time."""
        return [float(text) for text in re.findall(r"rank \d+ +([\d.]+)s", self.block(name))]


def collect(pytester: pytest.Pytester, body: str, *args: str) -> Run:
    """Only collect tests with the harness, in this process: nothing is forked, so no new interpreter is needed."""
    _write(pytester.path, "import pytest\n" + textwrap.dedent(body))
    result = pytester.runpytest_inprocess("--collect-only", "-Werror", *LOAD, "-o", "rank_preload=", *args)
    return Run(result.stdout.str(), result)


def run(launch: Launch, folder: Path, body: str, *args: str) -> Run:
    """Run tests with the harness in a fork of this process, which has imported torch; `body` follows the header."""
    _write(folder, HEADER + textwrap.dedent(body))
    (ended,) = launch(1, _pytest, folder, (*OPTIONS, *args), group=False, timeout=600)
    return Run(ended.log)


def _pytest(folder: Path, words: tuple[str, ...]) -> int:
    os.chdir(folder)
    rank_process._server = None  # this process is not a rank of the outer pytest but the controller of an inner one
    return int(pytest.main(list(words)))


def run_anew(pytester: pytest.Pytester, body: str, *args: str) -> Run:
    """Run tests with the harness in a fresh interpreter."""
    _write(pytester.path, textwrap.dedent(body))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "1")
        result = pytester.runpytest_subprocess(*args, *OPTIONS)
        return Run(result.stdout.str(), result)


def run_once(name: str, factory: pytest.TempPathFactory, launch: Launch, body: str, *args: str) -> Run:
    """Run tests for all workers of pytest-xdist: the first one runs them, the others wait for what it got."""
    base = factory.getbasetemp()
    written = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{name}.txt"
    with FileLock(f"{written}.lock"):
        if not written.exists():
            written.write_text(run(launch, factory.mktemp(name), body, *args).text)
    return Run(written.read_text())


def _write(folder: Path, text: str) -> None:
    (folder / "test_inner.py").write_text(text)
