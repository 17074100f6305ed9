"""The training loop: the one file that knows the order of everything.

Per epoch, per global batch: step, report, then what the callbacks asked for (log, evaluate, save), until one of them or
a signal says stop. Position is two integers, epoch and samples; nothing else decides which batch comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.trainer_callback import TrainerControl

from trainer.checkpoint.run_state import generator_states
from trainer.config.arguments import TrainingArguments
from trainer.data.length import RunLength
from trainer.training.callbacks import Events, RunState
from trainer.training.checkpoints import Checkpoints
from trainer.training.metrics import StepReport, now, peak_memory_bytes, throughput, timed
from trainer.training.nonfinite import CrashRecorder
from trainer.training.signals import StopRequest
from trainer.training.step import Engine, StepResult, take_step
from trainer.training.task import Batches, GlobalBatch

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that the loop drives."""

    args: TrainingArguments
    engine: Engine
    batches: Batches
    length: RunLength
    events: Events
    evaluate: Callable[[], dict[str, float]]
    checkpoints: Checkpoints
    crash: CrashRecorder
    log: Callable[[dict[str, float]], None]
    finish: Callable[[], None]  # what is to be done after the last step, before the end is told
    stop_signal: int | None = None  # the signal that ended the run

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
    group = run.engine.group
    with StopRequest(saves=run.checkpoints.is_on) as stop, group.naming_faults(lambda: f"step {next_step(run)}"):
        begin(run)
        while not (run.is_over or run.control.should_training_stop):
            train_epoch(run, stop)
        if run.stop_signal is None:
            end(run)
        run.checkpoints.finish()
        run.finish()
        run.events.emit("on_train_end")


def next_step(run: Run) -> int:
    """Return the number of the step that the run is at."""
    return run.state.global_step + 1


def begin(run: Run) -> None:
    """Do what is due before the first step, or before going on."""
    run.events.emit("on_train_begin")
    run.checkpoints.begin()
    if run.args.eval_on_start and run.state.global_step == 0:
        evaluate_once(run)
    close_epoch_of_former_run(run)


def end(run: Run) -> None:
    """Do what is due after the last step."""
    if run.args.save_strategy == "steps":
        run.checkpoints.save()
    if run.args.eval_at_end:
        evaluate_once(run)
        act(run)


def train_epoch(run: Run, stop: StopRequest) -> None:
    """Train what is left of one epoch; a signal leaves it open."""
    epoch, start = run.state.num_epochs_done, run.state.num_epoch_samples_seen
    window = log_window(run)
    run.state.epoch_end_is_due = True
    run.events.emit("on_epoch_begin")
    for batch, waited in timed(run.batches.epoch(epoch, start)):
        window.add(train_batch(run, batch, waited, stop))
        act(run)
        if run.control.should_training_stop or run.control.should_epoch_stop or run.is_over:
            break
    else:
        end_of_data(run, epoch, start)
    if run.stop_signal is None:
        close_epoch(run, epoch)


def close_epoch(run: Run, epoch: int) -> None:
    """End an epoch, cut short if a callback wants it so, and tell it."""
    if run.control.should_epoch_stop and run.state.num_epochs_done == epoch:
        run.state.end_epoch()
    run.events.emit("on_epoch_end")
    run.state.epoch_end_is_due = False
    act(run)


def close_epoch_of_former_run(run: Run) -> None:
    """Tell the end of an epoch that was reached, but not told, when the checkpoint was written."""
    state, control = run.state, run.control
    is_at_end = state.num_epoch_samples_seen == 0 or control.should_epoch_stop or control.should_training_stop
    if state.epoch_end_is_due and (is_at_end or run.is_over):
        close_epoch(run, state.num_epochs_done - (state.num_epoch_samples_seen == 0))


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


