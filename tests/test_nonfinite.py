"""A loss or gradient that is NaN: never stepped on, all ranks alike, recorded, and found again by a replay."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import linear_schedule
from tests.fixtures.runs import build_trainer, random_token_samples, read_metrics, weights_of
from tests.fixtures.tolerances import CLOSED_FORM_FLOAT64
from trainer.cli.main import EXIT_USAGE, main
from trainer.errors import NonFiniteError
from trainer.hf.trainer import Trainer
from trainer.model.fsdp import local_part

BAD_TOKEN = 50
BAD_SAMPLE = 9
PLACE = "backward: gradient of the output of model."  # which sum overflows first is a matter of its order
SAMPLES = random_token_samples([5 + i % 4 for i in range(16)])
SAMPLES = [([3 if t == BAD_TOKEN else t for t in ids], labels) for ids, labels in SAMPLES]
SAMPLES[BAD_SAMPLE][0][1] = BAD_TOKEN


def build(folder: Path, value: float = 3e38, **options: Any) -> Trainer:
    """A model in which one token has a finite weight whose square is not, and a sample that holds this token."""
    defaults = {"batch_size": 2, "max_grad_norm": 0, "save_strategy": "steps", "save_steps": 1, "async_save": False}
    trainer = build_trainer(folder, SAMPLES, tiny_llama(), **{**defaults, **options})
    part, region = local_part(trainer.model.model.embed_tokens.weight)
    if region[0].start <= BAD_TOKEN < region[0].stop:
        part[BAD_TOKEN - region[0].start] = value
    return trainer


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_optimizer_step(self, args, state, control, **_: Any) -> None:
        self.steps.append(state.global_step + 1)


@pytest.mark.world_size(1, 2)
def test_stop_leaves_the_weights_and_a_record(ranks) -> None:
    watch = Watch()
    trainer = build(ranks.tmp_path, callbacks=[watch])
    with pytest.raises(
        NonFiniteError, match="gradient norm is nan.*loss is finite on every rank.*crash/step_"
    ) as stopped:
        trainer.train()
    bad_step = trainer.state.global_step + 1
    assert watch.steps == list(range(1, bad_step))
    assert f"step {bad_step}: " in str(stopped.value)
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer.model).values())
    ranks.barrier()
    assert [line["step"] for line in read_metrics(ranks.tmp_path)] == watch.steps
    about = json.loads((ranks.tmp_path / "crash" / f"step_{bad_step}" / "crash.json").read_bytes())
    assert about["first_sample"] == 2 * (bad_step - 1)


@pytest.mark.world_size(1, 2)
def test_a_replay_on_one_process_finds_the_place(ranks, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = build(ranks.tmp_path)
    with pytest.raises(NonFiniteError):
        trainer.train()
    ranks.barrier()
    if not ranks.is_main:
        return
    (folder,) = (ranks.tmp_path / "crash").iterdir()
    finding = replay_alone(folder)
    assert finding.rank < ranks.world_size
    assert finding.place.startswith(PLACE)


def replay_alone(folder: Path) -> Any:
    from trainer.distributed.group import Group
    from trainer.distributed.topology import Topology
    from trainer.training.nonfinite import replay

    return replay(folder, Group(Topology(), torch.device("cpu")))


def test_the_command_line_says_what_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NonFiniteError):
        build(tmp_path).train()
    (folder,) = (tmp_path / "crash").iterdir()
    assert main(["replay", str(folder), "--use-cpu"]) == 0
    said = capsys.readouterr().out
    assert "the step was not taken" in said
    assert f"first non-finite value: rank 0, micro-batch 0, {PLACE}" in said
    (folder / "model_0.safetensors").unlink()
    assert main(["replay", str(folder), "--use-cpu"]) == 1
    assert main(["replay", str(tmp_path), "--use-cpu"]) == EXIT_USAGE
    assert "name crash/step_N of a run" in capsys.readouterr().err


def test_a_weight_that_was_bad_before_is_found(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="loss on rank 0"):
        build(tmp_path, math.nan).train()
    (folder,) = (tmp_path / "crash").iterdir()
    assert replay_alone(folder).place == "weight model.embed_tokens.weight, before the step"


@pytest.mark.world_size(1, 2)
def test_skip_leaves_the_step_out_and_goes_on(ranks) -> None:
    watch = Watch()
    rates = {"learning_rate": 1e-3, "warmup_steps": 2}
    trainer = build(ranks.tmp_path, callbacks=[watch], non_finite="skip", **rates)
    result = trainer.train()
    ranks.barrier()
    lines = read_metrics(ranks.tmp_path)
    (skipped,) = [line for line in lines if line.get("is_skipped")]
    assert "grad_norm" not in skipped
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert watch.steps == [line["step"] for line in lines if line is not skipped]
    assert trainer.state.num_skipped_steps == 1
    expected = [linear_schedule(step, 1e-3, 2, 8) for step in range(1, 9)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected, rel=CLOSED_FORM_FLOAT64)
    taken = [line for line in lines if line is not skipped]
    weights = sum(line["num_loss_tokens"] for line in taken)
    mean = sum(line["loss"] * line["num_loss_tokens"] for line in taken) / weights
    assert result.training_loss == pytest.approx(mean, rel=CLOSED_FORM_FLOAT64)
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)
