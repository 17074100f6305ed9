"""Which rank runs which samples in which micro-batch: the plan of one global batch, from lengths alone.

Owns the public face of packing: cost models, `plan_batch`, and the two functions whose names and contract are fixed.
Knows no tokens, no tensors and no process group. Invariant of every plan: each sample in exactly one pack, no pack over
the budget, every rank the same number of micro-batches, an empty pack only where there are fewer samples than packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from trainer.data.planner import TOKENS, Batch, CostModel, cost_model_from_config, pack, spread_to_empty
from trainer.errors import DataError, UsageError

__all__ = [
    "TOKENS",
    "CostModel",
    "Plan",
    "batch_lengths_to_minibatches",
    "batch_lengths_to_minibatches_lpt",
    "check_fits",
    "cost_model_from_config",
    "plan_batch",
]

PLACEHOLDER = -1

BatchLengths = Sequence[int] | NDArray[np.integer]
Packs = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """packs[m][r]: indices of the samples that rank r runs in micro-batch m; empty for a placeholder."""

    packs: tuple[Packs, ...]
    num_ranks: int

    @property
    def num_micro_batches(self) -> int:
        """How many micro-batches every rank runs."""
        return len(self.packs)

    def of_rank(self, rank: int) -> Packs:
        """This rank's pack of each micro-batch."""
        return tuple(micro_batch[rank] for micro_batch in self.packs)


def plan_batch(lengths: BatchLengths, max_tokens_per_rank: int, num_ranks: int, cost: CostModel = TOKENS) -> Plan:
    """The plan that trains these samples in the fewest micro-batches, then at the least cost.

    Args:
        lengths: tokens of each sample of the global batch.
        max_tokens_per_rank: token budget of one rank in one micro-batch.
        num_ranks: ranks that share the batch.
        cost: what a sample costs; decides the balance, not the number of micro-batches.

    Raises:
        DataError: for a sample over the budget.
        UsageError: for arguments out of range.

    The most expensive micro-batch comes first, so that running out of memory shows at once.
    """
    checked = _checked(lengths, max_tokens_per_rank, num_ranks)
    if checked.size == 0:
        return Plan((), num_ranks)
    order = np.argsort(-checked, kind="stable")
    batch = Batch(checked[order], max_tokens_per_rank, num_ranks, cost)
    ids, costs = order.tolist(), batch.costs
    packs = [(sum([costs[i] for i in members]), sorted([ids[i] for i in members])) for members in pack(batch)]
    packs.sort(key=itemgetter(0), reverse=True)
    return Plan(_to_ranks(packs, num_ranks), num_ranks)


def batch_lengths_to_minibatches(
    batch_lengths: BatchLengths, max_tokens_per_rank: int, num_ranks: int, rank: int
) -> list[list[int]]:
    """Greedy packing, in the order given: this rank's list of micro-batches, each a list of indices.

    Each sample goes to the rank with the fewest tokens in the present micro-batch; where it has no room there, a new
    micro-batch begins. A rank with nothing to do in a micro-batch gets [-1]; no samples give []. For errors see
    `plan_batch`.
    """
    checked = _checked(batch_lengths, max_tokens_per_rank, num_ranks)
    _check_rank(rank, num_ranks)
    packs: list[list[int]] = []
    tokens: list[int] = []
    for i, length in enumerate(checked.tolist()):
        chosen = _least_loaded(packs, tokens, num_ranks)
        if chosen < 0 or tokens[chosen] + length > max_tokens_per_rank:
            packs += [[] for _ in range(num_ranks)]
            tokens += [0] * num_ranks
            chosen = len(packs) - num_ranks
        packs[chosen].append(i)
        tokens[chosen] += length
    spread_to_empty(packs)
    return _share([sorted(members) for members in packs[rank::num_ranks]])


def batch_lengths_to_minibatches_lpt(
    batch_lengths: BatchLengths, max_tokens_per_rank: int, num_ranks: int, rank: int
) -> list[list[int]]:
    """This rank's share of `plan_batch` with token costs, in the form of `batch_lengths_to_minibatches`."""
    _check_rank(rank, num_ranks)
    return _share(
        [list(members) for members in plan_batch(batch_lengths, max_tokens_per_rank, num_ranks).of_rank(rank)]
    )


def _to_ranks(packs: list[tuple[int, list[int]]], num_ranks: int) -> tuple[Packs, ...]:
    """Packs (cost, members), most expensive first, to micro-batches: each to the rank that has done least so far."""
    done = [0] * num_ranks
    micro_batches = []
    for start in range(0, len(packs), num_ranks):
        ranks = sorted(range(num_ranks), key=done.__getitem__)
        micro_batch: list[tuple[int, ...]] = [()] * num_ranks
        for rank, (cost, members) in zip(ranks, packs[start : start + num_ranks], strict=True):
            done[rank] += cost
            micro_batch[rank] = tuple(members)
        micro_batches.append(tuple(micro_batch))
    return tuple(micro_batches)


def _least_loaded(packs: list[list[int]], tokens: list[int], num_ranks: int) -> int:
    """Index of the pack of the last micro-batch with the fewest tokens; -1 before the first."""
    last = range(len(packs) - num_ranks, len(packs))
    return min(last, key=tokens.__getitem__) if packs else -1


def _share(packs: list[list[int]]) -> list[list[int]]:
    return [members or [PLACEHOLDER] for members in packs]


def _check_rank(rank: int, num_ranks: int) -> None:
    if not 0 <= rank < num_ranks:
        raise UsageError(f"rank {rank} is not in 0..{num_ranks - 1}: it must be below num_ranks={num_ranks}")


def _checked(lengths: BatchLengths, max_tokens_per_rank: int, num_ranks: int) -> NDArray[np.int64]:
    """Lengths as int64, all arguments checked."""
    if num_ranks < 1:
        raise UsageError(f"num_ranks={num_ranks}: at least one rank must train")
    if max_tokens_per_rank < 1:
        raise UsageError(f"max_tokens_per_rank={max_tokens_per_rank}: the token budget must be at least 1")
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"lengths of shape {array.shape} and type {array.dtype}: a flat list of integers is needed")
    array = array.astype(np.int64)
    check_fits(array, max_tokens_per_rank)
    return array


def check_fits(lengths: NDArray[np.integer], max_tokens_per_rank: int) -> None:
    """Raise where a sample is longer than the token budget; the only check of its kind.

    Raises:
        DataError: a sample is over the budget; it names the first one and how many there are.
        UsageError: a length is negative.
    """
    wrong = np.flatnonzero((lengths < 0) | (lengths > max_tokens_per_rank))
    if wrong.size == 0:
        return
    index, length = int(wrong[0]), int(lengths[wrong[0]])
    if length < 0:
        raise UsageError(f"sample {index} has length {length}: lengths cannot be negative")
    raise DataError(
        f"sample {index} has {length} tokens ({wrong.size} of {lengths.size} samples are over the budget)",
        f"at most max_tokens_per_rank={max_tokens_per_rank} fit; raise it, or choose what happens to longer samples "
        "when preparing the data (overlong)",
        field="input_ids",
    )
