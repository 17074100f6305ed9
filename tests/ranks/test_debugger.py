"""breakpoint() and --pdb in a rank talk to the terminal that pytest was started from, and the clocks stop."""

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures.terminal import IN_TERMINAL, SECONDS, Dialogue
from tests.ranks.inner import HEADER, LOAD, ROOT

LIMIT = 4  # seconds of a test: what it does takes a tenth, but a busy machine may give it nothing for a second or two

STOPS = f"""
@pytest.mark.rank_timeout({LIMIT})
def test_stops(ranks):
    answer = 41 + ranks.rank
    if ranks.rank == 1: breakpoint()
    assert reduce()[0] == 2
"""
FAILS = f"""
@pytest.mark.rank_timeout({LIMIT})
def test_fails(ranks):
    answer = 40 + ranks.rank
    assert answer == 0
"""


@contextmanager
def pytest_in_terminal(folder: Path, body: str, *words: str) -> Iterator[tuple[Dialogue, subprocess.Popen[bytes]]]:
    (folder / "test_inner.py").write_text(HEADER + body)
    ours, theirs = pty.openpty()
    command = [*IN_TERMINAL, os.ttyname(theirs), sys.executable, "-m", "pytest", *LOAD, "-o", "rank_preload=", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True) as process:
        try:
            yield Dialogue(ours), process
        finally:
            process.kill()
    os.close(theirs)
    os.close(ours)


def test_a_breakpoint_stops_the_clocks(tmp_path: Path) -> None:
    with pytest_in_terminal(tmp_path, STOPS) as (person, process):
        person.wait_for("rank 1 of 2 (gloo)")
        person.wait_for("(Pdb)")
        time.sleep(LIMIT + 1)
        person.say("p answer * 1000")
        person.wait_for("42000")
        person.say("c")
        person.wait_for("1 passed")
        assert process.wait(SECONDS) == 0


def test_pdb_on_failure_lends_the_terminal_to_one_rank_at_a_time(tmp_path: Path) -> None:
    with pytest_in_terminal(tmp_path, FAILS, "--pdb") as (person, process):
        for _ in range(2):
            person.wait_for("(Pdb)")
            person.say("p 'value', answer")
            person.wait_for("('value', 4")
            person.say("c")
        person.wait_for("1 failed")
        assert process.wait(SECONDS) == 1
    assert "('value', 40)" in person.text
    assert "('value', 41)" in person.text


@pytest.mark.slow
def test_quitting_the_debugger_ends_the_session(tmp_path: Path) -> None:
    with pytest_in_terminal(tmp_path, STOPS + FAILS) as (person, process):
        person.wait_for("(Pdb)")
        person.say("q")
        person.wait_for("Quitting debugger")
        assert process.wait(SECONDS) == pytest.ExitCode.INTERRUPTED


@pytest.mark.slow
def test_without_a_terminal_a_breakpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(HEADER + STOPS)
    command = [sys.executable, "-m", "pytest", *LOAD, "-o", "rank_preload="]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, start_new_session=True, capture_output=True, text=True, timeout=SECONDS
    )
    assert "a debugger in rank 1 of 2 (gloo), and pytest has no terminal" in done.stdout
