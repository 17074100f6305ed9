"""The training loop: the one file that knows the order of everything.

Per epoch, per global batch: step, report, then what the callbacks asked for (log, evaluate, save), until one of them or
a signal says stop. Position is two integers, epoch and samples; nothing else decides which batch comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from time import perf_counter

from trainer.checkpoint.run_state import generator_states
from trainer.config.arguments import TrainingArguments
from trainer.data.length import RunLength
from trainer.training.callbacks import Events, RunState
from trainer.training.checkpoints import Checkpoints
from trainer.training.metrics import StepReport, peak_memory_bytes
from trainer.training.nonfinite import CrashRecorder
from trainer.training.signals import StopRequest
from trainer.training.step import Engine, take_step
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
    nominal_tflops: float | None = None  # of this rank's GPU, where that is known
    stop_signal: int | None = None  # the signal that ended the run

    @property
    def is_over(self) -> bool:
        """Return whether all steps or all epochs were trained."""
        state, num_steps, num_epochs = self.events.state, self.length.num_steps, self.length.num_epochs
        if num_steps is not None and state.global_step >= num_steps:
            return True
        return num_epochs is not None and state.num_epochs_done >= num_epochs


def train(run: Run) -> None:
    """Run from the position in `run.events.state` to the end, or until a callback or a signal stops it.

    A signal skips the last evaluation, but not what is written at the end; one that comes after the last step changes
    nothing.
    """
    args, events, state, group = run.args, run.events, run.events.state, run.engine.group
    state.max_steps = run.length.num_steps or -1
    state.num_train_epochs = run.length.num_epochs or 0
    state.num_steps_per_epoch = run.length.steps_per_epoch
    state.num_samples_per_epoch = run.batches.num_samples or state.num_samples_per_epoch
    with (
        StopRequest(saves=run.checkpoints.is_on) as stop,
        group.naming_faults(lambda: f"step {state.global_step + 1}"),
    ):
        events.emit("on_train_begin")
        run.checkpoints.begin()
        if args.eval_on_start and state.global_step == 0:
            evaluate_once(run)
        # The checkpoint that a run goes on from may have been written between the end of an epoch and on_epoch_end.
        is_at_start = state.num_epoch_samples_seen == 0
        is_at_end = is_at_start or events.control.should_epoch_stop or events.control.should_training_stop
        if state.epoch_end_is_due and (is_at_end or run.is_over):
            close_epoch(run, state.num_epochs_done - 1 if is_at_start else state.num_epochs_done)
        while not (run.is_over or events.control.should_training_stop):
            train_epoch(run, stop)
        if run.stop_signal is None:
            if args.save_strategy == "steps":
                run.checkpoints.save()
            if args.eval_at_end:
                evaluate_once(run)
                act(run)
        run.checkpoints.finish()
        run.finish()
        events.emit("on_train_end")


def train_epoch(run: Run, stop: StopRequest) -> None:
    """Train what is left of one epoch; a signal leaves it open."""
    events, state = run.events, run.events.state
    epoch = state.num_epochs_done
    state.epoch_end_is_due = True
    events.emit("on_epoch_begin")
    batches = iter(run.batches.epoch(epoch, state.num_epoch_samples_seen))
    try:
        while True:
            waiting_since = perf_counter()
            batch = next(batches, None)
            if batch is None and state.num_epochs_done == epoch:  # a stream ends: now its length is known
                if state.num_epoch_samples_seen == 0:
                    logger.warning("train_dataset gives no more samples: training stops at step %d", state.global_step)
                    events.control.should_training_stop = True
                else:
                    state.num_samples_per_epoch = state.num_epoch_samples_seen
                    state.end_epoch()
            if batch is None:
                break
            train_batch(run, batch, perf_counter() - waiting_since, stop)
            act(run)
            if events.control.should_training_stop or events.control.should_epoch_stop or run.is_over:
                break
    finally:
        # The traceback of an error would keep it alive, and with it the thread that reads ahead.
        if isinstance(batches, Generator):
            batches.close()
    if run.stop_signal is None:
        close_epoch(run, epoch)


def train_batch(run: Run, batch: GlobalBatch, data_seconds: float, stop: StopRequest) -> None:
    """Take one step on a batch that was waited for so many seconds, move the position past it, and report it."""
    events, state = run.events, run.events.state
    task, device = run.engine.task, run.engine.group.device
    events.emit("on_step_begin")
    started = perf_counter()
    random = generator_states(device)  # so that a step that fails can be replayed with the same dropout
    result = take_step(run.engine, batch, stop)
    if result.problem is not None:
        run.crash.handle(batch, result, random)
    counts = task.counts(batch)
    state.advance(counts.num_samples, counts.num_loss_tokens or 0)
    state.total_flos += counts.num_operations
    state.num_input_tokens_seen += counts.num_tokens or 0
    seconds = perf_counter() - started
    tflops = counts.num_operations / seconds / run.engine.group.world_size / 1e12
    num_steps = run.length.num_steps
    report = StepReport(
        step=state.global_step,
        epoch=state.epoch,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        loss=result.loss,
        num_samples=counts.num_samples,
        num_micro_batches=counts.num_micro_batches,
        samples_per_second=counts.num_samples / seconds,
        data_seconds=data_seconds,
        step_seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(device),
        num_loss_tokens=counts.num_loss_tokens,
        num_tokens=counts.num_tokens,
        packing_efficiency=counts.packing_efficiency,
        tokens_per_second=None if counts.num_tokens is None else counts.num_tokens / seconds,
        tflops_per_rank=tflops or None,
        mfu=None if run.nominal_tflops is None else tflops / run.nominal_tflops,
        seconds_left=None if num_steps is None else (num_steps - state.global_step) * (data_seconds + seconds),
        more=result.more,
        is_skipped=result.problem is not None,
    )
    add_to_log_window(state, report, is_filtered=run.args.logging_nan_inf_filter)
    events.emit("on_step_end", report=report)
    if result.stop_signal is not None:
        run.stop_signal, events.control.should_training_stop = result.stop_signal, True
        events.is_stopped_by_signal = True
    if run.checkpoints.is_on and (result.stop_signal is not None or result.is_save_asked):
        events.control.should_save = True


def close_epoch(run: Run, epoch: int) -> None:
    """End an epoch, cut short if a callback asks for that, and call on_epoch_end."""
    state = run.events.state
    if run.events.control.should_epoch_stop and state.num_epochs_done == epoch:
        state.end_epoch()
    run.events.emit("on_epoch_end")
    state.epoch_end_is_due = False
    act(run)


def add_to_log_window(state: RunState, report: StepReport, *, is_filtered: bool) -> None:
    """Add a step to those that the next log line is about, and to the mean loss of the run.

    The window is part of the state, so that a resumed run continues it.

    Args:
        state: where the run stands.
        report: the step.
        is_filtered: leave out the loss of a skipped step; the line always says that there was one.
    """
    window = dict(state.log_window)
    weight = 1 if report.num_loss_tokens is None else report.num_loss_tokens  # in means over steps
    loss_sum = report.loss * weight
    if not (report.is_skipped and is_filtered):
        window["loss_sum"] = window.get("loss_sum", 0.0) + loss_sum
        window["weight"] = window.get("weight", 0) + weight
    if report.is_skipped:
        window["num_skipped_steps"] = window.get("num_skipped_steps", 0) + 1
    else:
        window |= {"grad_norm": report.grad_norm, "learning_rate": report.learning_rate, **report.more}
        state.loss_sum += loss_sum
        state.loss_weight += weight
    state.log_window = window


def act(run: Run) -> None:
    """Do what the callbacks asked for: log, evaluate, save."""
    state, control = run.events.state, run.events.control
    run.checkpoints.poll()
    if control.should_log and state.log_window:
        line, state.log_window = state.log_window, {}
        loss_sum, weight = line.pop("loss_sum", 0.0), line.pop("weight", 0)
        if weight:  # else every step was skipped
            line = {"loss": loss_sum / weight, **line}
        run.log(line)
    run.events.control.should_log = False
    if run.events.control.should_evaluate:
        evaluate_once(run)
    run.events.control.should_evaluate = False
    if run.events.control.should_save:
        run.checkpoints.save()
    run.events.control.should_save = False


def evaluate_once(run: Run) -> None:
    """Evaluate, unless that was done after this very step: several reasons to evaluate may fall together."""
    state = run.events.state
    if state.evaluated_step != state.global_step:
        run.evaluate()
        state.evaluated_step = state.global_step
        if not run.args.export_best:  # the export is the best one's place
            run.checkpoints.mark_best()
