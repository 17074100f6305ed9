"""Evaluation and prediction: what `Trainer.evaluation_loop` runs, and `compute_metrics` on token data.

Each sample counts once, in the order of the data set, and a loss weighs as many labels as it is the mean of; so neither
batch size nor padding nor the number of ranks shows in a number (law L8). The packs of token data are taken apart into
samples for `compute_metrics`, which sees them as if each had been a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from trainer.data.loader import MicroBatch, to_device
from trainer.data.store import TokenStore
from trainer.errors import UsageError
from trainer.host import host_memory
from trainer.model.attention import packed_forward, packed_inputs
from trainer.model.fsdp import inference
from trainer.model.precision import cast_weights
from trainer.optim.adapters import averaged_weights
from trainer.training.batches import GlobalModelBatch
from trainer.training.evaluate import PADDING, Collected, gather_rows, join_rows, prefixed
from trainer.training.metrics import BatchMetrics
from trainer.training.model_task import ModelTask
from trainer.training.packed_task import PackedTask

if TYPE_CHECKING:
    from trainer.hf.trainer import Trainer

ROWS = ("predictions", "label_ids", "inputs", "losses")  # as EvalPrediction names them


def run_evaluation_loop(
    trainer: Trainer,
    loader: DataLoader[Any],
    description: str,
    loss_only: bool,
    ignore_keys: list[str] | None,
    prefix: str,
) -> EvalLoopOutput:
    """Run the model over all batches of a loader, on all ranks; see `Trainer.evaluation_loop`."""
    args, task = trainer.args, trainer.task
    if not isinstance(task, ModelTask):
        raise UsageError("evaluation_loop needs a custom data set: token data is packed, call evaluate")
    full = None
    if args.fp16_full_eval:
        full = torch.float16
    elif args.bf16_full_eval:
        full = torch.bfloat16
    keeps_rows = description == "Prediction" or not args.batch_eval_metrics
    outcome = EvaluationOutcome(trainer, names=ROWS if keeps_rows else ())
    trainer.callback_handler.eval_dataloader = loader
    in_use = task.prepared.in_use()
    with in_use, averaged_weights(trainer.optimizer), inference(trainer.model), cast_weights(trainer.model, full):
        batches = iter(task.eval_batches(loader))
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)
            rows = predict_batch(trainer, batch, loss_only, ignore_keys, outcome)
            trainer.events.emit("on_prediction_step")
            if args.batch_eval_metrics:
                outcome.metrics = measure(trainer, rows, compute_result=following is None) or outcome.metrics
            batch = following
    arrays = outcome.arrays()
    if not args.batch_eval_metrics:
        outcome.metrics = measure(trainer, arrays)
    needs_labels = description == "Evaluation" and not loss_only and trainer.compute_metrics is not None
    if needs_labels and not outcome.has_labels:
        raise UsageError(
            f"compute_metrics was never called: no batch of the evaluation had labels named "
            f"{', '.join(trainer.label_names) or '(none)'}; set label_names, or leave compute_metrics out"
        )
    metrics = denumpify_detensorize({**outcome.metrics, **outcome.loss()})
    return EvalLoopOutput(arrays["predictions"], arrays["label_ids"], prefixed(metrics, prefix), outcome.num_samples)


def predict_batch(
    trainer: Trainer,
    batch: GlobalModelBatch,
    loss_only: bool,
    ignore_keys: list[str] | None,
    outcome: EvaluationOutcome,
) -> dict[str, Any]:
    """Run one batch of all ranks, add it to the outcome; return its rows, on every rank those of all."""
    (inputs,), (size,) = batch.micro_batches, batch.num_samples
    loss, logits, labels = trainer.prediction_step(trainer.model, inputs, loss_only, ignore_keys=ignore_keys)
    if logits is not None and trainer.preprocess_logits_for_metrics is not None:
        logits = trainer.preprocess_logits_for_metrics(logits, labels)
    included = trainer.args.include_for_metrics
    own = {
        "predictions": logits,
        "label_ids": labels,
        "inputs": main_input(trainer, inputs) if "inputs" in included else None,
        "losses": loss.repeat(size) if loss is not None and "loss" in included else None,
    }
    rows = {}
    for name, nested in own.items():
        rows[name] = gather_rows(nested, trainer.group, has_rows=size > 0, padding=trainer.padding_of(name))
    outcome.add(batch, loss, rows)
    return rows


def measure(trainer: Trainer, rows: Mapping[str, Any], **more: bool) -> dict[str, Any]:
    """Return what compute_metrics makes of predictions and labels, where there are any."""
    if trainer.compute_metrics is None or rows["predictions"] is None or rows["label_ids"] is None:
        return {}
    return trainer.compute_metrics(EvalPrediction(**{name: rows[name] for name in ROWS}), **more) or {}


def measure_packs(
    trainer: Trainer, task: PackedTask, store: TokenStore, loader: DataLoader[list[MicroBatch]]
) -> dict[str, float]:
    """Run the model over the packs of a loader, and return what compute_metrics makes of its samples.

    It gets predictions (N,T,V) and labels (N,T) of N samples in the order of the data set, not shifted; rows that are
    shorter than T end in -100. preprocess_logits_for_metrics is called for one sample at a time, (1,T,V) and (1,T).

    Raises:
        UsageError: all logits together would not fit into a rank's share of this machine's memory.
    """
    assert trainer.compute_metrics is not None
    prepared, group = task.prepared, trainer.group
    preprocess = trainer.preprocess_logits_for_metrics
    if preprocess is None:
        _check_room(store, prepared.model, host_memory() // group.topology.local_world_size)
    collected = Collected()
    ids: list[int] = []
    with prepared.in_use(), inference(prepared.model):
        for batch in loader:
            rows: list[Any] = []
            placeholders: list[Any] = []  # tell the shape of rows on a rank that has none of its own
            own_ids = []
            for micro_batch in batch:
                micro_batch = to_device(micro_batch, group.device)
                with prepared.compute_context(), packed_forward():
                    logits = prepared.model(**packed_inputs(prepared.model, micro_batch)).logits
                own_ids.append(micro_batch["sample_ids"])
                kept = rows if len(own_ids[-1]) else placeholders
                for start, stop in pairwise(micro_batch["cu_seq_lens"].tolist()):
                    one, labels = logits[:, start:stop], micro_batch["labels"][:, start:stop]
                    kept.append((one if preprocess is None else preprocess(one, labels), labels))
            own = torch.cat(own_ids)
            joined = tree_map(lambda *parts: join_rows(parts, PADDING), *(rows or placeholders))
            collected.add(gather_rows(joined, group, has_rows=len(own) > 0))
            collected.move_to_host()
            ids += torch.cat(group.gather(own)).tolist()
    order = np.argsort(ids)
    predictions, labels = tree_map(lambda rows: rows[order], collected.arrays())
    found = trainer.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels)) or {}
    return denumpify_detensorize(found)


def _check_room(store: TokenStore, model: Any, memory: int) -> None:
    """Refuse logits of all samples that together are larger than the memory of a rank: each holds all of them."""
    lengths = store.lengths
    vocab_size = model.config.get_text_config().vocab_size
    needed = len(lengths) * int(lengths.max()) * vocab_size * 4
    if needed > memory:
        raise UsageError(
            f"compute_metrics would get logits of {len(lengths):,} samples, {needed / 2**30:,.0f} GiB, and a "
            f"rank of this machine has {memory / 2**30:,.0f} GiB: give preprocess_logits_for_metrics, such as "
            "lambda logits, labels: logits.argmax(-1)"
        )


def main_input(trainer: Trainer, inputs: Any) -> Tensor:
    """Return the model's main input of a batch, on its device."""
    name = getattr(trainer.model, "main_input_name", "input_ids")
    if name not in inputs:
        raise UsageError(
            f"include_for_metrics=['inputs'] needs the model's main input {name!r}, batches have "
            f"{', '.join(inputs)}: set main_input_name on the model"
        )
    main: Tensor = trainer._prepare_inputs({name: inputs[name]})[name]
    return main


