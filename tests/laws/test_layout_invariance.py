"""L2: loss and gradient of a global batch do not depend on how it is laid out over micro-batches and ranks.

`RUN_SLOW=1 pytest -s -k shows_in_numbers tests/laws/test_layout_invariance.py` prints the differences.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import Sample, gradients, linear_schedule, mean_loss, relative_difference
from tests.fixtures.runs import build_trainer, gradients_of, random_token_samples, step_lines, weights_of
from tests.fixtures.tolerances import LAYOUT_FLOAT64, LAYOUT_FP32, LAYOUT_TRAJECTORY_FLOAT64
from trainer.data.order import epoch_order
from trainer.training.step import accumulate_gradients

LENGTHS = (9, 3, 17, 5, 30, 2, 11, 7, 24, 4, 13, 6)
BUDGETS = (30, 48, sum(LENGTHS))  # hardly more than one long sample at a time ... everything at once
TOLERANCES = {torch.float64: LAYOUT_FLOAT64, torch.float32: LAYOUT_FP32}


def first_batch(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and number of micro-batches of one global batch of all samples."""
    trainer = build_trainer(
        folder, random_token_samples(LENGTHS), tiny_llama().to(dtype), batch_size=len(LENGTHS), **options
    )
    batch = next(iter(trainer.get_train_dataloader()))
    engine = trainer._build_run().engine
    loss = accumulate_gradients(engine, batch).reduce(trainer.group)["loss"]
    return loss, gradients_of(trainer.model), len(batch)


@functools.cache
def one_after_another(smoothing: float = 0.0) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of all samples in float64."""
    reference, samples = tiny_llama().double(), random_token_samples(LENGTHS)
    return mean_loss(reference, samples, smoothing).item(), gradients(reference, samples, smoothing)


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.backend("gloo", "nccl")
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gradient_is_that_of_one_sample_after_another(ranks, tmp_path: Path, dtype: torch.dtype, budget: int) -> None:
    loss, found, _ = first_batch(tmp_path, dtype, max_tokens_per_rank=budget)
    expected_loss, expected = ranks.once(one_after_another)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCES[dtype])
    assert relative_difference({name: g.double().cpu() for name, g in found.items()}, expected) < TOLERANCES[dtype]


@pytest.mark.world_size(1, 2, 3)
def test_label_smoothing_is_laid_out_alike(ranks, tmp_path: Path) -> None:
    _, found, _ = first_batch(tmp_path, torch.float64, max_tokens_per_rank=48, label_smoothing_factor=0.1)
    assert relative_difference(found, ranks.once(lambda: one_after_another(0.1))[1]) < LAYOUT_FLOAT64


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_run_is_the_run_by_hand(ranks, tmp_path: Path, tied: bool) -> None:
    samples = random_token_samples(LENGTHS)
    losses, weights = ranks.once(lambda: by_hand(tiny_llama(tie_word_embeddings=tied).double(), samples))
    model = tiny_llama(tie_word_embeddings=tied).double()
    trainer = build_trainer(tmp_path, samples, model, num_train_epochs=2, weight_decay=0.1)
    trainer.train()
    if ranks.is_main:
        assert [line["loss"] for line in step_lines(tmp_path)] == pytest.approx(losses, rel=LAYOUT_TRAJECTORY_FLOAT64)
    assert relative_difference(weights_of(trainer.model), weights) < LAYOUT_TRAJECTORY_FLOAT64


@pytest.mark.world_size(2, 4)
@pytest.mark.backend("gloo", "nccl")
def test_replicas_of_shards_train_what_one_process_trains(ranks, tmp_path: Path) -> None:
    samples = random_token_samples(LENGTHS)
    losses, weights = ranks.once(lambda: by_hand(tiny_llama().double(), samples))
    trainer = build_trainer(tmp_path, samples, tiny_llama().double(), num_train_epochs=2, weight_decay=0.1, replicate=2)
    trainer.train()
    assert dict(zip(trainer.group.mesh.mesh_dim_names, trainer.group.mesh.shape, strict=True)) == {
        "replicate": 2,
        "shard": ranks.world_size // 2,
    }
    matrix = trainer.model.model.layers[0].mlp.down_proj.weight
    assert matrix.to_local().numel() == matrix.numel() // (ranks.world_size // 2)
    if ranks.is_main:
        assert [line["loss"] for line in step_lines(tmp_path)] == pytest.approx(losses, rel=LAYOUT_TRAJECTORY_FLOAT64)
    assert relative_difference(weights_of(trainer.model), weights) < LAYOUT_TRAJECTORY_FLOAT64


def by_hand(model: torch.nn.Module, samples: list[Sample]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The run in plain torch: one sample after another, AdamW, linear decay, clipping at 1."""
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    losses = []
    batches = [
        order[start : start + 4]
        for order in (epoch_order(len(samples), 42, epoch) for epoch in range(2))
        for start in range(0, len(samples), 4)
    ]
    for step, indices in enumerate(batches, start=1):
        loss = mean_loss(model, [samples[i] for i in indices])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = linear_schedule(step, 1e-2, 0, len(batches))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def rows_of_differences(folder: Path, world_size: int) -> list[str]:
    """What every dtype and token budget makes of the gradient, as rows of a table."""
    _, expected = one_after_another()
    rows = []
    for dtype in TOLERANCES:
        for budget in BUDGETS:
            _, found, num = first_batch(folder, dtype, max_tokens_per_rank=budget)
            difference = relative_difference({name: g.double() for name, g in found.items()}, expected)
            assert difference < TOLERANCES[dtype]
            rows.append(f"{world_size:>5} {budget:>7} {num:>13} {str(dtype):>14} {difference:>11.1e}")
    return rows


@pytest.mark.slow
def test_layout_invariance_shows_in_numbers(launch, tmp_path: Path) -> None:
    print(f"\n{'ranks':>5} {'budget':>7} {'micro-batches':>13} {'dtype':>14} {'difference':>11}")
    for world_size in (1, 2, 3):
        rows = launch(world_size, rows_of_differences, tmp_path, world_size).values[0]
        assert len(rows) == len(TOLERANCES) * len(BUDGETS)
        print(*rows, sep="\n")
