"""Every optimizer of the registry does what the registry says; docs/optimizers.md is made of this module's results.

What is not installed is skipped, with the `pip install`; what a package cannot do is in the registry, and is tested to
be refused.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from tests.fixtures.models import tiny_llama
from tests.fixtures.optimizer_bytes import state_bytes
from tests.fixtures.optimizers import (
    BY_HAND,
    RANK,
    Regression,
    build_for,
    copy_of,
    options_for,
    regression_batch,
    state_tensors,
    take_steps,
    through_plain_values,
)
from tests.fixtures.oracles import mean_loss
from tests.fixtures.runs import build_trainer, random_token_samples, step_lines, weights_of
from tests.fixtures.tolerances import BY_HAND_FP32, LOSS_FP32, NORM_FP32, REGROUPED_FP32, REGROUPED_MUON
from tests.shape.source import ROOT
from trainer.atomic import read_json
from trainer.checkpoint.optimizer_state import pack_optimizer, restore_optimizer
from trainer.checkpoint.tensors import StoredTensors, model_tensors, restore_model
from trainer.checkpoint.writer import CheckpointWriter, Contents
from trainer.cli.main import main
from trainer.config.arguments import TrainingArguments
from trainer.config.groups import ScheduleArguments
from trainer.distributed.group import Group
from trainer.errors import CheckpointError, NonFiniteError, UsageError
from trainer.optim.gradients import last_backward
from trainer.optim.registry import GONE, OPTIMIZERS, is_installed
from trainer.optim.schedules import build_schedule

SAMPLES = random_token_samples([9, 14, 5, 20, 11, 7, 16, 8])
ALIASES = ("adamw_8bit", "rmsprop_bnb_32bit")  # the very specifications of adamw_bnb_8bit and rmsprop_bnb


def is_slow(name: str) -> bool:
    """Whether it compiles, or is the same code as another on a CPU."""
    return OPTIMIZERS[name].package == "torchao" or name.startswith("paged") or name in ALIASES


def cases(names: Any = OPTIMIZERS) -> list[Any]:
    """The optimizers as parameters: those that can run on this machine, the others skipped with the reason."""
    params = []
    for name in names:
        spec, marks = OPTIMIZERS[name], []
        if is_slow(name):
            marks.append(pytest.mark.slow)
        if not is_installed(spec):
            marks.append(pytest.mark.skip(reason=f"{spec.package} is not there: pip install {spec.package}"))
        elif spec.not_on_cpu:
            marks.append(pytest.mark.skip(reason=spec.not_on_cpu))
        params.append(pytest.param(name, id=name, marks=marks))
    return params


def tolerance_for(name: str) -> float:
    return REGROUPED_MUON if name == "muon" else REGROUPED_FP32


every = pytest.mark.parametrize("name", cases())


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    form, tensors = pack_optimizer(optimizer, model)
    writer = CheckpointWriter(folder, group, is_async=False, limit=None)
    writer.save(Contents(1, {"model": model_tensors(model), "optimizer": tensors}, {"optimizer.json": form}))


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    group.barrier()
    stored = StoredTensors(folder / "step_1", group.rank, group.world_size)
    restore_model(model, stored)
    restore_optimizer(optimizer, model, read_json(stored.folder / "optimizer.json"), stored, frozenset())


def save_on_one_process(folder: Path, name: str) -> list[float]:
    """Take two steps, save, and take two more; gives the losses of these."""
    model = Regression()
    optimizer = build_for(model, name)
    batches = [regression_batch(8, seed=step) for step in range(4)]
    take_steps(model, optimizer, batches[:2])
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        save(folder, model, optimizer, group)
    return take_steps(model, optimizer, batches[2:])


class TestConformance:
    @every
    def test_every_trainable_parameter_moves(self, name: str) -> None:
        """Every trainable parameter of a tiny Llama moves, no frozen one."""
        model = tiny_llama()
        model.model.embed_tokens.weight.requires_grad_(False)
        before, optimizer = weights_of(model), build_for(model, name)
        ids = torch.arange(24).reshape(2, 12)
        for _ in range(6 if name == "schedule_free_radam" else 2):
            with last_backward(optimizer):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        still = [n for n, value in weights_of(model).items() if torch.equal(value, before[n])]
        assert still == ["model.embed_tokens.weight"]

    @pytest.mark.learns
    @every
    def test_an_optimizer_converges(self, name: str) -> None:
        model = Regression()
        losses = take_steps(model, build_for(model, name), [regression_batch()] * 40)
        assert losses[-1] < 0.3 * losses[0]

    @every
    def test_accumulated_micro_batches_are_one_batch(self, name: str) -> None:
        """One micro-batch of 8 is two of 4."""
        batches = [regression_batch(8, seed=step) for step in range(4)]
        trajectories = []
        for num_micro_batches in (1, 2):
            model = Regression()
            trajectories.append(take_steps(model, build_for(model, name), batches, num_micro_batches))
        assert trajectories[0] == pytest.approx(trajectories[1], rel=tolerance_for(name))

    @every
    @pytest.mark.world_size(2)
    @pytest.mark.rank_timeout(300)  # some compile
    def test_a_sharded_step_is_the_whole_one(self, name: str, ranks: Any) -> None:
        """Sharded over ranks it takes the steps of one process, or is refused with the reason."""
        alone, model = Regression(), Regression()
        fully_shard(model, mesh=ranks.mesh())
        if OPTIMIZERS[name].not_sharded:
            with pytest.raises(UsageError, match="cannot train sharded parameters"):
                build_for(model, name)
            return
        batches = [regression_batch(8, seed=step) for step in range(3)]
        losses = take_steps(model, build_for(model, name), batches)
        expected = take_steps(alone, build_for(alone, name), batches)
        assert losses == pytest.approx(expected, rel=tolerance_for(name))

    @every
    def test_a_resumed_optimizer_goes_on_bit_equal(self, name: str) -> None:
        """State saved without pickle, loaded and continued, gives the same bits."""
        batches = [regression_batch(8, seed=step) for step in range(6)]
        model = Regression()
        optimizer = build_for(model, name)
        take_steps(model, optimizer, batches[:3])
        resumed = copy_of(model)
        state = through_plain_values(optimizer.state_dict())
        again = build_for(resumed, name)
        again.load_state_dict(state)
        assert take_steps(model, optimizer, batches[3:]) == take_steps(resumed, again, batches[3:])
        assert all(torch.equal(value, weights_of(model)[n]) for n, value in weights_of(resumed).items())

    @every
    @pytest.mark.world_size(2)
    @pytest.mark.rank_timeout(300)  # some compile
    def test_a_sharded_optimizer_resumes(self, name: str, ranks: Any) -> None:
        """The same on every rank's shard, through a checkpoint on disk."""
        if OPTIMIZERS[name].not_sharded:
            pytest.skip(OPTIMIZERS[name].not_sharded)
        batches = [regression_batch(8, seed=step) for step in range(4)]
        models = [Regression() for _ in range(2)]
        for model in models:
            fully_shard(model, mesh=ranks.mesh())
        optimizer, again = (build_for(model, name) for model in models)
        take_steps(models[0], optimizer, batches[:2])
        with torch.no_grad():
            for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
                ours.copy_(theirs)
        with Group.join(TrainingArguments(use_cpu=True)) as group:
            save(ranks.tmp_path, models[0], optimizer, group)
            load(ranks.tmp_path, models[1], again, group)
        assert take_steps(models[0], optimizer, batches[2:]) == take_steps(models[1], again, batches[2:])

    @every
    def test_a_parameter_without_gradient_is_tolerated(self, name: str) -> None:
        """A parameter without a gradient stays as it is, decay and all."""
        model = Regression()
        before = model.unused.weight.detach().clone()
        take_steps(model, build_for(model, name, weight_decay=0.1), [regression_batch(8)] * 2)
        assert torch.equal(model.unused.weight, before)

    @every
    def test_the_learning_rate_is_used(self, name: str) -> None:
        """The learning rate that the schedule shows is the one used: at 0 nothing moves."""
        model = Regression()
        before, optimizer = weights_of(model), build_for(model, name, weight_decay=0.1)
        args = ScheduleArguments(lr_scheduler_type="constant_with_warmup", warmup_steps=4)
        schedule = build_schedule(optimizer, args, None)
        shown = []
        for step in range(6):
            shown.append(float(schedule.get_last_lr()[0]))
            take_steps(model, optimizer, [regression_batch(8)])
            if step == 0:
                assert all(torch.equal(value, before[n]) for n, value in weights_of(model).items())
            schedule.step()
        rate = options_for(name).learning_rate
        assert shown == [0.0, rate / 4, rate / 2, rate * 3 / 4, rate, rate]

    @every
    def test_the_bytes_of_the_state_are_as_told(self, name: str) -> None:
        """State takes the stated bytes."""
        model = Regression()
        optimizer = build_for(model, name)
        take_steps(model, optimizer, [regression_batch(8)] * 2)
        state = optimizer.state_dict()["state"]
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            held = {tensor.data_ptr(): tensor.nbytes for tensor in state_tensors(state.get(index, {}))}
            if held:
                is_hidden = model.linear.weight is parameter
                stated = state_bytes(name, tuple(parameter.shape), RANK if is_hidden else None)
                assert sum(held.values()) == stated


