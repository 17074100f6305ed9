"""The training loop: when it stops, evaluates, exports and reports, on one rank and on several."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, default_data_collator

from tests.fixtures.datasets import RegressionDataset
from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import count_loss_tokens
from tests.fixtures.regression import RegressionModel
from tests.fixtures.runs import Calls, build_trainer, random_token_samples, read_metrics, step_lines, weights_of
from tests.fixtures.tolerances import LAYOUT_FLOAT64
from trainer import Trainer, TrainingArguments
from trainer.data.loader import prefetched
from trainer.data.order import epoch_order
from trainer.errors import DataError, NonFiniteError, UsageError

LENGTHS = (9, 3, 17, 5, 30, 2, 11, 7, 24, 4)
SAMPLES = random_token_samples(LENGTHS)
HELD_OUT = random_token_samples((8, 13, 5), seed=9)
STEPS_PER_EPOCH = 3  # 10 samples, 4 a step
SLOW_SECONDS = 0.05


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


class TestTrainingLength:
    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({"num_train_epochs": 1}, 3),
            ({"num_train_epochs": 2.5}, 8),
            ({"num_train_epochs": 0.1}, 1),
            ({"max_steps": 7}, 7),
            ({"max_steps": 2, "num_train_epochs": 5}, 2),
            ({"max_samples": 10}, 3),
            ({"max_samples": 11}, 4),
            ({"max_samples": 4, "max_steps": 5}, 1),
        ],
        ids=str,
    )
    def test_training_stops_where_asked(self, tmp_path: Path, options: dict[str, Any], steps: int) -> None:
        trainer = build_trainer(tmp_path, SAMPLES, **options)
        assert trainer.train().global_step == steps
        assert [line["step"] for line in step_lines(tmp_path)] == list(range(1, steps + 1))

    @pytest.mark.parametrize("num_tokens", [1, 40, 200])
    def test_training_stops_at_the_first_step_that_reaches_the_loss_tokens(
        self, tmp_path: Path, num_tokens: int
    ) -> None:
        build_trainer(tmp_path, SAMPLES, max_tokens=num_tokens).train()
        trained = [line["num_loss_tokens"] for line in step_lines(tmp_path)]
        assert sum(trained[:-1]) < num_tokens <= sum(trained)

    def test_endless_training_ends_when_a_callback_asks(self, tmp_path: Path) -> None:
        class StopAt(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = state.global_step == 10

        options = {"num_train_epochs": math.inf, "lr_scheduler_type": "constant"}
        assert build_trainer(tmp_path, SAMPLES, callbacks=[StopAt()], **options).train().global_step == 10
        assert step_lines(tmp_path)[-1]["epoch"] == pytest.approx(3.4, rel=LAYOUT_FLOAT64)

    def test_a_schedule_that_needs_an_end_is_refused_without_one(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="'linear' needs an end"):
            build_trainer(tmp_path, SAMPLES, num_train_epochs=math.inf).train()


class TestEvents:
    def test_events_come_in_the_order_of_the_protocol(self, tmp_path: Path) -> None:
        calls = Calls()
        build_trainer(tmp_path, SAMPLES[:4], eval_samples=HELD_OUT, eval_strategy="epoch", callbacks=[calls]).train()
        assert calls.names == [
            "on_init_end",
            "on_train_begin",
            "on_epoch_begin",
            "on_step_begin",
            "on_pre_optimizer_step",
            "on_optimizer_step",
            "on_step_end",
            "on_epoch_end",
            "on_log",
            "on_evaluate",
            "on_log",
            "on_train_end",
        ]

    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4, 6]),
            ({"eval_strategy": "epoch"}, [3, 6]),
            ({"min_samples_per_evaluation": 9}, [3, 5]),
            ({"eval_on_start": True, "eval_at_end": True}, [0, 6]),
            (
                {"eval_strategy": "steps", "eval_steps": 3, "eval_at_end": True, "min_samples_per_evaluation": 10},
                [3, 6],
            ),
        ],
        ids=str,
    )
    def test_a_run_evaluates_when_asked(self, tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
        calls = Calls()
        build_trainer(tmp_path, SAMPLES, None, HELD_OUT, num_train_epochs=2, callbacks=[calls], **options).train()
        assert calls.steps_of("on_evaluate") == steps
        assert [line["step"] for line in read_metrics(tmp_path) if "eval_loss" in line] == steps

    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({"logging_steps": 2}, [2, 4, 6]),
            ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
            ({"logging_strategy": "epoch"}, [3, 6]),
            ({"logging_strategy": "no"}, []),
        ],
        ids=str,
    )
    def test_a_run_logs_when_asked(self, tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
        trainer = build_trainer(tmp_path, SAMPLES, num_train_epochs=2, **options)
        trainer.train()
        assert [line["step"] for line in trainer.state.log_history if "loss" in line] == steps

    def test_a_logged_loss_is_the_mean_over_the_loss_tokens_since_the_last(self, tmp_path: Path) -> None:
        trainer = build_trainer(tmp_path, SAMPLES, logging_steps=3)
        trainer.train()
        lines = step_lines(tmp_path)
        expected = sum(line["loss"] * line["num_loss_tokens"] for line in lines) / count_loss_tokens(SAMPLES)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=LAYOUT_FLOAT64)

    def test_evaluation_without_held_out_data_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="evaluation needs held-out data"):
            build_trainer(tmp_path, SAMPLES, eval_strategy="epoch")


class TestExports:
    def names(self, folder: Path) -> list[str]:
        exports = sorted(folder.glob("hf_format/samples_*"), key=lambda path: int(path.name.split("_")[1]))
        return [path.name for path in exports]

    @pytest.mark.parametrize(
        ("options", "samples"),
        [
            ({}, []),
            ({"export_final": True}, [20]),
            ({"export_at_epoch": True}, [10, 20]),
            ({"min_samples_per_checkpoint": 9}, [10, 18]),
            ({"min_samples_per_checkpoint": 10, "export_at_epoch": True, "export_final": True}, [10, 20]),
        ],
        ids=str,
    )
    def test_exports_are_written_when_asked(self, tmp_path: Path, options: dict[str, Any], samples: list[int]) -> None:
        build_trainer(tmp_path, SAMPLES, num_train_epochs=2, **options).train()
        assert self.names(tmp_path) == [f"samples_{count}" for count in samples]

    def test_the_best_is_the_one_with_the_lowest_evaluation_loss(self, tmp_path: Path) -> None:
        options = {"eval_strategy": "epoch", "export_best": True, "num_train_epochs": 4, "learning_rate": 0.1}
        trainer = build_trainer(tmp_path, SAMPLES, None, HELD_OUT, **options)
        trainer.train()
        losses = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path) if "eval_loss" in line}
        best = min(losses, key=losses.__getitem__)
        assert (trainer.state.best_global_step, trainer.state.best_metric) == (best, losses[best])
        assert Path(trainer.state.best_model_checkpoint).name == f"samples_{best // STEPS_PER_EPOCH * 10}"

    def test_an_unknown_best_metric_names_those_that_were_measured(self, tmp_path: Path) -> None:
        options = {"eval_on_start": True, "export_best": True, "metric_for_best_model": "accuracy"}
        with pytest.raises(UsageError, match=r"'accuracy': measured are loss"):
            build_trainer(tmp_path, SAMPLES, None, HELD_OUT, **options).train()

    @pytest.mark.world_size(2)
    def test_exports_of_a_sharded_model_are_whole(self, ranks, tmp_path: Path) -> None:
        trainer = build_trainer(ranks.tmp_path / "run", SAMPLES, tiny_llama(), export_final=True)
        trainer.train()
        expected = weights_of(trainer.model)
        loaded = AutoModelForCausalLM.from_pretrained(ranks.tmp_path / "run" / "hf_format" / "samples_10")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.named_parameters())


class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_lets_the_step_finish_and_saves(self, tmp_path: Path, number: signal.Signals) -> None:
        handler = signal.getsignal(number)
        trainer = build_trainer(tmp_path, SAMPLES, callbacks=[SignalAt(2, number)], max_steps=9, export_final=True)
        assert trainer.train().global_step == 2
        assert trainer.stop_signal == number
        assert (tmp_path / "hf_format" / "samples_8").is_dir()
        assert signal.getsignal(number) is handler

    def test_a_signal_during_the_final_evaluation_does_not_cost_the_weights(self, tmp_path: Path) -> None:
        class SignalAtEvaluation(TrainerCallback):
            def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                os.kill(os.getpid(), signal.SIGTERM)

        options = {"max_steps": 1, "eval_at_end": True, "export_final": True}
        trainer = build_trainer(tmp_path, SAMPLES, None, HELD_OUT, callbacks=[SignalAtEvaluation()], **options)
        assert trainer.train().global_step == 1
        assert (tmp_path / "hf_format" / "samples_4").is_dir()

    @pytest.mark.world_size(2)
    def test_a_signal_to_one_rank_stops_all_after_the_same_step(self, ranks, tmp_path: Path) -> None:
        callbacks = [SignalAt(2, signal.SIGTERM)] if ranks.rank == 1 else []
        trainer = build_trainer(ranks.tmp_path / "run", SAMPLES, callbacks=callbacks, max_steps=9)
        assert (trainer.train().global_step, trainer.stop_signal) == (2, signal.SIGTERM)


class TestNonFinite:
    @pytest.mark.world_size(1, 2)
    def test_a_non_finite_loss_is_never_stepped_on(self, ranks, tmp_path: Path) -> None:
        model = tiny_llama()
        trainer = build_trainer(ranks.tmp_path / "run", SAMPLES, model)
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)
        others = {name: w for name, w in weights_of(trainer.model).items() if torch.isfinite(w).all()}
        with pytest.raises(NonFiniteError, match="loss is nan .*the step was not taken"):
            trainer.train()
        after = weights_of(trainer.model)
        assert others
        assert all(torch.equal(after[name], before) for name, before in others.items())


class TestBadInput:
    def test_a_sample_without_a_trained_token_is_named(self, tmp_path: Path) -> None:
        samples = [*SAMPLES, ([5, 6, 7], [5, -100, -100])]
        with pytest.raises(DataError, match="1 of 11 samples have no trained token, first number 10"):
            build_trainer(tmp_path, samples)

    def test_a_folder_that_holds_a_run_is_not_written_over(self, tmp_path: Path) -> None:
        build_trainer(tmp_path, SAMPLES).train()
        before = read_metrics(tmp_path)
        with pytest.raises(UsageError, match="holds a run already"):
            build_trainer(tmp_path, SAMPLES).train()
        assert read_metrics(tmp_path) == before
        build_trainer(tmp_path, SAMPLES, overwrite_output_dir=True, max_steps=1).train()
        assert len(read_metrics(tmp_path)) == 1

    @pytest.mark.parametrize(("option", "name"), [("optim", "adamv"), ("lr_scheduler_type", "linera")])
    def test_a_wrong_name_is_refused_at_once(self, tmp_path: Path, option: str, name: str) -> None:
        with pytest.raises(UsageError, match=f"{option} = '{name}'"):
            build_trainer(tmp_path / "run", SAMPLES, **{option: name})
        assert not (tmp_path / "run").exists()

    def test_a_sample_over_the_budget_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="29"):
            build_trainer(tmp_path, SAMPLES, max_tokens_per_rank=29).train()


class TestWaiting:
    def test_what_is_waited_for_is_told(self, tmp_path: Path) -> None:
        build_trainer(tmp_path, SAMPLES, max_steps=3).train()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        told = [json.loads(line)["data_seconds"] for line in lines]
        assert len(told) == 3
        assert all(seconds > 0 for seconds in told)

    def test_a_slow_loader_is_waited_for(self, tmp_path: Path) -> None:
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, save_strategy="no", export_final=False, disable_tqdm=True, max_steps=2
        )
        Trainer(RegressionModel(), args, data_collator=collate_slowly, train_dataset=RegressionDataset()).train()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["data_seconds"] >= SLOW_SECONDS for line in lines)

    def test_a_batch_read_during_a_step_is_not_waited_for(self) -> None:
        batches, seconds = prefetched(slow_items()), []
        for _ in range(4):
            started = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - started)
            time.sleep(4 * SLOW_SECONDS)
        assert seconds[0] >= SLOW_SECONDS
        assert min(seconds) < SLOW_SECONDS


def collate_slowly(samples: list[Any]) -> Any:
    time.sleep(SLOW_SECONDS)
    return default_data_collator(samples)


def slow_items() -> Iterator[int]:
    for item in range(4):
        time.sleep(SLOW_SECONDS)
        yield item


class TestRecord:
    def test_the_configuration_is_written_beside_the_metrics(self, tmp_path: Path) -> None:
        trainer = build_trainer(tmp_path, SAMPLES, weight_decay=0.25)
        trainer.train()
        written = json.loads((tmp_path / "training_params.json").read_text())
        assert type(trainer.args).from_mapping(written) == trainer.args

    def test_every_sample_is_trained_once_an_epoch(self, tmp_path: Path) -> None:
        build_trainer(tmp_path, SAMPLES, num_train_epochs=2).train()
        lines = step_lines(tmp_path)
        assert [line["num_samples"] for line in lines] == [4, 4, 2] * 2
        orders = [epoch_order(len(SAMPLES), 42, epoch) for epoch in range(2)]
        lengths = [[sum(LENGTHS[i] for i in order[start : start + 4]) for start in (0, 4, 8)] for order in orders]
        assert [line["num_tokens"] for line in lines] == lengths[0] + lengths[1]
