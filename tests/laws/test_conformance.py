"""The laws for any trainer: each catches the bugs that it should, and this project's trainer keeps them.

`tox -e conformance` runs them all, on ranks and with killed processes; here are those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.conformance import laws_of_runs  # noqa: F401  registers its laws
from tests.fixtures.conformance.adapters.plain import BUGS
from tests.fixtures.conformance.bench import Bench, Law
from tests.fixtures.conformance.driver import find_adapter, run_jobs
from tests.fixtures.conformance.job import Job
from tests.fixtures.conformance.laws import LAWS
from tests.fixtures.ranks.launch import Launch

BY_NAME = {law.name: law for law in LAWS}
ON_RANKS = [law.name for law in LAWS if law.name.endswith("ranks")]
OURS = ("accumulation", "packing", "labels of chats", "learning rate", "dropout", "resume")


@pytest.fixture
def execute(launch: Launch):
    """Run jobs in this process, or on ranks that the harness forks."""

    def run(name: str, jobs: Sequence[Job], folder: Path) -> None:
        if jobs[0].ranks == 1:
            run_jobs(find_adapter(name), jobs)
        else:
            assert launch(jobs[0].ranks, run_by_name, name, jobs).values

    return run


def run_by_name(name: str, jobs: Sequence[Job]) -> None:
    run_jobs(find_adapter(name), jobs)


def of_one_process(law: Law) -> bool:
    return not law.is_process and law.name not in ON_RANKS


def check_all_hold(bench: Bench, laws: Sequence[Law]) -> None:
    verdicts = bench.judge(laws)
    assert [verdict for verdict in verdicts.values() if verdict.state != "holds"] == []
    assert len(verdicts) == len(laws)


def test_a_right_loop_keeps_the_laws(execute, tmp_path: Path) -> None:
    check_all_hold(Bench("plain:Plain", tmp_path, execute), [law for law in LAWS if of_one_process(law)])


@pytest.mark.slow
def test_a_right_loop_keeps_the_laws_on_ranks(execute, tmp_path: Path) -> None:
    check_all_hold(Bench("plain:Plain", tmp_path, execute), [BY_NAME[name] for name in ON_RANKS])


def test_our_trainer_keeps_laws_of_arithmetic(execute, tmp_path: Path) -> None:
    check_all_hold(Bench("ours:Packed", tmp_path, execute), [BY_NAME[name] for name in OURS])


def by_cost() -> list[Any]:
    """The first bug of each law of one process; the others are slow."""
    firsts = {law: bug for bug, law in reversed(BUGS.items()) if law not in ON_RANKS}
    return [pytest.param(bug, marks=() if firsts.get(law) == bug else pytest.mark.slow) for bug, law in BUGS.items()]


@pytest.mark.parametrize("bug", by_cost())
def test_a_bug_breaks_the_law_that_names_it(execute, bug: str, tmp_path: Path) -> None:
    law = BY_NAME[BUGS[bug]]
    verdict = Bench("plain:Plain", tmp_path, execute, settings={"bug": bug}).judge([law])[law.name]
    assert verdict.state == "violated", bug
    assert "Traceback" not in verdict.words


def test_a_bug_is_named_by_each_law() -> None:
    assert {law.name for law in LAWS if not law.is_process} == set(BUGS.values())
