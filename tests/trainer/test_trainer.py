"""The Trainer on ordinary data and models: what it computes, against arithmetic by hand in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fixtures.runs import step_lines
from tests.fixtures.tolerances import REGRESSION_FP32
from tests.trainer.trainer_test_utils import RegressionDataset, get_regression_trainer
from trainer.data.sampler import epoch_order

SGD = (torch.optim.SGD, {"lr": 0.1})


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


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize(("num_samples", "per_device", "accumulation"), [(64, 8, 1), (21, 2, 2), (5, 4, 3), (1, 4, 1)])
def test_a_run_is_the_run_by_hand(ranks, num_samples: int, per_device: int, accumulation: int) -> None:
    trainer = get_regression_trainer(
        output_dir=ranks.tmp_path / "run",
        train_len=num_samples,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optimizer_cls_and_kwargs=SGD,
        pretrained=False,
    )
    trainer.train()
    steps = points_of_steps(num_samples, per_device * accumulation * ranks.world_size, epochs=2)
    losses, line = line_by_hand(steps, learning_rate=0.1)
    assert trainer.state.global_step == len(steps)
    assert (trainer.model.a.item(), trainer.model.b.item()) == pytest.approx(line, rel=REGRESSION_FP32)
    if ranks.is_lead:
        assert [report["loss"] for report in step_lines(ranks.tmp_path / "run")] == pytest.approx(
            losses, rel=REGRESSION_FP32
        )
