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
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.atomic import sync
from trainer.data.token_files import (
    REMEDY,
    TOKENS_SCHEMA,
    Int32s,
    Int64s,
    JoinedTokens,
    MappedTokens,
    MemoryTokens,
    Sample,
    Tokens,
    block_checksums,
    checked_columns,
    record_batch,
)
from trainer.errors import DataError
from trainer.labels import IGNORE_INDEX

FORMAT_VERSION = 3
DOCUMENT_BITS = 40
"""A document's number is its row in its file; above these bits stands the number of the file."""

CHUNK_TOKENS = 2**20
"""Tokens after which a record batch of the tokens file is closed; a sample never lies in two."""

_INDEX_SCHEMA = pa.schema(
    [("length", pa.int32()), ("num_loss_tokens", pa.int32()), ("document", pa.int64()), ("content", pa.uint64())]
)


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

    @classmethod
    def concatenate(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Lay batches end to end."""
        batches = [cls.join([], []), *batches]
        columns = ("input_ids", "labels", "lengths", "documents")
        return cls(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in columns))

    def where(self, wanted: NDArray[np.bool_]) -> TokenBatch:
        """Return the samples that are wanted, one flag each."""
        tokens = np.repeat(wanted, self.lengths)
        return TokenBatch(self.input_ids[tokens], self.labels[tokens], self.lengths[wanted], self.documents[wanted])

    def largest_id(self) -> int:
        """Return the largest token id among ids and labels, -1 if there is none."""
        return int(max(self.input_ids.max(initial=-1), self.labels.max(initial=-1)))

    def count_loss_tokens(self) -> Int32s:
        """Count, for each sample, the labels trained after the shift by one: the first never is."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        trained = self.labels != IGNORE_INDEX
        trained[(ends - self.lengths)[self.lengths > 0]] = False
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(trained, dtype=np.int64)])
        counts: Int32s = (before[ends] - before[ends - self.lengths]).astype(np.int32)
        return counts

    def hash_contents(self) -> NDArray[np.uint64]:
        """Hash the token ids of each sample: equal samples give equal numbers, others practically never."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        places = np.arange(len(self.input_ids)) - np.repeat(ends - self.lengths, self.lengths)
        x = (self.input_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x ^= (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1342543DE82EF95)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # SplitMix64
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(x, dtype=np.uint64)])
        return np.asarray(sums[ends] - sums[ends - self.lengths], np.uint64)

    def to_index(self) -> _Index:
        """Return what the index says of these samples."""
        return _Index(self.lengths, self.count_loss_tokens(), self.documents, self.hash_contents())


class TokenStore:
    """Samples by number, of one prepared file or of several.

    At hand are `lengths`, `num_loss_tokens` (int32[n]), `documents` (int64[n]: row, and number of the file), `contents`
    (uint64[n], a hash of the tokens) and `sources` (int32[n], numbers in `source_names`).
    """

    def __init__(self, tokens: Tokens, starts: Int64s, index: _Index, metadata: dict[str, Any]) -> None:
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
            raise DataError("its index and its tokens differ in number", REMEDY, folder)
        checksums = np.array(metadata["block_checksums"], np.uint32)
        return cls(MappedTokens(folder / "tokens.arrow", bounds, checksums), starts, index, metadata)

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[Any, Any]], metadata: dict[str, Any] | None = None) -> TokenStore:
        """Hold (input_ids, labels) pairs in memory; sample i stands for document i + 1."""
        pairs = [Sample(np.asarray(ids, np.int32), np.asarray(labels, np.int32)) for ids, labels in samples]
        for sample in pairs:
            _check_sample(sample)
        batch = TokenBatch.join(pairs, range(1, len(pairs) + 1))
        index = batch.to_index()
        starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        facts = {**(metadata or {}), "largest_id": batch.largest_id()}
        return cls(MemoryTokens(batch.input_ids, batch.labels), starts, index, facts)

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
    def contents(self) -> NDArray[np.uint64]:
        """A hash of each sample's token ids."""
        return self._index.contents

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """Checksums of all tokens and labels, block by block, of the files that the samples lie in."""
        return self._tokens.checksums

    @property
    def source_names(self) -> list[str]:
        """Names of the sources that the samples come from; one without a name where there is no more to say."""
        return list(self.metadata.get("source_names", [""]))

    @property
    def sources(self) -> Int32s:
        """Number of each sample's source."""
        of_files = np.array(self.metadata.get("source_of_files", [0]), np.int32)
        return np.asarray(of_files[self.documents >> DOCUMENT_BITS], np.int32)

    def sources_of(self, rows: Int64s) -> Int32s:
        """Return the numbers of the sources of some samples."""
        of_files = np.array(self.metadata.get("source_of_files", [0]), np.int32)
        return np.asarray(of_files[self.documents[rows] >> DOCUMENT_BITS], np.int32)

    def place(self, i: int) -> tuple[str, int]:
        """Return file and row of the document that sample i comes from."""
        files = self.metadata.get("files", [str(self.metadata.get("source", ""))])
        number, row = divmod(int(self.documents[i]), 1 << DOCUMENT_BITS)
        return files[number], row

    def check_unchanged(self) -> None:
        """Raise DataError where the tokens file was written since the store was made and differs; reads it then."""
        for tokens in self._tokens.parts():
            # The metadata is written last, so only what was written since then is younger.
            if tokens.path.stat().st_mtime_ns > tokens.path.with_name("metadata.json").stat().st_mtime_ns:
                tokens.check_all()

    @classmethod
    def concatenate(cls, stores: Sequence[TokenStore], files: Sequence[int], metadata: dict[str, Any]) -> TokenStore:
        """Return the samples of several stores one after the other; `files` numbers the file that each comes from."""
        bases = np.cumsum([0, *(store._tokens.num_tokens for store in stores)], dtype=np.int64)
        starts = [store._starts + base for store, base in zip(stores, bases, strict=False)]
        parts = []
        for store, file in zip(stores, files, strict=True):
            parts.append(store._index._replace(documents=store.documents + (file << DOCUMENT_BITS)))
        facts = {**metadata, "largest_id": max(store.largest_id for store in stores)}
        tokens = JoinedTokens([store._tokens for store in stores], bases)
        return cls(tokens, np.concatenate(starts), _Index.join(parts), facts)

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
        index = _Index(self.lengths[rows], self.num_loss_tokens[rows], self.documents[rows], self.contents[rows])
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
        self._writer = pa.ipc.new_file(self._file, TOKENS_SCHEMA)
        return self

    def append(self, input_ids: Any, labels: Any, document: int | None = None) -> None:
        """Add one sample; `document` is its line in the source file, by default its place in the store."""
        sample = Sample(np.asarray(input_ids, np.int32), np.asarray(labels, np.int32))
        _check_sample(sample)
        place = self._num_samples + 1 if document is None else document
        self.append_batch(TokenBatch.join([sample], [place]))

    def append_batch(self, batch: TokenBatch) -> None:
        """Add samples that lie end to end."""
        self._index.append(batch.to_index())
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
            columns = [np.concatenate([getattr(b, name) for b in self._pending]) for name in TOKENS_SCHEMA.names]
            self._writer.write_batch(record_batch(columns, TOKENS_SCHEMA))
            self._chunk_tokens.append(self._num_pending)
        self._pending, self._num_pending = [], 0

    def _publish(self) -> None:
        index = _Index.join(self._index)
        with (
            pa.OSFile(str(self._temporary / "index.arrow"), "wb") as file,
            pa.ipc.new_file(file, _INDEX_SCHEMA) as writer,
        ):
            writer.write_batch(record_batch(index, _INDEX_SCHEMA))
        facts = {
            "format_version": FORMAT_VERSION,
            "num_samples": len(index.lengths),
            "largest_id": self._largest_id,
            "num_tokens": sum(self._chunk_tokens),
            "num_loss_tokens": int(index.num_loss_tokens.sum(dtype=np.int64)),
            "chunk_tokens": self._chunk_tokens,
            "tokens_bytes": (self._temporary / "tokens.arrow").stat().st_size,
            "block_checksums": block_checksums(self._temporary / "tokens.arrow"),
            "index_checksum": zlib.crc32((self._temporary / "index.arrow").read_bytes()),
        }
        metadata = {**self.metadata, **facts}
        envelope = {"sha256": _digest(metadata), "metadata": metadata}
        (self._temporary / "metadata.json").write_text(json.dumps(envelope, indent=1), encoding="utf-8")
        for path in [*self._temporary.iterdir(), self._temporary]:
            sync(path)
        try:
            self._temporary.rename(self.directory)
        except OSError as error:
            raise DataError(
                f"cannot be published ({error.strerror})", "a folder of that name may exist", self.directory
            ) from error


