"""How many optimizer steps a run takes, known before it starts: a pure function of counts, order and options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.arguments.groups import ScheduleArguments
from trainer.data.sampler import epoch_order

Counts = np.ndarray  # one count for each global batch of an epoch


@dataclass(frozen=True)
class RunLength:
    """Steps of a run (None: it never ends) and of one epoch."""

    num_steps: int | None
    steps_per_epoch: int


def run_length(num_loss_tokens: np.ndarray, batch_size: int, seed: int, args: ScheduleArguments) -> RunLength:
    """Plan the number of steps over samples with these loss-token counts.

    max_steps, max_tokens and max_samples, where given, take the place of num_train_epochs; the first one reached stops.
    """
    num_samples = len(num_loss_tokens)
    steps_per_epoch = math.ceil(num_samples / batch_size)
    starts = np.arange(0, num_samples, batch_size)

    def loss_tokens(epoch: int) -> Counts:
        return np.add.reduceat(num_loss_tokens[epoch_order(num_samples, seed, epoch)].astype(np.int64), starts)

    def samples(epoch: int) -> Counts:
        return np.diff(starts, append=num_samples)

    limits = [
        args.max_steps if args.max_steps > 0 else None,
        _first_step_reaching(args.max_tokens, loss_tokens, steps_per_epoch),
        _first_step_reaching(args.max_samples, samples, steps_per_epoch),
    ]
    given = [limit for limit in limits if limit is not None]
    if given:
        return RunLength(min(given), steps_per_epoch)
    num_steps = args.num_train_epochs * steps_per_epoch
    return RunLength(None if math.isinf(num_steps) else math.ceil(num_steps), steps_per_epoch)


def _first_step_reaching(limit: int | None, counts: Callable[[int], Counts], steps_per_epoch: int) -> int | None:
    """Give the first step, from 1, after which the summed counts are at least the limit."""
    if limit is None:
        return None
    per_epoch = int(counts(0).sum())
    epoch = (limit - 1) // per_epoch  # whole epochs that surely come first: every epoch sums to the same
    reached = epoch * per_epoch + np.cumsum(counts(epoch))
    return epoch * steps_per_epoch + int(np.searchsorted(reached, limit)) + 1