@pytest.mark.parametrize("name", cases(BY_HAND))
def test_decays_as_by_hand(name: str) -> None:
    """Matrices decay, norms and biases do not; the step is that of the formula."""
    model = Regression()
    inputs, targets = regression_batch(8)
    torch.nn.functional.mse_loss(model(inputs), targets).backward()
    rate, decay = 0.01, 0.5
    expected = {
        n: BY_HAND[name](p.detach().double(), p.grad.double(), rate, decay if p.ndim >= 2 else 0.0)
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    model.zero_grad()
    optimizer = build_for(model, name, learning_rate=rate, weight_decay=decay)
    take_steps(model, optimizer, [regression_batch(8)])
    for n, value in expected.items():
        torch.testing.assert_close(weights_of(model)[n].double(), value, rtol=0, atol=BY_HAND_FP32)


@pytest.mark.parametrize("name", cases(["adamw_torch", "muon", "ademamix", "lion_32bit", "stable_adamw"]))
def test_optimizer_state_of_one_rank_resumes_on_more(name: str, launch: Any, tmp_path: Path) -> None:
    expected = launch(1, save_on_one_process, tmp_path, name).values[0]
    assert launch(2, go_on_sharded, tmp_path, name).values[0] == pytest.approx(expected, rel=tolerance_for(name))


@pytest.mark.parametrize("name", cases(["adamw_bnb_8bit", "adamw_torch_8bit"]))
def test_blocks_belong_to_their_world_size(name: str, launch: Any, tmp_path: Path) -> None:
    assert launch(1, save_on_one_process, tmp_path, name).values
    for outcome in launch(2, go_on_sharded, tmp_path, name):
        assert isinstance(outcome.error, CheckpointError)
        assert "resume at the world size that saved it" in str(outcome.error)


def go_on_sharded(folder: Path, name: str) -> list[float]:
    model = Regression(seed=2)
    with Group.join(TrainingArguments(use_cpu=True)) as group:
        fully_shard(model, mesh=group.mesh)
        optimizer = build_for(model, name)
        load(folder, model, optimizer, group)
        return take_steps(model, optimizer, [regression_batch(8, seed=step) for step in (2, 3)])


class TestRuns:
    """What a whole run does with the optimizers that change its order."""

    @pytest.mark.world_size(1, 2)
    @pytest.mark.parametrize("max_tokens_per_rank", [24, 128])
    def test_stepping_in_backward_is_the_ordinary_run(self, max_tokens_per_rank: int, ranks: Any) -> None:
        """Weights, losses and gradient norms, with one micro-batch and with several."""
        lines, weights = [], []
        for name in ("sgd", "lomo"):
            folder, options = ranks.tmp_path / name, {"max_grad_norm": 0.0, "weight_decay": 0.1, "learning_rate": 0.5}
            trainer = build_trainer(folder, SAMPLES, optim=name, max_tokens_per_rank=max_tokens_per_rank, **options)
            trainer.train()
            ranks.barrier()
            lines.append(step_lines(folder))
            weights.append(weights_of(trainer.model))
        assert len(lines[0]) == 2
        for ours, theirs in zip(*lines, strict=True):
            assert ours == pytest.approx(theirs, rel=NORM_FP32)
        assert all(torch.equal(value, weights[1][n]) for n, value in weights[0].items())

    def test_a_non_finite_gradient_is_an_error_with_steps_in_backward(self, tmp_path: Path) -> None:
        trainer = build_trainer(tmp_path / "run", SAMPLES, optim="lomo", max_grad_norm=0.0)
        trainer.model.lm_head.weight.data[5, 5] = math.nan
        with pytest.raises(NonFiniteError, match="the weights are damaged; go back to a checkpoint"):
            trainer.train()

    @pytest.mark.skipif(not is_installed(OPTIMIZERS["schedule_free_adamw"]), reason="pip install schedulefree")
    def test_averaged_weights_are_evaluated_and_exported(self, tmp_path: Path) -> None:
        options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
        trainer = build_trainer(tmp_path / "run", SAMPLES, eval_samples=SAMPLES, num_train_epochs=3, **options)
        trainer.train()
        trained = weights_of(trainer.model)
        measured = trainer.evaluate()["eval_loss"]
        exported = type(trainer.model).from_pretrained(trainer.save_model(tmp_path / "export"))
        assert all(torch.equal(value, trained[n]) for n, value in weights_of(trainer.model).items())
        assert not torch.equal(exported.lm_head.weight, trained["lm_head.weight"])
        assert mean_loss(exported, SAMPLES).item() == pytest.approx(measured, rel=LOSS_FP32)

    @pytest.mark.skipif(not is_installed(OPTIMIZERS["schedule_free_adamw"]), reason="pip install schedulefree")
    def test_the_best_averaged_weights_come_back_at_the_end(self, tmp_path: Path) -> None:
        options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "greater_is_better": True}
        options |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer = build_trainer(
            tmp_path / "run", SAMPLES, eval_samples=SAMPLES, load_best_model_at_end=True, num_train_epochs=3, **options
        )
        trainer.train()
        state = trainer.state
        assert state.best_global_step < state.global_step
        assert trainer.evaluate()["eval_loss"] == state.best_metric
        exported = type(trainer.model).from_pretrained(trainer.save_model(tmp_path / "export"))
        assert mean_loss(exported, SAMPLES).item() == pytest.approx(state.best_metric, rel=LOSS_FP32)
        assert main(["export", state.best_model_checkpoint, str(tmp_path / "best")]) == 0
        best = weights_of(type(trainer.model).from_pretrained(tmp_path / "best"))
        assert all(torch.equal(value, best[name]) for name, value in weights_of(exported).items())

    @pytest.mark.skipif(not is_installed(OPTIMIZERS["schedule_free_adamw"]), reason="pip install schedulefree")
    def test_averages_cannot_be_had_from_weights_alone(self, tmp_path: Path) -> None:
        options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "save_strategy": "epoch"}
        trainer = build_trainer(tmp_path, SAMPLES, save_only_model=True, **options)
        with pytest.raises(UsageError, match="save_only_model leaves out the state .* averaged weights"):
            trainer.train()

    def test_evaluating_changes_nothing(self, tmp_path: Path) -> None:
        """Also where evaluation swaps weights."""
        name = "schedule_free_adamw" if is_installed(OPTIMIZERS["schedule_free_adamw"]) else "adamw_torch"
        weights = []
        for strategy in ("no", "steps"):
            options = {"eval_strategy": strategy, "eval_steps": 1} if strategy == "steps" else {}
            folder = tmp_path / strategy
            trainer = build_trainer(
                folder, SAMPLES, eval_samples=SAMPLES[:2], optim=name, lr_scheduler_type="constant", **options
            )
            trainer.train()
            weights.append(weights_of(trainer.model))
        assert all(torch.equal(value, weights[1][n]) for n, value in weights[0].items())


def test_the_table_has_every_optimizer() -> None:
    """docs/optimizers.md is written by tests/optimizer_table.py."""
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    table, _, _ = text.partition("## Limits")
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == [*OPTIMIZERS]
    assert re.findall(r"^- `(\w+)`", text, flags=re.M) == [*GONE]
    for name, spec in OPTIMIZERS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {spec.package or 'torch'} |" in line.replace("transformers", "torch")