class _Index(NamedTuple):
    lengths: Int32s
    num_loss_tokens: Int32s
    documents: Int64s
    contents: NDArray[np.uint64]

    @classmethod
    def join(cls, parts: list[_Index]) -> _Index:
        empty = _Index(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint64))
        return _Index(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


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
        raise DataError(f"not a prepared data set, or a damaged one ({error})", REMEDY, folder) from None
    return dict(metadata)


def _read_index(folder: Path, metadata: dict[str, Any]) -> _Index:
    try:
        buffer = pa.memory_map(str(folder / "index.arrow")).read_buffer()
        if zlib.crc32(buffer) != metadata["index_checksum"]:
            raise ValueError("its checksum does not match")
        batch = pa.ipc.open_file(buffer).get_batch(0)
        return _Index(*checked_columns(batch, _INDEX_SCHEMA, metadata["num_samples"]))
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise DataError(f"its index is damaged ({error})", REMEDY, folder / "index.arrow") from None


def _digest(metadata: Any) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _check_sample(sample: Sample) -> None:
    if sample.input_ids.ndim != 1 or sample.input_ids.shape != sample.labels.shape:
        found = f"input_ids {sample.input_ids.shape} and labels {sample.labels.shape}"
        raise DataError(found, "both must be flat and of one length")
    if (sample.input_ids < 0).any() or ((sample.labels < 0) & (sample.labels != IGNORE_INDEX)).any():
        raise DataError("found a negative token id", f"ids must be at least 0, labels too or {IGNORE_INDEX}")
