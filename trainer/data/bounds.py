"""What no plan can beat: fewest micro-batches for given lengths, and the least cost of a step.

Owns lower bounds only; knows nothing of how plans are made. Lengths come sorted, longest first, as int64; no bound is
above what some valid plan reaches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trainer.data.costs import CostModel

LARGEST_DUAL_FEASIBLE_STEP = 12
MOST_SHARING = 8  # samples of one pack, beyond the first, that the bound on the dearest pack looks at

Integers = NDArray[np.int64]


def least_packs(lengths: Integers, capacity: int) -> int:
    """A lower bound on the number of packs of `capacity` tokens that hold all samples.

    The greater of two: what dual feasible functions weigh, and the number of samples of at least one length that a pack
    can hold.
    """
    lengths = lengths[lengths > 0]
    return max(_dual_feasible(lengths, capacity), _by_count(lengths, capacity)) if lengths.size else 0


def _dual_feasible(lengths: Integers, capacity: int) -> int:
    """Samples are weighed such that no pack that fits weighs more than one pack (Fekete and Schepers, 2001).

    By their length; and rounded to k-ths of a pack, for some k. On top of each, for every threshold t up to half a
    pack, those shorter than t weigh nothing and those longer than capacity - t, which can share with no other, a whole
    pack. With the first and the last of the weights this is Martello and Toth's bound L2.
    """
    thresholds = np.unique(np.append(lengths[lengths <= capacity // 2], 1))
    num_alone = _counts_longer(lengths, capacity - thresholds)
    num_counted = _counts_longer(lengths, thresholds - 1)
    best = 0
    for weights, of_a_pack in _weights(lengths, capacity):
        totals = np.concatenate(([0], np.cumsum(weights)))
        heaviest = int((num_alone * of_a_pack + totals[num_counted] - totals[num_alone]).max())
        best = max(best, -(-heaviest // of_a_pack))
    return best


def _weights(lengths: Integers, capacity: int) -> Iterator[tuple[Integers, int]]:
    yield lengths, capacity
    for k in range(LARGEST_DUAL_FEASIBLE_STEP, 0, -1):
        whole, remainder = np.divmod((k + 1) * lengths, capacity)
        yield np.where(remainder == 0, k * lengths, whole * capacity), k * capacity


def _by_count(lengths: Integers, capacity: int) -> int:
    """The j longest samples are all at least as long as the j-th, and only so many of that length fit one pack."""
    j = np.arange(1, lengths.size + 1)
    return int((-(-j // (capacity // lengths))).max())


def floor_costs(lengths: Integers, capacity: int, num_ranks: int, num_micro_batches: int, cost: CostModel) -> Integers:
    """What the m-th dearest micro-batch costs at least, for m = 0, 1, ...

    A prefix of the samples needs one pack for each sample over half the capacity, and one for each `capacity` tokens.
    When it needs more than m * num_ranks packs, its shortest sample cannot be in the m dearest micro-batches. And some
    pack, so the dearest, holds t + 1 of the first t * packs + 1 samples.
    """
    if lengths.size == 0:
        return np.zeros(num_micro_batches, np.int64)
    large = np.minimum(np.arange(1, lengths.size + 1), _count_longer(lengths, capacity // 2))
    needed = np.maximum(large, -(-np.cumsum(lengths) // capacity))
    first = np.searchsorted(needed, np.arange(num_micro_batches) * num_ranks, side="right")
    costs = np.append(cost.of(lengths), 0)
    floors = np.asarray(costs[first], np.int64)
    num_packs = num_micro_batches * num_ranks
    for t in range(1, min(MOST_SHARING, (lengths.size - 1) // num_packs) + 1):
        floors[0] = max(floors[0], costs[t * num_packs - t : t * num_packs + 1].sum())
    return floors


def least_step_cost(lengths: Integers, capacity: int, num_ranks: int, num_micro_batches: int, cost: CostModel) -> int:
    """A lower bound on the sum, over micro-batches, of the dearest rank's cost.

    For every k: the k dearest micro-batches cost at least their floors, and they hold no more than what the longest
    samples within k * num_ranks * capacity tokens cost; the rest is shared by num_ranks at best.
    """
    floors = floor_costs(lengths, capacity, num_ranks, num_micro_batches, cost)
    first = np.concatenate(([0], np.cumsum(floors)))
    held = most_cost_within(lengths, cost, np.arange(num_micro_batches + 1) * (num_ranks * capacity))
    total = int(cost.of(lengths).sum())
    shared = -(-(total - held) // num_ranks)
    return int((first + np.maximum(shared, first[-1] - first)).max())


def most_cost_within(lengths: Integers, cost: CostModel, tokens: Integers) -> Integers:
    """The most that samples of that many tokens in sum can cost (rounded up): the longest, the last one in part."""
    token_totals = np.concatenate(([0], np.cumsum(lengths)))
    cost_totals = np.concatenate(([0], np.cumsum(cost.of(lengths))))
    whole = np.searchsorted(token_totals, tokens, side="right") - 1
    partial = np.append(lengths, 0)[whole]
    extra = np.minimum(tokens - token_totals[whole], partial)
    rate = cost.per_token + cost.per_square * partial
    return np.asarray(cost_totals[whole] + extra * rate, np.int64)


def _count_longer(lengths: Integers, than: int) -> int:
    return int(_counts_longer(lengths, np.array([than]))[0])


def _counts_longer(lengths: Integers, than: Integers) -> Integers:
    """How many samples are longer than each value; lengths are in descending order."""
    return np.asarray(lengths.size - np.searchsorted(lengths[::-1], than, side="right"), np.int64)
