"""What happens around the steps, in transformers' callback protocol: when to log, evaluate and stop, what to write.

`on_step_end` receives, beside the protocol's arguments, `report=StepReport`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import trainer_callback
from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl, TrainerState

from trainer.config.arguments import TrainingArguments
from trainer.errors import MissingPackageError, OutputError, UsageError
from trainer.training.metrics import StepReport
from trainer.training.run_dir import METRICS


@dataclass
class RunState(TrainerState):
    """transformers' TrainerState, and where the run stands: all that a resumed run must know to go on alike.

    The position in the data is two integers, `num_epochs_done` and `num_epoch_samples_seen`.
    """

    log_history: list[dict[str, Any]] = field(default_factory=list)
    num_samples_seen: int = 0  # since the start
    num_loss_tokens_seen: int = 0
    num_epochs_done: int = 0
    num_epoch_samples_seen: int = 0
    num_epoch_steps: int = 0
    num_samples_per_epoch: int | None = None  # of a stream without a length not before its first pass ends
    num_steps_per_epoch: int | None = None
    loss_sum: float = 0.0  # over the steps so far, each by its weight (see `add_to_log_window`)
    loss_weight: int = 0
    loss_scale: float = 1.0  # see `LossScale`
    num_steps_at_scale: int = 0
    log_window: dict[str, float] = field(default_factory=dict)  # see `add_to_log_window`
    epoch_end_is_due: bool = False  # the end of an epoch was not told yet
    evaluated_step: int | None = None  # the last step after which there was an evaluation
    saved_step: int | None = None  # the last step whose state was saved
    num_skipped_steps: int = 0  # not taken because of a non-finite loss or gradient

    def __post_init__(self) -> None:
        """Start in this process."""
        super().__post_init__()
        self.resumed_step = self.resumed_samples = 0  # from which it went on: no part of the run's state

    def save_to_json(self, json_path: str) -> None:
        """Write what transformers' state has of it, as `TrainerState.load_from_json` reads it."""
        TrainerState(**{each.name: getattr(self, each.name) for each in fields(TrainerState)}).save_to_json(json_path)

    def advance(self, num_samples: int, num_loss_tokens: int) -> None:
        """Move past a finished step."""
        self.global_step += 1
        self.num_samples_seen += num_samples
        self.num_loss_tokens_seen += num_loss_tokens
        self.num_epoch_samples_seen += num_samples
        self.num_epoch_steps += 1
        if self.num_epoch_samples_seen == self.num_samples_per_epoch:
            self.end_epoch()
        self._tell_epoch()

    def end_epoch(self) -> None:
        """Move to the beginning of the next epoch, wherever in this one the run stands."""
        self.num_epochs_done += 1
        self.num_epoch_samples_seen = self.num_epoch_steps = 0
        self._tell_epoch()

    def train_metrics(self, seconds: float) -> dict[str, float]:
        """Return what the run did, under the names that transformers has for it."""
        return {
            "train_runtime": seconds,
            "train_samples_per_second": (self.num_samples_seen - self.resumed_samples) / seconds,
            "train_steps_per_second": (self.global_step - self.resumed_step) / seconds,
            "total_flos": self.total_flos,
            "train_loss": self.loss_sum / max(self.loss_weight, 1),
        }

    def _tell_epoch(self) -> None:
        """Say how many epochs were trained, with fractions as far as the length of one is known."""
        length, seen = self.num_samples_per_epoch, self.num_epoch_samples_seen
        if length is None:  # a loader that is not ours may know its steps
            length, seen = self.num_steps_per_epoch, self.num_epoch_steps
        self.epoch = float(self.num_epochs_done) if length is None else (self.num_epochs_done * length + seen) / length


class Events:
    """Tells callbacks what happens, and keeps state and control, which they may change.

    Args:
        args, state: what every callback is given.
        handler: the callbacks that users add to and take from.
        own: the Trainer's own, which are called first and stay.
    """

    def __init__(
        self, args: TrainingArguments, state: RunState, handler: CallbackHandler, own: Sequence[TrainerCallback]
    ) -> None:
        self.args, self.state, self.handler, self._own = args, state, handler, own
        self.control = TrainerControl()
        self.is_stopped_by_signal = False

    def emit(self, event: str, **more: Any) -> None:
        """Call an event of transformers' protocol on every callback."""
        for callback in self._own:
            getattr(callback, event)(self.args, self.state, self.control, **more)
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **more)

    def tell(self, event: str, done: int, total: int, seconds: float) -> None:
        """Report the progress of something slow to the callbacks that have such a method.

        It is called with (args, state, done, total, seconds).
        """
        for callback in self.handler.callbacks:
            if hasattr(type(callback), event):  # not one that answers to every name
                getattr(callback, event)(self.args, self.state, done, total, seconds)


