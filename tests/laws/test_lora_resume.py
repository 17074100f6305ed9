"""L4 with LoRA: adapters, their optimizer state and their dropout go on as if the run had never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import relative_difference
from tests.fixtures.runs import read_metrics, weights_of
from tests.fixtures.tolerances import LAYOUT_TRAJECTORY_FLOAT64
from tests.laws.test_resume import at, build, check_going_on, copy_run, hashes, record
from trainer.hf.trainer import Trainer

pytest.importorskip("peft", reason="peft is not installed")

NUM_STEPS = 4
ADAPTED = {"lora_rank": 2, "lora_dropout": 0.2, "max_steps": NUM_STEPS, "num_train_epochs": 3, "eval_strategy": "no"}


def build_adapted(folder: Path, stop_after: int | None = None, **options: Any) -> Trainer:
    return build(folder, stop_after, **{**ADAPTED, **options})


@pytest.mark.world_size(1, 2)
def test_stopped_at_any_step_adapters_go_on_bit_for_bit(ranks) -> None:
    straight = ranks.tmp_path / "straight"
    build_adapted(straight).train()
    ranks.barrier()
    for step in range(1, NUM_STEPS):
        folder = ranks.tmp_path / str(step)
        if ranks.is_main:
            folder.mkdir()
            copy_run(straight, folder, step)
        ranks.barrier()
        build_adapted(folder).train(resume_from_checkpoint=True)
        ranks.barrier()
        assert read_metrics(folder) == read_metrics(straight)
        for later in range(step + 1, NUM_STEPS + 1):
            assert hashes(at(folder, later)) == hashes(at(straight, later)), later
            assert record(at(folder, later)) == record(at(straight, later)), later


def test_an_optimizer_that_steps_in_backward_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_going_on(tmp_path, "lomo", lora_rank=2, lora_dropout=0.2)


def train_on(folder: Path, stop_after: int) -> dict[str, torch.Tensor]:
    """Go on from the newest checkpoint, in float64 without dropout."""
    trainer = build_adapted(folder, stop_after, model=tiny_llama(dtype=torch.float64), use_cpu=True, lora_dropout=0.0)
    trainer.train(resume_from_checkpoint="auto")
    weights = weights_of(trainer.model)
    trainer.group.close()
    return weights


def test_other_numbers_of_ranks_take_over_adapters(launch, tmp_path: Path) -> None:
    (alone,) = launch(1, train_on, tmp_path / "alone", NUM_STEPS).values
    for step, world_size in enumerate((1, 2, 1, 2), 1):
        weights, *_ = launch(world_size, train_on, tmp_path / "handed_on", step).values
    assert relative_difference(weights, alone) < LAYOUT_TRAJECTORY_FLOAT64
