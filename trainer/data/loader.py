"""From token samples to this rank's micro-batches: data set, collator and loader.

Each item of the loader is the list of this rank's micro-batches of one global batch. Every rank draws the same indices
and computes the same plan from the counts of all samples, then reads the tokens of its own samples only, so ranks need
not communicate. Nothing is trained across a border: the first label of every sample is ignored, and counts are of what
remains after the causal shift. T tokens of a pack, S samples in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NotRequired, Protocol, SupportsIndex, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader, Dataset

from trainer.data.jsonl import agrees_on_loss_tokens, detect_kind, read_documents, read_tokens
from trainer.data.order import EpochSampler, InfiniteSampler
from trainer.data.packing import TOKENS, CostModel, check_fits, plan_batch
from trainer.data.store import Sample, TokenStore
from trainer.errors import DataError, UsageError
from trainer.labels import IGNORE_INDEX

T = TypeVar("T")
_END = object()  # of an iteration in another thread

DUMMY_SAMPLE: dict[str, Any] = {
    "input_ids": torch.zeros(2, dtype=torch.int64),
    "labels": torch.full((2,), IGNORE_INDEX),
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
    sample_ids: NotRequired[torch.Tensor]  # (S,) int64, number of each sample in the data set; of a loader's packs
    source_ids: NotRequired[torch.Tensor]  # (S,) int64, number of each sample's source; of data of several sources
    batch_source_loss_tokens: NotRequired[list[int]]  # loss tokens of each source


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

    @property
    def ids(self) -> NDArray[np.int64]:
        """Number of each sample in the data set; of samples that come alone, in their batch."""

    @property
    def sources(self) -> NDArray[np.integer] | None:
        """Number of each sample's source; None of data of one source."""

    @property
    def num_sources(self) -> int:
        """How many sources the data has."""

    def read(self, indices: Sequence[int]) -> Arrays:
        """Tokens and labels of the samples with these numbers, end to end."""


