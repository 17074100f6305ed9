"""From a path to rows: files, globs, folders of shards, and data sets of the `datasets` library, in every usual format.

A source file is looked through once for its digest, then read in chunks. Lines of a plain file are read where they are
needed, in any process; other formats are decoded here in order, and their chunks carry their rows with them. What a
file is follows from its first bytes, never from its name. Invariant: the same rows give the same rows in chunks,
numbered from 1, whatever the format.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self

import pyarrow as pa

from trainer.download import WITHOUT_HUB, why_unreachable
from trainer.errors import DataError, MissingPackageError, UsageError

Form = Literal["lines", "gzip", "zstd", "array", "parquet", "arrow", "dataset"]

CHUNK_BYTES = 2**18
ROWS_PER_TABLE = 256
"""Rows of a table in one chunk: about CHUNK_BYTES of chats."""

SHARD_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz", ".zst", ".parquet", ".arrow")
HUB_PREFIX = "hf://datasets/"

_UNUSABLE = (
    (b"PK\x03\x04", "is a zip archive", "unpack it first"),
    (b"BZh", "is compressed with bzip2", "unpack it first, or compress it with gzip or zstd"),
    (b"\xfd7zXZ", "is compressed with xz", "unpack it first, or compress it with gzip or zstd"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the data", "fetch the data with `git lfs pull`"),
    (b"\xff\xfe", "is UTF-16", "convert it: `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "is UTF-16", "convert it: `iconv -f UTF-16 -t UTF-8`"),
    (b"{\0", "is UTF-16", "convert it: `iconv -f UTF-16LE -t UTF-8`"),
    (b"\0{", "is UTF-16", "convert it: `iconv -f UTF-16BE -t UTF-8`"),
    (b"<!DOCTYPE", "is an HTML page", "download the data itself; the address may need a login"),
    (b"<html", "is an HTML page", "download the data itself; the address may need a login"),
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SEPARATORS = re.compile(r"[ \t\r\n,]*")


class Chunk(NamedTuple):
    """Some rows: `offset` and `size` are where the lines of a plain file lie, else `data` holds them."""

    offset: int
    size: int  # bytes of the file that it stands for
    first_line: int
    data: bytes | None = None
    is_table: bool = False  # data is an Arrow stream, not lines

    def lines(self, path: str) -> list[bytes]:
        """Read the lines, without their ends."""
        if self.data is not None:
            return self.data.split(b"\n")
        with reading(path), Path(path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size).split(b"\n")

    def table(self) -> pa.Table:
        """Return the rows of a table."""
        return pa.ipc.open_stream(self.data).read_all()


@dataclass(frozen=True)
class Source:
    """One file (or data set) as it was when it was looked through: what it is, and the SHA-256 of its bytes."""

    path: str
    form: Form
    digest: str
    num_bytes: int
    stamp: tuple[int, int] = (0, 0)
    chunks: list[Chunk] = field(default_factory=list, repr=False)  # of a plain file
    dataset: Any = None

    @classmethod
    def scan(cls, path: str | Path) -> Self:
        """Hash a file, and find whole lines to hand out, in one pass.

        Raises:
            DataError: the file cannot be read, or is of a format that is not.
        """
        return cls.scan_parts(path, None)[0]

    @classmethod
    def scan_parts(cls, path: str | Path, part_bytes: int | None) -> list[Self]:
        """Do as `scan`, but cut a file of lines into parts of at least so many bytes, each with its own digest."""
        form = detect_form(path)
        stamp = _stamp(path)
        parts: list[Self] = []
        digest = hashlib.sha256()
        chunks: list[Chunk] = []
        begin = offset = part_begin = 0
        line = 1
        with reading(path), Path(path).open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                end = block.rfind(b"\n") + 1 if form == "lines" else 0
                digest.update(block[:end])
                if end:
                    chunks.append(Chunk(begin, offset + end - begin, line))
                    begin, line = offset + end, line + block.count(b"\n")
                if part_bytes and begin - part_begin >= part_bytes:
                    parts.append(cls(str(path), form, digest.hexdigest(), begin - part_begin, stamp, chunks))
                    digest, chunks, part_begin = hashlib.sha256(), [], begin
                digest.update(block[end:])
                offset += len(block)
        if offset > begin and form == "lines":
            chunks.append(Chunk(begin, offset - begin, line))
        if offset > part_begin or not parts:
            parts.append(cls(str(path), form, digest.hexdigest(), offset - part_begin, stamp, chunks))
        return parts

    @classmethod
    def of_dataset(cls, dataset: Any, name: str) -> Self:
        """Wrap a `datasets.Dataset`; its digest is that of its rows."""
        digest, num_bytes = hashlib.sha256(), 0
        for start in range(0, len(dataset), ROWS_PER_TABLE):
            data = _stream(_rows_of(dataset, start))
            digest.update(data)
            num_bytes += len(data)
        return cls(name, "dataset", digest.hexdigest(), num_bytes, dataset=dataset)

    @property
    def first_row(self) -> int:
        """Number of its first row in its file."""
        return self.chunks[0].first_line if self.chunks else 1

    def has_changed(self) -> bool:
        """Return whether the file is another now."""
        return self.form != "dataset" and _stamp(self.path) != self.stamp

    def read_chunks(self) -> Iterator[Chunk]:
        """Yield the rows in order.

        Raises:
            DataError: the file is damaged.
        """
        if self.form == "lines":
            yield from self.chunks
        elif self.form in ("gzip", "zstd", "array"):
            yield from self._text_chunks()
        else:
            yield from self._table_chunks()

    def _text_chunks(self) -> Iterator[Chunk]:
        """Decode a compressed file or an array; `size` shares the file's bytes out by what was read of it."""
        read = 0
        with reading(self.path), open_text(self.path, self.form) as (raw, text):
            line = 1
            head = text.read(4096)
            is_array = head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
            lines = _array_items(head, text, self.path) if is_array else _whole_lines(head, text)
            for block, num_lines in lines:
                size, read = raw.tell() - read, raw.tell()
                yield Chunk(0, size, line, block)
                line += num_lines

    def _table_chunks(self) -> Iterator[Chunk]:
        row = 1
        share = 0.0
        for table, num_rows in self._tables():
            data = _stream(table)
            before, share = share, share + self.num_bytes * table.num_rows / max(num_rows, 1)
            yield Chunk(0, int(share) - int(before), row, data, is_table=True)
            row += table.num_rows

    def _tables(self) -> Iterator[tuple[pa.Table, int]]:
        """Yield (some rows, number of all rows)."""
        if self.form == "dataset":
            for start in range(0, len(self.dataset), ROWS_PER_TABLE):
                yield _rows_of(self.dataset, start), len(self.dataset)
            return
        with reading(self.path):
            if self.form == "parquet":
                import pyarrow.parquet as pq

                with pq.ParquetFile(self.path) as file:
                    for batch in file.iter_batches(ROWS_PER_TABLE):
                        yield pa.Table.from_batches([batch]), file.metadata.num_rows
            else:
                for batch, num_rows in _arrow_batches(self.path):
                    for start in range(0, batch.num_rows, ROWS_PER_TABLE):
                        yield pa.Table.from_batches([batch.slice(start, ROWS_PER_TABLE)]), num_rows


