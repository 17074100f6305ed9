"""Evaluation and prediction of a Trainer: the methods that users call and override, under transformers' names.

Each sample counts once, in the order of the data set, and a loss weighs as many labels as it is the mean of; so neither
batch size nor padding nor the number of ranks shows in a number (law L8). Knows nothing of how a step is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, denumpify_detensorize

from trainer.errors import UsageError
from trainer.model.fsdp import inference
from trainer.model.precision import cast_weights
from trainer.model.traits import count_labels
from trainer.optim.averaging import averaged_weights
from trainer.optim.schedules import feed_metric
from trainer.training.batches import OrdinaryBatch
from trainer.training.collected import PADDING, Collected, gather_rows
from trainer.training.evaluation import best_metric, improves
from trainer.training.hub import TrainerHub
from trainer.training.metrics import BatchMetrics, now
from trainer.training.ordinary import OrdinaryRoad
from trainer.training.step import to_device

ROWS = ("predictions", "label_ids", "inputs", "losses")  # as EvalPrediction names them
Row = TypeVar("Row")


class TrainerPrediction(TrainerHub):
    """What a Trainer measures and predicts."""

    road: Any
    eval_dataset: Any
    label_names: list[str]
    model_accepts_loss_kwargs: bool
    _memory: Any  # TrainerMemoryTracker
    compute_loss: Callable[..., Any]
    log: Callable[..., None]
    compute_loss_func: Callable[..., Tensor] | None
    compute_metrics: Callable[..., dict[str, float]] | None
    preprocess_logits_for_metrics: Callable[..., Any] | None
    _ignored_outputs: list[str] | None = None  # in evaluations while training
    prediction_padding = PADDING  # of predictions that are narrower than others

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the loss, and what else was asked for, on held-out samples.

        Args:
            eval_dataset: what to evaluate on instead of the Trainer's own; a dict of several is evaluated one by one,
                each with its name behind the prefix.
            ignore_keys: outputs of the model that are not predictions.
            metric_key_prefix: what the name of every metric begins with.

        Returns:
            `eval_loss`, what compute_metrics gives, `eval_runtime`, samples and steps per second; with token data also
            `eval_num_loss_tokens`, `eval_num_samples`, and `eval_exact_match` when that option is set.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, Mapping):
            names = {name: name if eval_dataset is None else dataset for name, dataset in given.items()}
            return self._evaluate_each(names, ignore_keys, metric_key_prefix)
        self._memory.start()
        started = now()
        loader = self.get_eval_dataloader(eval_dataset)
        if isinstance(self.road, OrdinaryRoad):
            loss_only = True if self.compute_metrics is None else None
            output = self.evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, metric_key_prefix)
        else:
            output = self._evaluate_tokens(given, loader, metric_key_prefix)
        metrics = output.metrics | self._speed(output.num_samples, now() - started, metric_key_prefix)
        self.log(metrics)
        self.events.emit("on_evaluate", metrics=metrics)
        self._memory.stop_and_update_metrics(metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict every sample, and measure where there are labels.

        Returns:
            Predictions and labels as numpy arrays in the order of the data set, -100 where a row is narrower than
            others, nested as the model gives them; and metrics.
        """
        if not isinstance(self.road, OrdinaryRoad):
            raise UsageError(
                "predict needs a data set of your own, such as a list of {'input_ids': ..., 'labels': ...}: give one "
                "as eval_dataset to another Trainer; token data is packed, without a row of logits for each sample"
            )
        self._memory.start()
        started = now()
        loader = self.get_test_dataloader(test_dataset)
        output = self.evaluation_loop(loader, "Prediction", None, ignore_keys, metric_key_prefix)
        metrics = output.metrics | self._speed(output.num_samples, now() - started, metric_key_prefix)
        self.events.emit("on_predict", metrics=metrics)
        self._memory.stop_and_update_metrics(metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model over all batches of a loader, on all ranks; `evaluate` and `predict` are built on it."""
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        found = Found(self, keeps_rows=description == "Prediction" or not self.args.batch_eval_metrics)
        self.callback_handler.eval_dataloader = dataloader
        with self._as_evaluated():
            for batch, is_last in mark_last(self.road.eval_batches(dataloader)):
                rows = self._predict_batch(batch, loss_only, ignore_keys, found)
                self.events.emit("on_prediction_step")
                if self.args.batch_eval_metrics:
                    found.metrics = self._measure(rows, compute_result=is_last) or found.metrics
        arrays = found.arrays()
        if not self.args.batch_eval_metrics:
            found.metrics = self._measure(arrays)
        if description == "Evaluation" and not loss_only:
            self._check_labels(found)
        metrics = denumpify_detensorize({**found.metrics, **found.loss()})
        named = {_prefixed(name, metric_key_prefix): value for name, value in metrics.items()}
        return EvalLoopOutput(arrays["predictions"], arrays["label_ids"], named, found.num_samples)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Run the model on one batch; gives loss, logits and labels, each None where there are none or not asked for.

        Several outputs or several kinds of labels are tuples.
        """
        inputs = self._prepare_inputs(inputs)
        labels = tuple(inputs.get(name) for name in self.label_names)
        has_labels = bool(labels) and all(label is not None for label in labels)
        with torch.no_grad(), self.compute_loss_context_manager():
            if has_labels or (not labels and inputs.get("return_loss", self.road.traits.can_return_loss)):
                num_items = self._num_items(inputs)
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items)
                loss = loss.detach().mean()
            else:
                loss, outputs = None, model(**inputs)
        if prediction_loss_only:
            return loss, None, None
        logits = nested_detach(self._logits(outputs, ignore_keys, has_loss=loss is not None))
        return loss, logits, _alone(nested_detach(labels)) if has_labels else None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Build the loader of this rank's share of held-out samples; a name means one of a dict of data sets."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise UsageError("nothing to evaluate on: give eval_dataset, validation_data_path or validation_split")
        loader: DataLoader[Any] = self.road.eval_loader(dataset)
        return loader

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Build the loader of this rank's share of the samples to predict."""
        return self.get_eval_dataloader(test_dataset)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return to_device(inputs, self.group.device)

    def _evaluate_each(
        self, datasets: Mapping[str, Any], ignore_keys: list[str] | None, prefix: str
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, dataset in datasets.items():
            metrics |= self.evaluate(dataset, ignore_keys=ignore_keys, metric_key_prefix=f"{prefix}_{name}")
        return metrics

    @contextmanager
    def _as_evaluated(self) -> Iterator[None]:
        """Give the model the weights, mode and format in which it is evaluated, inside."""
        full = self._full_precision()
        with averaged_weights(self.optimizer), inference(self.model), cast_weights(self.model, full):
            yield

    def _evaluate_tokens(self, dataset: Any, loader: DataLoader[Any], prefix: str) -> EvalLoopOutput:
        with averaged_weights(self.optimizer):
            metrics = self.road.evaluate(dataset, loader, self.state.global_step)
        named = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, named, metrics["num_samples"])

    def _evaluate_and_compare(self) -> dict[str, float]:
        """Evaluate during a run, and remember the best."""
        metrics = self.evaluate(ignore_keys=self._ignored_outputs)
        value = best_metric(self.args, metrics)
        if value is None and self.args.metric_for_best_model != "loss":
            raise UsageError(
                f"metric_for_best_model = {self.args.metric_for_best_model!r}: measured are {', '.join(metrics)}"
            )
        if value is not None and improves(self.args, value, self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.control.should_save |= self.args.load_best_model_at_end or self.args.save_strategy == "best"
        assert self.lr_scheduler is not None
        feed_metric(self.lr_scheduler, value)
        return metrics

    def _predict_batch(
        self, batch: OrdinaryBatch, loss_only: bool, ignore_keys: list[str] | None, found: Found
    ) -> dict[str, Any]:
        """Run one batch of all ranks; gives its rows on every rank."""
        (inputs,), (size,) = batch.micro_batches, batch.num_samples
        loss, logits, labels = self.prediction_step(self.model, inputs, loss_only, ignore_keys=ignore_keys)
        if logits is not None and self.preprocess_logits_for_metrics is not None:
            logits = self.preprocess_logits_for_metrics(logits, labels)
        included = self.args.include_for_metrics
        own = {
            "predictions": logits,
            "label_ids": labels,
            "inputs": self._main_input(inputs) if "inputs" in included else None,
            "losses": loss.repeat(size) if loss is not None and "loss" in included else None,
        }
        rows = {
            name: gather_rows(nested, self.group, has_rows=size > 0, padding=self.padding_of(name))
            for name, nested in own.items()
        }
        found.add(batch, loss, rows)
        return rows

    def padding_of(self, rows: str) -> int:
        """What rows of this kind are padded with where others are wider."""
        return self.prediction_padding if rows == "predictions" else PADDING

    def _measure(self, rows: Mapping[str, Any], **more: bool) -> dict[str, Any]:
        """Give what compute_metrics makes of predictions and labels, where there are any."""
        if self.compute_metrics is None or rows["predictions"] is None or rows["label_ids"] is None:
            return {}
        return self.compute_metrics(EvalPrediction(**{name: rows[name] for name in ROWS}), **more) or {}

    def _check_labels(self, found: Found) -> None:
        if not found.has_labels:
            raise UsageError(
                f"compute_metrics was never called: no batch of the evaluation had labels named "
                f"{', '.join(self.label_names) or '(none)'}; set label_names, or leave compute_metrics out"
            )

    def _logits(self, outputs: Any, ignore_keys: list[str] | None, *, has_loss: bool) -> Any:
        """Take from a model's outputs what is neither loss nor to be ignored."""
        if isinstance(outputs, Mapping):
            if ignore_keys is None:
                config = getattr(self.model, "config", None)
                ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
            ignored = {*ignore_keys, "loss"} if has_loss else set(ignore_keys)
            return _alone(tuple(value for name, value in outputs.items() if name not in ignored))
        if isinstance(outputs, Tensor):
            return outputs
        return _alone(tuple(outputs[1:] if has_loss else outputs))

    def _num_items(self, inputs: Any) -> Tensor | None:
        """Count the labels of a batch, for a loss that divides by them."""
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return None
        count = count_labels(inputs, self.road.traits)
        return None if count is None else torch.tensor(count, device=self.group.device)

    def _main_input(self, inputs: Any) -> Tensor:
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs:
            raise UsageError(
                f"include_for_metrics=['inputs'] needs the model's main input {name!r}, batches have "
                f"{', '.join(inputs)}: set main_input_name on the model"
            )
        main: Tensor = self._prepare_inputs({name: inputs[name]})[name]
        return main

    def _full_precision(self) -> torch.dtype | None:
        if self.args.fp16_full_eval:
            return torch.float16
        return torch.bfloat16 if self.args.bf16_full_eval else None

    def _speed(self, num_samples: int, seconds: float, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}_runtime": seconds,
            f"{prefix}_samples_per_second": num_samples / seconds,
            f"{prefix}_steps_per_second": self.road.num_eval_batches(num_samples) / seconds,
        }