class EvaluationOutcome:
    """What an evaluation measured so far, the same on every rank except the sum of losses."""

    def __init__(self, trainer: Trainer, *, names: tuple[str, ...]) -> None:
        self.args, self.group = trainer.args, trainer.group
        joins = trainer.args.eval_do_concat_batches
        self.rows = {name: Collected(joins=joins, padding=trainer.padding_of(name)) for name in names}
        self.metrics: dict[str, Any] = {}
        self.has_labels = False
        self.num_samples = self._num_batches = 0
        self._losses, self._has_loss, self._loss_weight = BatchMetrics(), False, 0

    def add(self, batch: GlobalModelBatch, loss: Tensor | None, rows: Mapping[str, Any]) -> None:
        """Add one batch of all ranks: this rank's loss, and the rows of all."""
        self.num_samples += batch.batch_num_samples
        self._num_batches += 1
        self.has_labels |= rows["label_ids"] is not None
        if loss is not None:
            self._has_loss = True
            own, total = batch.own_num_items, batch.batch_num_items
            if total is None:  # labels cannot be counted
                own, total = batch.num_samples[0], batch.batch_num_samples
            self._losses.accumulate(loss=loss.double() * own if own else 0.0)
            self._loss_weight += total
        for name, collected in self.rows.items():
            if rows[name] is not None:
                collected.add(rows[name])
            if self.args.eval_accumulation_steps and self._num_batches % self.args.eval_accumulation_steps == 0:
                collected.move_to_host()

    def arrays(self) -> dict[str, Any]:
        """Return all rows as numpy arrays; None where there are none."""
        return dict.fromkeys(ROWS) | {name: collected.arrays() for name, collected in self.rows.items()}

    def loss(self) -> dict[str, float]:
        """Return the mean loss over all labels, or samples where labels cannot be counted; all ranks call."""
        if not self._has_loss:
            return {}
        total = self._losses.reduce(self.group)["loss"]
        return {"loss": total / self._loss_weight if self._loss_weight else float("nan")}


def alone(values: tuple[Any, ...]) -> Any:
    """Return the only value as it is, several as a tuple."""
    return values[0] if len(values) == 1 else values


def predictions_of(model: Any, outputs: Any, ignore_keys: list[str] | None, *, has_loss: bool) -> Any:
    """Return what of a model's outputs is neither the loss nor to be ignored."""
    if isinstance(outputs, Tensor):
        return outputs
    if not isinstance(outputs, Mapping):
        return alone(tuple(outputs[1:] if has_loss else outputs))
    if ignore_keys is None:
        ignore_keys = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
    ignored = {*ignore_keys, "loss"} if has_loss else set(ignore_keys)
    return alone(tuple(value for name, value in outputs.items() if name not in ignored))
