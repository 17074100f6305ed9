"""L7: what is logged is what a recomputation by hand gives; what the plan predicts is what the run does."""

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import count_loss_tokens, global_norm, gradients, linear_schedule, mean_loss
from tests.fixtures.ranks.context import Ranks
from tests.fixtures.runs import build_store, build_trainer, random_token_samples, read_metrics, step_lines
from tests.fixtures.tolerances import CLOSED_FORM_FLOAT64, LAYOUT_FLOAT64
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
