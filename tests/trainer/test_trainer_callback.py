"""Callbacks as users of transformers' Trainer know them, with that Trainer beside ours as the oracle."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.trainer_callback import EarlyStoppingCallback, ExportableState, TrainerCallback

from tests.fixtures.oracles import relative_difference
from tests.fixtures.runs import Calls, step_lines, weights_of
from tests.fixtures.tolerances import SAME_LOSS
from tests.trainer.trainer_test_utils import (
    RegressionDataset,
    RegressionModelConfig,
    RegressionPreTrainedModel,
    get_regression_trainer,
)
from trainer.checkpoint import manifest
from trainer.config.arguments import TrainingArguments
from trainer.errors import UsageError
from trainer.hf.trainer import Trainer


def run_both(folder: Path, callback: TrainerCallback, **options: Any) -> tuple[Any, Any, list[TrainerCallback]]:
    """The same run in transformers' Trainer and in ours; each has its own copy of the callback."""
    callbacks = [callback, copy.deepcopy(callback)]
    model = RegressionPreTrainedModel(RegressionModelConfig())
    given = {"train_sampling_strategy": "sequential", "disable_tqdm": True, "use_cpu": True, **options}
    data = {"train_dataset": RegressionDataset(), "eval_dataset": RegressionDataset(length=16)}
    # it takes labels of rows for a number of items that its models do not divide by
    model.accepts_loss_kwargs = False
    theirs = transformers.Trainer(
        copy.deepcopy(model),
        transformers.TrainingArguments(str(folder / "theirs"), report_to="none", **given),
        callbacks=[callbacks[0]],
        **data,
    )
    args = TrainingArguments(str(folder / "ours"), export_final=False, **given)
    ours = Trainer(model, args, callbacks=[callbacks[1]], **data)
    theirs.train()
    ours.train()
    return theirs, ours, callbacks


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 5},
        {"logging_strategy": "epoch", "save_strategy": "epoch"},
        {"logging_steps": 3, "save_steps": 5},
        {"logging_steps": 4, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no"},
        {"logging_steps": 8, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 6},
        {"logging_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.4, "save_steps": 0.3},
        {"logging_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "max_steps": 11},
    ],
    ids=str,
)
def test_events_come_in_their_order(tmp_path: Path, options: dict[str, Any]) -> None:
    _, ours, (expected, found) = run_both(tmp_path, Calls(), **{"num_train_epochs": 2, **options})
    assert found.events == expected.events
    assert ours.state.global_step == found.events[-1][1]


@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (2, 0.01), (3, 0.5)])
def test_early_stopping_stops_where_theirs_does(tmp_path: Path, patience: int, threshold: float) -> None:
    options = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    options |= {"eval_steps": 2, "save_steps": 2, "num_train_epochs": 8, "learning_rate": 0.3, "logging_steps": 100}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    theirs, ours, _ = run_both(tmp_path, EarlyStoppingCallback(patience, threshold), **options)
    assert ours.state.global_step == theirs.state.global_step < 64
    assert ours.state.best_global_step == theirs.state.best_global_step < ours.state.global_step
    assert ours.state.best_metric == pytest.approx(theirs.state.best_metric, rel=SAME_LOSS)
    assert relative_difference(weights_of(ours.model), weights_of(theirs.model)) < SAME_LOSS


def test_the_callbacks_are_those_that_theirs_has(tmp_path: Path) -> None:
    trainer = get_regression_trainer(output_dir=tmp_path, max_steps=2)
    args = transformers.TrainingArguments(str(tmp_path / "theirs"), report_to="none", disable_tqdm=True, use_cpu=True)
    theirs = transformers.Trainer(trainer.model, args)
    names = [[type(each).__name__ for each in each.callback_handler.callbacks] for each in (trainer, theirs)]
    assert names[0] == names[1]
    for kind in (transformers.PrinterCallback, transformers.DefaultFlowCallback):
        assert isinstance(trainer.pop_callback(kind), kind)
    trainer.train()
    assert [line["step"] for line in step_lines(tmp_path)] == [1, 2]  # what is no user's callback still works


class Counting(TrainerCallback, ExportableState):
    def __init__(self, name: str = "", count: int = 0) -> None:
        self.name, self.count = name, count

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"name": self.name}, "attributes": {"count": self.count}}


@dataclasses.dataclass
class OwnArguments(TrainingArguments):
    flavour: str = "plain"


