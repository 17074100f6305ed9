"""What tests of the Trainer share, under the names that the testing guide gives; builders live in tests/fixtures."""

from __future__ import annotations

from typing import Any

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
from trainer.arguments.training import TrainingArguments
from trainer.training.trainer import Trainer

__all__ = [
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
]

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
