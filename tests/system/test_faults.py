"""Real processes that die, hang and fail: the job ends soon and says who it was, and what was saved is never lost."""

import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.killed import check_as_if_never_killed, check_what_is_there, draw_faults, job
from tests.fixtures.ranks.faults import Fault, disk_full, kill, nan, stop, throw
from tests.fixtures.ranks.launch import Outcomes
from trainer.checkpoint import manifest
from trainer.checkpoint.verify import find_damage
from trainer.config.arguments import TrainingArguments
from trainer.distributed import failure
from trainer.distributed.group import Group, unhurried
from trainer.errors import CheckpointError, NonFiniteError, RankError
from trainer.model.fsdp import any_rank

KILLS_PER_RUN = 5
RUNS, SLOW_RUNS = 4, 94  # with those under torchrun 30 kills by default, 500 in all with RUN_SLOW=1
SECONDS_TO_END = 30
# Rank 0 notices in the next collective that it has to share: to save after step 6, which is on the way to step 7.
WHERE_NOTICED = re.compile("step [67]: rank 1 died or hangs")
PATIENCE = 2.0  # seconds until a collective gives up
IN_A_HURRY = {"async_save": False, "seconds_to_speak": 1.0}


def check_blame(outcomes: Outcomes) -> None:
    """Those that live say when it was, and which rank."""
    for outcome in outcomes:
        if outcome.error is not None:
            assert isinstance(outcome.error, RankError), outcomes.report()
            assert re.search(r"(step \d+|before the first step): .*rank", str(outcome.error))


