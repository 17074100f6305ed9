"""One optimizer step: micro-batches, loss, gradient, update.

What a global batch is and how a micro-batch becomes a gradient is the task's business. The gradient that the task
leaves, summed over ranks, is that of the batch's mean loss however the batch is split (law L2). A non-finite loss or
gradient is never stepped on; every rank sees the same numbers and acts alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer.distributed.group import Group
from trainer.errors import NonFiniteError, UsageError
from trainer.model.osft.layers import Osft
from trainer.optim.adapters import is_averaging
from trainer.optim.gradients import LossScale, clip, global_norm, last_backward, steps_in_backward, sum_whole_gradients
from trainer.optim.schedules import advance, step_schedule
from trainer.training.metrics import BatchMetrics
from trainer.training.signals import StopRequest
from trainer.training.task import GlobalBatch, Task

Emit = Callable[[str], None]  # calls an event of the callbacks


@dataclass(frozen=True)
class Engine:
    """What a step changes and what it needs."""

    model: nn.Module
    task: Task
    optimizer: Optimizer
    schedule: LRScheduler
    group: Group
    max_grad_norm: float
    emit: Emit
    scale: LossScale
    osft: Osft | None = None

    def __post_init__(self) -> None:
        if self.scale.is_on and steps_in_backward(self.optimizer):
            raise UsageError(
                "fp16 scales the loss, and an optimizer that steps during backward would take the scale for gradients; "
                "give bf16, or choose another optim"
            )
        if self.osft is not None and (steps_in_backward(self.optimizer) or is_averaging(self.optimizer)):
            raise UsageError(
                "osft projects gradients before the step, and weights after it: an optimizer that steps during "
                "backward, or keeps averaged weights of its own, would undo it; choose another optim"
            )


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on every rank except `own_loss`."""

    loss: float  # mean over the loss tokens of the global batch
    grad_norm: float  # before clipping
    learning_rate: float  # used by this step
    stop_signal: int | None  # some rank was asked to stop by this signal
    is_save_asked: bool  # some rank was asked to save
    more: dict[str, float]  # metrics of what is switched on
    own_loss: float = 0.0  # this rank's share of the loss, of a step that was not taken
    problem: str | None = None  # why the step was not taken: nothing was updated but the schedule


def take_step(engine: Engine, batch: GlobalBatch, stop: StopRequest) -> StepResult:
    """Take one optimizer step on this rank's share of a global batch; not with a non-finite loss or gradient.

    Raises:
        NonFiniteError: loss or gradient norm is NaN or infinite, and the optimizer has stepped during backward.
        LeakError: the update moved what OSFT protects.
    """
    model, optimizer, schedule = engine.model, engine.optimizer, engine.schedule
    group, osft = engine.group, engine.osft
    while True:
        metrics = accumulate_gradients(engine, batch)
        own_loss = metrics.sums["loss"]
        metrics.accumulate(**stop.as_flags())  # one collective for the loss and what signals ask for
        totals = metrics.reduce(group)
        # FSDP2 has summed the gradients of sharded parameters over ranks; those that every rank holds whole are not.
        sum_whole_gradients(model.parameters(), group)
        engine.scale.unscale(model.parameters())
        if osft is not None:
            osft.project_gradients()
        norm = global_norm(model.parameters(), optimizer)
        loss, grad_norm = totals.pop("loss"), norm.item()
        if not engine.scale.must_shrink(grad_norm):
            break
        optimizer.zero_grad()  # fp16 overflowed: the same batch again with a smaller scale

    learning_rate = float(schedule.get_last_lr()[0])
    signals = stop.agreed(totals)
    problem = find_non_finite(loss, grad_norm)
    if problem is not None:
        if steps_in_backward(optimizer):
            raise NonFiniteError(
                f"{problem}: the optimizer stepped on it during backward and the weights are damaged; go back to "
                "a checkpoint"
            )
        optimizer.zero_grad()
        advance(schedule)
        return StepResult(loss, grad_norm, learning_rate, *signals, {}, own_loss.item(), problem)

    engine.scale.grow()
    clip(model.parameters(), norm, engine.max_grad_norm)
    engine.emit("on_pre_optimizer_step")
    optimizer.step()
    if osft is not None:
        # AdamW's update is not its gradient: the part of the weights that leaves the free subspace is taken back.
        osft.project_updates()
    engine.emit("on_optimizer_step")
    step_schedule(schedule)
    optimizer.zero_grad()
    more = {name: value for name, value in totals.items() if name in engine.task.more_metrics}
    if osft is not None:
        more |= osft.report()
    return StepResult(loss, grad_norm, learning_rate, *signals, more)


def accumulate_gradients(engine: Engine, batch: GlobalBatch) -> BatchMetrics:
    """Add the gradient of this rank's micro-batches; return its share of `loss` and of what else the task measures."""
    metrics = BatchMetrics()
    num_micro_batches = engine.task.counts(batch).num_micro_batches
    for i in range(num_micro_batches):
        is_last = i == num_micro_batches - 1
        with last_backward(engine.optimizer) if is_last else nullcontext():
            metrics.accumulate(**engine.task.backward(batch, i))
        if not is_last:
            engine.emit("on_substep_end")
    return metrics


def find_non_finite(loss: float, grad_norm: float) -> str | None:
    """Say which of the two is NaN or infinite, if one is."""
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"gradient norm is {grad_norm}"
    return None