def find_sources(
    path: Any, split: str | None = None, revision: str | None = None, part_bytes: int | None = None
) -> list[list[Source]]:
    """Return the parts of each file that a path means, in order: a file, a glob, a folder of shards, a data set.

    Args:
        path: a path, `hf://datasets/NAME` for the hub, or a `datasets.Dataset`.
        split: of a data set that has several; by default "train".
        revision: of a data set on the hub.
        part_bytes: see `Source.scan_parts`.

    Raises:
        DataError: nothing is there, or what is there cannot be read.
        UsageError: split or revision has no effect.
    """
    if is_dataset(path):
        return [[Source.of_dataset(path, "datasets.Dataset")]]
    if str(path).startswith(HUB_PREFIX):
        return [[Source.of_dataset(_load_from_hub(str(path), split, revision), str(path))]]
    place = Path(path).expanduser()
    if is_saved_dataset(place):
        return [[Source.of_dataset(_load_from_disk(place, split), str(place))]]
    if split is not None or revision is not None:
        given = "split" if split is not None else "revision"
        raise UsageError(f"{given} has no effect on {path}: only data sets on the hub or saved by datasets have one")
    return [Source.scan_parts(file, part_bytes) for file in find_files(place)]


def raw_rows(source: Source, numbers: Collection[int]) -> dict[int, str]:
    """Return some rows of a source as text, as they stand in it."""
    found: dict[int, str] = {}
    for chunk in source.read_chunks():
        if chunk.is_table:
            rows = [json.dumps(row, ensure_ascii=False, default=str) for row in chunk.table().to_pylist()]
        else:
            rows = [line.decode("utf-8", "backslashreplace") for line in chunk.lines(source.path)]
        found |= {n: row for n, row in enumerate(rows, chunk.first_line) if n in numbers}
    return found


