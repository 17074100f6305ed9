"""save_pretrained during a run and after it: right on one rank, a clear error on several; no export is spoilt by it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.fixtures.datasets import labelled_rows
from tests.fixtures.models import tiny_llama
from tests.fixtures.runs import build_trainer, random_token_samples, weights_of
from trainer import Trainer, TrainingArguments
from trainer.errors import ModelError


class Saves(TrainerCallback):
    """Saves the model after each step, as scripts do; says what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.errors = folder, []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        try:
            model.save_pretrained(self.folder / str(state.global_step))
        except ModelError as error:
            self.errors.append(str(error))


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("is_packed", [True, False], ids=["token data", "custom data set"])
def test_a_callback_saves_while_training(ranks: Any, is_packed: bool) -> None:
    callback, model = Saves(ranks.tmp_path / "saved"), tiny_llama()
    if is_packed:
        trainer = build_trainer(
            ranks.tmp_path / "run", random_token_samples([6] * 8), model, max_steps=2, callbacks=[callback]
        )
    else:
        args = TrainingArguments(str(ranks.tmp_path / "run"), max_steps=2, use_cpu=True, export_final=False)
        trainer = Trainer(model, args, train_dataset=labelled_rows(32), callbacks=[callback])
    trainer.train()
    exports = [trainer.save_model(ranks.tmp_path / "export")]
    ranks.barrier()
    if ranks.world_size == 1:
        exports.append(callback.folder / "2")
        assert callback.errors == []
        assert "save_pretrained" not in vars(model)
        model.save_pretrained(ranks.tmp_path / "after")
        exports.append(ranks.tmp_path / "after")
    else:
        assert len(callback.errors) == 2
        assert "have all ranks call trainer.save_model(folder)" in callback.errors[0]
        with pytest.raises(ModelError, match="have all ranks call trainer.save_model"):
            model.save_pretrained(ranks.tmp_path / "after")  # it stays sharded
    trained = weights_of(model)
    for folder in exports:
        loaded = weights_of(AutoModelForCausalLM.from_pretrained(folder))
        assert all(torch.equal(loaded[name], trained[name]) for name in trained)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "torch.compile"])
def test_a_wrapper_whose_export_nothing_could_load_is_refused(tmp_path: Path, wrap: Any) -> None:
    with pytest.raises(ModelError, match="nothing could load what a run of it exports: give the model itself"):
        Trainer(wrap(tiny_llama()), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=labelled_rows(8))
