"""From the samples of a global batch to this rank's micro-batches, as tensors.

Owns the layout of a micro-batch and the placeholder for a rank without work. Knows lengths and loss-token counts of all
samples but reads the tokens of this rank's alone. Nothing is trained across a border: the first label of every sample
is ignored, and counts are of what remains after the causal shift. T tokens of a pack, S samples in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from trainer.data.packing import TOKENS, CostModel, plan_batch
from trainer.data.tokens import IGNORED
from trainer.errors import DataError, UsageError

DUMMY_SAMPLE: dict[str, Any] = {
    "input_ids": torch.zeros(2, dtype=torch.int64),
    "labels": torch.full((2,), IGNORED),
    "len": 2,
    "num_loss_counted_tokens": 0,
}

Arrays = tuple[NDArray[np.integer], NDArray[np.integer]]  # input_ids (T,), labels (T,)


class MicroBatch(TypedDict):
    """One rank's pack, and the totals of the global batch that it belongs to. A placeholder counts nothing."""

    input_ids: torch.Tensor  # (1, T) int64
    labels: torch.Tensor  # (1, T) int64, not shifted
    position_ids: torch.Tensor  # (1, T) int64, from 0 in every sample
    cu_seq_lens: torch.Tensor  # (S + 1,) int32, borders of the samples
    max_length: int  # tokens of the longest sample
    num_samples: int
    num_tokens: int
    num_loss_counted_tokens: int
    batch_num_samples: int
    batch_num_tokens: int
    batch_num_loss_counted_tokens: int


@dataclass(frozen=True)
class BatchTotals:
    """Counts over a whole global batch, all ranks."""

    num_samples: int
    num_tokens: int
    num_loss_counted_tokens: int


class Samples(Protocol):
    """The samples of one global batch: counts of all, tokens of those that are asked for."""

    @property
    def lengths(self) -> NDArray[np.integer]:
        """Tokens of each sample."""

    @property
    def num_loss_tokens(self) -> NDArray[np.integer]:
        """Trained tokens of each sample, after the causal shift."""

    def read(self, indices: Sequence[int]) -> Arrays:
        """Tokens and labels of the samples with these numbers, end to end."""


