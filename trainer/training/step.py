"""One optimizer step: micro-batches, loss, gradient, update.

Loss functions return sums; the one division by the loss tokens of the global batch, known from the plan, stands here.
Gradients are summed over ranks by FSDP2. So the step is the same however the batch is split (law L2). A non-finite loss
or gradient is never stepped on; every rank sees the same numbers and acts alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer.data.collate import MicroBatch
from trainer.distributed.group import Group
from trainer.errors import NonFiniteError
from trainer.model.loss import token_loss_sum
from trainer.optim.gradients import clip, global_norm
from trainer.training.metrics import BatchMetrics
from trainer.training.signals import StopRequest


@dataclass(frozen=True)
class Engine:
    """What a step changes and what it needs."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    group: Group
    max_grad_norm: float
    label_smoothing: float


@dataclass(frozen=True)
class StepResult:
    """What came of a step, the same on every rank."""

    loss: float  # mean over the loss tokens of the global batch
    grad_norm: float  # before clipping
    learning_rate: float  # used by this step
    stop_signal: int | None  # some rank was asked to stop by this signal


def take_step(engine: Engine, batch: list[MicroBatch], stop: StopRequest) -> StepResult:
    """Take one optimizer step on this rank's share of a global batch.

    Raises:
        NonFiniteError: loss or gradient norm is NaN or infinite; nothing was updated.
    """
    metrics = accumulate_gradients(engine, batch)
    metrics.accumulate(**stop.as_flags())
    totals = metrics.reduce(engine.group)
    norm = global_norm(engine.model.parameters())
    loss, grad_norm = totals["loss"], norm.item()
    check_finite(loss, grad_norm)
    return StepResult(loss, grad_norm, update(engine, norm), stop.agreed(totals))


def accumulate_gradients(engine: Engine, batch: list[MicroBatch]) -> BatchMetrics:
    """Add this rank's share of the gradient of the global batch's mean loss; gives its share of that `loss`."""
    metrics = BatchMetrics()
    num_loss_tokens = batch[0]["batch_num_loss_counted_tokens"]
    for micro_batch in batch:
        loss_sum = token_loss_sum(engine.model, to_device(micro_batch, engine.group.device), engine.label_smoothing)
        loss = loss_sum / num_loss_tokens
        loss.backward()
        metrics.accumulate(loss=loss)
    return metrics


def update(engine: Engine, norm: torch.Tensor) -> float:
    """Clip, move the weights, advance the schedule, clear the gradients; give the learning rate that was used."""
    learning_rate = engine.schedule.get_last_lr()[0]
    clip(engine.model.parameters(), norm, engine.max_grad_norm)
    engine.optimizer.step()
    engine.schedule.step()
    engine.optimizer.zero_grad()
    return float(learning_rate)


def check_finite(loss: float, grad_norm: float) -> None:
    """Raise NonFiniteError, naming which of the two is NaN or infinite."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value}: the step was not taken, the weights are those of the step before")


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Copy the tensors of a micro-batch to the device; counts stay plain numbers."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in micro_batch.items()
    }
    return MicroBatch(**moved)  # type: ignore[typeddict-item]
