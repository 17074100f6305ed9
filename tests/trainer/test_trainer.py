"""The Trainer on ordinary data and models: what it computes, and when it stops."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.models import build_seq2seq_model, tiny_llama
from tests.fixtures.oracles import relative_difference
from tests.fixtures.runs import Calls, step_lines, weights_of
from tests.fixtures.tolerances import (
    LAYOUT_TRAJECTORY_FLOAT64,
    REGRESSION_FP32,
    SAME_LOSS,
)
from tests.trainer.trainer_test_utils import (
    PLAIN,
    RegressionDataset,
    RegressionModelConfig,
    RegressionPreTrainedModel,
    get_regression_trainer,
    labelled_rows,
    line_by_hand,
    line_of,
    logged,
    points_of_steps,
)
from trainer.config.arguments import TrainingArguments
from trainer.errors import NonFiniteError, UsageError
from trainer.hf.trainer import Trainer


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
        if ranks.is_main:
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

    def test_a_micro_batch_without_labels_counts_for_nothing(self, tmp_path: Path) -> None:
        """Of a model that takes a mean over labels, which is 0 / 0 there: 4 rows at once, and one by one."""
        rows, found = labelled_rows(8), []
        for row in rows[1::3]:
            row["labels"] = [-100] * len(row["labels"])
        for per_device, accumulation in [(4, 1), (1, 4)]:
            args = TrainingArguments(
                str(tmp_path / str(per_device)),
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential",
                max_steps=2,
                export_final=False,
                disable_tqdm=True,
            )
            model = build_seq2seq_model("t5").double()
            trainer = Trainer(model, args, train_dataset=rows)
            trainer.train()
            found.append(weights_of(trainer.model))
        assert relative_difference(*found) < LAYOUT_TRAJECTORY_FLOAT64

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
        assert expected.metrics.keys() == output.metrics.keys()
        assert ours.state.total_flos == theirs.state.total_flos
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
    def test_steps_are_as_many_as_counted_by_hand(
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