class LoadedSamples:
    """Samples already in memory, as mappings with `input_ids` and `labels`; any counts they carry are made anew."""

    def __init__(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self._arrays = [_arrays(sample) for sample in samples]
        self.lengths = np.array([len(input_ids) for input_ids, _ in self._arrays], np.int64)
        self.num_loss_tokens = np.array([(labels[1:] != IGNORED).sum() for _, labels in self._arrays], np.int64)

    def read(self, indices: Sequence[int]) -> Arrays:
        """Tokens and labels of the samples with these numbers, end to end."""
        input_ids, labels = zip(*(self._arrays[i] for i in indices), strict=True)
        return np.concatenate(input_ids), np.concatenate(labels)


class MaxTokensPerRankCollator:
    """Samples of a global batch to the micro-batches of one rank; every rank gives equally many.

    Args:
        max_tokens_per_rank: token budget of one rank in one micro-batch.
        rank, world_size: this rank and how many there are; by default as torchrun says, else 0 of 1.
        dummy_sample: `input_ids` and `labels` (all -100) for a micro-batch in which this rank has nothing to do.
        cost: what packing balances over ranks.

    Raises:
        UsageError: an argument is out of range, or the dummy sample trains something.
    """

    def __init__(
        self,
        max_tokens_per_rank: int,
        rank: int | None = None,
        world_size: int | None = None,
        dummy_sample: Mapping[str, Any] | None = None,
        cost: CostModel = TOKENS,
    ) -> None:
        self.max_tokens_per_rank = max_tokens_per_rank
        self.global_rank, self.world_size = _place(rank, world_size)
        self.dummy_sample = DUMMY_SAMPLE if dummy_sample is None else dummy_sample
        self.cost = cost
        self._dummy = _arrays(self.dummy_sample)
        _check_dummy(self._dummy)
        plan_batch([], max_tokens_per_rank, self.world_size)  # checks the budget

    def __call__(self, samples: Sequence[Mapping[str, Any]] | Samples) -> list[MicroBatch]:
        """Plan the batch, read this rank's samples, and lay them end to end.

        Raises:
            DataError: a sample is longer than the budget, or nothing in the whole batch is trained.
        """
        batch: Samples = LoadedSamples(samples) if isinstance(samples, list | tuple) else samples  # type: ignore[assignment]
        totals = _totals(batch)
        self._check_trainable(batch, totals)
        plan = plan_batch(batch.lengths, self.max_tokens_per_rank, self.world_size, self.cost)
        return [self._micro_batch(batch, pack, totals) for pack in plan.of_rank(self.global_rank)]

    def _micro_batch(self, batch: Samples, pack: tuple[int, ...], totals: BatchTotals) -> MicroBatch:
        filled = [i for i in pack if batch.lengths[i]]
        if filled:
            micro_batch = collate_pack(batch.read(filled), batch.lengths[filled], totals)
        else:
            micro_batch = collate_pack(self._dummy, np.array([len(self._dummy[0])]), totals)
            micro_batch["num_tokens"] = 0
        micro_batch["num_samples"] = len(pack)
        return micro_batch

    def _check_trainable(self, batch: Samples, totals: BatchTotals) -> None:
        longest = int(batch.lengths.max(initial=0))
        if longest > self.max_tokens_per_rank:
            raise overlong(batch.lengths, self.max_tokens_per_rank)
        if totals.num_samples and not totals.num_loss_counted_tokens:
            raise DataError(
                f"none of the {totals.num_samples} samples of a global batch has a trained token",
                "the loss would be 0 / 0; drop such samples when preparing the data (on_untrainable)",
                field="labels",
            )


def collate_pack(tokens: Arrays, lengths: NDArray[np.integer], totals: BatchTotals) -> MicroBatch:
    """Samples that lie end to end (at least one, none empty) as tensors; nothing is trained at a border."""
    input_ids, labels = (column.astype(np.int64) for column in tokens)
    borders = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    starts, num_tokens = borders[:-1], int(borders[-1])
    labels[starts] = IGNORED
    return MicroBatch(
        input_ids=_row(input_ids),
        labels=_row(labels),
        position_ids=_row(np.arange(num_tokens) - np.repeat(starts, lengths)),
        cu_seq_lens=torch.from_numpy(borders.astype(np.int32)),
        max_length=int(lengths.max()),
        num_samples=len(lengths),
        num_tokens=num_tokens,
        num_loss_counted_tokens=int(np.count_nonzero(labels != IGNORED)),
        batch_num_samples=totals.num_samples,
        batch_num_tokens=totals.num_tokens,
        batch_num_loss_counted_tokens=totals.num_loss_counted_tokens,
    )


def overlong(lengths: NDArray[np.integer], max_tokens_per_rank: int) -> DataError:
    """The error for samples over the budget, naming the first one."""
    wrong = np.flatnonzero(lengths > max_tokens_per_rank)
    return DataError(
        f"sample {wrong[0]} has {lengths[wrong[0]]} tokens ({wrong.size} of {len(lengths)} samples over the budget)",
        f"at most max_tokens_per_rank={max_tokens_per_rank} fit; raise it, or choose what happens to longer samples "
        "when preparing the data (overlong)",
        field="input_ids",
    )


def _row(values: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(values)[None]


def _totals(batch: Samples) -> BatchTotals:
    lengths = batch.lengths
    return BatchTotals(len(lengths), int(lengths.sum(dtype=np.int64)), int(batch.num_loss_tokens.sum(dtype=np.int64)))


def _arrays(sample: Mapping[str, Any]) -> Arrays:
    input_ids, labels = _vector(sample["input_ids"]), _vector(sample["labels"])
    if len(input_ids) != len(labels):
        raise DataError(
            f"{len(labels)} labels for {len(input_ids)} tokens", "each token needs one label (-100: not trained)"
        )
    return input_ids, labels


def _vector(values: ArrayLike) -> NDArray[np.integer]:
    return np.asarray(values, dtype=np.int64).reshape(-1)


def _check_dummy(dummy: Arrays) -> None:
    input_ids, labels = dummy
    if len(input_ids) == 0 or (labels != IGNORED).any():
        raise UsageError("dummy_sample must hold at least one token and no trained label (all labels -100)")


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size, what is not given as torchrun says."""
    from trainer.distributed.topology import Topology  # here, so that data needs distributed only for this default

    if rank is None or world_size is None:
        here = Topology.from_environment()
        rank = here.rank if rank is None else rank
        world_size = here.world_size if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of world_size {world_size}: ranks are 0..world_size-1")
    return rank, world_size
