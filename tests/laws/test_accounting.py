"""L7: what is logged is what a recomputation by hand gives; what the plan predicts is what the run does."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import count_loss_tokens, global_norm, gradients, linear_schedule, mean_loss
from tests.fixtures.ranks.context import Ranks
from tests.fixtures.runs import (
    build_store,
    build_trainer,
    gradients_of,
    random_token_samples,
    read_metrics,
    step_lines,
    weights_of,
)
from tests.fixtures.tolerances import CLOSED_FORM_FLOAT64, LAYOUT_FLOAT64, RESIDENT_COUNTED, UPDATE_FP32
from trainer.data.length import Layout, forecast
from trainer.data.order import epoch_order
from trainer.data.packing import TOKENS

LENGTHS = (9, 3, 17, 5, 30, 2, 11, 7, 24, 4)
SAMPLES = random_token_samples(LENGTHS)
BATCH_SIZE, BUDGET, EPOCHS, SEED = 4, 40, 2, 42
PEAK, WARMUP, NUM_STEPS = 1e-2, 2, 6


def batches() -> list[list[int]]:
    orders = [epoch_order(len(SAMPLES), SEED, epoch).tolist() for epoch in range(EPOCHS)]
    return [order[start : start + BATCH_SIZE] for order in orders for start in range(0, len(order), BATCH_SIZE)]


@functools.cache
def lines_of_a_run(ranks: Ranks) -> list[dict[str, Any]]:
    """What all ranks together log of a run that packs by tokens alone."""
    folder = ranks.tmp_path / "run"
    build_trainer(folder, SAMPLES, num_train_epochs=EPOCHS, max_tokens_per_rank=BUDGET, packing_cost="tokens").train()
    ranks.barrier()  # the main rank has written its last line
    return step_lines(folder)


@pytest.mark.world_size(1, 2, 3)
def test_every_step_counts_what_it_trained(ranks: Ranks) -> None:
    lines = lines_of_a_run(ranks)
    seen = 0
    for number, (line, indices) in enumerate(zip(lines, batches(), strict=True), start=1):
        seen += len(indices)
        assert line["step"] == number
        assert line["epoch"] == seen / len(SAMPLES)
        assert line["num_samples"] == len(indices)
        assert line["num_tokens"] == sum(LENGTHS[i] for i in indices)
        assert line["num_loss_tokens"] == count_loss_tokens([SAMPLES[i] for i in indices])
        capacity = line["num_micro_batches"] * ranks.world_size * BUDGET
        assert line["packing_efficiency"] == line["num_tokens"] / capacity


@pytest.mark.world_size(1, 2, 3)
def test_the_run_does_what_the_plan_predicts(ranks: Ranks) -> None:
    lines, store = lines_of_a_run(ranks), build_store(SAMPLES)
    layout = Layout(BATCH_SIZE, BUDGET, ranks.world_size, TOKENS)
    told = forecast(store.lengths, store.num_loss_tokens, layout, SEED, EPOCHS)
    assert told.num_steps == len(lines)
    assert told.num_micro_batches == sum(line["num_micro_batches"] for line in lines)
    assert told.num_tokens == sum(line["num_tokens"] for line in lines)
    assert told.num_loss_tokens == sum(line["num_loss_tokens"] for line in lines)


@pytest.mark.world_size(1, 2)
def test_loss_and_gradient_norm_are_those_by_hand(ranks, tmp_path: Path) -> None:
    build_trainer(ranks.tmp_path / "run", SAMPLES, tiny_llama().double(), max_steps=1).train()
    ranks.barrier()
    line, model = step_lines(ranks.tmp_path / "run")[0], tiny_llama().double()
    trained = [SAMPLES[i] for i in batches()[0]]
    assert line["loss"] == pytest.approx(ranks.once(lambda: mean_loss(model, trained).item()), rel=LAYOUT_FLOAT64)
    expected = ranks.once(lambda: float(global_norm(list(gradients(model, trained).values()))))
    assert line["grad_norm"] == pytest.approx(expected, rel=LAYOUT_FLOAT64)


def test_the_learning_rate_is_the_closed_form(tmp_path: Path) -> None:
    build_trainer(tmp_path, SAMPLES, num_train_epochs=EPOCHS, learning_rate=PEAK, warmup_steps=WARMUP).train()
    rates = [line["learning_rate"] for line in step_lines(tmp_path)]
    expected = [linear_schedule(step, PEAK, WARMUP, NUM_STEPS) for step in range(1, NUM_STEPS + 1)]
    assert rates == pytest.approx(expected, rel=CLOSED_FORM_FLOAT64)


def test_the_mean_training_loss_is_over_loss_tokens(tmp_path: Path) -> None:
    output = build_trainer(tmp_path, SAMPLES, num_train_epochs=EPOCHS).train()
    lines = step_lines(tmp_path)
    total = sum(line["loss"] * line["num_loss_tokens"] for line in lines)
    expected = total / sum(line["num_loss_tokens"] for line in lines)
    assert output.training_loss == pytest.approx(expected, rel=LAYOUT_FLOAT64)


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7, "max_tokens_per_rank": 30}], ids=str)
def test_evaluation_counts_every_sample_once(ranks, tmp_path: Path, options: dict[str, int]) -> None:
    model, held_out = tiny_llama().double(), random_token_samples((8, 13, 5, 21, 3), seed=9)
    trainer = build_trainer(ranks.tmp_path / "run", SAMPLES, model, held_out, eval_at_end=True, max_steps=1, **options)
    trainer.train()
    expected = mean_loss(trainer.model, held_out).item() if ranks.world_size == 1 else None
    ranks.barrier()
    line = next(line for line in read_metrics(ranks.tmp_path / "run") if "eval_loss" in line)
    assert (line["eval_num_samples"], line["eval_num_loss_tokens"]) == (5, count_loss_tokens(held_out))
    if expected is not None:
        assert line["eval_loss"] == pytest.approx(expected, rel=LAYOUT_FLOAT64)


@pytest.mark.world_size(2, 3)
def test_evaluation_does_not_depend_on_the_number_of_ranks(ranks, tmp_path: Path) -> None:
    held_out = random_token_samples((8, 13, 5, 21, 3), seed=9)
    trainer = build_trainer(tmp_path, SAMPLES, tiny_llama().double(), held_out)
    expected = ranks.once(lambda: mean_loss(tiny_llama().double(), held_out).item())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=LAYOUT_FLOAT64)


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_updates_too_small_for_bf16_are_kept(ranks: Ranks, tmp_path: Path, stored: torch.dtype) -> None:
    """Weights are held and updated in float32 while the model computes in bf16, tensor by tensor, step by step."""

    class ByHand(TrainerCallback):
        """What SGD makes of each weight in float32."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            assert trainer.optimizer is not None
            rate = trainer.optimizer.param_groups[0]["lr"]
            held, grown = weights_of(model), gradients_of(model)
            self.expected = {name: weight - rate * grown[name] for name, weight in held.items()}
            self.moved = {name: rate * grown[name].abs().max() / weight.abs().max() for name, weight in held.items()}

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            for name, weight in weights_of(model).items():
                where = f"L7 accounting: step {state.global_step + 1}, {name}"
                assert 0 < self.moved[name] < torch.finfo(torch.bfloat16).eps / 2, f"{where}: the update is too large"
                assert weight.dtype == torch.float32, f"{where} is held in {weight.dtype}"
                error = ((weight - self.expected[name]).abs() / weight.abs()).nan_to_num().max()
                assert error < UPDATE_FP32, f"{where}: {error:.2g} from what SGD in float32 makes of it"

    options: dict[str, Any] = {"bf16": True, "optim": "sgd", "learning_rate": 1e-4, "max_grad_norm": 0.0}
    trainer = build_trainer(tmp_path, SAMPLES, tiny_llama(dtype=stored), **options, max_steps=2, callbacks=[ByHand()])
    trainer.train()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux says there how much a process holds")
def test_the_logged_peak_of_memory_counts_what_was_given_back(tmp_path: Path) -> None:
    class Holds(TrainerCallback):
        resident = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            block = torch.ones(2**24)  # 64 MiB, for a moment
            status = Path("/proc/self/status").read_text().split()
            self.resident = max(self.resident, 1024 * int(status[status.index("VmRSS:") + 1]), 4 * len(block))

    holds = Holds()
    build_trainer(tmp_path, SAMPLES, max_steps=2, callbacks=[holds]).train()
    all_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        peak = line.get("peak_memory_bytes", holds.resident)
        assert RESIDENT_COUNTED * holds.resident < peak <= all_memory, f"L7 accounting: step {line['step']}: {peak}"