def train_batch(run: Run, batch: GlobalBatch, waited: float, stop: StopRequest) -> StepReport:
    """Take one step on a batch that was waited for so many seconds, move the position past it, and report it."""
    run.events.emit("on_step_begin")
    started = now()
    random = generator_states(run.engine.group.device)
    result = take_step(run.engine, batch, stop)
    if result.problem is not None:
        run.crash.handle(batch, result, random)
    counts = run.engine.task.counts(batch)
    run.state.advance(counts["num_samples"], counts.get("num_loss_tokens", 0))
    run.state.total_flos += counts.pop("num_operations")
    run.state.num_input_tokens_seen += counts.get("num_tokens", 0)
    report = report_step(run, result, counts | {"data_seconds": waited}, now() - started)
    if not report.is_skipped:
        run.state.loss_sum += report.loss * report.weight
        run.state.loss_weight += report.weight
    run.events.emit("on_step_end", report=report)
    if result.stop_signal is not None:
        run.stop_signal, run.control.should_training_stop = result.stop_signal, True
        run.events.is_stopped_by_signal = True
    if run.checkpoints.is_on and (result.stop_signal is not None or result.is_save_asked):
        run.control.should_save = True
    return report


def report_step(run: Run, result: StepResult, counts: dict[str, Any], seconds: float) -> StepReport:
    """Put together what the step did."""
    return StepReport(
        step=run.state.global_step,
        epoch=run.state.epoch,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        loss=result.loss,
        is_skipped=result.problem is not None,
        **counts,
        **throughput(counts, seconds),
        peak_memory_bytes=peak_memory_bytes(run.engine.group.device),
        more=result.more,
    )


class LossWindow:
    """Steps since the last log line: their mean loss; of the newest gradient norm, learning rate and what is more.

    Args:
        state: what keeps it, so that a resumed run goes on with it.
        is_filtered: whether the loss of a skipped step is left out; that there was one is always told.
    """

    def __init__(self, state: RunState, *, is_filtered: bool) -> None:
        self._state, self._is_filtered = state, is_filtered

    def add(self, report: StepReport) -> None:
        """Take in one more step."""
        window = dict(self._state.log_window)
        if not (report.is_skipped and self._is_filtered):
            window["loss_sum"] = window.get("loss_sum", 0.0) + report.loss * report.weight
            window["weight"] = window.get("weight", 0) + report.weight
        if report.is_skipped:
            window["num_skipped_steps"] = window.get("num_skipped_steps", 0) + 1
        else:
            window |= {"grad_norm": report.grad_norm, "learning_rate": report.learning_rate, **report.more}
        self._state.log_window = window

    def take(self) -> dict[str, float]:
        """Return the log line and start the next window; without a loss where every step was skipped."""
        window, self._state.log_window = self._state.log_window, {}
        loss_sum, weight = window.pop("loss_sum", 0.0), window.pop("weight", 0)
        return {"loss": loss_sum / weight, **window} if weight else window

    @property
    def has_steps(self) -> bool:
        """Whether a step came since the last line."""
        return bool(self._state.log_window)


def log_window(run: Run) -> LossWindow:
    """Return the steps that the next log line is about."""
    return LossWindow(run.state, is_filtered=run.args.logging_nan_inf_filter)


def act(run: Run) -> None:
    """Do what the callbacks asked for."""
    run.checkpoints.poll()
    window = log_window(run)
    if run.control.should_log and window.has_steps:
        run.log(window.take())
    run.control.should_log = False
    if run.control.should_evaluate:
        evaluate_once(run)
    run.control.should_evaluate = False
    if run.control.should_save:
        run.checkpoints.save()
    run.control.should_save = False


def evaluate_once(run: Run) -> None:
    """Evaluate, unless that was done after this very step: several reasons to evaluate may fall together."""
    if run.state.evaluated_step != run.state.global_step:
        run.evaluate()
        run.state.evaluated_step = run.state.global_step
        if not run.args.export_best:  # the export is the best one's place
            run.checkpoints.mark_best()
