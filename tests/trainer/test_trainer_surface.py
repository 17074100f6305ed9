"""What else scripts ask of transformers' Trainer: answered alike, or refused with what to use instead."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.fixtures.models import tiny_llama
from tests.fixtures.tolerances import SAME_LOSS
from tests.trainer.trainer_test_utils import (
    PLAIN,
    RegressionDataset,
    SampleIterableDataset,
    get_regression_trainer,
    labelled_rows,
    line_of,
)
from trainer.config.arguments import TrainingArguments
from trainer.errors import UsageError
from trainer.hf.trainer import Trainer
from trainer.hf.unsupported import NEVER_CALLED, UNSUPPORTED

ELSEWHERE = {"default_optim", "is_torch_greater_or_equal_than_2_8"}  # constants of a module, by way of the class


@pytest.mark.parametrize("name", ["Trainer", "Seq2SeqTrainer", "TrainingArguments", "Seq2SeqTrainingArguments"])
def test_every_public_name_is_there_or_left_out(name: str) -> None:
    theirs = {word for word in dir(getattr(transformers, name)) if not word.startswith("_")}
    ours = set(dir(getattr(importlib.import_module("trainer"), name)))
    fields = set(getattr(getattr(transformers, name), "__dataclass_fields__", ()))
    assert theirs - ours - fields - set(UNSUPPORTED) - ELSEWHERE == set()


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_left_out_says_what_to_use(tmp_path: Path, name: str) -> None:
    trainer = get_regression_trainer(output_dir=tmp_path)
    with pytest.raises(AttributeError, match=rf"Trainer\.{name}: this Trainer has none: ") as raised:
        getattr(trainer, name)
    assert UNSUPPORTED[name] in str(raised.value)
    assert not hasattr(Trainer, name)


@pytest.mark.parametrize("name", ["_get_train_sampler", "get_batch_samples", *NEVER_CALLED])
def test_an_override_that_nothing_calls_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"Own\.{name} would never be called by this Trainer: "):
        type("Own", (Trainer,), {name: lambda self: None, "__qualname__": "Own"})


def test_an_unknown_name_is_an_attribute_error(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"Trainer\.speling: there is no such attribute"):
        get_regression_trainer(output_dir=tmp_path).speling  # noqa: B018


def test_samples_are_counted(tmp_path: Path) -> None:
    trainer = get_regression_trainer(output_dir=tmp_path, train_len=21, per_device_train_batch_size=4)
    assert trainer.num_examples(trainer.get_train_dataloader()) == 21
    assert trainer.num_examples([None] * 3) == 12
    stream = Trainer(trainer.model, trainer.args, train_dataset=SampleIterableDataset())
    with pytest.raises(TypeError):
        stream.num_examples(stream.get_train_dataloader())
    assert trainer.get_total_train_batch_size(trainer.args) == 4


def test_operations_are_those_that_transformers_counts(tmp_path: Path) -> None:
    model, inputs = tiny_llama(), {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    ours = Trainer(model, TrainingArguments(str(tmp_path / "ours")))
    theirs = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path / "theirs"), use_cpu=True))
    assert ours.floating_point_ops(inputs) == theirs.floating_point_ops(inputs) > 0
    assert get_regression_trainer(output_dir=tmp_path, pretrained=False).floating_point_ops(inputs) == 0


@pytest.mark.world_size(1, 2)
def test_operations_are_counted_over_ranks(ranks) -> None:
    args = TrainingArguments(str(ranks.tmp_path / "run"), num_train_epochs=1, export_final=False, disable_tqdm=True)
    trainer, rows = Trainer(tiny_llama(), args, train_dataset=(rows := labelled_rows(5))), rows
    trainer.train()
    one = trainer.floating_point_ops({"input_ids": torch.tensor([rows[0]["input_ids"]])})
    assert trainer.state.total_flos == 5 * one


def test_an_own_step_computes_its_loss_in_the_format_of_the_options(tmp_path: Path) -> None:
    class Own(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model_wrapped, inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    own, usual = (
        get_regression_trainer(output_dir=tmp_path / kind.__name__, trainer_class=kind, bf16=True, **PLAIN)
        for kind in (Own, Trainer)
    )
    own.train()
    usual.train()
    assert line_of(own) == pytest.approx(line_of(usual), rel=SAME_LOSS)


def test_an_own_context_is_entered_for_every_loss(tmp_path: Path) -> None:
    entered = []

    class Own(Trainer):
        def compute_loss_context_manager(self) -> Any:
            entered.append(self.is_in_train)
            return super().compute_loss_context_manager()

    trainer = get_regression_trainer(output_dir=tmp_path, trainer_class=Own, max_steps=1)
    trainer.train()
    trainer.evaluate()
    assert set(entered) == {True, False}


def test_matrices_decay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    trainer = get_regression_trainer(output_dir=tmp_path, model=model)
    theirs = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    assert trainer.get_decay_parameter_names(model) == theirs.get_decay_parameter_names(model) == ["0.weight"]


def test_model_init_may_take_a_trial(tmp_path: Path) -> None:
    trials: list[Any] = []

    def build(trial: Any) -> nn.Module:
        trials.append(trial)
        return get_regression_trainer(output_dir=tmp_path).model

    trainer = get_regression_trainer(output_dir=tmp_path, model_init=build, max_steps=1)
    trainer.train(trial="a")
    assert trials == [None, "a"]


def test_outputs_are_ignored_in_evaluations_while_training(tmp_path: Path) -> None:
    shapes: list[Any] = []

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(()))

        def forward(self, input_x: Any, labels: Any = None) -> dict[str, torch.Tensor]:
            y = self.a * input_x
            return {"loss": ((y - labels) ** 2).mean(), "y": y, "extra": y}

    def keep(found: Any) -> dict[str, float]:
        shapes.append(type(found.predictions))
        return {}

    trainer = get_regression_trainer(
        output_dir=tmp_path, model=Named(), compute_metrics=keep, eval_strategy="epoch", num_train_epochs=1
    )
    trainer.train(ignore_keys_for_eval=["extra"])
    trainer.evaluate(RegressionDataset())
    assert [kind.__name__ for kind in shapes] == ["ndarray", "tuple"]


@pytest.mark.world_size(2)
def test_the_end_leaves_the_group(ranks) -> None:
    trainer = get_regression_trainer(output_dir=ranks.tmp_path / "run")
    trainer.end()  # a group that was there before stays
    assert trainer.group.any(ranks.is_main)


def test_transformers_reads_the_state_that_is_saved(tmp_path: Path) -> None:
    trainer = get_regression_trainer(output_dir=tmp_path, max_steps=3)
    trainer.train()
    trainer.save_state()
    state = transformers.TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert (state.global_step, state.log_history) == (3, trainer.state.log_history)
