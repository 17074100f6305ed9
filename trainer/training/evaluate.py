"""Evaluation: sums over all held-out samples, divided once, so that no batch or rank layout shows (law L8).

`Collected` joins what the batches of an evaluation return (predictions, labels, inputs, losses) in the order of the
samples: anything nested (tuples, lists, mappings) whose leaves are tensors with a row for each sample. Rows of
different widths are padded at the end with -100, over batches and over ranks alike, so that neither shows.

N samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.trainer_pt_utils import nested_numpify

from trainer.config.arguments import TrainingArguments
from trainer.config.groups import EvaluationArguments
from trainer.data.loader import MicroBatch, to_device
from trainer.data.store import Sample, TokenStore
from trainer.distributed.group import Group
from trainer.errors import DataError, NonFiniteError, UsageError
from trainer.labels import IGNORE_INDEX
from trainer.model.fsdp import inference
from trainer.model.loss import token_loss_sum
from trainer.model.prepared import Prepared
from trainer.training.metrics import BatchMetrics

PADDING = IGNORE_INDEX  # of rows that are narrower than others
MEASURED = ("loss", "num_loss_tokens", "num_samples", "runtime", "samples_per_second", "steps_per_second")


def evaluation_loss(
    prepared: Prepared,
    loader: Iterable[list[MicroBatch]],
    group: Group,
    label_smoothing: float = 0.0,
    source_names: Sequence[str] = (),
) -> dict[str, float]:
    """Return `loss` (mean over all loss tokens), `num_loss_tokens` and `num_samples` of token data, over all ranks.

    The loss is the one that is trained, smoothed labels included, as transformers' Trainer evaluates it. Of data of
    several sources, whose names are given, `loss/NAME` is the mean over the loss tokens of each.
    """
    metrics = BatchMetrics()
    num_loss_tokens = num_samples = 0
    source_tokens = [0] * len(source_names)
    with prepared.in_use(), inference(prepared.model):
        for batch in loader:
            num_loss_tokens += batch[0]["batch_num_loss_counted_tokens"]
            num_samples += batch[0]["batch_num_samples"]
            if source_names:
                source_tokens = [
                    a + b for a, b in zip(source_tokens, batch[0]["batch_source_loss_tokens"], strict=True)
                ]
            for micro_batch in batch:
                micro_batch = to_device(micro_batch, group.device)
                sums = torch.zeros(len(source_names), dtype=torch.float64, device=group.device)
                loss = token_loss_sum(prepared, micro_batch, label_smoothing, sums if source_names else None)
                named = {f"loss/{name}": total for name, total in zip(source_names, sums, strict=True)}
                metrics.accumulate(loss=loss, **named)
    totals = metrics.reduce(group)
    means = {"loss": totals["loss"] / num_loss_tokens}
    for name, count in zip(source_names, source_tokens, strict=True):
        if count:
            means[f"loss/{name}"] = totals[f"loss/{name}"] / count
    return {**means, "num_loss_tokens": num_loss_tokens, "num_samples": num_samples}


def prefixed(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return metrics with the prefix of their evaluation before each name that does not have it already."""
    named = {}
    for name, value in metrics.items():
        named[name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"] = value
    return named


def split_by_role(whole: TokenStore, of_assistant: TokenStore) -> dict[str, TokenStore]:
    """Share out the loss tokens of chats over `assistant` and `others`, whose parts of the loss add up to the whole.

    Args:
        whole: chats prepared with train_on=all.
        of_assistant: the same chats, prepared with train_on=assistant.

    Raises:
        DataError: a chat has other tokens, or several samples, where only the assistant is trained.
    """
    places: dict[tuple[int, int], list[int]] = {}
    for i, place in enumerate(zip(of_assistant.sources.tolist(), of_assistant.documents.tolist(), strict=True)):
        places.setdefault(place, []).append(i)
    parts: dict[str, list[Sample]] = {"assistant": [], "others": []}
    for i, place in enumerate(zip(whole.sources.tolist(), whole.documents.tolist(), strict=True)):
        sample, found = whole.sample(i), [of_assistant.sample(j) for j in places.get(place, [])]
        length = len(found[0].input_ids) if len(found) == 1 else 0
        if found and (not length or not np.array_equal(found[0].input_ids, sample.input_ids[:length])):
            raise DataError(
                f"document {place[1]}: its template writes the chat otherwise where only the assistant is trained",
                "losses by role need one text for both: leave train_on=all out, and the assistant's loss is measured",
            )
        is_assistant = np.zeros(len(sample.labels), bool)
        is_assistant[:length] = found[0].labels != IGNORE_INDEX if found else False
        for name, chosen in (("assistant", is_assistant), ("others", ~is_assistant)):
            labels = np.where(chosen, sample.labels, IGNORE_INDEX)
            if (labels[1:] != IGNORE_INDEX).any():
                parts[name].append(Sample(sample.input_ids, labels))
    return {name: TokenStore.from_samples(samples) for name, samples in parts.items() if samples}


def check_metric(args: EvaluationArguments, scores: Sequence[str] | None) -> None:
    """Raise UsageError where no evaluation will measure `metric_for_best_model`.

    Args:
        args: the options.
        scores: what `score_answers` measures; None where only a user's function knows.
    """
    if scores is None:
        return  # the first evaluation shows the names
    measured = [*MEASURED, *scores]
    if args.eval_exact_match:
        measured.append("exact_match")
    if args.metric_for_best_model.removeprefix("eval_") not in measured:
        raise UsageError(f"metric_for_best_model = {args.metric_for_best_model!r}: measured are {', '.join(measured)}")


def depends_on_best(args: TrainingArguments) -> bool:
    """Return whether an option of the run needs to know which evaluation was the best."""
    return args.load_best_model_at_end or args.save_strategy == "best" or args.export_best


def check_best_of_several(args: TrainingArguments, eval_dataset: Any) -> None:
    """Raise UsageError where evaluation sets have names and `metric_for_best_model` names none of them."""
    if not isinstance(eval_dataset, Mapping) or not depends_on_best(args):
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    if not any(metric.startswith(f"{name}_") for name in eval_dataset):
        examples = ", ".join(f"eval_{name}_loss" for name in eval_dataset)
        raise UsageError(
            f"metric_for_best_model = {args.metric_for_best_model!r}: eval_dataset is a dict, so metrics are named "
            f"after its keys: {examples}; name one of them"
        )


def best_metric(args: TrainingArguments, metrics: Mapping[str, float]) -> float | None:
    """Return the value of `metric_for_best_model`, named with or without eval_; None if it was not measured.

    Raises:
        UsageError: it was asked for, and was not measured.
        NonFiniteError: it is NaN or infinite, and an option of the run depends on it.
    """
    value = metrics.get("eval_" + args.metric_for_best_model.removeprefix("eval_"))
    if value is None and (args.metric_for_best_model != "loss" or depends_on_best(args)):
        raise UsageError(f"metric_for_best_model = {args.metric_for_best_model!r}: measured are {', '.join(metrics)}")
    if value is not None and not math.isfinite(value):
        if depends_on_best(args):
            raise NonFiniteError(
                f"{args.metric_for_best_model} is {value} in the evaluation, and load_best_model_at_end, "
                "save_strategy=best or export_best depends on it"
            )
        return None
    return value


def more_is_better(args: EvaluationArguments) -> bool:
    """Return whether more of `metric_for_best_model` is better; TrainingArguments says it where the user did not."""
    return bool(args.greater_is_better)


def improves(args: EvaluationArguments, value: float, best: float | None) -> bool:
    """Return whether a value of the metric is better than the best so far, by more than the threshold."""
    gain = 0.0 if best is None else value - best if more_is_better(args) else best - value
    return best is None or gain > args.metric_improvement_threshold


class Collected:
    """Nested tensors of one batch after another; every rank holds those of all ranks."""

    def __init__(self, *, joins: bool = True, padding: int = PADDING) -> None:
        self.joins, self.padding = joins, padding  # not joined: a list with an entry for each batch
        self._batches: list[Any] = []
        self._num_on_host = 0

    def add(self, batch: Any) -> None:
        """Take in what all ranks have for the next samples."""
        self._batches.append(batch)

    def move_to_host(self) -> None:
        """Free the device of what was taken in so far."""
        for i in range(self._num_on_host, len(self._batches)):
            self._batches[i] = tree_map(_host, self._batches[i])
        self._num_on_host = len(self._batches)

    def arrays(self) -> Any:
        """Return everything as numpy arrays (N over all batches, ...), nested as it came; None if nothing came."""
        self.move_to_host()
        if not self._batches:
            return None
        if not self.joins:
            return nested_numpify(self._batches)
        return nested_numpify(tree_map(lambda *parts: join_rows(parts, self.padding), *self._batches))


def gather_rows(nested: Any, group: Group, *, has_rows: bool = True, padding: int = PADDING) -> Any:
    """Join what each rank has for the same batch, in the order of ranks.

    Args:
        nested: this rank's rows.
        group: all ranks; every one of them calls.
        has_rows: whether the rows are this rank's own; those of a rank that ran a placeholder are dropped.
        padding: fills rows that are narrower than others.
    """

    def rows(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        tensor = torch.atleast_1d(tensor)
        return join_rows(group.gather(tensor if has_rows else tensor[:0]), padding)

    return tree_map(rows, nested)


def join_rows(parts: Sequence[Any], padding: int) -> Any:
    """Put tensors (N, ...) under each other; dimensions behind the first are padded to the largest."""
    if len(parts) == 1 or not isinstance(parts[0], Tensor):
        return parts[0]
    widths = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_full((sum(len(part) for part in parts), *widths), padding)
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return whole


def _host(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf
