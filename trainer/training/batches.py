"""Global batches of a custom data set: micro-batches gathered into steps, counted, and agreed on by all ranks.

What a step divides by is known here before its first forward pass. Ranks run equally many micro-batches: a rank without
work gets a placeholder that counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import find_batch_size

from trainer.data.batched import BatchedLoader, Dealing, Inputs, RankBatches, StreamShare, has_length
from trainer.distributed.group import Group
from trainer.errors import UsageError


@dataclass(frozen=True)
class InputCounts:
    """What a micro-batch holds besides samples."""

    num_items: int | None  # labels that are not -100, None where there are none
    num_tokens: int = 0  # of its input, where they are counted
    num_inputs: int = 0  # numbers in its main input
    num_attended: int = 0  # of these, those that the attention mask leaves


CountInputs = Callable[[Inputs], InputCounts]


@dataclass(frozen=True)
class GlobalModelBatch:
    """This rank's share of a global batch, and what all ranks have of it."""

    micro_batches: list[Inputs]  # equally many on every rank
    num_samples: list[int]  # in each of them; 0: a placeholder for a rank without work
    num_items: list[int]  # labels in each of them
    num_attended: list[int]  # inputs in each of them, padding aside
    batch_num_samples: int
    batch_num_items: int | None  # labels over all ranks, where there are any
    batch_num_tokens: int  # of the input over all ranks, where they are counted
    batch_num_inputs: int  # numbers in the main input over all ranks
    batch_num_attended: int  # of these, padding aside

    @property
    def own_num_items(self) -> int:
        """Labels of this rank's share."""
        return sum(self.num_items)

    @property
    def shares(self) -> list[float]:
        """What part of the global batch each micro-batch holds: of its labels, or of its samples if there are none."""
        if self.batch_num_items:
            return [count / self.batch_num_items for count in self.num_items]
        return [count / self.batch_num_samples for count in self.num_samples]

    @property
    def input_shares(self) -> list[float]:
        """What part of the global batch's inputs each micro-batch holds, padding aside."""
        return [count / max(self.batch_num_attended, 1) for count in self.num_attended]


class ModelBatches:
    """Global batches, epoch by epoch, of our own loader or of any other that gives this rank's micro-batches."""

    def __init__(self, loader: DataLoader[Inputs], dealing: Dealing, group: Group, count: CountInputs) -> None:
        self.loader, self.dealing, self.group, self.count = loader, dealing, group, count
        self.num_samples = loader.num_samples if isinstance(loader, BatchedLoader) else None
        self.samples_per_step = dealing.per_step
        self._filler: Inputs | None = None  # what a rank without work runs
        self._is_in_place = False  # a stream was moved to where the next epoch goes on

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None where the loader does not know its length."""
        if self.num_samples is not None:
            return -(-self.num_samples // self.dealing.per_step)
        return -(-len(self.loader) // self.dealing.accumulation) if has_length(self.loader) else None

    def epoch(self, epoch: int, start: int) -> Iterator[GlobalModelBatch]:
        """Return what is left of an epoch after `start` of its samples."""
        to_skip = start
        if self._is_in_place:
            self._is_in_place, to_skip = False, 0
        elif isinstance(self.loader, BatchedLoader):
            to_skip = self.loader.move_to(epoch, start)
        else:
            _tell_epoch(self.loader, epoch)
        position, iterator = start - to_skip, iter(self.loader)
        while (batch := self._next(iterator, position)) is not None:
            if position >= start:
                yield batch
            position += batch.batch_num_samples

    def position(self) -> Any:
        """Return where a stream stands that keeps its own position; None where samples are counted instead."""
        stream = self._stream()
        return None if stream is None else stream.state_dict()

    def move_to(self, position: Any) -> None:
        """Continue the next epoch from what `position` returned."""
        if position is not None and (stream := self._stream()) is not None:
            stream.load_state_dict(position)
            self._is_in_place = True

    def _stream(self) -> Any:
        """The stream, if this process reads it and it keeps its own position."""
        stream = getattr(getattr(self.loader, "dataset", None), "stream", None)
        is_ours = isinstance(self.loader, BatchedLoader) and self.loader.num_workers == 0
        return stream if is_ours and hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict") else None

    def _next(self, iterator: Iterator[Inputs], position: int) -> GlobalModelBatch | None:
        """Take the micro-batches of one step; ranks tell each other what they have, in one collective."""
        own = list(islice(iterator, self.dealing.accumulation))
        sizes = self._sizes(own, position)
        counts = [self.count(micro_batch) for micro_batch in own]
        items = [count.num_items or 0 for count in counts]
        attended = [count.num_attended for count in counts]
        has_items = any(count.num_items is not None for count in counts)
        num_tokens = sum(count.num_tokens for count in counts)
        num_inputs = sum(count.num_inputs for count in counts)
        is_present = [float(number < len(own)) for number in range(self.dealing.accumulation)]
        own_totals = [sum(sizes), sum(items), has_items, num_tokens, num_inputs, sum(attended)]
        totals = self.group.sum([*own_totals, *is_present])
        total_samples, total_items, any_items, total_tokens, total_inputs, total_attended = totals[: len(own_totals)]
        # Ranks run as many micro-batches as the rank that has most: FSDP2 gathers weights in each of them.
        num_micro_batches = sum(count > 0 for count in totals[len(own_totals) :])
        if num_micro_batches == 0:
            return None
        missing = num_micro_batches - len(own)
        own += [self._fill(own)] * missing
        self._filler = own[-1] if self.group.world_size > 1 else None
        placeholders = [0] * missing
        return GlobalModelBatch(
            micro_batches=own,
            num_samples=sizes + placeholders,
            num_items=items + placeholders,
            num_attended=attended + placeholders,
            batch_num_samples=int(total_samples),
            batch_num_items=int(total_items) if any_items else None,
            batch_num_tokens=int(total_tokens),
            batch_num_inputs=int(total_inputs),
            batch_num_attended=int(total_attended),
        )

    def _sizes(self, own: list[Inputs], position: int) -> list[int]:
        """Samples of each micro-batch: as they were dealt, or as its tensors say where we did not deal."""
        if self.num_samples is None or not isinstance(self.loader.batch_sampler, RankBatches):
            sizes = [find_batch_size(micro_batch) for micro_batch in own]
            if None in sizes:
                raise UsageError("the first tensor of a batch has no dimension, so its samples cannot be counted")
            return [int(size) for size in sizes]
        return [size for size in self.dealing.own_sizes(self.num_samples - position) if size]

    def _fill(self, own: list[Inputs]) -> Inputs:
        """Return something for this rank to run while others have work: its last micro-batch, or else one sample."""
        if own or self._filler is not None:
            return own[-1] if own else self._filler
        dataset, collate = self.loader.dataset, self.loader.collate_fn
        first = next(iter(dataset.stream)) if isinstance(dataset, StreamShare) else dataset[0]
        return collate([first])


def _tell_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of a loader that is not ours and of what it draws from: a DistributedSampler shuffles by it."""
    for part in (loader, *(getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset"))):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
