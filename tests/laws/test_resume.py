"""L4: a run stopped anywhere and resumed is the run that was never stopped: bit for bit on as many ranks as before, and
up to the order of sums on others."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from tests.fixtures.corpora import write_jsonl
from tests.fixtures.models import tiny_llama
from tests.fixtures.runs import build_trainer, chat_job, random_token_samples, read_metrics, weights_of
from tests.fixtures.tolerances import LAYOUT_TRAJECTORY_FLOAT64
from trainer.checkpoint import manifest
from trainer.config.arguments import TrainingArguments
from trainer.hf.trainer import Trainer
from trainer.optim.registry import OPTIMIZERS, is_installed

SAMPLES = random_token_samples([4 + i * 5 % 11 for i in range(16)])
EPOCH = 8  # steps of 2 samples
NUM_STEPS = 20
CLOCK = ("runtime", "_per_second")
LOOK_AHEAD = 1  # steps after a resume that are compared; what they leave is where the next resume starts


class StopAfter(TrainerCallback):
    """A scheduler that takes the machine away during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def build(folder: Path, stop_after: int | None = None, **options: Any) -> Trainer:
    """A run with dropout, evaluated after each epoch, that saves after every step."""
    model = options.pop("model", None) or tiny_llama(num_hidden_layers=1, attention_dropout=0.1)
    defaults = {
        "batch_size": 2,
        "num_train_epochs": NUM_STEPS / EPOCH,
        "save_strategy": "steps",
        "save_steps": 1,
        "async_save": False,
        "logging_steps": 4,
        "eval_strategy": "epoch",
        "warmup_steps": 3,
    }
    callbacks = [StopAfter(stop_after)] if stop_after is not None else []
    return build_trainer(folder, SAMPLES, model, SAMPLES[:3], callbacks=callbacks, **{**defaults, **options})


def copy_run(source: Path, target: Path, step: int) -> None:
    """What a run that was killed some steps later has left."""
    shutil.copytree(
        manifest.folder_of(source / manifest.FOLDER, step), manifest.folder_of(target / manifest.FOLDER, step)
    )
    shutil.copy(source / "metrics.jsonl", target)


def record(checkpoint: Path) -> Any:
    """The state of a checkpoint, without what the clock put there."""
    state = json.loads((checkpoint / "state.json").read_bytes())
    for line in state["state"].pop("log_history"):
        state.setdefault("history", []).append({name: line[name] for name in line if not name.endswith(CLOCK)})
    for changing in ("metrics_bytes", "metrics_sha256", "should_stop"):
        state.pop(changing)
    state["state"].pop("best_model_checkpoint")
    return state


def hashes(checkpoint: Path) -> dict[str, str]:
    """Of weights, optimizer state and random generators."""
    files = manifest.read_manifest(checkpoint).files
    return {name: fact.sha256 for name, fact in files.items() if name.startswith(("model_", "optimizer", "rank_"))}


def at(folder: Path, step: int) -> Path:
    return manifest.folder_of(folder / manifest.FOLDER, step)


@pytest.mark.world_size(1, 2)
@pytest.mark.rank_timeout(300)
def test_stopped_at_any_step_it_goes_on_bit_for_bit(ranks) -> None:
    straight = ranks.tmp_path / "straight"
    build(straight).train()
    ranks.barrier()
    lines = read_metrics(straight)
    for step in range(1, NUM_STEPS + 1):
        folder = ranks.tmp_path / str(step)
        if ranks.is_main:
            folder.mkdir()
            copy_run(straight, folder, step)
        ranks.barrier()
        last = min(step + LOOK_AHEAD, NUM_STEPS)
        trainer = build(folder, stop_after=last)
        trainer.train(resume_from_checkpoint=True)
        ranks.barrier()
        assert trainer.state.global_step == last
        for later in range(step + 1, last + 1):
            assert hashes(at(folder, later)) == hashes(at(straight, later)), later
            assert record(at(folder, later)) == record(at(straight, later)), later
        assert [line for line in read_metrics(folder) if line["step"] < last] == [
            line for line in lines if line["step"] < last
        ]


def test_the_end_is_the_same_from_everywhere(tmp_path: Path) -> None:
    straight = build(tmp_path / "straight")
    straight.train()
    for step in (3, EPOCH, 2 * EPOCH, NUM_STEPS - 1, NUM_STEPS):  # in epoch 0, at the edges, before and at the end
        folder = tmp_path / str(step)
        folder.mkdir()
        copy_run(tmp_path / "straight", folder, step)
        trainer = build(folder)
        trainer.train(resume_from_checkpoint="auto")
        weights, expected = weights_of(trainer.model), weights_of(straight.model)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert read_metrics(folder) == read_metrics(tmp_path / "straight")
        assert trainer.state.best_metric == straight.state.best_metric