def find_files(place: Path) -> list[Path]:
    """Return the files that a path names, in the order of their names."""
    if os.path.isdir(place):
        names = sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith((".", "_")))
        files = [path for path in names if path.suffix in SHARD_SUFFIXES]
        if not files:
            suffixes = ", ".join(SHARD_SUFFIXES)
            allowed = f"give a prepared folder, a folder saved by datasets, or one with files that end in {suffixes}"
            raise DataError("a folder without metadata.json and without data files", allowed, place)
        kinds = sorted({path.name[path.name.index(".") :] for path in files})
        forms = {detect_form(path) for path in files}
        if len(forms) > 1:
            raise DataError(
                f"a folder with files of several formats ({', '.join(kinds)})",
                "they may hold the same rows: name the ones to train on, as FOLDER/*.jsonl",
                place,
            )
        return files
    if not os.path.exists(place) and any(character in str(place) for character in "*?["):
        found = sorted(path for path in glob.glob(str(place), recursive=True) if os.path.isfile(path))
        if not found:
            raise DataError("no file matches", "give a pattern that matches at least one file", place)
        return [Path(path) for path in found]
    return [place]


def is_dataset(value: Any) -> bool:
    """Return whether this is a `datasets.Dataset`, of which the rows can be read as Arrow tables."""
    return hasattr(value, "with_format") and hasattr(value, "column_names") and hasattr(value, "__len__")


def is_saved_dataset(place: Path) -> bool:
    """Return whether `datasets` has written this folder with `save_to_disk`."""
    return any(os.path.isfile(place / name) for name in ("state.json", "dataset_dict.json"))


