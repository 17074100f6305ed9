"""Loss over held-out samples: sums over all of them, divided once, so that no batch or rank layout shows (law L8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from trainer.config.groups import EvaluationArguments
from trainer.data.loader import MicroBatch
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.fsdp import inference
from trainer.model.loss import token_loss_sum
from trainer.training.metrics import BatchMetrics
from trainer.training.step import to_device

MEASURED = ("loss", "num_loss_tokens", "num_samples", "runtime", "samples_per_second", "steps_per_second")


def evaluation_loss(model: nn.Module, loader: Iterable[list[MicroBatch]], group: Group) -> dict[str, float]:
    """Give `loss` (mean over all loss tokens), `num_loss_tokens` and `num_samples` of a data set, over all ranks."""
    metrics = BatchMetrics()
    num_loss_tokens = num_samples = 0
    with inference(model):
        for batch in loader:
            num_loss_tokens += batch[0]["batch_num_loss_counted_tokens"]
            num_samples += batch[0]["batch_num_samples"]
            for micro_batch in batch:
                metrics.accumulate(loss=token_loss_sum(model, to_device(micro_batch, group.device)))
    loss_sum = metrics.reduce(group)["loss"]
    return {"loss": loss_sum / num_loss_tokens, "num_loss_tokens": num_loss_tokens, "num_samples": num_samples}


def check_metric(args: EvaluationArguments) -> None:
    """Raise UsageError where no evaluation will measure `metric_for_best_model`."""
    measured = [*MEASURED, *(["exact_match"] if args.eval_exact_match else [])]
    if args.metric_for_best_model.removeprefix("eval_") not in measured:
        raise UsageError(f"metric_for_best_model = {args.metric_for_best_model!r}: measured are {', '.join(measured)}")


def best_metric(args: EvaluationArguments, metrics: Mapping[str, float]) -> float | None:
    """Give the value of `metric_for_best_model`, named with or without eval_; None if it was not measured."""
    return metrics.get("eval_" + args.metric_for_best_model.removeprefix("eval_"))


def more_is_better(args: EvaluationArguments) -> bool:
    """Whether more of `metric_for_best_model` is better; TrainingArguments says it where the user did not."""
    return bool(args.greater_is_better)


def improves(args: EvaluationArguments, value: float, best: float | None) -> bool:
    """Whether a value of the metric is better than the best so far, by more than the threshold."""
    gain = 0.0 if best is None else value - best if more_is_better(args) else best - value
    return best is None or gain > args.metric_improvement_threshold
