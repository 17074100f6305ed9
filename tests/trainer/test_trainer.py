"""The Trainer on ordinary data and models: what it computes, when it stops, what it tells, what it understands."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import relative_difference
from tests.fixtures.runs import Calls, step_lines, weights_of
from tests.fixtures.tolerances import (
    COMPUTE_FP16,
    LAYOUT_FLOAT64,
    LAYOUT_TRAJECTORY_FLOAT64,
    REGRESSION_FP32,
    SAME_LOSS,
)
from tests.trainer.trainer_test_utils import (
    RegressionDataset,
    RegressionModel,
    RegressionModelConfig,
    RegressionPreTrainedModel,
    get_regression_trainer,
    labelled_rows,
)
from trainer.arguments.training import TrainingArguments
from trainer.data.sampler import epoch_order
from trainer.errors import ModelError, NonFiniteError, UsageError
from trainer.optim.scaling import FIRST_SCALE, STEPS_BETWEEN_GROWTHS, LossScale
from trainer.training.callbacks import RunState
from trainer.training.trainer import Trainer

SGD = (torch.optim.SGD, {"lr": 0.1})
PLAIN = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optimizer_cls_and_kwargs": SGD}


def line_by_hand(steps: list[list[Any]], learning_rate: float) -> tuple[list[float], tuple[float, float]]:
    """Losses and the line after gradient descent on the mean squared error of the points of each step."""
    a, b = 0.0, 0.0
    losses = []
    for points in steps:
        errors = [a * x + b - y for x, y in points]
        losses.append(sum(error**2 for error in errors) / len(points))
        by_a = sum(2 * error * x for error, (x, _) in zip(errors, points, strict=True)) / len(points)
        by_b = sum(2 * error for error in errors) / len(points)
        a, b = a - learning_rate * by_a, b - learning_rate * by_b
    return losses, (a, b)


def points_of_steps(num_samples: int, per_step: int, epochs: int, seed: int = 42) -> list[list[tuple[float, float]]]:
    dataset = RegressionDataset(length=num_samples)
    points = [(float(x), float(y)) for x, y in zip(dataset.x, dataset.ys[0], strict=True)]
    orders = [epoch_order(num_samples, seed, epoch).tolist() for epoch in range(epochs)]
    return [
        [points[i] for i in order[start : start + per_step]]
        for order in orders
        for start in range(0, num_samples, per_step)
    ]


def line_of(trainer: Trainer) -> tuple[float, float]:
    return trainer.model.a.item(), trainer.model.b.item()


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if "loss" in line]


class TestNumbers:
    @pytest.mark.world_size(1, 2)
    @pytest.mark.parametrize(
        ("num_samples", "per_device", "accumulation"), [(64, 8, 1), (21, 2, 2), (5, 4, 3), (1, 4, 1)]
    )
    def test_a_run_is_the_run_by_hand(self, ranks, num_samples: int, per_device: int, accumulation: int) -> None:
        trainer = get_regression_trainer(
            output_dir=ranks.tmp_path / "run",
            train_len=num_samples,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            pretrained=False,
            **PLAIN,
        )
        trainer.train()
        steps = points_of_steps(num_samples, per_device * accumulation * ranks.world_size, epochs=2)
        losses, line = line_by_hand(steps, learning_rate=0.1)
        assert trainer.state.global_step == len(steps)
        assert line_of(trainer) == pytest.approx(line, rel=REGRESSION_FP32)
        if ranks.is_lead:
            found = [report["loss"] for report in step_lines(ranks.tmp_path / "run")]
            assert found == pytest.approx(losses, rel=REGRESSION_FP32)

    @pytest.mark.world_size(1, 2, 3)
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_labels_count_over_the_whole_step_however_it_is_dealt(self, ranks, smoothing: float) -> None:
        """By a model that divides by num_items_in_batch: 12 rows as one micro-batch, and dealt out."""
        rows, found = labelled_rows(12), []
        for number, (per_device, accumulation) in enumerate([(12, 1), (4, 3), (2, 3)]):
            model = tiny_llama().double()
            options = {"label_smoothing_factor": smoothing, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
            args = TrainingArguments(
                str(ranks.tmp_path / f"run{number}"),
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=accumulation,
                max_samples=12,
                export_final=False,
                disable_tqdm=True,
                **options,
            )
            trainer = Trainer(model, args, train_dataset=rows)
            if per_device * accumulation * ranks.world_size < 12:
                continue
            trainer.train()
            found.append(weights_of(trainer.model))
        assert len(found) >= 2
        assert all(relative_difference(one, found[0]) < LAYOUT_TRAJECTORY_FLOAT64 for one in found[1:])

    def test_a_mean_loss_weighs_each_micro_batch_by_its_samples(self, tmp_path: Path) -> None:
        """7 samples as 7 and as 4 + 3: equal, where an equal weight for both micro-batches would not be."""
        lines = []
        for per_device, accumulation in [(7, 1), (4, 2)]:
            options = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
            trainer = get_regression_trainer(output_dir=tmp_path / str(per_device), train_len=7, **options, **PLAIN)
            trainer.train()
            lines.append(line_of(trainer))
        assert lines[0] == pytest.approx(lines[1], rel=REGRESSION_FP32)

    @pytest.mark.parametrize(
        "case",
        [
            {"model": "line", "learning_rate": 0.1},
            {"model": "line", "learning_rate": 0.1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
            {"model": "llama", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
            {"model": "llama", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "bf16": True},
            {"model": "llama", "per_device_train_batch_size": 4, "label_smoothing_factor": 0.1},
        ],
        ids=str,
    )
    def test_the_run_is_that_of_transformers_trainer(self, tmp_path: Path, case: dict[str, Any]) -> None:
        kind, options = case["model"], {name: value for name, value in case.items() if name != "model"}
        options |= {"num_train_epochs": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
        options |= {"train_sampling_strategy": "sequential"}
        model = tiny_llama() if kind == "llama" else RegressionPreTrainedModel(RegressionModelConfig())
        data = labelled_rows(12) if kind == "llama" else RegressionDataset()
        their_args = transformers.TrainingArguments(
            str(tmp_path / "theirs"), report_to="none", save_strategy="no", **options
        )
        theirs = transformers.Trainer(copy.deepcopy(model), their_args, train_dataset=data)
        ours = Trainer(
            model, TrainingArguments(str(tmp_path / "ours"), export_final=False, **options), train_dataset=data
        )
        expected, output = theirs.train(), ours.train()
        for name in ("loss", "grad_norm", "learning_rate", "epoch"):
            assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=SAME_LOSS)
        assert output.training_loss == pytest.approx(expected.training_loss, rel=SAME_LOSS)
        assert expected.metrics.keys() - output.metrics.keys() <= {"total_flos"}
        assert relative_difference(weights_of(ours.model), weights_of(theirs.model)) < SAME_LOSS

    def test_a_non_finite_loss_is_never_stepped_on(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, a=math.nan)
        with pytest.raises(NonFiniteError, match="loss is nan .*the step was not taken"):
            trainer.train()
        assert trainer.model.b.item() == 0


class TestSteps:
    @settings(max_examples=30)
    @given(
        num_samples=st.integers(1, 40),
        per_device=st.integers(1, 9),
        accumulation=st.integers(1, 5),
        epochs=st.sampled_from([0.3, 1, 1.5, 2]),
        max_steps=st.sampled_from([-1, 1, 7]),
        drop_last=st.booleans(),
    )
    def test_there_are_as_many_as_counted_by_hand(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        num_samples: int,
        per_device: int,
        accumulation: int,
        epochs: float,
        max_steps: int,
        drop_last: bool,
    ) -> None:
        trainer = get_regression_trainer(
            output_dir=tmp_path_factory.mktemp("run"),
            train_len=num_samples,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            max_steps=max_steps,
            dataloader_drop_last=drop_last,
        )
        micro_batches = num_samples // per_device if drop_last else math.ceil(num_samples / per_device)
        if micro_batches == 0:
            with pytest.raises(UsageError, match="train_dataset gives no batch"):
                trainer.train()
            return
        per_epoch = math.ceil(micro_batches / accumulation)
        expected = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
        calls = Calls()
        trainer.add_callback(calls)
        trainer.train()
        assert trainer.state.global_step == expected == len(calls.steps_of("on_step_end"))
        whole_epochs, rest = divmod(expected, per_epoch)
        assert len(calls.steps_of("on_epoch_end")) == whole_epochs + (rest > 0)
        num_micro_batches = whole_epochs * micro_batches + min(rest * accumulation, micro_batches)
        assert len(calls.steps_of("on_substep_end")) == num_micro_batches - expected

    def test_a_run_stops_at_the_first_step_that_reaches_max_samples(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, max_samples=65)
        trainer.train()
        assert trainer.state.num_samples_seen == 72

    def test_a_second_run_counts_anew(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, max_steps=3)
        assert trainer.train().global_step == 3
        assert trainer.train().global_step == 3
        assert [path.name for path in sorted(tmp_path.glob("metrics*"))] == ["metrics.1.jsonl", "metrics.jsonl"]
        assert [line["step"] for line in step_lines(tmp_path)] == [1, 2, 3]
        assert trainer.state.log_history[-1]["step"] == 3


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
    def test_come_in_the_documented_order(self, tmp_path: Path, options: dict[str, Any]) -> None:
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


class TestModels:
    def test_the_loss_is_found_by_name_or_first(self, tmp_path: Path) -> None:
        class Named(RegressionModel):
            def forward(self, input_x: Any, labels: Any = None, **_: Any) -> Any:
                loss, y = super().forward(input_x, labels)
                return {"y": y, "loss": loss}

        class Nameless(Named):
            def forward(self, input_x: Any, labels: Any = None, **_: Any) -> Any:
                return {"y": super().forward(input_x, labels)["y"]}

        first, named = (
            get_regression_trainer(output_dir=tmp_path / kind.__name__, model=kind(), **PLAIN)
            for kind in (RegressionModel, Named)
        )
        first.train()
        named.train()
        assert line_of(first) == line_of(named)
        with pytest.raises(ModelError, match="gave no loss, only y, for the inputs"):
            get_regression_trainer(output_dir=tmp_path / "none", model=Nameless()).train()

    def test_model_init_builds_anew_for_each_run(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            return RegressionModel(a=torch.rand(()).item())

        trainer = get_regression_trainer(output_dir=tmp_path, model_init=build, max_steps=2)
        starts = [trainer.model.a.item()]
        trainer.train()
        first = line_of(trainer)
        trainer.train()
        assert line_of(trainer) == first
        assert starts[0] != first[0]

    def test_a_model_is_given_in_one_way(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="give either model or model_init"):
            Trainer(RegressionModel(), TrainingArguments(str(tmp_path)), model_init=RegressionModel)
        with pytest.raises(ModelError, match="model is a str: give a torch.nn.Module"):
            Trainer("model", TrainingArguments(str(tmp_path)), train_dataset=RegressionDataset())  # type: ignore[arg-type]

    def test_a_loss_function_takes_outputs_labels_and_their_number(self, tmp_path: Path) -> None:
        def squared_error(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            return ((outputs[0] - labels) ** 2).sum() / num_items_in_batch

        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, **PLAIN}
        own = get_regression_trainer(output_dir=tmp_path / "own", **options)
        by_function = get_regression_trainer(output_dir=tmp_path / "given", compute_loss_func=squared_error, **options)
        own.train()
        by_function.train()
        assert line_of(by_function) == pytest.approx(line_of(own), rel=REGRESSION_FP32)

    def test_overrides_are_used(self, tmp_path: Path) -> None:
        class Doubled(Trainer):
            def compute_loss(self, *given: Any, **options: Any) -> Any:
                return 2 * super().compute_loss(*given, **options)

        class ByHand(Trainer):
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
                loss = 2 * model(**inputs)[0]
                self.accelerator.backward(loss)
                return loss.detach()

            def log(self, logs: dict[str, float], start_time: Any = None) -> None:
                super().log({**logs, "mine": 1.0}, start_time)

        doubled, by_hand = (
            get_regression_trainer(output_dir=tmp_path / kind.__name__, trainer_class=kind, logging_steps=1, **PLAIN)
            for kind in (Doubled, ByHand)
        )
        doubled.train()
        by_hand.train()
        assert line_of(by_hand) == line_of(doubled)
        assert logged(by_hand, "mine") == [1.0] * 24
        with pytest.raises(AttributeError, match=r"accelerator\.autocast: this Trainer works without accelerate"):
            by_hand.accelerator.autocast  # noqa: B018

    @pytest.mark.world_size(1, 2)
    def test_an_own_step_is_averaged_over_ranks(self, ranks) -> None:
        class ByHand(Trainer):
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
                loss = model(**inputs)[0]
                self.accelerator.backward(loss)
                return loss.detach()

        options = {"per_device_train_batch_size": 8 // ranks.world_size, "logging_steps": 1, "num_train_epochs": 1}
        trainer = get_regression_trainer(output_dir=ranks.tmp_path / "run", trainer_class=ByHand, **options, **PLAIN)
        trainer.train()
        losses, line = line_by_hand(points_of_steps(64, 8, 1), learning_rate=0.1)
        assert logged(trainer) == pytest.approx(losses, rel=REGRESSION_FP32)
        assert line_of(trainer) == pytest.approx(line, rel=REGRESSION_FP32)

    def test_own_makers_of_optimizer_and_schedule_are_used(self, tmp_path: Path) -> None:
        class Own(Trainer):
            def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
                self.optimizer = self.optimizer or torch.optim.SGD(self.model.parameters(), lr=1.0)
                return self.optimizer

            def create_scheduler(self, num_training_steps: int | None, optimizer: Any = None) -> Any:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.create_optimizer(), lambda step: 0.1)
                self.planned = num_training_steps
                return self.lr_scheduler

        own = get_regression_trainer(output_dir=tmp_path / "own", trainer_class=Own, max_grad_norm=0.0)
        named = get_regression_trainer(output_dir=tmp_path / "named", **PLAIN)
        own.train()
        named.train()
        assert own.planned == 24
        assert line_of(own) == pytest.approx(line_of(named), rel=REGRESSION_FP32)

    def test_keys_and_values_are_not_kept(self, tmp_path: Path) -> None:
        trainer = Trainer(tiny_llama(), TrainingArguments(str(tmp_path)), eval_dataset=labelled_rows(2))
        predictions = trainer.predict(labelled_rows(2), ignore_keys=[]).predictions
        assert predictions.shape[0] == 2

    def test_optimizer_and_schedule_may_be_given(self, tmp_path: Path) -> None:
        model = RegressionModel()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
        given = get_regression_trainer(
            output_dir=tmp_path / "given", model=model, optimizers=(optimizer, schedule), max_grad_norm=0.0
        )
        named = get_regression_trainer(output_dir=tmp_path / "named", **PLAIN)
        assert (given.optimizer, given.lr_scheduler) == (optimizer, schedule)
        given.train()
        named.train()
        assert line_of(given) == pytest.approx(line_of(named), rel=REGRESSION_FP32)

    @pytest.mark.world_size(2)
    def test_an_optimizer_of_parameters_that_were_sharded_is_refused(self, ranks) -> None:
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        args = TrainingArguments(str(ranks.tmp_path / "run"), max_steps=1)
        trainer = Trainer(model, args, train_dataset=labelled_rows(2), optimizers=(optimizer, None))
        with pytest.raises(UsageError, match="parameters that are not the model's"):
            trainer.train()

    def test_frozen_parameters_stay(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, b=0.5, freeze_patterns=["^b$"])
        assert trainer.get_num_trainable_parameters() == 1
        trainer.train()
        assert trainer.model.b.item() == 0.5
        assert trainer.model.a.item() != 0

    def test_arguments_know_the_device(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, use_cpu=True)
        assert (trainer.args.device, trainer.args.n_gpu) == (trainer.model.a.device, 0)

    def test_optimizers_can_be_asked(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, learning_rate=0.25)
        with pytest.raises(ValueError, match="there is no optimizer yet"):
            trainer.get_learning_rates()
        trainer.create_optimizer_and_scheduler(10)
        assert set(trainer.get_learning_rates()) == {0.25}
        group = trainer.get_optimizer_group(trainer.model.a)
        assert any(held is trainer.model.a for held in group["params"])
        assert sum(len(params) for params in trainer.get_optimizer_group()) == 2

    @pytest.mark.world_size(1, 2)
    def test_a_plain_module_is_exported_as_weights(self, ranks) -> None:
        from safetensors.torch import load_file

        trainer = get_regression_trainer(
            output_dir=ranks.tmp_path / "run", pretrained=False, export_final=True, max_steps=1
        )
        trainer.train()
        (folder,) = (ranks.tmp_path / "run" / "hf_format").iterdir()
        weights = load_file(folder / "model.safetensors")
        assert (weights["a"].item(), weights["b"].item()) == line_of(trainer)

    def test_a_model_may_be_saved_among_what_the_run_writes(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, max_steps=1)
        trainer.train()
        trainer.save_model(str(tmp_path))
        trainer.save_model(str(tmp_path))
        saved = RegressionPreTrainedModel.from_pretrained(tmp_path)
        assert (saved.a.item(), saved.b.item()) == line_of(trainer)
        assert (tmp_path / "metrics.jsonl").is_file()


class TestOptions:
    def test_a_run_repeats_itself_and_leaves_its_arguments_alone(self, tmp_path: Path) -> None:
        def run() -> list[float]:
            trainer = get_regression_trainer(output_dir=tmp_path, logging_steps=1, max_steps=5)
            before = dataclasses.asdict(trainer.args)
            trainer.train()
            assert dataclasses.asdict(trainer.args) == before
            return logged(trainer)

        assert run() == run()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 4}, "batch_size has no effect on a data set of your own: give per_device_train_batch_size"),
            ({"block_size": 4}, "block_size has no effect"),
            ({"attn_implementation": "eager"}, "choose it when you build the model"),
            ({"bf16": True, "fp16": True}, "exclude each other"),
            ({"dataloader_prefetch_factor": 2}, "have no effect without dataloader_num_workers"),
            ({"gradient_checkpointing_kwargs": {"debug": True}}, "have no effect without gradient_checkpointing"),
            ({"torch_compile_mode": "default"}, "have no effect without torch_compile"),
            ({"length_column_name": "n"}, "has no effect but with"),
            ({"neftune_noise_alpha": 0.1}, "has no input embeddings to add noise to"),
            ({"gradient_checkpointing": True}, "does not support it"),
        ],
        ids=str,
    )
    def test_what_has_no_effect_is_refused(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises((UsageError, ModelError), match=message):
            get_regression_trainer(output_dir=tmp_path, **options).train()

    def test_full_determinism_holds_for_the_process(self, tmp_path: Path) -> None:
        cudnn, environment = torch.backends.cudnn, dict(os.environ)
        kept = cudnn.deterministic, cudnn.benchmark
        try:
            lines = []
            for name in ("one", "other"):
                trainer = get_regression_trainer(output_dir=tmp_path / name, full_determinism=True, max_steps=2)
                assert torch.are_deterministic_algorithms_enabled()
                trainer.train()
                lines.append(line_of(trainer))
            assert lines[0] == lines[1]
        finally:
            torch.use_deterministic_algorithms(False)
            cudnn.deterministic, cudnn.benchmark = kept
            os.environ.clear()
            os.environ.update(environment)

    def test_recomputing_changes_nothing(self, tmp_path: Path) -> None:
        def run(name: str, **more: Any) -> dict[str, torch.Tensor]:
            args = TrainingArguments(str(tmp_path / name), max_steps=2, export_final=False, disable_tqdm=True, **more)
            trainer = Trainer(tiny_llama().double(), args, train_dataset=labelled_rows(4))
            trainer.train()
            assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()) == bool(
                more
            )
            return weights_of(trainer.model)

        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        for options in ({"gradient_checkpointing": True}, settings):
            assert relative_difference(run("changed", **options), run("plain")) < LAYOUT_FLOAT64

    def test_compiling_changes_nothing(self, tmp_path: Path) -> None:
        options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
        compiled = get_regression_trainer(output_dir=tmp_path / "compiled", pretrained=False, **options, **PLAIN)
        plain = get_regression_trainer(output_dir=tmp_path / "plain", pretrained=False, max_steps=2, **PLAIN)
        assert compiled.model._compiled_call_impl is not None
        compiled.train()
        plain.train()
        assert line_of(compiled) == pytest.approx(line_of(plain), rel=REGRESSION_FP32)

    def test_noise_is_on_embeddings_and_in_training_alone(self, tmp_path: Path) -> None:
        seen: list[torch.Tensor] = []
        model = tiny_llama()
        options = {"neftune_noise_alpha": 5.0, "max_steps": 1, "export_final": False, "disable_tqdm": True}
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=labelled_rows(2))

        class Look(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clean = model.get_input_embeddings().weight[torch.arange(6)[None]].detach()
                noisy = model.get_input_embeddings()(torch.arange(6)[None]).detach()
                seen.append(noisy - clean)

        trainer.add_callback(Look)
        trainer.train()
        limit = 5.0 / math.sqrt(6 * seen[0].shape[-1])
        assert limit / 2 < seen[0].abs().max().item() <= limit
        assert not model.get_input_embeddings()._forward_hooks

    def test_memory_that_runs_out_means_smaller_micro_batches_from_the_start(self, tmp_path: Path) -> None:
        class OutOfMemory(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 2 and state.train_batch_size >= 15:
                    raise RuntimeError("CUDA out of memory.")

        options = {"max_steps": 4, "learning_rate": 0.1}
        found = get_regression_trainer(
            output_dir=tmp_path / "found",
            callbacks=[OutOfMemory()],
            auto_find_batch_size=True,
            per_device_train_batch_size=16,
            **options,
        )
        found.train()
        assert found.state.train_batch_size == 14
        known = get_regression_trainer(output_dir=tmp_path / "known", per_device_train_batch_size=14, **options)
        known.train()
        assert line_of(found) == line_of(known)
        assert found.args.per_device_train_batch_size == 16

    def test_memory_that_runs_out_is_an_error_otherwise(self, tmp_path: Path) -> None:
        class OutOfMemory(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                raise RuntimeError("CUDA out of memory.")

        with pytest.raises(RuntimeError, match="out of memory"):
            get_regression_trainer(output_dir=tmp_path / "off", callbacks=[OutOfMemory]).train()
        options = {"auto_find_batch_size": True, "per_device_train_batch_size": 2}
        with pytest.raises(UsageError, match="not even one sample fits"):
            get_regression_trainer(output_dir=tmp_path / "on", callbacks=[OutOfMemory], **options).train()

    @pytest.mark.world_size(1, 2)
    @pytest.mark.parametrize("kind", ["all", "non_padding"])
    def test_input_tokens_are_counted(self, ranks, kind: str) -> None:
        rows = [{**row, "attention_mask": [1] * 6 + [0] * (len(row["input_ids"]) - 6)} for row in labelled_rows(5)]
        args = TrainingArguments(
            str(ranks.tmp_path / "run"),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            include_num_input_tokens_seen=kind,
            export_final=False,
            disable_tqdm=True,
        )
        trainer = Trainer(tiny_llama(), args, train_dataset=rows)
        trainer.train()
        expected = 5 * (len(rows[0]["input_ids"]) if kind == "all" else 6)
        assert trainer.state.num_input_tokens_seen == expected
        assert trainer.state.log_history[-1]["num_input_tokens_seen"] == expected

    def test_memory_is_measured_when_asked(self, tmp_path: Path) -> None:
        pytest.importorskip("psutil")
        trainer = get_regression_trainer(output_dir=tmp_path / "on", skip_memory_metrics=False, max_steps=1)
        metrics = trainer.train().metrics
        assert {"init_mem_cpu_alloc_delta", "train_mem_cpu_alloc_delta", "train_mem_cpu_peaked_delta"} <= metrics.keys()
        assert "eval_mem_cpu_alloc_delta" in trainer.evaluate()
        assert "test_mem_cpu_alloc_delta" in trainer.predict(trainer.eval_dataset).metrics
        skipped = get_regression_trainer(output_dir=tmp_path / "off", max_steps=1).train().metrics
        assert not any("mem" in name for name in skipped)


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
        assert relative_difference(weights_of(half.model), weights_of(full.model)) < COMPUTE_FP16
