"""How many optimizer steps a run takes, known before it starts: a pure function of counts, order and options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.config.groups import ScheduleArguments
from trainer.data.sampler import epoch_order
from trainer.errors import UsageError

Counts = np.ndarray  # one count for each global batch of an epoch


@dataclass(frozen=True)
class RunLength:
    """Steps of a run, as planned from its start (None: it never ends), and of one epoch."""

    planned_steps: int | None
    steps_per_epoch: int | None  # None: a stream without a length
    num_steps_more: int = 0  # that were taken because batches had another size before the run was resumed

    @property
    def num_steps(self) -> int | None:
        """Steps of the run; None: it never ends."""
        return None if self.planned_steps is None else self.planned_steps + self.num_steps_more

    @property
    def num_epochs(self) -> int | None:
        """Passes over the data, the last one perhaps not to its end; None where only steps limit them, or nothing."""
        if self.planned_steps is None or self.steps_per_epoch is None:
            return None
        return math.ceil(self.planned_steps / self.steps_per_epoch)


def run_length(num_loss_tokens: np.ndarray, batch_size: int, seed: int, args: ScheduleArguments) -> RunLength:
    """Plan the number of steps over samples with these loss-token counts.

    max_steps, max_tokens and max_samples, where given, take the place of num_train_epochs; the first one reached stops.
    """
    num_samples = len(num_loss_tokens)
    starts = np.arange(0, num_samples, batch_size)

    def loss_tokens(epoch: int) -> Counts:
        return np.add.reduceat(num_loss_tokens[epoch_order(num_samples, seed, epoch)].astype(np.int64), starts)

    by_tokens = _first_step_reaching(args.max_tokens, loss_tokens, len(starts))
    by_samples = _first_step_reaching(args.max_samples, lambda _: _sizes(num_samples, batch_size), len(starts))
    return _first_limit([args.max_steps if args.max_steps > 0 else None, by_tokens, by_samples], len(starts), args)


def ordinary_length(
    num_samples: int | None, steps_per_epoch: int | None, batch_size: int, args: ScheduleArguments
) -> RunLength:
    """Plan the number of steps over batches of which no loss tokens are known, and perhaps not even the samples.

    Raises:
        UsageError: nothing says when to stop.
    """
    by_samples = None
    if args.max_samples is not None and num_samples is not None and steps_per_epoch is not None:
        by_samples = _first_step_reaching(args.max_samples, lambda _: _sizes(num_samples, batch_size), steps_per_epoch)
    elif args.max_samples is not None:
        by_samples = math.ceil(args.max_samples / batch_size)
    return _first_limit([args.max_steps if args.max_steps > 0 else None, by_samples], steps_per_epoch, args)


def _first_limit(limits: list[int | None], steps_per_epoch: int | None, args: ScheduleArguments) -> RunLength:
    """The first of these limits, or num_train_epochs where there is none."""
    given = [limit for limit in limits if limit is not None]
    if given:
        return RunLength(min(given), steps_per_epoch)
    if steps_per_epoch is None:
        raise UsageError(
            "max_steps must be given: train_dataset has no length, so num_train_epochs does not say how many steps "
            "there are"
        )
    num_steps = args.num_train_epochs * steps_per_epoch
    return RunLength(None if math.isinf(num_steps) else math.ceil(num_steps), steps_per_epoch)


def _sizes(num_samples: int, batch_size: int) -> Counts:
    """Samples of each global batch of an epoch."""
    return np.diff(np.arange(0, num_samples, batch_size), append=num_samples)


def _first_step_reaching(limit: int | None, counts: Callable[[int], Counts], steps_per_epoch: int) -> int | None:
    """Give the first step, from 1, after which the summed counts are at least the limit."""
    if limit is None:
        return None
    per_epoch = int(counts(0).sum())
    epoch = (limit - 1) // per_epoch  # whole epochs that surely come first: every epoch sums to the same
    reached = epoch * per_epoch + np.cumsum(counts(epoch))
    return epoch * steps_per_epoch + int(np.searchsorted(reached, limit)) + 1