def detect_form(path: str | Path) -> Form:
    """Say what a file is by its first bytes; refuse what cannot be read, naming it for what it is."""
    place = Path(path)
    with reading(path):
        if place.exists() and not place.is_file():  # a pipe could be read once only, and might never end
            raise DataError("is not a regular file", "give the path of a data file", path)
        with place.open("rb") as file:
            head = file.read(4096)
    for sign, found, remedy in _UNUSABLE:
        if head.startswith(sign):
            raise DataError(found, remedy, path)
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    return "array" if head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[") else "lines"


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what the system or a decoder raises while a file is read into an error that names the file."""
    try:
        yield
    except DataError:
        raise
    except EOFError:
        raise DataError("ends too early: it was cut off", "download or write it again", path) from None
    except (gzip.BadGzipFile, zlib.error, pa.ArrowException) as error:
        raise DataError(f"is damaged ({error})", "download or write it again", path) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if "Truncated compressed" in str(error):
            raise DataError("ends too early: it was cut off", "download or write it again", path) from None
        raise DataError(f"cannot be read ({reason})", "give the path of a data file that can be", path) from None


@contextmanager
def open_text(path: str | Path, form: Form) -> Iterator[tuple[IO[bytes], Any]]:
    """Open a file of lines or of an array, compressed or not: (the file, its decoded bytes)."""
    with Path(path).open("rb") as raw:
        if form == "gzip":
            with gzip.GzipFile(fileobj=raw) as text:
                yield raw, text
        elif form == "zstd":
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as text:
                yield raw, text
        else:
            yield raw, raw


def _whole_lines(head: bytes, text: Any) -> Iterator[tuple[bytes, int]]:
    """Yield (whole lines, their number), about CHUNK_BYTES at a time."""
    rest = head
    while block := text.read(CHUNK_BYTES):
        end = block.rfind(b"\n") + 1
        if end:
            whole = rest + block[:end]
            yield whole, whole.count(b"\n")
            rest = block[end:]
        else:
            rest += block
    if rest:
        yield rest, rest.count(b"\n") + 1


def _array_items(head: bytes, text: Any, path: str) -> Iterator[tuple[bytes, int]]:
    """Yield (items of a JSON array, one a line; their number). Line breaks in an item can only be white space."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    rest = decode(head.removeprefix(_BYTE_ORDER_MARK).lstrip()[1:])
    number, size = 0, CHUNK_BYTES
    is_last = False
    while True:
        items, place, is_ended, reason = _items_in(rest, is_last)
        number += len(items)
        if items:
            yield "\n".join(items).encode("utf-8", "surrogateescape"), len(items)
        rest = rest[place:]
        if is_ended:
            break
        if is_last:
            found = f"not JSON ({reason})" if rest else "ends too early: it was cut off"
            raise DataError(found, "it must be one JSON array of objects", path, number + 1)
        size = CHUNK_BYTES if items else 2 * size  # an item longer than a block is not tried too often
        block = text.read(size)
        is_last = not block
        rest += decode(block, is_last)
    if (rest + text.read(4096).decode("utf-8", "replace")).strip():
        raise DataError("more follows after the array", "a file holds one JSON array, or one object a line", path)


def _items_in(text: str, is_last: bool) -> tuple[list[str], int, bool, str]:
    """Return the whole items at the beginning, where they end, whether the array ends there, or why no item follows."""
    decoder = json.JSONDecoder()
    items: list[str] = []
    place = 0
    while True:
        place = _SEPARATORS.match(text, place).end()  # type: ignore[union-attr] # it matches nothing too
        if text.startswith("]", place):
            return items, place + 1, True, ""
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            return items, place, False, str(error)
        if end == len(text) and not is_last:  # a number may go on in the next block
            return items, place, False, ""
        items.append(text[place:end].replace("\n", " ").replace("\r", " "))
        place = end


def _arrow_batches(path: str) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield (record batch, number of rows in all) of an Arrow file or stream."""
    source = pa.memory_map(path)
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        num_rows = sum(batch.num_rows for batch in pa.ipc.open_stream(pa.memory_map(path)))
        for batch in pa.ipc.open_stream(pa.memory_map(path)):
            yield batch, num_rows
        return
    num_rows = sum(file.get_batch(i).num_rows for i in range(file.num_record_batches))
    for i in range(file.num_record_batches):
        yield file.get_batch(i), num_rows


def _rows_of(dataset: Any, start: int) -> pa.Table:
    table: pa.Table = dataset.with_format("arrow")[start : start + ROWS_PER_TABLE]
    return table


def _stream(table: pa.Table) -> bytes:
    """Write a table as an Arrow stream, without the metadata of its schema."""
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingPackageError.in_extra("reading this data needs the package datasets", "datasets") from None
    return datasets


def _load_from_disk(place: Path, split: str | None) -> Any:
    loaded = _datasets().load_from_disk(str(place))
    if not isinstance(loaded, dict):
        if split is not None:
            raise UsageError(f"split={split!r} has no effect on {place}: it is a single data set")
        return loaded
    wanted = split or "train"
    if wanted not in loaded:
        raise DataError(f"has no split {wanted!r}", f"it has {', '.join(loaded)}: choose one with split", place)
    return loaded[wanted]


def _load_from_hub(name: str, split: str | None, revision: str | None) -> Any:
    repository, datasets = name.removeprefix(HUB_PREFIX), _datasets()
    unreachable = why_unreachable(repository, "dataset")
    # Where `datasets` keeps what it fetched; it finds that by itself, also without the hub.
    if unreachable is not None and not Path(datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___")).exists():
        raise DataError(f"was not downloaded before, and {unreachable}", WITHOUT_HUB, name)
    try:
        return datasets.load_dataset(repository, split=split or "train", revision=revision)
    except MissingPackageError:
        raise
    except Exception as error:  # noqa: BLE001  of many kinds: network, login, unknown names, scripts
        raise DataError(
            f"cannot be loaded ({type(error).__name__}: {error})", "check name, split and revision", name
        ) from error


def _stamp(path: str | Path) -> tuple[int, int]:
    with reading(path):
        status = Path(path).stat()
        return status.st_size, status.st_mtime_ns
