"""JSONL files: bytes to documents, with file, line and field in every error.

Owns what a line may look like: its encoding, its JSON, its kind and the types of its fields, tokenized lines included.
Invariant: whatever the bytes are, a line gives a valid document, nothing (blank), or a DataError that names file and
line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.formats import AS_IT_IS, PACKED_SIGNS, FormatError, Reading, drop_nulls, split_packed
from trainer.data.sources import Chunk, Source
from trainer.errors import DataError
from trainer.labels import IGNORE_INDEX

Kind = Literal["messages", "prompt_completion", "text", "tokens"]

PRETRAIN_ROLE = "pretrain"
"""Role of a message whose content is raw text, trained whole."""

MASKS = ("loss_mask", "completion_mask", "assistant_masks")
"""Other names under which tokenized lines say what is trained: 1, or 0."""

FIELDS: dict[Kind, frozenset[str]] = {
    "tokens": frozenset(
        {
            "input_ids",
            "labels",
            *MASKS,
            "attention_mask",
            "len",
            "num_loss_counted_tokens",
            "position_ids",
            "seq_lengths",
        }
    ),
    "messages": frozenset({"messages", "tools"}),
    "prompt_completion": frozenset({"prompt", "completion", "tools"}),
    "text": frozenset({"text"}),
}
"""The fields that are read, by kind. Others are ignored, and reported as ignored."""

TRAINED_FLAGS: dict[str, tuple[Any, Any]] = {"weight": (0, 1), "train": (False, True), "training": (False, True)}
"""Fields of a message by which OpenAI's format and axolotl's say whether it is trained: no, yes."""

_SIGNS: tuple[tuple[str, Kind], ...] = (
    ("input_ids", "tokens"),
    ("messages", "messages"),
    ("prompt", "prompt_completion"),
    ("text", "text"),
)
_KINDS_ALLOWED = "each line needs 'messages', 'prompt' and 'completion', 'text', or 'input_ids'"
_FOREIGN = {
    "conversations": "is it ShareGPT's format? Then give data_format=sharegpt",
    "instruction": "is it Alpaca's format? Then give data_format=alpaca",
}
_NUM_FIRST_LINES = 100
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UndecidedError(DataError):
    """A good document that is too long or has nothing to train: overlong and on_untrainable decide, not on_broken."""


@dataclass(frozen=True)
class Document:
    """One line of a JSONL file as read: `line` counts from 1, `fields` are checked for the document's kind."""

    path: str
    line: int
    fields: dict[str, Any]
    may_hold_nulls: bool = True

    @property
    def kind(self) -> Kind:
        """The kind that its fields say it is."""
        for sign, kind in _SIGNS:
            if sign in self.fields:
                return kind
        names = ", ".join(map(repr, islice(self.fields, 8))) or "no fields"
        hints = [hint for name, hint in _FOREIGN.items() if name in self.fields]
        hints = hints or ["columns maps other names to these, as columns='messages=NAME'"]
        raise self.refusal(f"found {names}", "; ".join([_KINDS_ALLOWED, *hints]))

    def refusal(self, found: str, allowed: str, field: str | None = None) -> DataError:
        """Build the error that refuses this document."""
        return DataError(found, allowed, self.path, self.line, field)

    def undecided(self, found: str, allowed: str) -> DataError:
        """Build the error of a good document with which an option must say what to do."""
        return UndecidedError(found, allowed, self.path, self.line)


@dataclass(frozen=True)
class FileKind:
    """The kind of a file, and the line that shows it."""

    kind: Kind
    line: int


def read_documents(path: str | PathLike[str]) -> Iterator[Document]:
    """Yield the checked documents of a file in order; all of the kind of the first. Blank lines hold no document."""
    source = Source.scan(Path(path))
    expected = detect_file_kind(source)
    for chunk in source.read_chunks():
        for document in parse_chunk(chunk, source.path, expected, AS_IT_IS, Counter()):
            if isinstance(document, DataError):
                raise document
            yield document


def detect_kind(path: str | PathLike[str]) -> Kind:
    """Say what the documents of a file are, from its first rows."""
    return detect_file_kind(Source.scan(Path(path))).kind


def detect_file_kind(source: Source, reading: Reading = AS_IT_IS) -> FileKind:
    """Say what the documents of a source are, by the first of its first rows that is one, and which row that is.

    Raises:
        DataError: none of the first rows is a document; it tells why the first is not.
    """
    first_error = None
    rows = (row for chunk in source.read_chunks() for row in _rows(chunk, source.path, reading))
    for document in islice(rows, _NUM_FIRST_LINES):
        try:
            if isinstance(document, Document):
                document = _read_as(document, reading)
                return FileKind(document.kind, document.line)
            if document is not None:
                raise document
        except DataError as error:
            first_error = first_error or error
    raise first_error or DataError(
        f"found no document in the first {_NUM_FIRST_LINES} lines", _KINDS_ALLOWED, source.path
    )


