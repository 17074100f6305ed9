"""Saving and resuming as users of Trainer meet it: when, how many, what may change, what is refused."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import linear_schedule
from tests.fixtures.ranks.faults import flip_bit
from tests.fixtures.runs import build_trainer, random_token_samples, read_metrics, weights_of
from tests.fixtures.tolerances import CLOSED_FORM_FLOAT64
from tests.trainer.trainer_test_utils import RegressionDataset, get_regression_trainer
from trainer.checkpoint import manifest
from trainer.errors import CheckpointError, UsageError
from trainer.hf.trainer import Trainer
from trainer.training.signals import SIGNALS

SAMPLES = random_token_samples([4 + i % 9 for i in range(16)])


def regression(folder: Path, **options: Any) -> Trainer:
    """64 samples, 4 a step: 16 steps an epoch."""
    defaults = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 4, "learning_rate": 0.1}
    return get_regression_trainer(output_dir=folder, **{**defaults, **options})


def saved_steps(folder: Path) -> list[int]:
    return sorted(map(manifest.step_of, manifest.list_checkpoints(folder / "checkpoints")))


def checkpoint(folder: Path, step: int) -> Path:
    return manifest.folder_of(folder / "checkpoints", step)


def assert_same_weights(trainer: Trainer, other: Trainer) -> None:
    weights, expected = weights_of(trainer.model), weights_of(other.model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


class SignalAt(TrainerCallback):
    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


class Remember(TrainerCallback):
    def __init__(self) -> None:
        self.saved: list[tuple[int, bool]] = []

    def on_save(self, args, state, control, checkpoint: Path, **_: Any) -> None:
        self.saved.append((manifest.step_of(checkpoint), checkpoint.is_dir()))


class TestWhenACheckpointIsWritten:
    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({"save_steps": 5, "max_steps": 12}, [5, 10, 12]),
            ({"save_strategy": "epoch", "save_steps": 500, "num_train_epochs": 2}, [16, 32]),
            ({"save_strategy": "no", "save_steps": 500, "max_steps": 3}, []),
            ({"save_strategy": "signal", "save_steps": 500, "max_steps": 3}, []),
            ({"save_steps": 500, "min_samples_per_full_checkpoint": 10, "max_steps": 7}, [3, 5, 7]),
            ({"save_steps": 4, "max_steps": 16, "save_total_limit": 2}, [12, 16]),
        ],
    )
    def test_the_options_decide(self, tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
        seen = Remember()
        regression(tmp_path, callbacks=[seen], **options).train()
        assert saved_steps(tmp_path) == steps
        assert all(is_there for _, is_there in seen.saved)
        assert [step for step, _ in seen.saved][-len(steps) :] == steps[-len(seen.saved) :]
        assert not list((tmp_path / "checkpoints").glob(".*")) if steps else not (tmp_path / "checkpoints").exists()

    @pytest.mark.parametrize("number", SIGNALS)
    def test_a_stop_signal_saves_after_the_step(self, tmp_path: Path, number: signal.Signals) -> None:
        before = signal.signal(number, signal.SIG_DFL)  # nohup ignores one
        try:
            trainer = regression(tmp_path, save_strategy="signal", save_steps=500, callbacks=[SignalAt(3, number)])
            trainer.train()
        finally:
            signal.signal(number, before)
        assert saved_steps(tmp_path) == [3]
        assert trainer.stop_signal == number

    def test_usr1_saves_and_goes_on(self, tmp_path: Path) -> None:
        options = {"save_strategy": "signal", "save_steps": 500, "max_steps": 5}
        trainer = regression(tmp_path, callbacks=[SignalAt(2, signal.SIGUSR1)], **options)
        trainer.train()
        assert saved_steps(tmp_path) == [2]
        assert trainer.state.global_step == 5

    def test_a_callback_may_ask(self, tmp_path: Path) -> None:
        class Ask(TrainerCallback):
            def on_step_end(self, args, state, control, **_: Any) -> None:
                control.should_save = state.global_step == 3

        regression(tmp_path, save_steps=500, max_steps=4, callbacks=[Ask()]).train()
        assert saved_steps(tmp_path) == [3, 4]

    def test_weights_alone_are_small_and_cannot_be_gone_on_with(self, tmp_path: Path) -> None:
        regression(tmp_path, save_only_model=True, max_steps=4).train()
        assert not (checkpoint(tmp_path, 4) / "optimizer_0.safetensors").exists()
        with pytest.raises(CheckpointError, match="it holds weights alone"):
            regression(tmp_path).train(resume_from_checkpoint=True)
        with pytest.raises(CheckpointError, match="a run cannot go on from it"):
            regression(tmp_path).train(resume_from_checkpoint=str(checkpoint(tmp_path, 4)))


class TestTheBestModel:
    def best_run(self, folder: Path, **options: Any) -> Trainer:
        defaults = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        return build_trainer(
            folder, SAMPLES, tiny_llama(), SAMPLES[:4], max_steps=8, **{**defaults, "save_strategy": "best", **options}
        )

    def test_the_best_model_is_kept_and_loaded(self, tmp_path: Path) -> None:
        trainer = self.best_run(tmp_path, learning_rate=0.3, save_total_limit=1)
        trainer.train()
        losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
        best = min(losses, key=lambda step: losses[step])
        assert trainer.state.best_global_step == best
        assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
        assert best in saved_steps(tmp_path)
        assert trainer.evaluate()["eval_loss"] == losses[best]

    def test_the_limit_spares_it_where_later_ones_are_worse(self, tmp_path: Path) -> None:
        options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "greater_is_better": True}
        trainer = self.best_run(tmp_path, learning_rate=1e-2, **options)  # the loss falls: the first is "best"
        trainer.train()
        best = trainer.state.best_global_step
        assert best < 6, "the best one would be among the newest"
        assert saved_steps(tmp_path) == [best, 8]

    def test_a_best_model_saved_before_it_was_measured_is_known(self, tmp_path: Path) -> None:
        options = {"eval_strategy": "epoch", "num_train_epochs": 2, "learning_rate": 0.01}  # saved in the step itself
        trainer = regression(tmp_path, eval_dataset=RegressionDataset(length=8), **options)
        trainer.train()
        assert trainer.state.best_global_step == 32
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-32")

    def test_a_run_that_a_callback_ended_says_that_it_is_over(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = state.global_step == 4

        regression(tmp_path, callbacks=[Stop()]).train()
        resumed = regression(tmp_path)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 4
        assert f"{checkpoint(tmp_path, 4)}: a callback ended this run here" in caplog.text

    def test_early_stopping_goes_on_where_it_was(self, tmp_path: Path) -> None:
        def run(folder: Path) -> Trainer:
            every_step = {"save_strategy": "steps", "save_steps": 1, "greater_is_better": True}  # so none is better
            return self.best_run(folder, callbacks=[EarlyStoppingCallback(2)], **every_step)

        straight = run(tmp_path / "straight")
        straight.train()
        last = straight.state.global_step
        assert last < 8
        for step in range(1, last + 1):
            folder = tmp_path / str(step)
            shutil.copytree(checkpoint(tmp_path / "straight", step), checkpoint(folder, step))
            resumed = run(folder)
            if straight.state.best_global_step <= step:
                best = straight.state.best_global_step
                source = checkpoint(tmp_path / "straight", best)
                shutil.copytree(source, checkpoint(folder, best), dirs_exist_ok=True)
            resumed.train(resume_from_checkpoint="auto")
            assert resumed.state.global_step == last
            assert resumed.state.best_metric == straight.state.best_metric
            assert_same_weights(resumed, straight)


class TestResuming:
    def test_auto_begins_where_nothing_is(self, tmp_path: Path) -> None:
        trainer = regression(tmp_path, max_steps=2)
        trainer.train(resume_from_checkpoint="auto")
        assert trainer.state.global_step == 2
        with pytest.raises(CheckpointError, match="No valid checkpoint found in output directory"):
            regression(tmp_path / "elsewhere").train(resume_from_checkpoint=True)
        with pytest.raises(CheckpointError, match="Can't find a valid checkpoint at .*no_such"):
            regression(tmp_path / "elsewhere").train(resume_from_checkpoint="no_such")
        with pytest.raises(CheckpointError, match="Can't find a valid checkpoint at .*checkpoint-7"):
            regression(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))

    def test_auto_passes_over_what_is_damaged_and_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        regression(tmp_path, max_steps=12).train()
        flip_bit(checkpoint(tmp_path, 12) / "model_0.safetensors")
        trainer = regression(tmp_path, max_steps=12)
        trainer.train(resume_from_checkpoint="auto")
        assert "passed over step_12" in caplog.text
        assert "model_0.safetensors does not have the content that was written" in caplog.text
        aside = tmp_path / "checkpoints.discarded" / "step_12"
        assert f"set aside step_12 as {aside}: the run goes on from step 8" in caplog.text
        assert (aside / "model_0.safetensors").is_file()
        assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 13))
        assert saved_steps(tmp_path) == [4, 8, 12]

    def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(self, tmp_path: Path) -> None:
        regression(tmp_path, max_steps=4).train()
        flip_bit(checkpoint(tmp_path, 4) / "state.json")
        with pytest.raises(CheckpointError, match=r"No valid checkpoint .* to go on from; step_4: .*state.json"):
            regression(tmp_path).train(resume_from_checkpoint="auto")

    def test_an_older_checkpoint_cuts_off_what_came_after(self, tmp_path: Path) -> None:
        straight = regression(tmp_path, max_steps=12)
        straight.train()
        trainer = regression(tmp_path, max_steps=12)
        metrics = trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, 4))).metrics
        assert metrics["train_steps_per_second"] * metrics["train_runtime"] == pytest.approx(8, rel=CLOSED_FORM_FLOAT64)
        assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(
            32, rel=CLOSED_FORM_FLOAT64
        )
        assert_same_weights(trainer, straight)
        assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 13))
        assert saved_steps(tmp_path) == [4, 8, 12]

    def test_a_finished_run_stays_finished(self, tmp_path: Path) -> None:
        straight = regression(tmp_path, max_steps=8)
        straight.train()
        again = regression(tmp_path, max_steps=8)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 8
        assert_same_weights(again, straight)

    def test_frozen_weights_stay(self, tmp_path: Path) -> None:
        options = {"freeze_patterns": ["embed_tokens"], "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        straight = build_trainer(tmp_path, SAMPLES, tiny_llama(), **options)
        straight.train()
        resumed = build_trainer(tmp_path, SAMPLES, tiny_llama(), **options)
        resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path, 2)))
        assert_same_weights(resumed, straight)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
    def test_adapters_alone_are_saved(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")

        def run(**options: Any) -> Trainer:
            torch.manual_seed(0)
            model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
            rows = [{"input_ids": ids, "labels": labels} for ids, labels in random_token_samples([6] * 16)]
            return get_regression_trainer(output_dir=tmp_path, model=model, train_dataset=rows, max_steps=6, **options)

        straight = run(save_strategy="steps", save_steps=3)
        straight.train()
        index = json.loads((checkpoint(tmp_path, 3) / "tensors.json").read_bytes())["tensors"]
        assert all("lora_" in name for name in index)
        resumed = run(save_strategy="steps", save_steps=3)
        resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path, 3)))
        assert_same_weights(resumed, straight)

    def test_a_run_in_a_used_folder_sets_the_former_aside(self, tmp_path: Path) -> None:
        for _ in range(2):
            regression(tmp_path, max_steps=4).train()
        assert saved_steps(tmp_path) == [4]
        assert manifest.list_checkpoints(tmp_path / "checkpoints.1")


class TestWhatMayChange:
    def test_a_harmful_change_is_refused_by_name(self, tmp_path: Path) -> None:
        regression(tmp_path, max_steps=8).train()
        changed = {"learning_rate": 0.2, "seed": 7, "train_dataset": RegressionDataset(length=32)}
        with pytest.raises(UsageError, match=r"learning_rate was 0.1 when it was saved, 0.2 now") as refused:
            regression(tmp_path, max_steps=8, **changed).train(resume_from_checkpoint=True)
        assert "seed was 42" in str(refused.value)
        assert "data was 'RegressionDataset of 64 samples'" in str(refused.value)
        assert "allow_change=seed,learning_rate,data" in str(refused.value).replace(
            "learning_rate,seed", "seed,learning_rate"
        )

    def test_a_harmless_change_passes(self, tmp_path: Path) -> None:
        regression(tmp_path, max_steps=4).train()
        trainer = regression(tmp_path, max_steps=4, logging_steps=1, save_steps=3, min_samples_per_full_checkpoint=8)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4

    def test_an_allowed_learning_rate_is_the_new_one(self, tmp_path: Path) -> None:
        regression(tmp_path, max_steps=8, lr_scheduler_type="constant").train()
        options = {"learning_rate": 0.5, "allow_change": ["learning_rate", "max_steps"], "max_steps": 10}
        trainer = regression(tmp_path, lr_scheduler_type="constant", **options)
        trainer.train(resume_from_checkpoint=True)
        assert [line["learning_rate"] for line in read_metrics(tmp_path)] == [0.1] * 8 + [0.5] * 2

    def test_a_schedule_with_an_allowed_peak_goes_on_by_optimizer_steps(self, tmp_path: Path) -> None:
        options = {"max_steps": 8, "warmup_steps": 3, "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
        regression(tmp_path, **options).train()
        trainer = regression(tmp_path, learning_rate=0.2, allow_change=["learning_rate"], **options)
        trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, 4)))
        expected = [linear_schedule(step, 0.1 if step <= 4 else 0.2, 3, 8) for step in range(1, 9)]
        assert [line["learning_rate"] for line in read_metrics(tmp_path)] == pytest.approx(
            expected, rel=CLOSED_FORM_FLOAT64
        )

    @pytest.mark.parametrize(("first", "then", "sizes"), [(4, 8, [4] * 6 + [8] * 13), (8, 4, [8] * 6 + [4] * 20)])
    def test_an_allowed_batch_size_trains_each_sample_as_often(
        self, tmp_path: Path, first: int, then: int, sizes: list[int]
    ) -> None:
        options = {"num_train_epochs": 2, "save_steps": 6}
        regression(tmp_path, per_device_train_batch_size=first, **options).train()
        change = {"allow_change": ["per_device_train_batch_size"]}
        trainer = regression(tmp_path, per_device_train_batch_size=then, **options, **change)
        trainer.train(resume_from_checkpoint=str(checkpoint(tmp_path, 6)))
        assert [line["num_samples"] for line in read_metrics(tmp_path)] == sizes
        assert trainer.state.epoch == 2

    def test_what_cannot_be_allowed_is_named(self) -> None:
        with pytest.raises(UsageError, match="allow_change names moon: give names of options, or data"):
            regression(Path("x"), allow_change=["moon"])


class Numbers(IterableDataset):
    """A stream of 64 samples; with `knows`, it keeps its own position."""

    def __init__(self) -> None:
        self.samples, self.position, self.num_read = RegressionDataset(length=64), 0, 0

    def __iter__(self):
        while self.position < 64:
            self.position += 1
            self.num_read += 1
            yield self.samples[self.position - 1]
        self.position = 0


class Positioned(Numbers):
    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class TestStreams:
    @pytest.mark.parametrize(("kind", "num_read"), [(Numbers, 64 + 32), (Positioned, 64)])
    def test_a_stream_goes_on(self, tmp_path: Path, kind: type[Numbers], num_read: int) -> None:
        options = {"max_steps": 24, "save_steps": 8}
        straight = regression(tmp_path, train_dataset=kind(), **options)
        straight.train()
        stream = kind()
        resumed = regression(tmp_path, train_dataset=stream, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path, 8)))
        assert_same_weights(resumed, straight)
        assert stream.num_read == num_read

    def test_a_map_style_data_set_reads_what_it_trains(self, tmp_path: Path) -> None:
        class Counting(RegressionDataset):
            num_read = 0

            def __getitem__(self, i: int) -> Any:
                self.num_read += 1
                return super().__getitem__(i)

        regression(tmp_path, max_steps=16).train()
        dataset = Counting(length=64)
        options = {"train_dataset": dataset, "max_steps": 16, "allow_change": ["data"]}
        regression(tmp_path, **options).train(resume_from_checkpoint=str(checkpoint(tmp_path, 12)))
        assert dataset.num_read == 4 * 4
