"""One optimizer step: micro-batches, loss, gradient, update.

What a global batch is and how it becomes gradients is the objective's business; the gradient that it leaves, summed
over ranks, is that of the batch's mean loss however the batch is split (law L2). A non-finite loss or gradient is never
stepped on; every rank sees the same numbers and acts alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer.distributed.group import Group
from trainer.errors import NonFiniteError, UsageError
from trainer.model.osft.layers import Osft
from trainer.optim.averaging import is_averaging
from trainer.optim.gradients import clip, global_norm, sum_whole_gradients
from trainer.optim.in_backward import last_backward, steps_in_backward
from trainer.optim.scaling import LossScale
from trainer.optim.schedules import advance, step_schedule
from trainer.training.metrics import BatchMetrics
from trainer.training.signals import StopRequest

GlobalBatch = Any  # this rank's share of one, as the objective knows it
OWN_LOSS = "own_loss"
Emit = Callable[[str], None]  # tells the callbacks of an event


class Objective(Protocol):
    """What is minimised: packs of tokens by their cross-entropy, or whatever a model calls its loss."""

    def backward(self, batch: GlobalBatch) -> Iterator[Tensor]:
        """Go through this rank's micro-batches, add the gradient of each, and give its share of the batch's loss.

        Every rank gives equally many. The shares of all micro-batches and ranks sum to the mean loss.
        """

    def counts(self, batch: GlobalBatch) -> dict[str, Any]:
        """Count what the batch holds over all ranks: `num_samples`, `num_micro_batches`, and what else is known."""


@dataclass(frozen=True)
class Engine:
    """What a step changes and what it needs."""

    model: nn.Module
    objective: Objective
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
    """What came of a step, the same on every rank but for `own_loss`."""

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
    totals, norm = find_gradients(engine, batch, stop)
    while engine.scale.must_shrink(norm.item()):
        engine.optimizer.zero_grad()
        totals, norm = find_gradients(engine, batch, stop)
    loss, grad_norm = totals["loss"], norm.item()
    signals = (stop.agreed(totals), stop.agreed_to_save(totals))
    if (problem := find_non_finite(loss, grad_norm, engine.optimizer)) is not None:
        return StepResult(loss, grad_norm, skip(engine), *signals, {}, totals[OWN_LOSS], problem)
    engine.scale.grow()
    learning_rate = update(engine, norm)
    more = {} if engine.osft is None else engine.osft.report()
    return StepResult(loss, grad_norm, learning_rate, *signals, more)


def find_gradients(engine: Engine, batch: GlobalBatch, stop: StopRequest) -> tuple[dict[str, float], Tensor]:
    """Leave the gradient of a global batch, over all ranks; gives the sums over ranks, and its norm.

    Beside the sums stands this rank's own share of the loss.
    """
    metrics = accumulate_gradients(engine, batch)
    metrics.accumulate(**stop.as_flags())
    own_loss = metrics.own("loss")
    totals = metrics.reduce(engine.group)
    sum_whole_gradients(engine.model.parameters(), engine.group)
    engine.scale.unscale(engine.model.parameters())
    if engine.osft is not None:
        engine.osft.project_gradients()
    totals[OWN_LOSS] = own_loss.item()
    return totals, global_norm(engine.model.parameters(), engine.optimizer)


def accumulate_gradients(engine: Engine, batch: GlobalBatch) -> BatchMetrics:
    """Add this rank's share of the gradient of the global batch's mean loss; gives its share of that `loss`."""
    metrics = BatchMetrics()
    num_micro_batches = engine.objective.counts(batch)["num_micro_batches"]
    losses = engine.objective.backward(batch)  # one for each micro-batch, as it is drawn
    for number in range(1, num_micro_batches + 1):
        with last_backward(engine.optimizer) if number == num_micro_batches else nullcontext():
            metrics.accumulate(loss=next(losses))
        if number < num_micro_batches:
            engine.emit("on_substep_end")
    next(losses, None)  # lets it come to its end
    return metrics


def update(engine: Engine, norm: Tensor) -> float:
    """Clip, move the weights, advance the schedule, clear the gradients; give the learning rate that was used."""
    learning_rate = engine.schedule.get_last_lr()[0]
    clip(engine.model.parameters(), norm, engine.max_grad_norm)
    engine.emit("on_pre_optimizer_step")
    engine.optimizer.step()
    if engine.osft is not None:
        engine.osft.project_updates()
    engine.emit("on_optimizer_step")
    step_schedule(engine.schedule)
    engine.optimizer.zero_grad()
    return float(learning_rate)


def skip(engine: Engine) -> float:
    """Leave the weights alone, advance the schedule, clear the gradients; give the learning rate of the step."""
    learning_rate = engine.schedule.get_last_lr()[0]
    engine.optimizer.zero_grad()
    advance(engine.schedule)
    return float(learning_rate)


def find_non_finite(loss: float, grad_norm: float, optimizer: Optimizer) -> str | None:
    """Say which of the two is NaN or infinite, if one is.

    Raises:
        NonFiniteError: and the optimizer has stepped on it already.
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            if steps_in_backward(optimizer):
                raise NonFiniteError(
                    f"{name} is {value}: the optimizer stepped on it during backward and the weights are spoilt; go "
                    "back to a checkpoint"
                )
            return f"{name} is {value}"
    return None


def to_device(data: Any, device: torch.device) -> Any:
    """Copy the tensors of a micro-batch to the device, however they are nested; all else stays as it is."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        return type(data)({name: to_device(value, device) for name, value in data.items()})  # type: ignore[call-arg]
    if isinstance(data, list | tuple):
        return type(data)(to_device(value, device) for value in data)
    return data
