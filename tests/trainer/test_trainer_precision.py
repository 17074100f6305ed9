"""float16: its loss scale, and the runs that need one."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import relative_difference
from tests.fixtures.runs import build_store, random_token_samples, weights_of
from tests.fixtures.tolerances import (
    COMPUTE_FP16,
)
from tests.trainer.trainer_test_utils import (
    get_regression_trainer,
    labelled_rows,
)
from trainer.config.arguments import TrainingArguments
from trainer.errors import UsageError
from trainer.hf.trainer import Trainer
from trainer.optim.gradients import FIRST_SCALE, STEPS_BETWEEN_GROWTHS, LossScale
from trainer.training.callbacks import RunState


class TestLossScale:
    def test_a_step_that_overflows_is_taken_again_at_half_the_scale(self) -> None:
        state = RunState()
        scale = LossScale(state, is_on=True)
        assert scale.value == FIRST_SCALE
        assert scale.must_shrink(math.inf)
        assert state.loss_scale == FIRST_SCALE / 2
        assert not scale.must_shrink(1.0)
        state.loss_scale = 1.0
        assert not scale.must_shrink(math.nan)

    def test_the_scale_grows_after_many_good_steps(self) -> None:
        state = RunState()
        scale = LossScale(state, is_on=True)
        for _ in range(STEPS_BETWEEN_GROWTHS):
            scale.grow()
        assert (state.loss_scale, state.num_steps_at_scale) == (FIRST_SCALE * 2, 0)

    def test_gradients_are_those_of_the_loss(self) -> None:
        scale = LossScale(RunState(), is_on=True)
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.full((2,), 3.0 * scale.value)
        scale.unscale([parameter])
        assert parameter.grad.tolist() == [3.0, 3.0]

    def test_an_optimizer_that_steps_during_backward_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("lomo_optim")
        options = {"fp16": True, "optim": "lomo", "max_grad_norm": 0.0}
        with pytest.raises(UsageError, match="fp16 scales the loss"):
            get_regression_trainer(output_dir=tmp_path, **options).train()

    @pytest.mark.world_size(1, 2)
    def test_a_run_in_float16_loses_no_sample_to_overflow(self, ranks) -> None:
        """Products of 300 overflow float16 at the first scales."""

        def run(name: str, **options: Any) -> Trainer:
            args = TrainingArguments(
                str(ranks.tmp_path / name),
                max_steps=3,
                learning_rate=1e-2,
                export_final=False,
                disable_tqdm=True,
                **options,
            )
            trainer = Trainer(tiny_llama(), args, train_dataset=labelled_rows(6), data_collator=None)
            trainer.train()
            return trainer

        half, full = run("half", fp16=True), run("full")
        assert half.state.num_samples_seen == full.state.num_samples_seen
        assert 1 <= half.state.loss_scale <= FIRST_SCALE
        assert half.state.num_steps_at_scale > 0, "good steps are not counted, so the scale never grows"
        assert relative_difference(weights_of(half.model), weights_of(full.model)) < COMPUTE_FP16


@pytest.mark.world_size(2)
def test_weights_are_gathered_in_bfloat16_for_token_data_and_for_rows(ranks) -> None:
    """Between steps they are float32; what a layer computes with is what FSDP2 has gathered."""
    data = {"token data": build_store(random_token_samples((9, 3, 17, 5))), "rows": labelled_rows(8)}
    gathered: dict[str, set[torch.dtype]] = {name: set() for name in data}
    for name, dataset in data.items():
        args = TrainingArguments(
            str(ranks.tmp_path / name.replace(" ", "_")),
            bf16=True,
            use_cpu=True,
            max_steps=1,
            save_strategy="no",
            export_final=False,
            disable_tqdm=True,
        )
        trainer = Trainer(tiny_llama(), args, train_dataset=dataset)
        for module in trainer.model.modules():
            if isinstance(module, nn.Linear):
                note = partial(note_dtype, gathered[name])
                module.register_forward_pre_hook(note)
        trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert gathered == {"token data": {torch.bfloat16}, "rows": {torch.bfloat16}}


def note_dtype(seen: set[torch.dtype], module: Any, inputs: Any) -> None:
    if module.weight.numel():
        seen.add(module.weight.dtype)
