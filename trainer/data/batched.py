"""Custom data sets (map-style or streams): how their samples are dealt to ranks, and the loader of one rank's share.

A micro-batch of all ranks is `per_device` samples for each of them in turn; the rest of an epoch goes to the first
ranks. Every rank draws the same order, so ranks need not communicate about who gets what. Of a map-style data set a
rank reads only its own samples; a stream is read whole by every rank, which keeps its share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from trainer.config.groups import LoaderArguments
from trainer.data.order import EpochSampler
from trainer.errors import UsageError

logger = logging.getLogger(__name__)

Inputs = Any  # what the collator makes of samples: a mapping of names to tensors
Collate = Callable[[list[Any]], Inputs]
T = TypeVar("T")


@dataclass(frozen=True)
class Dealing:
    """How samples are dealt to ranks and micro-batches."""

    per_device: int  # samples of one rank in one micro-batch
    accumulation: int  # micro-batches of a step
    rank: int
    world_size: int
    drop_last: bool

    @property
    def per_micro_batch(self) -> int:
        """Samples of a micro-batch over all ranks."""
        return self.per_device * self.world_size

    @property
    def per_step(self) -> int:
        """Samples of a global batch."""
        return self.per_micro_batch * self.accumulation

    def num_trained(self, num_samples: int) -> int:
        """Samples of an epoch that are trained: all, or those of full micro-batches."""
        return num_samples - num_samples % self.per_micro_batch if self.drop_last else num_samples

    def own(self, dealt: list[T]) -> list[T]:
        """This rank's share of a micro-batch of all ranks; empty at the tail of an epoch for the last ranks."""
        return dealt[self.rank * self.per_device : (self.rank + 1) * self.per_device]

    def own_sizes(self, num_left: int) -> list[int]:
        """Samples in each of this rank's micro-batches of the next step, when so many are left in the epoch."""
        starts = range(0, min(num_left, self.per_step), self.per_micro_batch)
        return [min(max(num_left - start - self.rank * self.per_device, 0), self.per_device) for start in starts]


class RankBatches(Sampler[list[int]]):
    """Indices of this rank's micro-batches of one epoch, from the sampler's position on; none of them is empty."""

    def __init__(self, sampler: EpochSampler, dealing: Dealing) -> None:
        self.sampler, self.dealing = sampler, dealing

    def __iter__(self) -> Iterator[list[int]]:
        left = self.dealing.num_trained(self.sampler.len_data) - self.sampler.start
        for dealt in chunks(islice(self.sampler, max(left, 0)), self.dealing.per_micro_batch):
            if own := self.dealing.own(dealt):
                yield own

    def __len__(self) -> int:
        """Micro-batches of this rank in a whole epoch."""
        num_trained = self.dealing.num_trained(self.sampler.len_data)
        full, rest = divmod(num_trained, self.dealing.per_micro_batch)
        return full + int(sum(self.dealing.own_sizes(rest)) > 0)


class StreamShare(IterableDataset[Any]):
    """This rank's share of a stream; a new pass begins with each iteration."""

    def __init__(self, stream: Iterable[Any], dealing: Dealing) -> None:
        self.stream, self.dealing = stream, dealing

    def __iter__(self) -> Iterator[Any]:
        for dealt in chunks(self.stream, self.dealing.per_micro_batch):
            if len(dealt) == self.dealing.per_micro_batch or not self.dealing.drop_last:
                yield from self.dealing.own(dealt)


class SizedStreamShare(StreamShare):
    """This rank's share of a stream that knows its length."""

    def __len__(self) -> int:
        num_trained = self.dealing.num_trained(len(self.stream))  # type: ignore[arg-type]
        full, rest = divmod(num_trained, self.dealing.per_micro_batch)
        return full * self.dealing.per_device + sum(self.dealing.own_sizes(rest))


