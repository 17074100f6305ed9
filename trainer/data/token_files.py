"""Tokens by place: of one Arrow file, mapped; of several; or in memory.

The file is read without a copy. Invariant: what is read from a file is what was written, block by block, or an error.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.errors import DataError

TOKENS_SCHEMA = pa.schema([("input_ids", pa.int32()), ("labels", pa.int32())])
REMEDY = "delete the folder and prepare the data again"
_DIGEST_BYTES = 2**20  # of the tokens file that one checksum covers

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


class Sample(NamedTuple):
    """Token ids and labels, int32[T] each, of one sample or of several laid end to end."""

    input_ids: Int32s
    labels: Int32s


class Tokens(Protocol):
    """Tokens by place, counted from the first."""

    @property
    def num_tokens(self) -> int:
        """How many there are."""

    def read(self, starts: Int64s, lengths: Int32s) -> Sample:
        """Return the spans that begin at `starts`, end to end."""

    def parts(self) -> list[MappedTokens]:
        """Return the files that they lie in."""

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """CRC-32 of every block of ids and labels."""


@dataclass(frozen=True)
class JoinedTokens:
    """The tokens of several stores; `bases` are where each begins, and the end."""

    stores: list[Tokens]
    bases: Int64s

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return int(self.bases[-1])

    def parts(self) -> list[MappedTokens]:
        """Return the files that they lie in."""
        return [part for store in self.stores for part in store.parts()]

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """CRC-32 of every block of every store."""
        return np.concatenate([store.checksums for store in self.stores])

    def read(self, starts: Int64s, lengths: Int32s) -> Sample:
        """Return the spans that begin at `starts`, end to end."""
        owners = np.searchsorted(self.bases, starts, side="right") - 1
        borders = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)] if len(owners) else [0]
        pieces = [Sample(np.zeros(0, np.int32), np.zeros(0, np.int32))]
        for begin, end in pairwise(borders):
            owner = int(owners[begin])
            pieces.append(self.stores[owner].read(starts[begin:end] - self.bases[owner], lengths[begin:end]))
        return Sample(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))


def _places(starts: Int64s, lengths: Int32s) -> Int64s:
    """Where the tokens of spans lie that begin at `starts`, one span after the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


@dataclass(frozen=True)
class MemoryTokens:
    """Tokens in memory."""

    input_ids: Int32s
    labels: Int32s

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return len(self.input_ids)

    def parts(self) -> list[MappedTokens]:
        """Return the files that they lie in."""
        return []

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """CRC-32 of all ids, and of all labels."""
        return np.array([zlib.crc32(column.tobytes()) for column in (self.input_ids, self.labels)], np.uint32)

    def read(self, starts: Int64s, lengths: Int32s) -> Sample:
        """Return the spans that begin at `starts`, end to end."""
        places = _places(starts, lengths)
        return Sample(self.input_ids[places], self.labels[places])


class MappedTokens:
    """The tokens file, mapped as one array of 32-bit words; a block is checked when it is first read from.

    Pickles as its path.
    """

    def __init__(self, path: Path, bounds: Int64s, checksums: NDArray[np.uint32]) -> None:
        self.path, self.bounds = path, bounds  # bounds: first token of each record batch, and the number of tokens
        self.checksums = checksums  # CRC-32 of every _DIGEST_BYTES of the file
        self._file: Any = None
        self._words: Int32s = np.zeros(0, np.int32)
        self._places = np.full((2, len(bounds) - 1), -1)  # word at which ids, and labels, of each record batch begin
        self._is_checked = np.zeros(len(checksums), bool)

    def __reduce__(self) -> tuple[type[MappedTokens], tuple[Path, Int64s, NDArray[np.uint32]]]:
        return type(self), (self.path, self.bounds, self.checksums)

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return int(self.bounds[-1])

    def parts(self) -> list[MappedTokens]:
        """Return the files that they lie in."""
        return [self]

    def read(self, starts: Int64s, lengths: Int32s) -> Sample:
        """Return the spans that begin at `starts`, end to end."""
        batches = np.searchsorted(self.bounds, starts, side="right") - 1
        for number in np.unique(batches[self._places[0, batches] < 0]).tolist():
            self._places[:, number] = self._locate(number)
        begins = self._places[:, batches] + (starts - self.bounds[batches])
        self._check(begins, lengths)
        return Sample(*(self._words[_places(column, lengths)] for column in begins))

    def check_all(self) -> None:
        """Check every block; raise DataError at the first that was changed."""
        self._map()
        for number in range(len(self.checksums)):
            self._check_block(number)

    def _check(self, begins: Int64s, lengths: Int32s) -> None:
        first = begins * 4 // _DIGEST_BYTES
        last = ((begins + lengths) * 4 - 1) // _DIGEST_BYTES
        if self._is_checked[first].all() and self._is_checked[last].all() and (last - first <= 1).all():
            return
        for begin, end in zip(first.ravel().tolist(), last.ravel().tolist(), strict=True):
            for number in range(begin, end + 1):
                if not self._is_checked[number]:
                    self._check_block(number)

    def _check_block(self, number: int) -> None:
        block = memoryview(self._file)[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES]
        if zlib.crc32(block) != int(self.checksums[number]):
            raise DataError(f"its tokens were changed since they were prepared (block {number})", REMEDY, self.path)
        self._is_checked[number] = True

    def _map(self) -> None:
        if self._file is None:
            self._file = pa.memory_map(str(self.path)).read_buffer()
            self._words = np.frombuffer(self._file, np.int32, self._file.size // 4)

    def _locate(self, number: int) -> list[int]:
        try:
            self._map()
            batch = pa.ipc.open_file(self._file).get_batch(number)
            checked_columns(batch, TOKENS_SCHEMA, int(self.bounds[number + 1] - self.bounds[number]))
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise DataError(f"cannot read its tokens ({error})", REMEDY, self.path) from error
        return [(column.buffers()[1].address - self._file.address) // 4 for column in batch.columns]


def block_checksums(path: Path) -> list[int]:
    """Return the CRC-32 of every block of a tokens file."""
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(_DIGEST_BYTES), b"")]


def record_batch(columns: Iterable[NDArray[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Arrow's view of these columns; `pa.array` would first import pandas, where it is installed: a second."""
    typed = [
        np.ascontiguousarray(column, kind.to_pandas_dtype()) for column, kind in zip(columns, schema.types, strict=True)
    ]
    arrays = [
        pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(column)])
        for column, kind in zip(typed, schema.types, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def checked_columns(batch: Any, schema: Any, num_rows: int) -> list[NDArray[Any]]:
    """Return the columns of a record batch; raise where it is not as described."""
    batch.validate()
    if batch.schema != schema or batch.num_rows != num_rows or any(column.null_count for column in batch.columns):
        raise ValueError(f"{batch.num_rows} rows of {batch.schema.names}, not {num_rows} of {schema.names}")
    columns = []
    for column in batch.columns:
        # Where it lies; its own `to_numpy` would import pandas too.
        kind, begin = column.type.to_pandas_dtype(), column.offset * column.type.byte_width
        columns.append(np.frombuffer(column.buffers()[1] or b"", kind, len(column), begin))
    return columns