class Found:
    """What an evaluation has found so far, the same on every rank but for the sum of losses."""

    def __init__(self, trainer: TrainerPrediction, *, keeps_rows: bool) -> None:
        self.args, self.group = trainer.args, trainer.group
        joins = trainer.args.eval_do_concat_batches
        names = ROWS if keeps_rows else ()
        self.rows = {name: Collected(joins=joins, padding=trainer.padding_of(name)) for name in names}
        self.metrics: dict[str, Any] = {}
        self.has_labels = False
        self.num_samples = self._num_batches = 0
        self._losses, self._has_loss, self._loss_weight = BatchMetrics(), False, 0

    def add(self, batch: OrdinaryBatch, loss: Tensor | None, rows: Mapping[str, Any]) -> None:
        """Take in one batch of all ranks: this rank's loss, and everyone's rows."""
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
        """Give all rows as numpy arrays; None where there are none."""
        return dict.fromkeys(ROWS) | {name: collected.arrays() for name, collected in self.rows.items()}

    def loss(self) -> dict[str, float]:
        """Give the mean loss over all labels, or samples where labels cannot be counted; all ranks call."""
        if not self._has_loss:
            return {}
        total = self._losses.reduce(self.group)["loss"]
        return {"loss": total / self._loss_weight if self._loss_weight else float("nan")}


def mark_last(batches: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
    """Give each batch, and whether it is the last one."""
    iterator = iter(batches)
    for batch in iterator:
        for following in iterator:
            yield batch, False
            batch = following  # noqa: PLW2901
        yield batch, True


def _alone(values: tuple[Any, ...]) -> Any:
    """Give the only value as it is, several as a tuple."""
    return values[0] if len(values) == 1 else values


def _prefixed(name: str, prefix: str) -> str:
    return name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"