class DefaultFlowCallback(trainer_callback.DefaultFlowCallback):
    """Sets the control flags from the options: log, evaluate, save, stop."""

    def __init__(self) -> None:
        self._evaluations, self._saves = Every(None), Every(None)

    def on_train_begin(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Start counting samples from where the run stands."""
        self._evaluations = Every(args.min_samples_per_evaluation, state.num_samples_seen)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, args.in_steps(name, state.max_steps))
        self._saves = Every(args.min_samples_per_full_checkpoint, state.num_samples_seen)

    def on_step_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Decide after a step."""
        step = state.global_step
        is_last = 0 < state.max_steps <= step
        if args.logging_strategy == "steps" and (step % state.logging_steps == 0 or step == args.logging_first_step):
            control.should_log = True
        if args.eval_strategy == "steps" and (step % state.eval_steps == 0 or is_last) and step >= args.eval_delay:
            control.should_evaluate = True
        if self._evaluations.is_due(state.num_samples_seen):
            control.should_evaluate = True
        if self._saves.is_due(state.num_samples_seen) or (
            args.save_strategy == "steps" and (step % state.save_steps == 0 or is_last)
        ):
            control.should_save = True
        if is_last:
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Decide after an epoch."""
        control.should_log |= args.logging_strategy == "epoch"
        control.should_evaluate |= args.eval_strategy == "epoch" and (state.epoch or 0) >= args.eval_delay
        control.should_save |= args.save_strategy == "epoch"


class Every:
    """Says when a growing count has passed the next multiple of an interval; never for an interval of None."""

    def __init__(self, interval: int | None, count: int = 0) -> None:
        self.interval, self._passed = interval, count // interval if interval else 0

    def is_due(self, count: int) -> bool:
        """Return whether a multiple was passed since the last time this was asked."""
        passed = count // self.interval if self.interval else 0
        is_due, self._passed = passed > self._passed, passed
        return is_due


class MetricsFile(TrainerCallback):
    """Appends one JSON line for each step and each evaluation of a run to metrics.jsonl, on the main rank."""

    def __init__(self) -> None:
        self._is_training = False

    def on_train_begin(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Write from now on; an evaluation outside a run leaves no line."""
        self._is_training = True

    def on_train_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Write no more."""
        self._is_training = False

    def on_step_end(
        self, args: TrainingArguments, state: RunState, control: TrainerControl, report: StepReport, **_: Any
    ) -> None:
        """Write the step's report."""
        self._append(args, state, report.to_dict())

    def on_evaluate(
        self, args: TrainingArguments, state: RunState, control: TrainerControl, metrics: Mapping[str, float], **_: Any
    ) -> None:
        """Write the evaluation's metrics."""
        self._append(args, state, {"step": state.global_step, "epoch": state.epoch, **metrics})

    def _append(self, args: TrainingArguments, state: RunState, line: Mapping[str, Any]) -> None:
        if not (self._is_training and state.is_world_process_zero):
            return
        path = Path(args.output_dir, METRICS)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=np.ndarray.tolist) + "\n")  # a metric may be an array
        except OSError as error:
            raise OutputError(f"{path} cannot be written after step {state.global_step}: {error}") from error


class ExportCallback(TrainerCallback):
    """Exports Hugging Face weights every N samples, after epochs, and at the end."""

    def __init__(self, export: Callable[[], Path]) -> None:
        self._export = export
        self._samples = Every(None)

    def on_train_begin(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Start counting samples from where the run stands."""
        self._samples = Every(args.min_samples_per_checkpoint, state.num_samples_seen)

    def on_step_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Export when enough samples were trained."""
        if self._samples.is_due(state.num_samples_seen):
            self._export()

    def on_epoch_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Export after an epoch when asked."""
        if args.export_at_epoch:
            self._export()

    def on_train_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Export the final weights."""
        if args.export_final:
            self._export()


def reporters(report_to: str | Sequence[str]) -> list[TrainerCallback]:
    """Build the callbacks that report to these trackers; "all" means those that are installed, "none" none.

    Raises:
        UsageError: there is no integration of that name.
        MissingPackageError: its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names in ([], ["none"]):
        return []
    # Imported here: it looks for all of their packages.
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if names == ["all"]:
        names = get_available_reporting_integrations()
    if unknown := [name for name in names if name not in INTEGRATION_TO_CALLBACK]:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise UsageError(f"report_to = {', '.join(unknown)}: expected none, all, or some of {known}")
    callbacks = []
    for name in names:
        try:
            callbacks.append(INTEGRATION_TO_CALLBACK[name]())
        except (ImportError, RuntimeError) as error:
            raise MissingPackageError(f"report_to = {name}: {error}") from error
    return callbacks
