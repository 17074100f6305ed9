"""Ranks that are killed under torchrun: it starts them anew, and the run goes on from its last checkpoint."""

import os
import random
from pathlib import Path

import pytest
import torch

from tests.fixtures.killed import check_as_if_never_killed, draw_faults, job
from tests.fixtures.ranks.injection import faults_installed
from tests.fixtures.ranks.launch import Launch
from tests.fixtures.torchrun import under_torchrun

KILLS = 5  # of one rank or of both


def rank_of_a_run(folder: Path, seed: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Die somewhere, if torchrun has not yet started this often enough; gives the number of restarts, the weights."""
    attempt, rank, world_size = (
        int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK", "LOCAL_WORLD_SIZE")
    )
    drawn = draw_faults(random.Random(seed + attempt), world_size) if attempt < KILLS else []
    with faults_installed([fault for fault in drawn if fault.rank == rank]):
        return attempt, job(folder, {"async_save": bool(attempt % 2), "seconds_to_speak": 1.0})


def run_until_done(world_size: int, folder: Path, seed: int) -> tuple[int, dict[str, torch.Tensor]]:
    return under_torchrun(world_size, rank_of_a_run, folder, seed, max_restarts=KILLS)[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world_size", "seed"), [(1, 0), (2, 50)])
def test_restarted_by_torchrun_a_killed_run_ends_bit_for_bit(
    launch: Launch, tmp_path: Path, world_size: int, seed: int
) -> None:
    (ended,) = launch(1, run_until_done, world_size, tmp_path / "killed", seed, group=False, timeout=200).values
    restarts, weights = ended
    assert restarts >= KILLS - 1  # a fault may come too late
    check_as_if_never_killed(launch, tmp_path, world_size, weights)
