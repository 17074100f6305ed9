"""Speed of the loader: tokens per second of one rank, time to the first batch, and the order of large epochs.

Run with `pytest benchmarks/bench_loader.py --benchmark-only`. Data: 20,000 samples with the lengths of chat (lognormal,
median 120 tokens, at most 1,024), half of the tokens trained; budget 32,768.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from trainer.data.loader import get_data_loader
from trainer.data.order import EpochSampler, epoch_order
from trainer.data.store import TokenStore

NUM_SAMPLES, BUDGET, SAMPLES_PER_RANK = 20_000, 32_768, 182
NUM_BATCHES = 50


@pytest.fixture(scope="module")
def store() -> TokenStore:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(120), 0.9, NUM_SAMPLES), 4, 1024).astype(int)
    return TokenStore.from_samples(
        (ids, np.where(rng.random(len(ids)) < 0.5, ids, -100)) for ids in (rng.integers(0, 4096, n) for n in lengths)
    )


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.benchmark(group="loader, one rank, batches of 32k tokens per rank")
def test_loader(benchmark: Any, store: TokenStore, world_size: int) -> None:
    loader = get_data_loader(
        store=store,
        batch_size=SAMPLES_PER_RANK * world_size,
        max_tokens_per_gpu=BUDGET,
        rank=0,
        world_size=world_size,
        sampler=EpochSampler(NUM_SAMPLES),
    )

    def epoch() -> int:
        return sum(mb["num_tokens"] for batch in islice(loader, NUM_BATCHES) for mb in batch)

    num_tokens = benchmark(epoch)
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = num_tokens / benchmark.stats.stats.median


@pytest.mark.benchmark(group="first batch")
def test_first_batch(benchmark: Any, store: TokenStore) -> None:
    def first() -> None:
        next(iter(get_data_loader(store=store, batch_size=182, max_tokens_per_gpu=BUDGET, rank=0, world_size=1)))

    benchmark(first)


@pytest.mark.parametrize("num_samples", [200_000, 10_000_000])
@pytest.mark.benchmark(group="order of an epoch")
def test_epoch_order(benchmark: Any, num_samples: int) -> None:
    benchmark.pedantic(epoch_order, (num_samples, 0, 1), rounds=3)
