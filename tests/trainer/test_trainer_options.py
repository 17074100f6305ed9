"""Options of the Trainer on ordinary data: each does what it says, or is refused."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import relative_difference
from tests.fixtures.runs import weights_of
from tests.fixtures.tolerances import (
    LAYOUT_FLOAT64,
    REGRESSION_FP32,
)
from tests.trainer.trainer_test_utils import (
    PLAIN,
    get_regression_trainer,
    labelled_rows,
    line_of,
    logged,
)
from trainer.config.arguments import TrainingArguments
from trainer.errors import ModelError, UsageError
from trainer.hf.trainer import Trainer
from trainer.training.out_of_memory import is_out_of_memory, next_batch_size


class Recomputing(TrainerCallback):
    """Notes at each step whether the model recomputes activations."""

    def __init__(self) -> None:
        self.recomputes: list[bool] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.recomputes.append(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))


class Compiled(TrainerCallback):
    """Notes at each step whether the model is compiled."""

    def __init__(self) -> None:
        self.is_compiled: list[bool] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.is_compiled.append(model._compiled_call_impl is not None)


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
            ({"batch_size": 4}, "batch_size has no effect on a custom data set: give per_device_train_batch_size"),
            ({"block_size": 4}, "block_size has no effect"),
            ({"attn_implementation": "eager"}, "choose it when you build the model"),
            ({"bf16": True, "fp16": True}, "exclude each other"),
            ({"dataloader_prefetch_factor": 2}, "has no effect without dataloader_num_workers"),
            ({"gradient_checkpointing_kwargs": {"debug": True}}, "has no effect without gradient_checkpointing"),
            ({"length_column_name": "n"}, "has no effect with train_sampling_strategy=random"),
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
            trainer.add_callback(seen := Recomputing())
            trainer.train()
            assert seen.recomputes == [bool(more)] * 2
            return weights_of(trainer.model)

        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        for options in ({"gradient_checkpointing": True}, settings):
            assert relative_difference(run("changed", **options), run("plain")) < LAYOUT_FLOAT64

    def test_compiling_changes_nothing(self, tmp_path: Path) -> None:
        options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
        compiled = get_regression_trainer(output_dir=tmp_path / "compiled", pretrained=False, **options, **PLAIN)
        plain = get_regression_trainer(output_dir=tmp_path / "plain", pretrained=False, max_steps=2, **PLAIN)
        compiled.add_callback(seen := Compiled())
        compiled.train()
        assert seen.is_compiled == [True] * 2
        assert compiled.model._compiled_call_impl is None  # the model is as before
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

    def test_memory_ran_out_where_an_error_says_so_and_one_sample_is_the_last_try(self) -> None:
        says = {RuntimeError("CUDA out of memory."): True, RuntimeError("no such device"): False}
        says |= {ValueError("out of memory"): False, torch.OutOfMemoryError("full"): True}
        assert {error: is_out_of_memory(error) for error in says} == says
        assert [next_batch_size(size) for size in (16, 10, 3, 2)] == [14, 9, 2, 1]
        with pytest.raises(UsageError, match="not even one sample fits"):
            next_batch_size(1)

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