def check_killed_until_done(launch: Any, folder: Path, seed: int) -> None:
    source = random.Random(seed)
    world_size = 1 + seed % 2
    options = {"async_save": bool(seed % 4 < 2), "seconds_to_speak": 1.0}  # who is dead stays silent for long enough
    for _ in range(KILLS_PER_RUN):
        outcomes = launch(world_size, job, folder / "killed", options, faults=draw_faults(source, world_size))
        check_what_is_there(folder / "killed")
        if not outcomes.died:
            break
        check_blame(outcomes)
    weights = launch(world_size, job, folder / "killed", options).values[0]
    check_as_if_never_killed(launch, folder, world_size, weights)
    assert not list((folder / "killed" / manifest.FOLDER).glob(".*"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(RUNS))
def test_killed_anywhere_a_run_ends_bit_for_bit_as_if_it_had_not(launch, tmp_path: Path, seed: int) -> None:
    check_killed_until_done(launch, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(RUNS, RUNS + SLOW_RUNS))
def test_killed_anywhere_many_times(launch, tmp_path: Path, seed: int) -> None:
    check_killed_until_done(launch, tmp_path, seed)


def run_with(launch: Any, folder: Path, *faults: Fault) -> tuple[Outcomes, float]:
    """Two ranks and a fault after some steps were saved; gives what became of them and the seconds it took."""
    started = time.monotonic()
    outcomes = launch(2, job, folder, dict(IN_A_HURRY), faults=faults, pg_timeout=PATIENCE)
    check_what_is_there(folder)
    return outcomes, time.monotonic() - started


def newest(folder: Path) -> str:
    return manifest.list_checkpoints(folder / manifest.FOLDER)[0].name


def test_a_killed_rank_is_named(launch, tmp_path: Path) -> None:
    outcomes, seconds = run_with(launch, tmp_path, kill(1, at=("step", 6)))
    assert outcomes[1].signal == "SIGKILL"
    assert isinstance(outcomes[0].error, RankError)
    assert WHERE_NOTICED.search(str(outcomes[0].error))
    assert seconds < SECONDS_TO_END
    assert newest(tmp_path) == "step_4"


def test_a_hanging_rank_is_named(launch, tmp_path: Path) -> None:
    outcomes = launch(
        2, job, tmp_path, dict(IN_A_HURRY), faults=[stop(1, at=("step", 6))], pg_timeout=PATIENCE, timeout=8
    )
    assert outcomes[1].was_hung
    assert WHERE_NOTICED.search(str(outcomes[0].error))
    assert outcomes[0].seconds < SECONDS_TO_END
    check_what_is_there(tmp_path)


def freeze_the_store() -> None:
    """Join as torchrun's ranks do where each start has a store of its own, which rank 0 keeps; then rank 0 freezes."""
    failure.SECONDS_TO_SPEAK = 1.0
    with Group.join(TrainingArguments(use_cpu=True, ddp_timeout=2)) as group, group.naming_faults(lambda: "step 1"):
        group.any(True)
        if group.is_main:
            os.kill(os.getpid(), signal.SIGSTOP)
        group.any(True)


def test_a_frozen_host_of_the_store_is_named(launch) -> None:
    outcomes = launch(2, freeze_the_store, group=False, timeout=10)
    assert outcomes[0].was_hung
    assert str(outcomes[1].error) == (
        "step 1: the host of the ranks' store did not answer within 2 s: another node is down or frozen, or the "
        "network to it is"
    )
    assert outcomes[1].seconds < SECONDS_TO_END


def long_work(longer: float, dies: bool) -> list[int]:
    """Have the main rank work for longer than a collective may take; the other one may die meanwhile."""
    failure.SECONDS_TO_SPEAK = 1.0
    group, done = Group.join(TrainingArguments(use_cpu=True)), []

    def work() -> None:
        time.sleep(longer)

    with group.naming_faults(lambda: "preparing the data"):
        if dies and not group.is_main:
            os.kill(os.getpid(), signal.SIGKILL)
        with group.main_first():
            if group.is_main:
                work()
            done.append(1)
        group.try_on_main(work)
        with unhurried(partial(any_rank, mesh=group.mesh)):
            if not group.is_main:
                work()
        done.append(2)
    return done


def test_long_work_of_one_rank_does_not_count_against_the_timeout(launch) -> None:
    assert launch(2, long_work, 2 * PATIENCE, False, pg_timeout=PATIENCE).values == [[1, 2], [1, 2]]


def test_a_rank_that_dies_while_another_works_is_named(launch) -> None:
    outcomes = launch(2, long_work, 1.0, True, pg_timeout=PATIENCE)
    assert outcomes[1].signal == "SIGKILL"
    assert str(outcomes[0].error) == "preparing the data: rank 1 died or hangs: it did not answer within 1 s"


def test_an_exception_on_one_rank_reaches_the_others(launch, tmp_path: Path) -> None:
    outcomes, seconds = run_with(launch, tmp_path, throw(1, ValueError("bad luck"), at=("backward", 5)))
    assert isinstance(outcomes[1].error, ValueError)
    assert "step 5: rank 1 failed at step 5: ValueError: bad luck" in str(outcomes[0].error)
    assert seconds < SECONDS_TO_END


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_on_one_rank_stops_all_alike(launch, tmp_path: Path, rank: int) -> None:
    after_the_probe = 6  # of how models pack, which runs four forwards before the first step
    outcomes, _ = run_with(launch, tmp_path, nan(rank, at=("forward", after_the_probe)))
    for outcome in outcomes:
        assert isinstance(outcome.error, NonFiniteError), outcomes.report()
        assert f": loss is nan (loss on rank {rank})" in str(outcome.error)
    (crash,) = (tmp_path / "crash").iterdir()
    assert f"{crash.name.replace('_', ' ')}: loss" in str(outcomes[0].error)
    assert find_damage(crash) == []


def test_a_full_disk_stops_all_alike(launch, tmp_path: Path) -> None:
    outcomes, _ = run_with(launch, tmp_path, disk_full(1, at=("write", 5, "*.safetensors")))
    for outcome in outcomes:
        assert isinstance(outcome.error, CheckpointError)
        assert "the checkpoint after step 6 failed: rank 1: OSError" in str(outcome.error)
    assert newest(tmp_path) == "step_4"
