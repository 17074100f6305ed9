"""Documents that are tokenized already: checked, never changed.

Owns what `input_ids`, `labels` or a mask, `len` and `num_loss_counted_tokens` of a line may say. Must not know
tokenizers beyond their number of ids. Invariant: what comes out is what stands in the line, or a DataError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.jsonl import MASKS, Document, describe

IGNORED = -100
"""Label of a position that is not trained."""

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
        _check_range(document, "labels", labels[labels != IGNORED], limit, f" or {IGNORED}")
    else:
        labels = np.where(_mask(document, given[0], len(ids)), ids, IGNORED) if given else ids
    if document.fields.get("attention_mask") is not None and not _mask(document, "attention_mask", len(ids)).all():
        raise document.refusal("found padding", "samples stand without padding: take it out", "attention_mask")
    stated = document.fields.get("len")
    if stated is not None and stated != len(ids):
        raise document.refusal(f"found {describe(stated)}", f"'len' must be {len(ids)}, as input_ids has", "len")
    return ids.astype(np.int32), labels.astype(np.int32)


def agrees_on_loss_tokens(document: Document, labels: NDArray[np.int32]) -> bool:
    """Whether `num_loss_counted_tokens`, if stated, is the number of labels trained after the shift by one."""
    stated = document.fields.get("num_loss_counted_tokens")
    return stated is None or stated == int(np.count_nonzero(labels[1:] != IGNORED))


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