def is_tiny(name: str) -> bool:
    """Not what needs a GPU, matrices chosen for it, or seconds to compile."""
    spec = OPTIMIZERS[name]
    return is_installed(spec) and not (spec.target_options or spec.not_on_cpu or spec.package == "torchao")


def check_going_on(folder: Path, optim: str, barrier: Callable[[], None] = lambda: None, **more: Any) -> None:
    """Two steps and two more, by one process or by two after each other: weights and state are the same."""
    spec = OPTIMIZERS[optim]
    options: dict[str, Any] = {"optim": optim, "max_steps": 4, "num_train_epochs": 3, "save_steps": 2} | more
    options |= {"eval_strategy": "no", "max_grad_norm": 0 if spec.steps_in_backward else 1}
    if spec.averages_weights:
        options |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    build(folder / "straight", **options).train()
    barrier()
    resumed = build(folder / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(at(folder / "straight", 2)))
    barrier()
    assert resumed.state.resumed_step == 2
    assert hashes(at(folder / "resumed", 4)) == hashes(at(folder / "straight", 4))


@pytest.mark.parametrize("optim", [*filter(is_tiny, OPTIMIZERS)])
def test_every_optimizer_goes_on_bit_for_bit(tmp_path: Path, optim: str) -> None:
    check_going_on(tmp_path, optim)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_an_optimizer_of_shards_goes_on_bit_for_bit(ranks, optim: str) -> None:
    check_going_on(ranks.tmp_path, optim, ranks.barrier)


def test_pretraining_blocks_go_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"line {i} " * (i % 5 + 1)} for i in range(30)])
    saves = {"save_strategy": "steps", "save_steps": 1, "export_final": False, "num_train_epochs": 2}
    job = chat_job(tmp_path) | saves | {"data_path": str(text), "block_size": 16}
    straight, resumed = (
        Trainer(args=TrainingArguments(str(tmp_path / name), **job)) for name in ("straight", "resumed")
    )
    straight.train()
    middle = straight.state.global_step // 4  # of the first epoch
    resumed.train(resume_from_checkpoint=str(at(tmp_path / "straight", middle)))
    weights, expected = weights_of(resumed.model), weights_of(straight.model)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    lines = [line for line in read_metrics(tmp_path / "straight") if line["step"] > middle]
    assert lines
    assert read_metrics(tmp_path / "resumed")[-len(lines) :] == lines


def test_saving_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for name, options in {"never": {"save_strategy": "no", "save_steps": 500}, "beside": {"async_save": True}}.items():
        trainer = build(tmp_path / name, **options)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_metrics(tmp_path / "never") == read_metrics(tmp_path / "beside")


def train_on(folder: Path, stop_after: int | None, replicate: int = 1) -> dict[str, torch.Tensor]:
    """Go on from the newest checkpoint, in float64 without dropout."""
    model = tiny_llama(dtype=torch.float64, num_hidden_layers=1)
    trainer = build(folder, stop_after, model=model, use_cpu=True, replicate=replicate)
    trainer.train(resume_from_checkpoint="auto")
    weights = weights_of(trainer.model)
    trainer.group.close()
    return weights


def test_other_numbers_of_ranks_take_over(launch, tmp_path: Path) -> None:
    (alone,) = launch(1, train_on, tmp_path / "alone", 16).values
    folder = tmp_path / "handed_on"
    layouts = ((1, 1), (2, 1), (3, 1), (4, 2), (3, 1), (2, 2), (4, 1), (1, 1))  # ranks, and replicas among them
    for number, (world_size, replicate) in enumerate(layouts, 1):
        weights, *_ = launch(world_size, train_on, folder, 2 * number, replicate).values
    for name, expected in alone.items():
        assert torch.allclose(
            weights[name], expected, rtol=LAYOUT_TRAJECTORY_FLOAT64, atol=LAYOUT_TRAJECTORY_FLOAT64
        ), name
    keys = ("step", "num_samples", "num_tokens", "learning_rate", "epoch")
    seen = [[line.get(key) for key in keys] for line in read_metrics(folder)]
    assert seen == [[line.get(key) for key in keys] for line in read_metrics(tmp_path / "alone")]
