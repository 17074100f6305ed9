"""The training loop: the one file that knows the order of everything.

Per epoch, per global batch: step, report, then what the callbacks asked for (log, evaluate, save), until one of them or
a signal says stop. Position is two integers, epoch and samples; nothing else decides which batch comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from transformers.trainer_callback import TrainerControl

from trainer.arguments.training import TrainingArguments
from trainer.data.length import RunLength
from trainer.training.callbacks import Events, RunState
from trainer.training.metrics import StepReport, now, peak_memory_bytes, throughput
from trainer.training.signals import StopRequest
from trainer.training.step import Engine, GlobalBatch, StepResult, take_step

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """Where global batches come from."""

    num_samples: int | None  # of an epoch, over all ranks; None: not known before one has ended

    def epoch(self, epoch: int, start: int) -> Iterator[GlobalBatch]:
        """Give what is left of an epoch after `start` of its samples."""


@dataclass
class Run:
    """Everything that the loop drives."""

    args: TrainingArguments
    engine: Engine
    batches: Batches
    length: RunLength
    events: Events
    evaluate: Callable[[], dict[str, float]]
    save: Callable[[], None]
    log: Callable[[dict[str, float]], None]
    finish: Callable[[], None]  # what is to be done after the last step, before the end is told
    stop_signal: int | None = None  # the signal that ended the run
    evaluated_step: int | None = None  # the last step after which there was an evaluation

    @property
    def state(self) -> RunState:
        """Where the run stands."""
        return self.events.state

    @property
    def control(self) -> TrainerControl:
        """What the callbacks ask for."""
        return self.events.control

    @property
    def is_over(self) -> bool:
        """Whether all steps or all epochs were trained."""
        limits = ((self.length.num_steps, self.state.global_step), (self.length.num_epochs, self.state.num_epochs_done))
        return any(limit is not None and done >= limit for limit, done in limits)


def train(run: Run) -> None:
    """Run from the position in `run.state` to the end, or until a callback or a signal stops it.

    A signal skips the last evaluation, but not what is written at the end; one that comes after the last step changes
    nothing.
    """
    run.state.max_steps = run.length.num_steps or -1
    run.state.num_train_epochs = run.length.num_epochs or 0
    run.state.num_steps_per_epoch = run.length.steps_per_epoch
    run.state.num_samples_per_epoch = run.batches.num_samples or run.state.num_samples_per_epoch
    with StopRequest() as stop:
        run.events.emit("on_train_begin")
        if run.args.eval_on_start:
            evaluate_once(run)
        while not (run.is_over or run.control.should_training_stop):
            train_epoch(run, stop)
        if run.args.eval_at_end and run.stop_signal is None:
            evaluate_once(run)
        run.finish()
        run.events.emit("on_train_end")


def train_epoch(run: Run, stop: StopRequest) -> None:
    """Train what is left of one epoch."""
    epoch, start = run.state.num_epochs_done, run.state.num_epoch_samples_seen
    window = LossWindow(run.state)
    run.events.emit("on_epoch_begin")
    for batch in run.batches.epoch(epoch, start):
        window.add(train_batch(run, batch, stop))
        act(run, window)
        if run.control.should_training_stop or run.control.should_epoch_stop:
            break
    else:
        end_of_data(run, epoch, start)
    if run.control.should_epoch_stop and run.state.num_epochs_done == epoch:
        run.state.end_epoch()
    run.events.emit("on_epoch_end")
    act(run, window)


def end_of_data(run: Run, epoch: int, start: int) -> None:
    """Close an epoch whose batches ran out; a stream shows its length, or that it has nothing left to give."""
    seen = run.state.num_epoch_samples_seen
    if run.state.num_epochs_done > epoch:  # its length was known
        return
    if seen == 0:
        logger.warning("train_dataset gives no more samples: training stops at step %d", run.state.global_step)
        run.control.should_training_stop = True
        return
    run.state.num_samples_per_epoch = seen
    run.state.end_epoch()


def train_batch(run: Run, batch: GlobalBatch, stop: StopRequest) -> StepReport:
    """Take one step, move the position past it, and report it."""
    run.events.emit("on_step_begin")
    started = now()
    result = take_step(run.engine, batch, stop)
    counts = run.engine.objective.counts(batch)
    run.state.advance(counts["num_samples"], counts.get("num_loss_tokens", 0))
    run.state.num_input_tokens_seen += counts.get("num_tokens", 0)
    report = report_step(run, result, counts, now() - started)
    run.state.loss_sum += report.loss * report.weight
    run.state.loss_weight += report.weight
    run.events.emit("on_step_end", report=report)
    if result.stop_signal is not None:
        run.stop_signal, run.control.should_training_stop = result.stop_signal, True
    return report


def report_step(run: Run, result: StepResult, counts: dict[str, Any], seconds: float) -> StepReport:
    """Put together what the step did."""
    return StepReport(
        step=run.state.global_step,
        epoch=run.state.epoch,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        loss=result.loss,
        **counts,
        **throughput(counts, seconds),
        peak_memory_bytes=peak_memory_bytes(run.engine.group.device),
        more=result.more,
    )


class LossWindow:
    """Steps since the last log line: their mean loss; of the newest gradient norm, learning rate and what is more."""

    def __init__(self, state: RunState) -> None:
        self._state = state

    def add(self, report: StepReport) -> None:
        """Take in one more step."""
        window = self._state.log_window
        self._state.log_window = {
            "loss_sum": window.get("loss_sum", 0.0) + report.loss * report.weight,
            "weight": window.get("weight", 0) + report.weight,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            **report.more,
        }

    def take(self) -> dict[str, float]:
        """Give the log line and start the next window."""
        window, self._state.log_window = self._state.log_window, {}
        return {"loss": window.pop("loss_sum") / window.pop("weight"), **window}

    @property
    def has_steps(self) -> bool:
        """Whether a step came since the last line."""
        return bool(self._state.log_window)


def act(run: Run, window: LossWindow) -> None:
    """Do what the callbacks asked for."""
    if run.control.should_log and window.has_steps:
        run.log(window.take())
    run.control.should_log = False
    if run.control.should_evaluate:
        evaluate_once(run)
    run.control.should_evaluate = False
    if run.control.should_save:
        run.save()
        run.events.emit("on_save")


def evaluate_once(run: Run) -> None:
    """Evaluate, unless that was done after this very step: several reasons to evaluate may fall together."""
    if run.evaluated_step != run.state.global_step:
        run.evaluate()
        run.evaluated_step = run.state.global_step
