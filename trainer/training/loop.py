"""The training loop: the one file that knows the order of everything.

Per epoch, per global batch: step, report, then whatever the callbacks asked for (log, evaluate), until one of them or a
signal says stop. Position is two integers, epoch and samples; nothing else decides which batch comes next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_callback import CallbackHandler, TrainerControl

from trainer.arguments.training import TrainingArguments
from trainer.data.collate import MicroBatch
from trainer.data.length import RunLength
from trainer.data.sampler import EpochSampler
from trainer.training.callbacks import RunState
from trainer.training.metrics import StepReport, batch_counts, now, peak_memory_bytes, throughput
from trainer.training.signals import StopRequest
from trainer.training.step import Engine, StepResult, take_step

GlobalBatch = list[MicroBatch]  # this rank's share of it


@dataclass
class Run:
    """Everything that the loop drives."""

    args: TrainingArguments
    engine: Engine
    loader: DataLoader[GlobalBatch]
    sampler: EpochSampler
    num_samples: int
    length: RunLength
    state: RunState
    control: TrainerControl
    callbacks: CallbackHandler
    evaluate: Callable[[], dict[str, float]]
    log: Callable[[dict[str, float]], None]
    loss_sum: float = 0.0  # over all loss tokens trained so far
    stop_signal: int | None = None  # the signal that ended the run
    evaluated_step: int | None = None  # the last step after which there was an evaluation


def train(run: Run) -> None:
    """Run from the position in `run.state` to the end, or until a callback or a signal stops it.

    A signal skips the last evaluation, but not what is written at the end; one that comes after the last step changes
    nothing.
    """
    run.state.max_steps = run.length.num_steps or -1
    with StopRequest() as stop:
        run.callbacks.on_train_begin(run.args, run.state, run.control)
        if run.args.eval_on_start:
            evaluate_once(run)
        for epoch in itertools.count(run.state.num_samples_seen // run.num_samples):
            train_epoch(run, epoch, stop)
            if run.control.should_training_stop:
                break
        if run.args.eval_at_end and run.stop_signal is None:
            evaluate_once(run)
        run.callbacks.on_train_end(run.args, run.state, run.control)


def train_epoch(run: Run, epoch: int, stop: StopRequest) -> None:
    """Train what is left of one epoch."""
    run.sampler.set_epoch(epoch, start=run.state.num_samples_seen - epoch * run.num_samples)
    run.callbacks.on_epoch_begin(run.args, run.state, run.control)
    window = LossWindow()
    for batch in run.loader:
        report = train_batch(run, batch, stop)
        window.add(report)
        act(run, window)
        if run.control.should_training_stop or run.control.should_epoch_stop:
            break
    run.callbacks.on_epoch_end(run.args, run.state, run.control)
    act(run, window)


def train_batch(run: Run, batch: GlobalBatch, stop: StopRequest) -> StepReport:
    """Take one step, move the position past it, and report it."""
    run.callbacks.on_step_begin(run.args, run.state, run.control)
    started = now()
    result = take_step(run.engine, batch, stop)
    counts = batch_counts(batch, run.args.max_tokens_per_rank, run.engine.group.world_size)
    advance(run, counts["num_samples"], counts["num_loss_tokens"])
    run.loss_sum += result.loss * counts["num_loss_tokens"]
    report = report_step(run, result, counts, now() - started)
    run.callbacks.on_step_end(run.args, run.state, run.control, report=report)
    if result.stop_signal is not None:
        run.stop_signal, run.control.should_training_stop = result.stop_signal, True
    return report


def advance(run: Run, num_samples: int, num_loss_tokens: int) -> None:
    """Move the position past a finished step."""
    run.state.global_step += 1
    run.state.num_samples_seen += num_samples
    run.state.num_loss_tokens_seen += num_loss_tokens
    run.state.epoch = run.state.num_samples_seen / run.num_samples


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
    )


class LossWindow:
    """Steps since the last log line: their mean loss over loss tokens, and the newest report."""

    def __init__(self) -> None:
        self._loss_sum, self._num_loss_tokens = 0.0, 0
        self._newest: StepReport | None = None

    def add(self, report: StepReport) -> None:
        """Take in one more step."""
        self._loss_sum += report.loss * report.num_loss_tokens
        self._num_loss_tokens += report.num_loss_tokens
        self._newest = report

    def take(self) -> dict[str, float]:
        """Give the log line and start the next window."""
        assert self._newest is not None
        line = {
            "loss": self._loss_sum / self._num_loss_tokens,
            "grad_norm": self._newest.grad_norm,
            "learning_rate": self._newest.learning_rate,
        }
        self._loss_sum, self._num_loss_tokens = 0.0, 0
        return line

    @property
    def has_steps(self) -> bool:
        """Whether a step came since the last line."""
        return self._num_loss_tokens > 0


def act(run: Run, window: LossWindow) -> None:
    """Do what the callbacks asked for."""
    if run.control.should_log and window.has_steps:
        run.log(window.take())
    run.control.should_log = False
    if run.control.should_evaluate:
        evaluate_once(run)
    run.control.should_evaluate = False


def evaluate_once(run: Run) -> None:
    """Evaluate, unless that was done after this very step: several reasons to evaluate may fall together."""
    if run.evaluated_step != run.state.global_step:
        run.evaluate()
        run.evaluated_step = run.state.global_step