def parse_chunk(
    chunk: Chunk, path: str, expected: FileKind, reading: Reading, report: Counter[str]
) -> Iterator[Document | DataError]:
    """Yield the document of every row, or why it is none; all must be of the expected kind.

    A row that holds several packed samples gives a document for each. Counted in `report` is what was changed.
    """
    is_converted = bool(reading.columns or reading.format)
    for row in _rows(chunk, path, reading):
        if not isinstance(row, Document):
            if row is not None:
                yield row
            continue
        try:
            document = _read_as(row, reading) if is_converted else row
            if document.kind != expected.kind:
                found = f"line {document.line} is {document.kind!r}, but line {expected.line} is {expected.kind!r}"
                allowed = "a file holds documents of one kind; put each kind into a file of its own"
                raise document.refusal(found, allowed)
            if row.may_hold_nulls:
                document = replace(document, fields=drop_nulls(document.fields, report))
            documents = [document]
            if expected.kind == "tokens" and any(document.fields.get(sign) is not None for sign in PACKED_SIGNS):
                documents = [replace(document, fields=sample) for sample in split_packed(document.fields, report)]
            for document in documents:
                check_fields(document, expected.kind)
        except DataError as error:
            yield error
        except FormatError as error:
            yield row.refusal(error.found, error.allowed, error.field)
        else:
            yield from documents


def _read_as(row: Document, reading: Reading) -> Document:
    try:
        return replace(row, fields=reading.apply(row.fields))
    except FormatError as error:
        raise row.refusal(error.found, error.allowed, error.field) from None


def _rows(chunk: Chunk, path: str, reading: Reading) -> Iterator[Document | DataError | None]:
    """Yield what each row of a chunk says, why it says nothing, or None where it is blank."""
    if not chunk.is_table:
        for number, raw in enumerate(chunk.lines(path), chunk.first_line):
            try:
                yield parse_line(raw, path, number)
            except DataError as error:
                yield error
        return
    table = chunk.table()
    known = reading.column_names.union(*FIELDS.values())
    signs = {sign for sign, _ in _SIGNS}
    for i, name in enumerate(table.column_names):
        if name not in known:  # it only matters whether there is something, for the report of ignored fields
            table = table.set_column(i, name, table.column(i).is_valid())
    for number, row in enumerate(table.to_pylist(), chunk.first_line):
        fields = {name: value for name, value in row.items() if value is not None and (name in known or value)}
        if not signs & fields.keys():  # all are null: say so in the error
            fields |= {name: None for name in row if name in signs}
        yield Document(path, number, fields)


def parse_line(raw: bytes, path: str, line: int) -> Document | None:
    """Decode one line; None if it is blank."""
    if line == 1:
        raw = raw.removeprefix(_BYTE_ORDER_MARK)
    if not raw.strip():
        return None
    try:
        fields = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
        if b"\\u" in raw:
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {raw[error.start : error.start + 1]!r} at position {error.start}"
        raise DataError(f"{found} is not UTF-8", "a line must be JSON in UTF-8", path, line) from None
    except UnicodeEncodeError as error:
        found = f"half a surrogate pair, {error.object[error.start]!a}, in a string"
        raise DataError(found, "strings must be valid Unicode", path, line) from None
    except (ValueError, RecursionError) as error:
        found = "JSON nested too deeply" if isinstance(error, RecursionError) else f"not JSON ({error})"
        raise DataError(found, "each line must be one JSON object", path, line) from None
    if not isinstance(fields, dict):
        raise DataError(f"found {describe(fields)}", "each line must be one JSON object", path, line)
    return Document(path, line, fields, b"null" in raw)


def check_fields(document: Document, kind: Kind) -> None:
    """Raise DataError where a field that this kind reads is missing or of the wrong type."""
    if kind == "messages":
        check_messages(document, "messages")
        _check_pretrain(document)
    elif kind == "prompt_completion":
        _check_prompt_completion(document)
    elif kind == "text" and not isinstance(document.fields["text"], str):
        raise document.refusal(f"found {describe(document.fields['text'])}", "'text' must be a string", "text")
    tools = document.fields.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise document.refusal(f"found {describe(tools)}", "'tools' must be a list of objects", "tools")


def check_messages(document: Document, field: str) -> None:
    """Raise DataError where the field is not a list of messages, each with a role and a content."""
    messages = document.fields[field]
    if not isinstance(messages, list) or not messages:
        raise document.refusal(f"found {describe(messages)}", "it must be a list of messages", field)
    for i, message in enumerate(messages):
        _check_message(document, message, f"{field}[{i}]")


