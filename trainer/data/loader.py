"""The loader: store, sampler, plan and collator as one torch DataLoader over global batches.

Owns how they are put together; every decision is made elsewhere. Each item is the list of this rank's micro-batches of
one global batch. Every rank draws the same indices and plans the same: ranks need not talk, nor read for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer.data.collate import MaxTokensPerRankCollator, MicroBatch, overlong
from trainer.data.dataset import JsonlDataset
from trainer.data.packing import TOKENS, CostModel
from trainer.data.prefetch import prefetched
from trainer.data.sampler import EpochSampler, InfiniteSampler
from trainer.data.store import TokenStore
from trainer.errors import UsageError


class TokenLoader(DataLoader[list[MicroBatch]]):
    """Global batches in the sampler's order; the next one is planned, read and pinned while one is trained on."""

    def __iter__(self) -> Iterator[list[MicroBatch]]:  # type: ignore[override]
        # Pinning needs the CUDA context of this rank's device, which each thread chooses for itself.
        choose_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if self.pin_memory else None
        return prefetched(super().__iter__(), choose_device)


def get_data_loader(
    data_path: str | PathLike[str] | None = None,
    batch_size: int = 1,
    max_tokens_per_gpu: int | None = None,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    dummy_sample: Mapping[str, Any] | None = None,
    *,
    store: TokenStore | None = None,
    sampler: EpochSampler | InfiniteSampler | None = None,
    max_tokens_per_rank: int | None = None,
    cost: CostModel = TOKENS,
    pin_memory: bool = False,
) -> TokenLoader:
    """Build the loader of this rank's share of every global batch.

    Args:
        data_path: tokenized .jsonl or a prepared store; or give `store`.
        batch_size: samples of a global batch, over all ranks; the last batch of an epoch may be smaller.
        max_tokens_per_gpu: token budget of one rank in one micro-batch; `max_tokens_per_rank` is the same.
        seed: of the default sampler, which never ends (`InfiniteSampler`): such a loader has no length.
        rank, world_size, dummy_sample: see `MaxTokensPerRankCollator`.
        sampler: another order; `EpochSampler` gives one epoch for each iteration.
        cost: what packing balances over ranks.
        pin_memory: lay tensors where a GPU can fetch them while it computes.

    Raises:
        UsageError: arguments contradict each other or are out of range.
        DataError: a sample is longer than the budget.
    """
    dataset = JsonlDataset(data_path, store=store)
    budget = _one_budget(max_tokens_per_gpu, max_tokens_per_rank)
    collator = MaxTokensPerRankCollator(budget, rank, world_size, dummy_sample, cost)
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: a global batch holds at least one sample")
    if len(dataset) and dataset.store.lengths.max() > budget:
        raise overlong(dataset.store.lengths, budget)
    if sampler is None:  # a sampler at the end of its epoch is empty, so it would count as false
        sampler = InfiniteSampler(len(dataset), seed)
    if sampler.len_data != len(dataset):
        raise UsageError(f"the sampler orders {sampler.len_data} samples, the data has {len(dataset)}")
    return TokenLoader(
        dataset,  # type: ignore[arg-type] # it gives samples, the collator makes them micro-batches
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collator,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else every iteration would draw from torch's global generator
    )


def _one_budget(max_tokens_per_gpu: int | None, max_tokens_per_rank: int | None) -> int:
    given = {budget for budget in (max_tokens_per_gpu, max_tokens_per_rank) if budget is not None}
    if len(given) != 1:
        raise UsageError(
            f"max_tokens_per_gpu={max_tokens_per_gpu}, max_tokens_per_rank={max_tokens_per_rank}: "
            "they are one setting under two names; give one of them"
        )
    return given.pop()