class LoadedSamples:
    """Samples already in memory, as mappings with `input_ids` and `labels`; any counts they carry are made anew."""

    sources = None
    num_sources = 1

    def __init__(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self._arrays = [_arrays(sample) for sample in samples]
        self.ids = np.arange(len(samples))
        self.lengths = np.array([len(input_ids) for input_ids, _ in self._arrays], np.int64)
        self.num_loss_tokens = np.array([(labels[1:] != IGNORE_INDEX).sum() for _, labels in self._arrays], np.int64)

    def read(self, indices: Sequence[int]) -> Arrays:
        """Tokens and labels of the samples with these numbers, end to end."""
        input_ids, labels = zip(*(self._arrays[i] for i in indices), strict=True)
        return np.concatenate(input_ids), np.concatenate(labels)


class MaxTokensPerRankCollator:
    """Samples of a global batch to the micro-batches of one rank; every rank gives equally many.

    Args:
        max_tokens_per_rank: token budget of one rank in one micro-batch.
        rank, world_size: this rank and how many there are; by default those of this process.
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
        dummy_ids, dummy_labels = self._dummy
        if len(dummy_ids) == 0 or (dummy_labels != IGNORE_INDEX).any():
            raise UsageError("dummy_sample must hold at least one token and no trained label (all labels -100)")
        plan_batch([], max_tokens_per_rank, self.world_size)  # checks the budget

    def __call__(self, samples: Sequence[Mapping[str, Any]] | Samples) -> list[MicroBatch]:
        """Plan the batch, read this rank's samples, and lay them end to end.

        Raises:
            DataError: a sample is longer than the budget, or nothing in the whole batch is trained.
        """
        batch: Samples = LoadedSamples(samples) if isinstance(samples, list | tuple) else samples  # type: ignore[assignment]
        num_tokens = int(batch.lengths.sum(dtype=np.int64))
        num_loss_tokens = int(batch.num_loss_tokens.sum(dtype=np.int64))
        totals = BatchTotals(len(batch.lengths), num_tokens, num_loss_tokens)
        plan = plan_batch(batch.lengths, self.max_tokens_per_rank, self.world_size, self.cost)
        if totals.num_samples and not totals.num_loss_counted_tokens:
            raise DataError(
                f"none of the {totals.num_samples} samples of a global batch has a trained token",
                "the loss would be 0 / 0; drop such samples when preparing the data (on_untrainable)",
                field="labels",
            )
        micro_batches = []
        for pack in plan.of_rank(self.global_rank):
            filled = [i for i in pack if batch.lengths[i]]
            if filled:
                micro_batch = collate_pack(batch.read(filled), batch.lengths[filled], totals)
            else:
                micro_batch = collate_pack(self._dummy, np.array([len(self._dummy[0])]), totals)
                micro_batch["num_tokens"] = 0
            micro_batch["num_samples"] = len(pack)
            micro_batch["sample_ids"] = torch.from_numpy(batch.ids[filled])
            if batch.sources is not None:
                counts = np.bincount(batch.sources, batch.num_loss_tokens, batch.num_sources)
                micro_batch["source_ids"] = torch.from_numpy(batch.sources[filled].astype(np.int64))
                micro_batch["batch_source_loss_tokens"] = counts.astype(np.int64).tolist()
            micro_batches.append(micro_batch)
        return micro_batches


def collate_pack(tokens: Arrays, lengths: NDArray[np.integer], totals: BatchTotals) -> MicroBatch:
    """Samples that lie end to end (at least one, none empty) as tensors; nothing is trained at a border."""
    input_ids, labels = (column.astype(np.int64) for column in tokens)
    borders = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    starts, num_tokens = borders[:-1], int(borders[-1])
    labels[starts] = IGNORE_INDEX
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(np.arange(num_tokens) - np.repeat(starts, lengths))[None],
        cu_seq_lens=torch.from_numpy(borders.astype(np.int32)),
        max_length=int(lengths.max()),
        num_samples=len(lengths),
        num_tokens=num_tokens,
        num_loss_counted_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
        batch_num_samples=totals.num_samples,
        batch_num_tokens=totals.num_tokens,
        batch_num_loss_counted_tokens=totals.num_loss_counted_tokens,
    )


def to_device(data: Any, device: torch.device) -> Any:
    """Copy the tensors of a micro-batch to the device, however they are nested; everything else stays as it is."""
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        return type(data)({name: to_device(value, device) for name, value in data.items()})  # type: ignore[call-arg]
    if isinstance(data, list | tuple):
        return type(data)(to_device(value, device) for value in data)
    return data


def _arrays(sample: Mapping[str, Any]) -> Arrays:
    input_ids, labels = _vector(sample["input_ids"]), _vector(sample["labels"])
    if len(input_ids) != len(labels):
        raise DataError(
            f"{len(labels)} labels for {len(input_ids)} tokens", "each token needs one label (-100: not trained)"
        )
    return input_ids, labels


def _vector(values: ArrayLike) -> NDArray[np.integer]:
    return np.asarray(values, dtype=np.int64).reshape(-1)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Fill in what is not given from the process group or torchrun."""
    from trainer.distributed.topology import (
        current_topology,  # here, so that data needs distributed only for this default
    )

    if rank is None or world_size is None:
        here = current_topology()
        rank = here.rank if rank is None else rank
        world_size = here.world_size if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of world_size {world_size}: ranks are 0..world_size-1")
    return rank, world_size


class JsonlDataset(Dataset[dict[str, Any]]):
    """Samples of a tokenized .jsonl file or of a prepared store, in the order of the file.

    An item has `input_ids` and `labels` (int64 tensors; -100 marks what is not trained), `len`, and
    `num_loss_counted_tokens`, the trained tokens after the causal shift. That number is always counted; a line that
    states another one (some tools count before the shift) is counted in `store.metadata`.

    Args:
        path: the file or the store's folder.
        store: an opened store instead.

    Raises:
        DataError: a line is not a tokenized sample.
    """

    def __init__(self, path: str | PathLike[str] | None = None, *, store: TokenStore | None = None) -> None:
        if (path is None) == (store is None):
            raise UsageError(f"path={path!r}, store={store!r}: give either the path of the data or an opened store")
        self.store = store if store is not None else _open(Path(path))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        i = index.__index__()
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        sample = self.store.sample(i)
        return {
            "input_ids": torch.from_numpy(sample.input_ids.astype(np.int64)),
            "labels": torch.from_numpy(sample.labels.astype(np.int64)),
            "len": int(self.store.lengths[i]),
            "num_loss_counted_tokens": int(self.store.num_loss_tokens[i]),
        }

    def __getitems__(self, indices: Sequence[int]) -> StoredSamples:
        """The samples of a global batch, none of them read yet; torch's DataLoader asks for them by this name."""
        return StoredSamples(self, np.asarray(indices, np.int64))


TokenData = TokenStore | JsonlDataset


def is_token_data(dataset: Any) -> bool:
    """Return whether a data set is one of ours, whose samples are packed; of a dict of several, whether one is."""
    if isinstance(dataset, Mapping):
        return any(isinstance(each, TokenData) for each in dataset.values())
    return isinstance(dataset, TokenData)


class StoredSamples(Sequence[dict[str, Any]]):
    """Some samples of a data set: counts at hand, tokens read when asked for."""

    def __init__(self, dataset: JsonlDataset, indices: NDArray[np.int64]) -> None:
        self._dataset = dataset
        self.ids = indices
        self.num_sources = len(dataset.store.source_names)
        self.sources = dataset.store.sources_of(indices) if self.num_sources > 1 else None
        self.lengths = dataset.store.lengths[indices]
        self.num_loss_tokens = dataset.store.num_loss_tokens[indices]

    def read(self, indices: Sequence[int]) -> Sample:
        """Tokens and labels of the samples with these numbers among these, end to end."""
        return self._dataset.store.read(self.ids[indices])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: Any) -> Any:
        return self._dataset[self.ids[i]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._dataset[i] for i in self.ids)


