"""Time of planning: the planner beside the textbook ones, per distribution, and at growing sizes.

Run with `pytest benchmarks/bench_packing.py --benchmark-only`. The number of micro-batches
stands in `extra_info`; bounds and balance in the table that `python tests/test_batch_lengths_to_minibatches.py` prints.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fixtures.packing_cases import DISTRIBUTIONS
from tests.fixtures.peers_packing import PEERS
from trainer.data.packing import CostModel, batch_lengths_to_minibatches, plan_batch

SEVEN_BILLION = CostModel(per_token=24576, per_square=1)


def lengths_of(name: str, num_samples: int, budget: int) -> np.ndarray:
    return np.array(DISTRIBUTIONS[name](np.random.default_rng(0), num_samples, budget))


@pytest.mark.parametrize("budget", [2048, 8192, 32768, 65536])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.benchmark(group="planner, n=1024, 8 ranks, 7B cost")
def test_planner(benchmark: Any, name: str, budget: int) -> None:
    plan = benchmark(plan_batch, lengths_of(name, 1024, budget), budget, 8, SEVEN_BILLION)
    benchmark.extra_info["num_micro_batches"] = plan.num_micro_batches


@pytest.mark.parametrize("num_samples", [64, 256, 1024, 8192])
@pytest.mark.benchmark(group="planner, chat lengths, 8 ranks, budget 32768")
def test_planner_by_size(benchmark: Any, num_samples: int) -> None:
    benchmark(plan_batch, lengths_of("chat", num_samples, 32768), 32768, 8, SEVEN_BILLION)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.benchmark(group="textbook planners, chat lengths, n=1024, 8 ranks, budget 32768")
def test_textbook(benchmark: Any, name: str) -> None:
    packs = benchmark(PEERS[name], lengths_of("chat", 1024, 32768).tolist(), 32768, 8)
    benchmark.extra_info["num_micro_batches"] = len(packs) // 8


@pytest.mark.benchmark(group="textbook planners, chat lengths, n=1024, 8 ranks, budget 32768")
def test_greedy_of_ours(benchmark: Any) -> None:
    benchmark(batch_lengths_to_minibatches, lengths_of("chat", 1024, 32768), 32768, 8, 0)