def describe(value: Any) -> str:
    """Say what a JSON value is, in few words."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)[:40]
    if isinstance(value, str):
        return f"the string {value[:40]!r}{'...' if len(value) > 40 else ''}"
    noun = "list" if isinstance(value, list) else "object"
    return f"{'a' if noun == 'list' else 'an'} {noun} of {len(value)}" if value else f"an empty {noun}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} stands twice in one object")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_message(document: Document, message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise document.refusal(f"found {describe(message)}", "a message must be an object", place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise document.refusal(f"found {describe(role)}", "a role must be a string that is not empty", f"{place}.role")
    if content is None and len(message.keys() - {"role", "content"}) == 0:
        raise document.refusal("found nothing", "a message needs a content or tool calls", f"{place}.content")
    for name, values in TRAINED_FLAGS.items():
        if message.get(name) not in (None, *values):
            found = f"found {describe(message[name])}"
            raise document.refusal(found, f"it must be {' or '.join(map(describe, values))}", f"{place}.{name}")
    has_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not (content is None or isinstance(content, str) or has_parts):
        allowed = "a content must be a string or a list of objects"
        raise document.refusal(f"found {describe(content)}", allowed, f"{place}.content")


def _check_pretrain(document: Document) -> None:
    messages = document.fields["messages"]
    if not any(message["role"] == PRETRAIN_ROLE for message in messages):
        return
    if len(messages) > 1:
        allowed = f"a {PRETRAIN_ROLE!r} message must be the only one of its document"
        raise document.refusal(f"found {len(messages)} messages", allowed, "messages")
    if not isinstance(messages[0].get("content"), str):
        found = f"found {describe(messages[0].get('content'))}"
        raise document.refusal(found, f"a {PRETRAIN_ROLE!r} content must be a string", "messages[0].content")


def _check_prompt_completion(document: Document) -> None:
    if "completion" not in document.fields:
        raise document.refusal("found 'prompt' without 'completion'", "both are needed", "completion")
    prompt, completion = document.fields["prompt"], document.fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return
    if isinstance(prompt, str) or isinstance(completion, str):
        found = f"found prompt {describe(prompt)}, completion {describe(completion)}"
        raise document.refusal(found, "both must be strings, or both lists of messages", "completion")
    check_messages(document, "prompt")
    check_messages(document, "completion")


_LARGEST_ID = 2**31 - 1


def read_tokens(document: Document, vocabulary_size: int | None = None) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return (input_ids, labels) of a tokenized document; labels default to the ids, all trained or those of a mask."""
    limit = _LARGEST_ID if vocabulary_size is None else vocabulary_size - 1
    ids = _integers(document, "input_ids")
    _check_range(document, "input_ids", ids, limit)
    given = [name for name in ("labels", *MASKS) if document.fields.get(name) is not None]
    if len(given) > 1:
        raise document.refusal(f"found {' and '.join(given)}", "one of them says what is trained", given[1])
    if given == ["labels"]:
        labels = _for_each(document, "labels", len(ids))
        _check_range(document, "labels", labels[labels != IGNORE_INDEX], limit, f" or {IGNORE_INDEX}")
    else:
        labels = np.where(_mask(document, given[0], len(ids)), ids, IGNORE_INDEX) if given else ids
    if document.fields.get("attention_mask") is not None and not _mask(document, "attention_mask", len(ids)).all():
        raise document.refusal("found padding", "samples stand without padding: take it out", "attention_mask")
    stated = document.fields.get("len")
    if stated is not None and stated != len(ids):
        raise document.refusal(f"found {describe(stated)}", f"'len' must be {len(ids)}, as input_ids has", "len")
    return ids.astype(np.int32), labels.astype(np.int32)


def agrees_on_loss_tokens(document: Document, labels: NDArray[np.int32]) -> bool:
    """Return whether `num_loss_counted_tokens`, if stated, is the number of labels trained after the shift by one."""
    stated = document.fields.get("num_loss_counted_tokens")
    return stated is None or stated == int(np.count_nonzero(labels[1:] != IGNORE_INDEX))


def _mask(document: Document, field: str, length: int) -> NDArray[np.bool_]:
    values = _for_each(document, field, length)
    if (outside := values[(values != 0) & (values != 1)]).size:
        raise document.refusal(f"found {str(outside[0])[:40]}", "a mask holds 0 and 1", field)
    return values.astype(bool)


def _for_each(document: Document, field: str, length: int) -> NDArray[Any]:
    """Read a field that has an integer for each of the ids."""
    values = _integers(document, field)
    if len(values) != length:
        raise document.refusal(f"found {len(values)} {field}", f"one for each of {length} input_ids", field)
    return values


def _integers(document: Document, field: str) -> NDArray[Any]:
    value = document.fields[field]
    allowed = "it must be a list of integers that is not empty"
    if not isinstance(value, list) or not value:
        raise document.refusal(f"found {describe(value)}", allowed, field)
    if set(map(type, value)) != {int}:
        i = next(i for i, item in enumerate(value) if type(item) is not int)
        raise document.refusal(f"found {describe(value[i])}", allowed, f"{field}[{i}]")
    return np.array(value, dtype=object) if max(value) > _LARGEST_ID or min(value) < -_LARGEST_ID else np.array(value)


def _check_range(document: Document, field: str, ids: NDArray[Any], limit: int, also: str = "") -> None:
    outside = ids[(ids < 0) | (ids > limit)]
    if len(outside):
        raise document.refusal(f"found token id {str(outside[0])[:40]}", f"ids must be 0 to {limit}{also}", field)
