"""The order of samples: a pure function of (number of samples, seed, epoch).

Owns the permutation and the two samplers over it; knows no data and no torch. A position is two integers, the epoch and
the samples of it already consumed, and starting there costs as much as starting at the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UsageError

BLOCK = 65536  # indices turned into Python integers at once
BATCHES_SORTED = 50  # batches whose samples are sorted by length together
LARGEST_SEED = 2**64 - 1


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(num_samples), int64[num_samples].

    Sorts the raw 64-bit stream of the counter-based generator Philox4x64-10 with key (seed, epoch), each draw carrying
    its index in the low bits: draws are distinct, so any sort gives the same order on any platform, and the raw stream
    is fixed by its publication (Salmon et al. 2011), so any numpy version does. `numpy.random.Generator.permutation`
    promises neither.
    """
    _check(num_samples, seed)
    _check_position(num_samples, epoch, 0)
    draws = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_samples)
    low_bits = np.uint64((1 << num_samples.bit_length()) - 1)
    draws &= ~low_bits
    draws |= np.arange(num_samples, dtype=np.uint64)
    draws.sort()
    return (draws & low_bits).astype(np.int64)


class _Sampler:
    """What both samplers share: size, seed, and the position where the next iteration starts."""

    def __init__(self, len_data: int, seed: int = 0) -> None:
        _check(len_data, seed)
        self.len_data = len_data
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Start the next iteration at this epoch, after `start` of its samples (0 <= start <= len_data)."""
        _check_position(self.len_data, epoch, start)
        self.epoch, self.start = epoch, start

    def _rest_of(self, epoch: int, start: int) -> Iterator[int]:
        order = epoch_order(self.len_data, self.seed, epoch)
        for block in range(start, self.len_data, BLOCK):
            yield from order[block : block + BLOCK].tolist()


class EpochSampler(_Sampler):
    """The samples of one epoch from the position on; `set_epoch` moves to another. Iterating does not move it."""

    def __iter__(self) -> Iterator[int]:
        return self._rest_of(self.epoch, self.start)

    def __len__(self) -> int:
        """How many samples an iteration gives: what is left of the epoch."""
        return self.len_data - self.start


class OrderedSampler(EpochSampler):
    """The samples in their own order, every epoch, from the position on."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.len_data))


class LengthGroupedSampler(EpochSampler):
    """Random order in which neighbours have like lengths: shuffled, then sorted by length in pieces of many batches.

    The longest sample of all comes first, so that running out of memory shows at once.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        super().__init__(len(lengths), seed)
        self.lengths = np.asarray(lengths, np.int64)
        self.piece = min(batch_size * BATCHES_SORTED, max(batch_size, len(lengths) // 4 // batch_size * batch_size))

    def _rest_of(self, epoch: int, start: int) -> Iterator[int]:
        order = epoch_order(self.len_data, self.seed, epoch)
        pieces = [order[first : first + self.piece] for first in range(0, self.len_data, self.piece)]
        grouped = np.concatenate([piece[np.argsort(-self.lengths[piece], kind="stable")] for piece in pieces])
        longest = int(self.lengths[grouped].argmax())
        grouped[[0, longest]] = grouped[[longest, 0]]
        yield from grouped[start:].tolist()


class InfiniteSampler(_Sampler):
    """Epochs without end from the position on: each complete before the next, each in an order of its own."""

    def __iter__(self) -> Iterator[int]:
        start = self.start
        for epoch in count(self.epoch):
            yield from self._rest_of(epoch, start)
            start = 0


def _check(num_samples: int, seed: int) -> None:
    if num_samples < 1:
        raise UsageError(f"the data set has {num_samples} samples: at least one is needed")
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"seed {seed}: must be in 0..2**64-1")


def _check_position(num_samples: int, epoch: int, start: int) -> None:
    if not 0 <= epoch <= LARGEST_SEED:
        raise UsageError(f"epoch {epoch}: must be in 0..2**64-1")
    if not 0 <= start <= num_samples:
        raise UsageError(f"start {start}: must be in 0..{num_samples}, the samples of an epoch")
