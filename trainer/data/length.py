"""How long a run takes, known before it starts: its steps, and the micro-batches and packing of every epoch.

A pure function of counts, order and options. Every global batch is planned as the loader plans it, for any number of
ranks, without torch. Invariant: the integers predicted here are those that the run logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.config.groups import ScheduleArguments
from trainer.data.order import epoch_order
from trainer.data.packing import TOKENS, CostModel, Plan, plan_batch
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


def custom_length(
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
    """Return the first step, from 1, after which the summed counts are at least the limit."""
    if limit is None:
        return None
    per_epoch = int(counts(0).sum())
    epoch = (limit - 1) // per_epoch  # whole epochs that surely come first: every epoch sums to the same
    reached = epoch * per_epoch + np.cumsum(counts(epoch))
    return epoch * steps_per_epoch + int(np.searchsorted(reached, limit)) + 1


@dataclass(frozen=True)
class EpochForecast:
    """One epoch. `num_placeholders` counts the packs in which a rank has nothing to do."""

    epoch: int
    num_steps: int
    num_micro_batches: int
    num_placeholders: int
    num_tokens: int
    num_loss_tokens: int
    packing_efficiency: float  # tokens / (micro-batches * ranks * budget)
    balance: float  # cost of all packs / (ranks * sum over micro-batches of the most expensive)
    largest_pack: int  # tokens of the largest pack of any rank


@dataclass(frozen=True)
class Layout:
    """How samples are spread: over steps of `batch_size`, and over ranks with a token budget."""

    batch_size: int
    max_tokens_per_rank: int
    world_size: int = 1
    cost: CostModel = TOKENS

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size}: a global batch holds at least one sample")


@dataclass(frozen=True)
class Forecast:
    """A run: how it is laid out, and its epochs. `num_steps` and the other totals are over all epochs."""

    layout: Layout
    num_samples: int
    epochs: tuple[EpochForecast, ...]

    @property
    def num_steps(self) -> int:
        """Optimizer steps, which are global batches."""
        return sum(epoch.num_steps for epoch in self.epochs)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of every rank."""
        return sum(epoch.num_micro_batches for epoch in self.epochs)

    @property
    def num_tokens(self) -> int:
        """Tokens of all ranks."""
        return sum(epoch.num_tokens for epoch in self.epochs)

    @property
    def num_loss_tokens(self) -> int:
        """Trained tokens of all ranks, after the causal shift."""
        return sum(epoch.num_loss_tokens for epoch in self.epochs)


def forecast(
    lengths: NDArray[np.integer], num_loss_tokens: NDArray[np.integer], layout: Layout, seed: int = 0, epochs: int = 1
) -> Forecast:
    """Plan `epochs` epochs of a store with these lengths and loss-token counts.

    Raises:
        UsageError: a sample is over the budget, or an argument is out of range.
    """
    if epochs < 1:
        raise UsageError(f"epochs={epochs}: at least one must be planned")
    num_trained = int(np.sum(num_loss_tokens, dtype=np.int64))
    told = tuple(_epoch(lengths.astype(np.int64), num_trained, layout, seed, epoch) for epoch in range(epochs))
    return Forecast(layout, len(lengths), told)


def _epoch(lengths: NDArray[np.int64], num_loss_tokens: int, layout: Layout, seed: int, epoch: int) -> EpochForecast:
    in_order = lengths[epoch_order(len(lengths), seed, epoch)]
    tally = _Tally(layout.cost)
    for start in range(0, len(lengths), layout.batch_size):
        batch = in_order[start : start + layout.batch_size]
        tally.add(batch, plan_batch(batch, layout.max_tokens_per_rank, layout.world_size, layout.cost))
    num_tokens = int(lengths.sum())
    return EpochForecast(
        epoch=epoch,
        num_steps=tally.num_steps,
        num_micro_batches=tally.num_micro_batches,
        num_placeholders=tally.num_placeholders,
        num_tokens=num_tokens,
        num_loss_tokens=num_loss_tokens,
        packing_efficiency=num_tokens / (tally.num_micro_batches * layout.world_size * layout.max_tokens_per_rank),
        balance=tally.cost / (layout.world_size * tally.slowest) if tally.slowest else 1.0,
        largest_pack=tally.largest,
    )


class _Tally:
    """Running sums over the plans of an epoch."""

    def __init__(self, cost: CostModel) -> None:
        self._cost_model = cost
        self.num_steps = self.num_micro_batches = self.num_placeholders = 0
        self.cost = 0
        self.slowest = 0  # sum over micro-batches of the most expensive rank's cost
        self.largest = 0  # tokens of a pack

    def add(self, lengths: NDArray[np.int64], plan: Plan) -> None:
        """Count one global batch."""
        costs, tokens = self._cost_model.of(lengths).tolist(), lengths.tolist()
        self.num_steps += 1
        self.num_micro_batches += plan.num_micro_batches
        self.cost += sum(costs)
        for micro_batch in plan.packs:
            self.num_placeholders += sum(not pack for pack in micro_batch)
            self.slowest += max(sum(costs[i] for i in pack) for pack in micro_batch)
            self.largest = max(self.largest, *(sum(tokens[i] for i in pack) for pack in micro_batch))
