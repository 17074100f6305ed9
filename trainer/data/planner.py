"""The planner of one global batch: fewest micro-batches first, then the cheapest step, then speed.

A step costs the sum over its micro-batches of the most expensive rank, because ranks wait for each other. Samples are
sorted lengths, packs are lists of positions in them. Only integers, a fixed number of attempts and no clock, so that
every rank and every machine finds the same plan.

The search uses as few micro-batches as the lower bound allows, makes all packs equally expensive except where a long
sample forces its micro-batch to be more expensive, and puts packs of similar cost into the same micro-batch. The lower
bounds, in the second half, depend on lengths alone; none is above what some valid plan reaches.

What a sample costs (`CostModel`) is an integer function of its length, derived from a model's configuration.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import isqrt
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UsageError

Lengths = TypeVar("Lengths", int, NDArray[np.int64])


@dataclass(frozen=True)
class CostModel:
    """cost(length) = per_token * length + per_square * length**2, in an arbitrary unit; both integers, not negative."""

    per_token: int
    per_square: int

    def __post_init__(self) -> None:
        if self.per_token < 0 or self.per_square < 0 or self.per_token + self.per_square == 0:
            raise UsageError(
                f"cost model per_token={self.per_token}, per_square={self.per_square}: "
                "both must be >= 0 and one of them > 0"
            )

    def of(self, length: Lengths) -> Lengths:
        """Cost of one sample, or of each sample of an int64 array."""
        return length * (self.per_token + self.per_square * length)

    def longest_within(self, cost: int) -> int:
        """The longest sample that costs at most `cost` (>= 0): the inverse of `of`, rounded down."""
        if self.per_square == 0:
            return cost // self.per_token
        return (isqrt(self.per_token**2 + 4 * self.per_square * cost) - self.per_token) // (2 * self.per_square)


TOKENS = CostModel(per_token=1, per_square=0)


def cost_model_from_config(config: Mapping[str, Any] | object) -> CostModel:
    """The cost model of a transformer, from its configuration (a transformers config or its dict).

    Forward FLOPs in units of one squared token, so per_square is 1: 2 per weight and token in the linear layers and
    the head, and 4 * heads * head_dim per squared token in each full-attention layer. The causal half that kernels
    skip is not subtracted, because attention reaches about half the rate of the linear layers. Backward is a multiple
    of forward and drops out. Sliding-window layers cost their window per token. With nothing but `hidden_size` and
    `num_hidden_layers` this is 6 * hidden_size tokens per squared token. Without any full attention: `TOKENS`.
    """
    shape = ModelShape(config)
    square = 4 * shape.query_width * shape.num_full_layers
    if square == 0:
        return TOKENS
    windows = 4 * shape.query_width * shape.window * shape.num_sliding_layers
    linear = 2 * (shape.num_layers * shape.layer_weights + shape.hidden * shape.vocabulary) + windows
    return CostModel(per_token=(linear + square // 2) // square, per_square=1)


class ModelShape:
    """The sizes that decide FLOPs and memory, read from a configuration under the names in use."""

    def __init__(self, config: Mapping[str, Any] | object) -> None:
        self._config = _field(config, "text_config") or config
        self.hidden = self._required("hidden_size", "n_embd", "d_model")
        self.num_layers = self._required("num_hidden_layers", "n_layer", "num_layers")
        self.vocabulary = self._get(0, "vocab_size")
        num_heads = self._get(1, "num_attention_heads", "n_head")
        self._head_width = self._get(self.hidden // num_heads, "head_dim")
        self.query_width = num_heads * self._head_width
        self._num_key_value_heads = self._get(num_heads, "num_key_value_heads")
        kinds = self._value("layer_types") or ["full_attention"] * self.num_layers
        self.num_full_layers = sum(kind == "full_attention" for kind in kinds)
        self.num_sliding_layers = sum(kind == "sliding_attention" for kind in kinds)
        self.window = self._get(0, "sliding_window")

    @property
    def layer_weights(self) -> int:
        """Weights that one token meets in one layer: projections in and out of attention, then the active MLPs."""
        attention = self.hidden * 2 * (self.query_width + self._num_key_value_heads * self._head_width)
        return attention + self._mlp_weights

    @property
    def inner(self) -> int:
        """Values that the active MLPs of a layer compute for one token, of each of their matrices."""
        inner = self._get(0, "intermediate_size")
        active = self._get(0, "num_experts_per_tok")
        return active * self._get(inner, "moe_intermediate_size") if inner and active else inner

    @property
    def num_weights(self) -> int:
        """Weights of the model, roughly: layers with all experts, embeddings and head."""
        num_experts = max(self._get(1, "num_local_experts", "num_experts", "n_routed_experts"), 1)
        active = max(self._get(1, "num_experts_per_tok"), 1)
        layer = self.layer_weights + self._mlp_weights * (num_experts - active) // active
        return self.num_layers * layer + 2 * self.hidden * self.vocabulary

    @property
    def _mlp_weights(self) -> int:
        if not self.inner:
            return 8 * self.hidden**2  # two matrices to and from 4 * hidden, as GPT-2 had them
        return 3 * self.hidden * self.inner  # gate, up, down

    def _value(self, *names: str) -> Any:
        return next((value for name in names if (value := _field(self._config, name)) is not None), None)

    def _get(self, default: int, *names: str) -> int:
        value = self._value(*names)
        return default if value is None else int(value)

    def _required(self, *names: str) -> int:
        value = self._value(*names)
        if value is None:
            raise UsageError(f"no cost model from this configuration: none of {', '.join(names)} is set; use TOKENS")
        return int(value)


def _field(config: Mapping[str, Any] | object, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


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
        shape = batch.lengths, batch.capacity, batch.num_ranks, num_micro_batches, batch.cost
        floors = floor_costs(*shape).tolist()
        first = _first_solution(batch, floors)
        if first is not None:
            return _search(batch, floors, first, least_step_cost(*shape))[1]
    raise AssertionError("one sample to a pack always fits")


def step_cost(pack_costs: list[int], num_ranks: int) -> int:
    """Sum over micro-batches of the most expensive pack, when packs of like cost share a micro-batch."""
    return sum(sorted(pack_costs, reverse=True)[::num_ranks])


def _first_solution(batch: Batch, floors: list[int]) -> _Solution | None:
    """The packing with the best balance that is found; where none is, one that wastes less room."""
    ranks, num_packs = batch.num_ranks, batch.num_ranks * len(floors)
    pinned = [floor for floor in floors[: _num_pinned(batch, floors)] for _ in range(ranks)]
    packs = _fill(batch, pinned, num_packs - len(pinned))
    if packs is None and pinned:
        packs = _fill(batch, [], num_packs)
    if packs is None:
        packs = _fill(Batch(batch.lengths, batch.capacity, ranks, TOKENS), [], num_packs)
    if packs is None:
        packs = _fill(batch, [batch.cost.of(batch.capacity)] * num_packs, 0)
    return None if packs is None else _finished(batch, packs)


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
    low, num_pinned = 0, _num_pinned(batch, floors)  # below this level the packs cannot hold all cost
    if num_pinned < len(floors):
        rest = sum(batch.costs) - ranks * sum(floors[:num_pinned])
        low = max(0, rest // (ranks * (len(floors) - num_pinned)))
    stride = 4 * low // GOOD_ENOUGH + 1
    for _ in range(min(MOST_TRIES, max(1, SEARCH_SAMPLES // len(batch.costs)))):
        is_good_enough = (best[0] - bound) * GOOD_ENOUGH <= bound
        if high - low < 2 or is_good_enough:
            break
        level = min(low + stride, (low + high) // 2)
        packs = _fill(batch, [max(floor, level) for floor in floors for _ in range(ranks)], 0)
        if packs is None:
            low, stride = level, 2 * stride
        else:
            high = level
            best = min(best, _finished(batch, packs), key=lambda solution: solution[0])
    return best


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
    """Move into every empty pack the shortest sample (the last position) that does not sit alone."""
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


LARGEST_DUAL_FEASIBLE_STEP = 12
MOST_SHARING = 8  # samples of one pack, beyond the first, that the bound on the most expensive pack looks at

Integers = NDArray[np.int64]


def least_packs(lengths: Integers, capacity: int) -> int:
    """A lower bound on the number of packs of `capacity` tokens that hold all samples.

    The greater of two: what dual feasible functions weigh, and the number of samples of at least one length that a pack
    can hold.
    """
    lengths = lengths[lengths > 0]
    if not lengths.size:
        return 0
    # The j longest samples are all at least as long as the j-th, and only so many of that length fit one pack.
    j = np.arange(1, lengths.size + 1)
    by_count = int((-(-j // (capacity // lengths))).max())
    return max(_dual_feasible(lengths, capacity), by_count)


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


def floor_costs(lengths: Integers, capacity: int, num_ranks: int, num_micro_batches: int, cost: CostModel) -> Integers:
    """What the m-th most expensive micro-batch costs at least, for m = 0, 1, ...

    A prefix of the samples needs one pack for each sample over half the capacity, and one for each `capacity` tokens.
    When it needs more than m * num_ranks packs, its shortest sample cannot be in the m most expensive micro-batches.
    And some pack, so the most expensive too, holds t + 1 of the first t * packs + 1 samples.
    """
    if lengths.size == 0:
        return np.zeros(num_micro_batches, np.int64)
    large = np.minimum(np.arange(1, lengths.size + 1), int(_counts_longer(lengths, np.array([capacity // 2]))[0]))
    needed = np.maximum(large, -(-np.cumsum(lengths) // capacity))
    first = np.searchsorted(needed, np.arange(num_micro_batches) * num_ranks, side="right")
    costs = np.append(cost.of(lengths), 0)
    floors = np.asarray(costs[first], np.int64)
    num_packs = num_micro_batches * num_ranks
    for t in range(1, min(MOST_SHARING, (lengths.size - 1) // num_packs) + 1):
        floors[0] = max(floors[0], costs[t * num_packs - t : t * num_packs + 1].sum())
    return floors


def least_step_cost(lengths: Integers, capacity: int, num_ranks: int, num_micro_batches: int, cost: CostModel) -> int:
    """A lower bound on the sum, over micro-batches, of the most expensive rank's cost.

    For every k: the k most expensive micro-batches cost at least their floors, and they hold no more than what the
    longest samples within k * num_ranks * capacity tokens cost; the rest is shared by num_ranks at best.
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


def _counts_longer(lengths: Integers, than: Integers) -> Integers:
    """How many samples are longer than each value; lengths are in descending order."""
    return np.asarray(lengths.size - np.searchsorted(lengths[::-1], than, side="right"), np.int64)
