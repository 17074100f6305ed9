"""compute_loss in the forms that scripts have it: the losses of transformers' Trainer, however batches are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from tests.fixtures.datasets import labelled_rows
from tests.fixtures.tolerances import LOGGED_LOSS, SAME_LOSS
from trainer import Trainer, TrainingArguments


class Divides:
    """The usual form: a sum, divided by the number of labels where that is given."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), reduction=reduction)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class Ignores:
    """Takes the number and returns a mean all the same."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())
        return (loss, outputs) if return_outputs else loss


class Adds:
    """Adds nothing to what the Trainer computes."""

    def compute_loss(self, model: nn.Module, inputs: Any, **more: Any) -> Any:
        return super().compute_loss(model, inputs, **more)  # type: ignore[misc]


class Older:
    """Does not take the number at all; transformers' Trainer fails on it."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False) -> Any:
        return Ignores.compute_loss(self, model, inputs, return_outputs)  # type: ignore[arg-type]


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return transformers.BertForMaskedLM(config)


OPTIONS = {
    "use_cpu": True,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}


def losses(history: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in history if "loss" in line]


def ours(form: type, folder: Path, per_device: int, accumulation: int) -> list[float]:
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        export_final=False,
        **OPTIONS,
    )
    trainer = type("Own", (form, Trainer), {})(bert(), args, train_dataset=labelled_rows(16))
    trainer.train()
    return losses(trainer.state.log_history)


@pytest.mark.parametrize("form", [Divides, Ignores, Adds])
def test_a_custom_loss_is_that_of_transformers(tmp_path: Path, form: type) -> None:
    args = transformers.TrainingArguments(
        str(tmp_path / "theirs"),
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        **OPTIONS,
    )
    theirs = type("Theirs", (form, transformers.Trainer), {})(bert(), args, train_dataset=labelled_rows(16))
    theirs.train()
    assert ours(form, tmp_path / "ours", 8, 1) == pytest.approx(losses(theirs.state.log_history), abs=LOGGED_LOSS)


@pytest.mark.parametrize("form", [Divides, Ignores, Adds, Older])
def test_a_custom_loss_does_not_depend_on_micro_batches(tmp_path: Path, form: type) -> None:
    whole, split = ours(form, tmp_path / "whole", 8, 1), ours(form, tmp_path / "split", 2, 4)
    assert split == pytest.approx(whole, rel=SAME_LOSS)
