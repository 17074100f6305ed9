"""Restarts as scripts for transformers' Trainer write them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from tests.fixtures.models import tiny_llama
from tests.fixtures.runs import random_token_samples, weights_of
from trainer import Trainer, TrainingArguments
from trainer.checkpoint.verify import find_damage

ROWS = [{"input_ids": ids, "labels": labels} for ids, labels in random_token_samples([6] * 16)]


def train(folder: Path, callbacks: Any = (), resume: Any = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "export_final": False}
    args = TrainingArguments(str(folder), per_device_train_batch_size=2, disable_tqdm=True, **{**defaults, **options})
    model = tiny_llama(num_hidden_layers=1)
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_loads_as(folder: Path | str, trainer: Trainer) -> None:
    loaded, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    weights = weights_of(loaded)
    assert all(torch.equal(weights[name], expected) for name, expected in weights_of(trainer.model).items())


def test_the_last_checkpoint_is_found_loaded_and_resumed(tmp_path: Path) -> None:
    straight = train(tmp_path)
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]
    assert_loads_as(tmp_path / "checkpoint-6", straight)
    assert TrainerState.load_from_json(str(tmp_path / "checkpoint-6" / "trainer_state.json")).global_step == 6
    for asked in (str(tmp_path / "checkpoint-2"), True):
        resumed = train(tmp_path, resume=asked)
        assert resumed.state.global_step == 6
        weights, expected = weights_of(resumed.model), weights_of(straight.model)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_limit_holds_for_both_names_and_the_best_stays(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-3}
    trainer = train(tmp_path, save_total_limit=2, **options)
    names = {path.name.replace("-", "_") for path in tmp_path.glob("checkpoint-*")}
    kept = {path.name.replace("step", "checkpoint") for path in (tmp_path / "checkpoints").iterdir()}
    assert names == kept
    assert len(kept) == 2
    assert_loads_as(trainer.state.best_model_checkpoint, trainer)


class WritesIntoCheckpoint(TrainerCallback):
    """As callbacks that save adapters beside every checkpoint do."""

    def on_save(self, args, state, control, model=None, **_: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        model.save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")


def test_a_callback_writes_into_a_checkpoint(tmp_path: Path) -> None:
    trainer = train(tmp_path, [WritesIntoCheckpoint()], save_total_limit=1)
    assert find_damage(tmp_path / "checkpoints" / "step_6") == []
    assert_loads_as(tmp_path / "checkpoint-6", trainer)
    assert (tmp_path / "checkpoint-2" / "notes.txt").read_text() == "mine"
    assert train(tmp_path, resume=True).state.global_step == 6


def test_a_saved_model_is_loaded_from_the_output_folder(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    assert trainer.save_model() == tmp_path
    assert_loads_as(tmp_path, trainer)
    assert train(tmp_path, resume=True).state.global_step == 6


def test_a_new_run_beside_checkpoints_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path)
    train(tmp_path, max_steps=2)
    assert "set aside as checkpoints.1 (to continue it instead: resume_from_checkpoint=True)" in caplog.text
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def train_and_listen(folder: Path) -> list[str]:
    messages = Messages()
    logging.getLogger("trainer").addHandler(messages)
    train(folder, max_steps=2, use_cpu=True)
    return messages.texts


def test_an_error_on_several_ranks_names_the_export(launch: Any, tmp_path: Path) -> None:
    said, _ = launch(2, train_and_listen, tmp_path).values
    assert any(f"run `trainer export {tmp_path}/checkpoints/step_2 FOLDER` first" in text for text in said)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(get_last_checkpoint(str(tmp_path)))