def _open(path: Path) -> TokenStore:
    if path.is_dir():
        return TokenStore.open(path)
    kind = detect_kind(path)
    if kind != "tokens":
        raise DataError(
            f"its lines are of kind {kind!r}",
            "token ids are needed here; tokenize the file with `trainer prepare`",
            path,
        )
    samples, num_miscounted = [], 0
    for document in read_documents(path):
        input_ids, labels = read_tokens(document)
        samples.append((input_ids, labels))
        num_miscounted += not agrees_on_loss_tokens(document, labels)
    return TokenStore.from_samples(samples, {"kind": kind, "num_miscounted_loss_tokens": num_miscounted})


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
    budgets = {budget for budget in (max_tokens_per_gpu, max_tokens_per_rank) if budget is not None}
    if len(budgets) != 1:
        raise UsageError(
            f"max_tokens_per_gpu={max_tokens_per_gpu}, max_tokens_per_rank={max_tokens_per_rank}: "
            "they are one setting under two names; give one of them"
        )
    budget = budgets.pop()
    collator = MaxTokensPerRankCollator(budget, rank, world_size, dummy_sample, cost)
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: a global batch holds at least one sample")
    check_fits(dataset.store.lengths, budget)
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


def prefetched(items: Iterable[T], start_thread: Callable[[], None] | None = None) -> Iterator[T]:
    """Yield the items in order, each made in a thread while its predecessor is in use.

    What making an item raises is raised in its place. `start_thread` runs in the thread before anything else.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, "prefetch", start_thread) as thread:
        following = thread.submit(next, iterator, _END)
        while (item := following.result()) is not _END:
            following = thread.submit(next, iterator, _END)
            yield item  # type: ignore[misc]
