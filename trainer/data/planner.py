"""The planner: fewest micro-batches first, then the cheapest step, then speed.

A step costs the sum over its micro-batches of the dearest rank, because ranks wait for each other. Owns the search and
nothing else: samples are sorted lengths, packs are lists of positions in them. Integers, a fixed number of tries and no
clock, so that every rank and every machine finds the same plan.

How it goes about it: as few micro-batches as the lower bound says; all packs equally dear, except where a long sample
forces its micro-batch to be dearer; packs of like cost side by side in one micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import isqrt
from typing import cast

import numpy as np
from numpy.typing import NDArray

from trainer.data.bounds import floor_costs, least_packs, least_step_cost, most_cost_within
from trainer.data.costs import TOKENS, CostModel

GOOD_ENOUGH = 300  # search stops within 1 / GOOD_ENOUGH of the lower bound
SEARCH_SAMPLES = 4096  # samples placed by one search, over all its tries: bounds its time
MOST_TRIES = 16

Packs = list[list[int]]  # positions in the sorted samples, one list for each pack
_Solution = tuple[int, Packs]  # step cost, packs


@dataclass(frozen=True)
class Batch:
    """Samples of one global batch, longest first, and what holds them."""

    lengths: NDArray[np.int64]
    capacity: int
    num_ranks: int
    cost: CostModel

    @cached_property
    def length_list(self) -> list[int]:
        """The lengths as Python integers: the inner loops are faster on them."""
        return cast(list[int], self.lengths.tolist())

    @cached_property
    def costs(self) -> list[int]:
        """The cost of each sample."""
        return cast(list[int], self.cost.of(self.lengths).tolist())


def pack(batch: Batch) -> Packs:
    """num_micro_batches * num_ranks packs; none over the capacity, each sample in exactly one.

    A pack is empty only where there are fewer samples than packs.
    """
    least = max(1, -(-least_packs(batch.lengths, batch.capacity) // batch.num_ranks))
    for num_micro_batches in count(least):
        packs = _pack_into(batch, num_micro_batches)
        if packs is not None:
            return packs
    raise AssertionError("one sample to a pack always fits")


def step_cost(pack_costs: list[int], num_ranks: int) -> int:
    """Sum over micro-batches of the dearest pack, when packs of like cost share a micro-batch."""
    return sum(sorted(pack_costs, reverse=True)[::num_ranks])


def _pack_into(batch: Batch, num_micro_batches: int) -> Packs | None:
    """The best packing found into so many micro-batches, or None where none was found."""
    shape = batch.lengths, batch.capacity, batch.num_ranks, num_micro_batches, batch.cost
    floors = floor_costs(*shape).tolist()
    best = next(_solutions(batch, floors), None)
    if best is None:
        return None
    return _search(batch, floors, best, least_step_cost(*shape))[1]


def _solutions(batch: Batch, floors: list[int]) -> Iterator[_Solution]:
    """Packings from the one with the best balance to the one that wastes the least room."""
    ranks, num_packs = batch.num_ranks, batch.num_ranks * len(floors)
    num_pinned = _num_pinned(batch, floors)
    pinned = [floor for floor in floors[:num_pinned] for _ in range(ranks)]
    full = batch.cost.of(batch.capacity)
    tokens = Batch(batch.lengths, batch.capacity, ranks, TOKENS)
    attempts: tuple[Callable[[], Packs | None], ...] = (
        lambda: _fill(batch, pinned, num_packs - len(pinned)),
        lambda: _fill(batch, [], num_packs) if pinned else None,
        lambda: _fill(tokens, [], num_packs),
        lambda: _fill(batch, [full] * num_packs, 0),
    )
    for attempt in attempts:
        packs = attempt()
        if packs is not None:
            yield _finished(batch, packs)


def _finished(batch: Batch, packs: Packs) -> _Solution:
    spread_to_empty(packs)
    return step_cost(_pack_costs(batch, packs), batch.num_ranks), packs


def _pack_costs(batch: Batch, packs: Packs) -> list[int]:
    costs = batch.costs
    return [sum([costs[i] for i in pack]) for pack in packs]


def _num_pinned(batch: Batch, floors: list[int]) -> int:
    """How many micro-batches have a floor above the level of all the rest.

    Such a micro-batch costs its floor whatever else happens, so room below it is free.
    """
    num_micro_batches, ranks = len(floors), batch.num_ranks
    tokens = np.arange(1, num_micro_batches + 1) * (ranks * batch.capacity)
    held = np.minimum(most_cost_within(batch.lengths, batch.cost, tokens), np.cumsum(floors) * ranks).tolist()
    rest = total = sum(batch.costs)
    for m, floor in enumerate(floors):
        if floor * ranks * (num_micro_batches - m) <= rest:
            return m
        rest = total - held[m]
    return num_micro_batches


def _search(batch: Batch, floors: list[int], best: _Solution, bound: int) -> _Solution:
    """Look for the lowest water level (multifit): a pack may cost its micro-batch's floor, or the level if higher.

    Starts just above the level that nothing can beat and doubles the distance, then bisects.
    """
    ranks = batch.num_ranks
    dearest = sorted(_pack_costs(batch, best[1]), reverse=True)[::ranks]
    high = max((cost for cost, floor in zip(dearest, floors, strict=True) if cost > floor), default=0)
    low = _level(batch, floors)
    stride = 4 * low // GOOD_ENOUGH + 1
    for _ in range(min(MOST_TRIES, max(1, SEARCH_SAMPLES // len(batch.costs)))):
        if high - low < 2 or _is_good_enough(best, bound):
            break
        level = min(low + stride, (low + high) // 2)
        packs = _fill(batch, [max(floor, level) for floor in floors for _ in range(ranks)], 0)
        if packs is None:
            low, stride = level, 2 * stride
        else:
            high = level
            best = min(best, _finished(batch, packs), key=lambda solution: solution[0])
    return best


def _is_good_enough(solution: _Solution, bound: int) -> bool:
    return (solution[0] - bound) * GOOD_ENOUGH <= bound


def _level(batch: Batch, floors: list[int]) -> int:
    """A level below which the packs cannot hold all cost."""
    num_pinned = _num_pinned(batch, floors)
    if num_pinned == len(floors):
        return 0
    rest = sum(batch.costs) - batch.num_ranks * sum(floors[:num_pinned])
    return max(0, rest // (batch.num_ranks * (len(floors) - num_pinned)))


def _fill(batch: Batch, caps: list[int], num_level: int) -> Packs | None:
    """Place samples, longest first; None as soon as one finds no room.

    Each goes to the tightest pack below its cost cap that has room; where there is none, to the cheapest of the
    `num_level` packs without a cap that has token room. With every cap at what a full pack costs this is best-fit
    decreasing; without caps and with token costs, longest processing time first.
    """
    packs: Packs = [[] for _ in range(len(caps) + num_level)]
    left = _fill_capped(batch, caps, packs) if caps else range(len(batch.costs))
    return packs if not left or (num_level and _fill_level(batch, left, packs, len(caps))) else None


def _fill_capped(batch: Batch, caps: list[int], packs: Packs) -> list[int]:
    """Best-fit decreasing into packs with cost caps; returns the samples that found no room."""
    lengths, costs = batch.length_list, batch.costs
    per_token, per_square = batch.cost.per_token, batch.cost.per_square
    width, tokens_left, cost_left = len(caps), [batch.capacity] * len(caps), list(caps)
    longest_within, at_zero, twice = batch.cost.longest_within, per_token**2, 2 * per_square
    room_below = {cap: min(batch.capacity, longest_within(cap)) for cap in set(caps)}
    rooms = sorted([room_below[cap] * width + p for p, cap in enumerate(caps)])
    left: list[int] = []
    for i, length in enumerate(lengths):
        at = bisect_left(rooms, length * width)
        if at == len(rooms):
            left.append(i)
            continue
        p = rooms.pop(at) % width
        packs[p].append(i)
        tokens_left[p] = tokens = tokens_left[p] - length
        cost_left[p] = cost = cost_left[p] - costs[i]
        if tokens * (per_token + per_square * tokens) > cost:
            # CostModel.longest_within, without the call
            tokens = (isqrt(at_zero + 2 * twice * cost) - per_token) // twice if per_square else cost // per_token
        insort(rooms, tokens * width + p)
    return left


def _fill_level(batch: Batch, samples: Iterable[int], packs: Packs, start: int) -> bool:
    """Each sample into the cheapest pack from `start` on that has token room; False as soon as one finds none.

    Packs stand in a heap by cost; those too full for the present sample are parked until shorter samples come.
    """
    lengths, costs = batch.length_list, batch.costs
    width, tokens_left = len(packs), [batch.capacity] * len(packs)
    heap = list(range(start, width))
    parked: list[tuple[int, int]] = []
    for i in samples:
        length = lengths[i]
        while parked and -parked[0][0] >= length:
            heappush(heap, heappop(parked)[1])
        while heap and tokens_left[heap[0] % width] < length:
            key = heappop(heap)
            heappush(parked, (-tokens_left[key % width], key))
        if not heap:
            return False
        p = heap[0] % width
        packs[p].append(i)
        tokens_left[p] -= length
        heapreplace(heap, heap[0] + costs[i] * width)
    return True


def spread_to_empty(packs: Packs) -> None:
    """Give every empty pack the shortest sample (the last position) that does not sit alone."""
    empty = [p for p, pack in enumerate(packs) if not pack]
    if not empty:
        return
    sizes = [len(pack) for pack in packs]
    home = sorted((i, p) for p, pack in enumerate(packs) for i in pack)
    while empty and home:
        i, p = home.pop()
        if sizes[p] > 1:
            sizes[p] -= 1
            packs[p].remove(i)
            packs[empty.pop()].append(i)