def saving(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """Four steps, of which the second is saved."""
    args = OwnArguments(
        str(folder), flavour="sour", save_steps=2, max_steps=4, export_final=False, disable_tqdm=True, **options
    )
    model = RegressionPreTrainedModel(RegressionModelConfig())
    return Trainer(model, args, train_dataset=RegressionDataset(), callbacks=[*callbacks])


def test_callbacks_with_a_state_go_on_with_it(tmp_path: Path) -> None:
    """Under their name of a checkpoint, and with a class of options that has one more."""
    straight = saving(tmp_path, Counting("first"), Counting("second", 10))
    straight.train()
    restored = {"restore_callback_states_from_checkpoint": True}  # what always happens
    resumed = saving(tmp_path, Counting(), Counting(), **restored)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    counts = [(each.name, each.count) for each in resumed.callback_handler.callbacks if isinstance(each, Counting)]
    assert counts == [("first", 4), ("second", 14)]
    expected, found = (dataclasses.asdict(trainer.state) for trainer in (straight, resumed))
    for state in (expected, found):
        state.pop("log_history")
    assert found == expected


@pytest.mark.parametrize("name", ["logging_steps", "save_steps"])
def test_a_share_of_all_steps_needs_their_number(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} = 2.5: expected a whole number, or a share"):
        TrainingArguments(**{name: 2.5})
    trainer = get_regression_trainer(output_dir=tmp_path, max_steps=8, save_strategy="steps", **{name: 0.3})
    trainer.train()
    assert getattr(trainer.state, name) == 3
    steps = [manifest.step_of(folder) for folder in manifest.list_checkpoints(tmp_path / "checkpoints")]
    assert sorted(steps) == ([3, 6, 8] if name == "save_steps" else [8])


def test_a_skipped_step_is_counted_in_the_log_and_shows_where_asked(tmp_path: Path) -> None:
    class Faulty(RegressionPreTrainedModel):
        def forward(self, input_x: torch.Tensor, labels: Any = None, **_: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            loss, y = super().forward(input_x, labels)
            return loss * (float("nan") if self.calls == 2 else 1), y

    def run(name: str, **options: Any) -> list[dict[str, float]]:
        trainer = get_regression_trainer(
            output_dir=tmp_path / name,
            model=Faulty(RegressionModelConfig()),
            **{"non_finite": "skip", "max_steps": 4, "logging_steps": 2, **options},
        )
        trainer.train()
        return trainer.state.log_history

    left_out, *_ = run("left out")
    assert (left_out["num_skipped_steps"], left_out["step"]) == (1, 2)
    assert left_out["loss"] == run("alone", logging_steps=1)[0]["loss"]
    shown, after, _ = run("shown", logging_nan_inf_filter=False)
    assert shown["loss"] != shown["loss"]
    assert after["loss"] == after["loss"]
    every_step = run("each", logging_steps=1)
    assert [line.get("num_skipped_steps", 0) for line in every_step] == [0, 1, 0, 0, 0]
    assert "loss" not in every_step[1]


class TestEvents:
    LOOP = ("step_begin", "pre_optimizer_step", "optimizer_step", "step_end")
    EVALUATION = (*["prediction_step"] * 2, "log", "evaluate")  # 16 held-out samples, 8 in a batch

    def expected(self, args: TrainingArguments, num_steps: int) -> list[str]:
        """The flow that transformers documents, for one epoch."""

        def due(strategy: str, interval: float | None, step: int) -> bool:
            return strategy == "steps" and interval is not None and step % interval == 0

        events = ["init_end", "train_begin", *(self.EVALUATION if args.eval_on_start else ()), "epoch_begin"]
        for step in range(1, num_steps + 1):
            events += self.LOOP
            events += ["log"] if due(args.logging_strategy, args.logging_steps, step) else []
            events += self.EVALUATION if due(args.eval_strategy, args.eval_steps, step) else ()
        events += ["epoch_end"]
        events += ["log"] if args.logging_strategy == "epoch" else []
        events += self.EVALUATION if args.eval_strategy == "epoch" else ()
        return [*events, "log", "train_end"]

    @pytest.mark.parametrize(
        "options",
        [
            {"logging_steps": 3},
            {"logging_strategy": "epoch"},
            {"logging_strategy": "no"},
            {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 2},
            {"eval_strategy": "epoch", "logging_strategy": "epoch"},
            {"eval_strategy": "epoch", "logging_steps": 4, "eval_on_start": True},
        ],
        ids=str,
    )
    def test_events_come_in_the_documented_order(self, tmp_path: Path, options: dict[str, Any]) -> None:
        calls = Calls()
        given = {"callbacks": [calls], "num_train_epochs": 1, "eval_len": 16, **options}
        trainer = get_regression_trainer(output_dir=tmp_path, **given)
        trainer.train()
        assert calls.names == [f"on_{event}" for event in self.expected(trainer.args, num_steps=8)]

    def test_micro_batches_but_the_last_end_a_substep(self, tmp_path: Path) -> None:
        calls = Calls()
        options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "num_train_epochs": 1}
        get_regression_trainer(output_dir=tmp_path, callbacks=[calls], **options).train()
        events = [name.removeprefix("on_") for name in calls.names]
        in_steps = [event for event in events if event in (*self.LOOP, "substep_end")]
        begin, *rest = self.LOOP
        assert in_steps == [begin, *["substep_end"] * 2, *rest] * 2 + [begin, "substep_end", *rest]

    def test_flags_are_honoured(self, tmp_path: Path) -> None:
        class Flags(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_log = state.global_step == 2
                control.should_epoch_stop = state.global_step == 3
                control.should_training_stop = state.global_step == 5

        trainer = get_regression_trainer(output_dir=tmp_path, callbacks=[Flags], logging_strategy="no")
        trainer.train()
        assert [line["step"] for line in trainer.state.log_history] == [2, 5]
        assert trainer.state.global_step == 5
        assert trainer.state.num_epochs_done == 1
        assert trainer.state.num_epoch_samples_seen == 16

    def test_an_exception_in_a_callback_is_not_swallowed(self, tmp_path: Path) -> None:
        class Broken(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                raise RuntimeError("broken callback")

        trainer = get_regression_trainer(output_dir=tmp_path, callbacks=[Broken()])
        with pytest.raises(RuntimeError, match="broken callback"):
            trainer.train()
        assert not trainer.is_in_train

    def test_callbacks_come_and_go(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path)
        trainer.add_callback(Calls)
        added = trainer.callback_handler.callbacks[-1]
        assert trainer.pop_callback(Calls) is added
        assert trainer.pop_callback(Calls) is None
        trainer.add_callback(added)
        trainer.remove_callback(added)
        assert added not in trainer.callback_handler.callbacks

    def test_progress_is_shown_as_transformers_does(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        get_regression_trainer(output_dir=tmp_path / "lines", max_steps=2, logging_steps=1).train()
        assert "'loss'" in capsys.readouterr().out
        get_regression_trainer(output_dir=tmp_path / "bar", max_steps=2, disable_tqdm=False).train()
        assert "2/2" in capsys.readouterr().err
