"""What tests of the Trainer share, under the names that the testing guide gives; builders live in tests/fixtures."""

from __future__ import annotations

from typing import Any

import torch

from tests.fixtures.datasets import (
    DynamicShapesDataset,
    RegressionDataset,
    RepeatDataset,
    SampleIterableDataset,
    labelled_rows,
)
from tests.fixtures.regression import (
    BasicTextGenerationModel,
    RegressionModel,
    RegressionModelConfig,
    RegressionPreTrainedModel,
)
from trainer.config.arguments import TrainingArguments
from trainer.data.order import epoch_order
from trainer.hf.trainer import Trainer

__all__ = [
    "PLAIN",
    "BasicTextGenerationModel",
    "DynamicShapesDataset",
    "RegressionDataset",
    "RegressionModel",
    "RegressionModelConfig",
    "RegressionPreTrainedModel",
    "RepeatDataset",
    "SampleIterableDataset",
    "get_regression_trainer",
    "labelled_rows",
    "line_by_hand",
    "line_of",
    "logged",
    "points_of_steps",
]

_SGD = (torch.optim.SGD, {"lr": 0.1})
PLAIN = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optimizer_cls_and_kwargs": _SGD}

GIVEN_TO_TRAINER = (
    "callbacks",
    "compute_loss_func",
    "compute_metrics",
    "data_collator",
    "model_init",
    "optimizer_cls_and_kwargs",
    "optimizers",
    "preprocess_logits_for_metrics",
    "processing_class",
)


def get_regression_trainer(
    a: float = 0,
    b: float = 0,
    double_output: bool = False,
    train_len: int = 64,
    eval_len: int = 64,
    pretrained: bool = True,
    **options: Any,
) -> Trainer:
    """A trainer of y = a * x + b; `options` are those of TrainingArguments and Trainer, and include `output_dir`."""
    given = {name: options.pop(name) for name in GIVEN_TO_TRAINER if name in options}
    data = {"train_dataset": train_len, "eval_dataset": eval_len}
    names = options.get("label_names")
    for name, length in data.items():
        given[name] = options.pop(name, None) or RegressionDataset(length=length, label_names=names)
    if "model_init" not in given and (model := options.pop("model", None)) is None:
        config = RegressionModelConfig(a=a, b=b, double_output=double_output)
        model = RegressionPreTrainedModel(config) if pretrained else RegressionModel(a, b, double_output)
    kind = options.pop("trainer_class", Trainer)
    output_dir = str(options.pop("output_dir"))
    args = TrainingArguments(
        output_dir, **{"export_final": False, "save_strategy": "no", "disable_tqdm": True, **options}
    )
    return kind(None if "model_init" in given else model, args, **given)


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