class BatchedLoader(DataLoader[Inputs]):
    """A DataLoader over this rank's micro-batches of one epoch, which knows how they were dealt."""

    def __init__(self, dataset: Any, dealing: Dealing, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.dealing = dealing
        assert self.generator is not None
        self._seed = self.generator.initial_seed()
        self._following, self._is_placed = 0, False  # epoch of the next iteration, and whether it was chosen

    def __iter__(self) -> Any:
        """Go through one epoch; without `move_to` each iteration is the next epoch, from its beginning."""
        if not self._is_placed:
            self.move_to(self._following, 0)
        self._is_placed = False
        return super().__iter__()

    @property
    def total_batch_size(self) -> int:
        """Samples of a micro-batch over all ranks."""
        return self.dealing.per_micro_batch

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch that are trained, over all ranks; None for a stream without a length."""
        dataset: Any = self.dataset.stream if isinstance(self.dataset, StreamShare) else self.dataset
        return self.dealing.num_trained(len(dataset)) if has_length(dataset) else None

    def move_to(self, epoch: int, start: int) -> int:
        """Start the next iteration at a position; gives how many samples are left for the caller to skip."""
        self._is_placed, self._following = True, epoch + 1
        self.generator.manual_seed(self._seed + epoch)  # of the processes that read
        if isinstance(self.batch_sampler, RankBatches):
            self.batch_sampler.sampler.set_epoch(epoch, start)
            return 0
        stream = self.dataset.stream if isinstance(self.dataset, StreamShare) else self.dataset
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(epoch)
        return start


def build_loader(
    dataset: Any,
    collate: Collate,
    args: LoaderArguments,
    dealing: Dealing,
    sampler: EpochSampler | None,
    seed: int,
    device_type: str = "cpu",
) -> BatchedLoader:
    """Build the loader of this rank's micro-batches.

    Args:
        dataset: map-style or a stream.
        collate: from a list of samples to a micro-batch.
        args: how it is read.
        dealing: which samples are this rank's.
        sampler: the order of a map-style data set; None for a stream.
        seed: of the processes that read, where there are any.
        device_type: where the model is; a run on the CPU of a GPU machine pins no memory.
    """
    options: dict[str, Any] = {
        "collate_fn": collate,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and device_type == "cuda",
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "generator": torch.Generator().manual_seed(seed + dealing.rank),  # not the global one, which has other uses
    }
    if sampler is not None:
        return BatchedLoader(dataset, dealing, batch_sampler=RankBatches(sampler, dealing), **options)
    share = SizedStreamShare if has_length(dataset) else StreamShare
    return BatchedLoader(share(dataset, dealing), dealing, batch_size=dealing.per_device, **options)


def is_stream(dataset: Any) -> bool:
    """Return whether samples come one after another and cannot be asked for by number."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def has_length(dataset: Any) -> bool:
    """Return whether the number of samples is known."""
    try:
        return len(dataset) >= 0
    except (TypeError, AttributeError, NotImplementedError):
        return False


def chunks(samples: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut into lists of `size`, the last one shorter."""
    iterator = iter(samples)
    while chunk := list(islice(iterator, size)):
        yield chunk


def keep_columns(dataset: Any, collate: Collate, columns: Sequence[str]) -> tuple[Any, Collate]:
    """Return data set and collator such that batches have these columns alone.

    Raises:
        UsageError: none of the data set's columns is among them.
    """
    present = getattr(dataset, "column_names", None)
    if present is None or not hasattr(dataset, "remove_columns"):  # not of Hugging Face's datasets
        return dataset, ColumnFilter(collate, columns)
    left_out = [name for name in present if name not in columns]
    if len(left_out) == len(present):
        raise _nothing_left(left_out, columns)
    _note(left_out)
    return dataset.remove_columns(left_out), collate


def sample_lengths(dataset: Any, length_column: str, input_name: str) -> list[int]:
    """Return the length of every sample: from its column, or by measuring its input.

    Raises:
        UsageError: there is neither.
    """
    if length_column in getattr(dataset, "column_names", ()):
        return list(dataset[length_column])
    first = dataset[0]
    if not isinstance(first, Mapping) or input_name not in first:
        raise UsageError(
            f"train_sampling_strategy=group_by_length: train_dataset has neither a column {length_column!r} "
            f"(length_column_name) nor an input {input_name!r} to measure"
        )
    return [len(dataset[i][input_name]) for i in range(len(dataset))]


class ColumnFilter:
    """A collator that sees only some columns of each sample."""

    def __init__(self, collate: Collate, columns: Sequence[str]) -> None:
        self.collate, self.columns = collate, columns
        self._was_noted = False

    def __call__(self, samples: list[Any]) -> Any:
        """Collate."""
        return self.collate([self._kept(sample) for sample in samples])

    def _kept(self, sample: Any) -> Any:
        if not isinstance(sample, Mapping):
            return sample
        left_out = [name for name in sample if name not in self.columns]
        if sample and len(left_out) == len(sample):
            raise _nothing_left(left_out, self.columns)
        if not self._was_noted:
            _note(left_out)
            self._was_noted = True
        return {name: value for name, value in sample.items() if name in self.columns} if left_out else sample


def _note(left_out: Sequence[str]) -> None:
    if left_out:
        logger.warning("columns that the model does not take are left out: %s", ", ".join(left_out))


def _nothing_left(left_out: Sequence[str], columns: Sequence[str]) -> UsageError:
    return UsageError(
        f"the model takes none of the columns {', '.join(left_out)}, only {', '.join(columns)}: rename them, or set "
        "remove_unused_columns=False for a data_collator that makes the model's inputs of them"
    )
