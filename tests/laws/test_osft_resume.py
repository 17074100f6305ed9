"""L4 with orthogonal subspace fine-tuning: what is split, projected and measured goes on like everything else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures.models import build_pack, tiny_llama
from tests.fixtures.oracles import relative_difference
from tests.fixtures.runs import random_token_samples, read_metrics, step_lines, weights_of
from tests.fixtures.tolerances import OSFT_LOGITS_FP32, OSFT_TRAJECTORY_FLOAT64
from tests.laws.test_resume import StopAfter, at, build, copy_run, hashes, record
from trainer.cli.main import main
from trainer.errors import NonFiniteError, UsageError
from trainer.model import osft_importance
from trainer.model.osft import osft_layers
from trainer.training.trainer import Trainer

NUM_STEPS = 4
SPLIT = {"osft": True, "osft_unfreeze_rank_ratio": 0.5, "num_train_epochs": NUM_STEPS / 12, "eval_strategy": "no"}


def build_split(folder: Path, stop_after: int | None = None, **options: Any) -> Trainer:
    return build(folder, stop_after, **{**SPLIT, **options})


def without_starts(checkpoint: Path) -> Any:
    """The state of a checkpoint, without the log lines that each process begins with."""
    state = record(checkpoint)
    state["history"] = [line for line in state.get("history", []) if "osft/num_decomposed" not in line]
    return state


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=build_pack([20])["input_ids"], use_cache=False).logits


@pytest.mark.world_size(1, 2)
def test_a_split_model_goes_on_bit_for_bit(ranks) -> None:
    straight, folder = ranks.tmp_path / "straight", ranks.tmp_path / "resumed"
    options = {"gradient_accumulation_steps": 1, "max_tokens_per_rank": 16}  # several packs in each step
    build_split(straight, **options).train()
    ranks.barrier()
    if ranks.is_lead:
        folder.mkdir()
        copy_run(straight, folder, 2)
    ranks.barrier()
    trainer = build_split(folder, model=tiny_llama(attention_dropout=0.1, seed=1), **options)
    trainer.train(resume_from_checkpoint=True)
    ranks.barrier()
    assert [line["osft/num_decomposed"] for line in trainer.state.log_history if "osft/num_decomposed" in line] == [14, 0]
    assert read_metrics(folder) == read_metrics(straight)
    assert all("osft/leak" in line for line in step_lines(folder))
    for step in (3, NUM_STEPS):
        assert hashes(at(folder, step)) == hashes(at(straight, step))
        assert without_starts(at(folder, step)) == without_starts(at(straight, step))
