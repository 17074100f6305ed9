"""L3: each sample is trained exactly once per epoch, at any world size, budget, batch size and place of resuming."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.runs import numbered_store
from trainer.data.loader import get_data_loader
from trainer.data.order import EpochSampler, epoch_order
from trainer.data.packing import plan_batch
from trainer.data.store import TokenStore
from trainer.errors import DataError

BUDGET = 40


@st.composite
def stores(draw: st.DrawFn) -> TokenStore:
    return numbered_store(draw(st.lists(st.integers(2, BUDGET), min_size=1, max_size=40)))


def trained(store: TokenStore, batch_size: int, world_size: int, epoch: int, start: int = 0) -> list[list[int]]:
    """For each step: the samples that the ranks hold between them, each as often as they hold it whole."""
    steps: list[list[int]] = []
    for rank in range(world_size):
        sampler = EpochSampler(len(store), seed=5)
        sampler.set_epoch(epoch, start)
        loader = get_data_loader(
            store=store,
            batch_size=batch_size,
            max_tokens_per_gpu=BUDGET,
            rank=rank,
            world_size=world_size,
            sampler=sampler,
        )
        for step, micro_batches in enumerate(loader):
            if len(steps) <= step:
                steps.append([])
            for micro_batch in micro_batches:
                if micro_batch["num_samples"]:
                    pieces = micro_batch["input_ids"][0].tensor_split(micro_batch["cu_seq_lens"][1:-1].long())
                    assert all(len(piece) == store.lengths[piece[0]] for piece in pieces)
                    steps[step] += [int(piece[0]) for piece in pieces]
    return [sorted(step) for step in steps]


@given(store=stores(), batch_size=st.integers(1, 50), world_size=st.integers(1, 5), epoch=st.integers(0, 3))
def test_every_sample_once_per_epoch(store: TokenStore, batch_size: int, world_size: int, epoch: int) -> None:
    steps = trained(store, batch_size, world_size, epoch)
    assert sorted(i for step in steps for i in step) == list(range(len(store)))


@given(store=stores(), batch_size=st.integers(1, 50), world_size=st.integers(2, 5))
def test_steps_hold_the_same_samples_at_any_world_size(store: TokenStore, batch_size: int, world_size: int) -> None:
    assert trained(store, batch_size, world_size, epoch=1) == trained(store, batch_size, 1, epoch=1)


@given(store=stores(), batch_size=st.integers(1, 10), data=st.data())
def test_nothing_is_lost_or_repeated_by_resuming_elsewhere(
    store: TokenStore, batch_size: int, data: st.DataObject
) -> None:
    whole = trained(store, batch_size, 1, epoch=0)
    done = data.draw(st.integers(0, len(whole) - 1))
    world_size = data.draw(st.integers(1, 4))
    assert trained(store, batch_size, world_size, epoch=0, start=done * batch_size) == whole[done:]


@pytest.mark.parametrize("num_ranks", [1, 64, 512, 1024])
def test_large_batches_at_any_world_size(num_ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 4097, 3000)
    packs = [pack for micro_batch in plan_batch(lengths, 4096, num_ranks).packs for pack in micro_batch]
    assert sorted(i for pack in packs for i in pack) == list(range(3000))
    assert max(int(lengths[list(pack)].sum()) for pack in packs) <= 4096


def test_no_sample_is_dropped_for_its_length() -> None:
    with pytest.raises(DataError, match="sample 2 has 11 tokens"):
        plan_batch([1, 2, 11], 10, 2)


def test_epochs_cover_the_data_in_different_orders() -> None:
    orders = [epoch_order(1000, seed=0, epoch=epoch).tolist() for epoch in range(5)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
