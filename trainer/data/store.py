"""Tokenized samples on disk (Arrow, memory-mapped) or in memory.

Owns the format: flat tokens in record batches, an index of lengths, loss tokens and documents, and a checked metadata
file. Must not know where samples come from. Invariant: a store is whole or not there, and opening one reads its index
only; nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.atomic import sync
from trainer.errors import DataError
from trainer.labels import IGNORE_INDEX

FORMAT_VERSION = 2
CHUNK_TOKENS = 2**20
"""Tokens after which a record batch of the tokens file is closed; a sample never lies in two."""

_TOKENS_SCHEMA = pa.schema([("input_ids", pa.int32()), ("labels", pa.int32())])
_INDEX_SCHEMA = pa.schema([("length", pa.int32()), ("num_loss_tokens", pa.int32()), ("document", pa.int64())])
_REMEDY = "delete the folder and prepare the data again"

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


class Sample(NamedTuple):
    """Token ids and labels, int32[T] each, of one sample or of several laid end to end."""

    input_ids: Int32s
    labels: Int32s


@dataclass(frozen=True)
class TokenBatch:
    """Samples laid end to end: flat int32 ids and labels, and for each sample its length and its document's line."""

    input_ids: Int32s
    labels: Int32s
    lengths: Int32s
    documents: Int64s

    @classmethod
    def join(cls, samples: Sequence[Sample], documents: Sequence[int]) -> TokenBatch:
        """Lay samples end to end."""
        empty = np.zeros(0, np.int32)
        return cls(
            np.concatenate([empty, *(sample.input_ids for sample in samples)]).astype(np.int32, copy=False),
            np.concatenate([empty, *(sample.labels for sample in samples)]).astype(np.int32, copy=False),
            np.array([len(sample.input_ids) for sample in samples], np.int32),
            np.array(documents, np.int64),
        )

    def where(self, wanted: NDArray[np.bool_]) -> TokenBatch:
        """Return the samples that are wanted, one flag each."""
        tokens = np.repeat(wanted, self.lengths)
        return TokenBatch(self.input_ids[tokens], self.labels[tokens], self.lengths[wanted], self.documents[wanted])

    def largest_id(self) -> int:
        """Give the largest token id among ids and labels, -1 if there is none."""
        return int(max(self.input_ids.max(initial=-1), self.labels.max(initial=-1)))

    def count_loss_tokens(self) -> Int32s:
        """Count, for each sample, the labels trained after the shift by one: the first never is."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        trained = self.labels != IGNORE_INDEX
        trained[(ends - self.lengths)[self.lengths > 0]] = False
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(trained, dtype=np.int64)])
        counts: Int32s = (before[ends] - before[ends - self.lengths]).astype(np.int32)
        return counts


class TokenStore:
    """Samples by number. `lengths`, `num_loss_tokens` (int32[n]) and `documents` (int64[n], lines) are at hand."""

    def __init__(self, tokens: _Tokens, starts: Int64s, index: _Index, metadata: dict[str, Any]) -> None:
        self._tokens, self._starts, self._index = tokens, starts, index
        self.metadata = metadata

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> TokenStore:
        """Open a store in O(index); raise DataError if it is torn or corrupted."""
        folder = Path(directory)
        metadata = _read_metadata(folder)
        index = _read_index(folder, metadata)
        starts = np.cumsum(index.lengths, dtype=np.int64) - index.lengths
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(metadata["chunk_tokens"], dtype=np.int64)])
        if int(bounds[-1]) != int(index.lengths.sum(dtype=np.int64)):
            raise DataError("its index and its tokens differ in number", _REMEDY, folder)
        return cls(_MappedTokens(folder / "tokens.arrow", bounds), starts, index, metadata)

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[Any, Any]], metadata: dict[str, Any] | None = None) -> TokenStore:
        """Hold (input_ids, labels) pairs in memory; sample i stands for document i + 1."""
        pairs = [Sample(np.asarray(ids, np.int32), np.asarray(labels, np.int32)) for ids, labels in samples]
        for sample in pairs:
            _check_sample(sample)
        batch = TokenBatch.join(pairs, range(1, len(pairs) + 1))
        index = _Index(batch.lengths, batch.count_loss_tokens(), batch.documents)
        starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        facts = {**(metadata or {}), "largest_id": batch.largest_id()}
        return cls(_MemoryTokens(batch.input_ids, batch.labels), starts, index, facts)

    @property
    def lengths(self) -> Int32s:
        """Tokens of each sample."""
        return self._index.lengths

    @property
    def num_loss_tokens(self) -> Int32s:
        """Loss tokens of each sample, after the shift by one."""
        return self._index.num_loss_tokens

    @property
    def documents(self) -> Int64s:
        """Line in the source file of the document that each sample comes from (a block: begins in)."""
        return self._index.documents

    @property
    def largest_id(self) -> int:
        """Largest token id among ids and labels, of this store or of the one that it was selected from."""
        return int(self.metadata["largest_id"])

    def __len__(self) -> int:
        return len(self._starts)

    def sample(self, i: int) -> Sample:
        """Return sample i in O(1)."""
        return self.read([i])

    def read(self, indices: Any) -> Sample:
        """Return the samples with these numbers laid end to end, in this order; each costs its length."""
        rows = self._rows(indices)
        rows = rows[self.lengths[rows] > 0]
        return self._tokens.read(self._starts[rows], self.lengths[rows])

    def select(self, indices: Any) -> TokenStore:
        """Return a store of the samples with these numbers, in this order, over the same tokens."""
        rows = self._rows(indices)
        index = _Index(self.lengths[rows], self.num_loss_tokens[rows], self.documents[rows])
        return TokenStore(self._tokens, self._starts[rows], index, self.metadata)

    def _rows(self, indices: Any) -> Int64s:
        rows = np.asarray(indices, dtype=np.int64)
        unknown = rows[(rows < 0) | (rows >= len(self))]
        if len(unknown):
            raise IndexError(f"sample {unknown[0]} of a store of {len(self)}")
        return rows


class StoreWriter:
    """Write a store; the directory appears whole when the `with` block ends well, and not at all otherwise.

    What `metadata` holds at the end of the block is kept with the store.
    """

    def __init__(self, directory: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> None:
        self.directory = Path(directory)
        self.metadata = metadata if metadata is not None else {}
        self._temporary = self.directory.with_name(f"{self.directory.name}.tmp-{uuid.uuid4().hex}")
        self._pending: list[TokenBatch] = []
        self._num_pending = self._num_samples = 0
        self._largest_id = -1
        self._chunk_tokens: list[int] = []
        self._index: list[_Index] = []

    def __enter__(self) -> StoreWriter:
        self._temporary.mkdir(parents=True)
        self._file = pa.OSFile(str(self._temporary / "tokens.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._file, _TOKENS_SCHEMA)
        return self

    def append(self, input_ids: Any, labels: Any, document: int | None = None) -> None:
        """Add one sample; `document` is its line in the source file, by default its place in the store."""
        sample = Sample(np.asarray(input_ids, np.int32), np.asarray(labels, np.int32))
        _check_sample(sample)
        place = self._num_samples + 1 if document is None else document
        self.append_batch(TokenBatch.join([sample], [place]))

    def append_batch(self, batch: TokenBatch) -> None:
        """Add samples that lie end to end."""
        self._index.append(_Index(batch.lengths, batch.count_loss_tokens(), batch.documents))
        self._pending.append(batch)
        self._num_pending += len(batch.input_ids)
        self._num_samples += len(batch.lengths)
        self._largest_id = max(self._largest_id, batch.largest_id())
        if self._num_pending >= CHUNK_TOKENS:
            self._flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._flush()
            self._writer.close()
            self._file.close()
            if error is None:
                self._publish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _flush(self) -> None:
        if self._num_pending:
            columns = [np.concatenate([getattr(b, name) for b in self._pending]) for name in _TOKENS_SCHEMA.names]
            self._writer.write_batch(_record_batch(columns, _TOKENS_SCHEMA))
            self._chunk_tokens.append(self._num_pending)
        self._pending, self._num_pending = [], 0

    def _publish(self) -> None:
        index = _Index.join(self._index)
        with (
            pa.OSFile(str(self._temporary / "index.arrow"), "wb") as file,
            pa.ipc.new_file(file, _INDEX_SCHEMA) as writer,
        ):
            writer.write_batch(_record_batch(index, _INDEX_SCHEMA))
        facts = {
            "format_version": FORMAT_VERSION,
            "num_samples": len(index.lengths),
            "largest_id": self._largest_id,
            "num_tokens": sum(self._chunk_tokens),
            "num_loss_tokens": int(index.num_loss_tokens.sum(dtype=np.int64)),
            "chunk_tokens": self._chunk_tokens,
            "tokens_bytes": (self._temporary / "tokens.arrow").stat().st_size,
            "index_checksum": zlib.crc32((self._temporary / "index.arrow").read_bytes()),
        }
        _write_metadata(self._temporary, {**self.metadata, **facts})
        for path in [*self._temporary.iterdir(), self._temporary]:
            sync(path)
        try:
            self._temporary.rename(self.directory)
        except OSError as error:
            raise DataError(
                f"cannot be published ({error.strerror})", "a folder of that name may exist", self.directory
            ) from error


def _record_batch(columns: Iterable[NDArray[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Arrow's view of these columns; `pa.array` would first import pandas, where it is installed: a second."""
    typed = [
        np.ascontiguousarray(column, kind.to_pandas_dtype()) for column, kind in zip(columns, schema.types, strict=True)
    ]
    arrays = [
        pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(column)])
        for column, kind in zip(typed, schema.types, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


class _Index(NamedTuple):
    lengths: Int32s
    num_loss_tokens: Int32s
    documents: Int64s

    @classmethod
    def join(cls, parts: list[_Index]) -> _Index:
        empty = _Index(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64))
        return _Index(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


class _Tokens(Protocol):
    def read(self, starts: Int64s, lengths: Int32s) -> Sample: ...


def _places(starts: Int64s, lengths: Int32s) -> Int64s:
    """Where the tokens of spans lie that begin at `starts`, one span after the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


@dataclass(frozen=True)
class _MemoryTokens:
    input_ids: Int32s
    labels: Int32s

    def read(self, starts: Int64s, lengths: Int32s) -> Sample:
        places = _places(starts, lengths)
        return Sample(self.input_ids[places], self.labels[places])


class _MappedTokens:
    """The tokens file, mapped as one array of 32-bit words; a record batch is checked when it is first read from.

    Pickles as its path.
    """

    def __init__(self, path: Path, bounds: Int64s) -> None:
        self.path, self.bounds = path, bounds  # bounds: first token of each record batch, and the number of tokens
        self._file: Any = None
        self._words: Int32s = np.zeros(0, np.int32)
        self._places = np.full((2, len(bounds) - 1), -1)  # word at which ids, and labels, of each record batch begin

    def __reduce__(self) -> tuple[type[_MappedTokens], tuple[Path, Int64s]]:
        return type(self), (self.path, self.bounds)

    def read(self, starts: Int64s, lengths: Int32s) -> Sample:
        batches = np.searchsorted(self.bounds, starts, side="right") - 1
        for number in np.unique(batches[self._places[0, batches] < 0]).tolist():
            self._places[:, number] = self._locate(number)
        begins = self._places[:, batches] + (starts - self.bounds[batches])
        return Sample(*(self._words[_places(column, lengths)] for column in begins))

    def _locate(self, number: int) -> list[int]:
        try:
            if self._file is None:
                self._file = pa.memory_map(str(self.path)).read_buffer()
                self._words = np.frombuffer(self._file, np.int32, self._file.size // 4)
            batch = pa.ipc.open_file(self._file).get_batch(number)
            _columns(batch, _TOKENS_SCHEMA, int(self.bounds[number + 1] - self.bounds[number]))
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise DataError(f"cannot read its tokens ({error})", _REMEDY, self.path) from error
        return [(column.buffers()[1].address - self._file.address) // 4 for column in batch.columns]


def _columns(batch: Any, schema: Any, num_rows: int) -> list[NDArray[Any]]:
    batch.validate()
    if batch.schema != schema or batch.num_rows != num_rows or any(column.null_count for column in batch.columns):
        raise ValueError(f"{batch.num_rows} rows of {batch.schema.names}, not {num_rows} of {schema.names}")
    return [_numbers(column) for column in batch.columns]


def _numbers(column: Any) -> NDArray[Any]:
    """What lies in the column, where it lies; its own `to_numpy` would import pandas too."""
    kind = column.type.to_pandas_dtype()
    return np.frombuffer(column.buffers()[1] or b"", kind, len(column), column.offset * column.type.byte_width)


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        envelope = json.loads((folder / "metadata.json").read_bytes())
        metadata = envelope["metadata"]
        if envelope["sha256"] != _digest(metadata):
            raise ValueError("its checksum does not match")
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {metadata['format_version']}, this trainer reads {FORMAT_VERSION}")
        if (folder / "tokens.arrow").stat().st_size != metadata["tokens_bytes"]:
            raise ValueError("tokens.arrow has another size than it was written with")
    except FileNotFoundError as error:
        allowed = "name a JSONL file or a whole prepared folder, or prepare the data again"
        raise DataError(f"a folder without {Path(error.filename).name}", allowed, folder) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"not a prepared data set, or a damaged one ({error})", _REMEDY, folder) from None
    return dict(metadata)


def _read_index(folder: Path, metadata: dict[str, Any]) -> _Index:
    try:
        buffer = pa.memory_map(str(folder / "index.arrow")).read_buffer()
        if zlib.crc32(buffer) != metadata["index_checksum"]:
            raise ValueError("its checksum does not match")
        batch = pa.ipc.open_file(buffer).get_batch(0)
        return _Index(*_columns(batch, _INDEX_SCHEMA, metadata["num_samples"]))
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise DataError(f"its index is damaged ({error})", _REMEDY, folder / "index.arrow") from None


def _write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    envelope = {"sha256": _digest(metadata), "metadata": metadata}
    (folder / "metadata.json").write_text(json.dumps(envelope, indent=1), encoding="utf-8")


def _digest(metadata: Any) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _check_sample(sample: Sample) -> None:
    if sample.input_ids.ndim != 1 or sample.input_ids.shape != sample.labels.shape:
        found = f"input_ids {sample.input_ids.shape} and labels {sample.labels.shape}"
        raise DataError(found, "both must be flat and of one length")
    if (sample.input_ids < 0).any() or ((sample.labels < 0) & (sample.labels != IGNORE_INDEX)).any():
        raise DataError("found a negative token id", f"ids must be at least 0, labels too or {IGNORE_INDEX}")
