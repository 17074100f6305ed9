"""What the plan foretells: micro-batches, packing efficiency and balance of a run, before any tensor exists.

Plans every global batch as the loader does, from lengths and order alone, for any world size. Knows no torch.
Invariant: its whole numbers are those that a run over `EpochSampler` logs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import TOKENS, CostModel, Plan, plan_batch
from trainer.data.sampler import epoch_order
from trainer.errors import UsageError


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
    balance: float  # cost of all packs / (ranks * sum over micro-batches of the dearest)


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
        raise UsageError(f"epochs={epochs}: there must be at least one to foretell")
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
        balance=tally.cost / (layout.world_size * tally.dearest) if tally.dearest else 1.0,
    )


class _Tally:
    """Running sums over the plans of an epoch."""

    def __init__(self, cost: CostModel) -> None:
        self._cost_model = cost
        self.num_steps = self.num_micro_batches = self.num_placeholders = 0
        self.cost = 0
        self.dearest = 0  # sum over micro-batches of the dearest rank's cost

    def add(self, lengths: NDArray[np.int64], plan: Plan) -> None:
        """Count one global batch."""
        costs = self._cost_model.of(lengths).tolist()
        self.num_steps += 1
        self.num_micro_batches += plan.num_micro_batches
        self.cost += sum(costs)
        for micro_batch in plan.packs:
            self.num_placeholders += sum(not pack for pack in micro_batch)
            self.dearest += max(sum(costs[i] for i in pack) for pack in micro_batch)
