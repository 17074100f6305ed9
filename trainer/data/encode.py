"""Text and character spans to token ids and label masks, a batch at a time.

Owns the tokenizer's backend and where a token begins and ends. Must not know chats or files. Invariant: a token is
trained if and only if one of its characters lies in a trained span.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.chat import Span

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids and which of them are trained."""

_PROBE = "a"


class Encoder:
    """A tokenizer's backend, without truncation and padding, adding no special tokens but those asked for."""

    def __init__(self, backend: str, split_special_tokens: bool = False) -> None:
        from tokenizers import Tokenizer, processors

        self._backend: Tokenizer = Tokenizer.from_str(backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = split_special_tokens
        self.prefix, self.suffix = _added_around(self._backend)
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets of whole tokens
        self._num_bytes = _bytes_per_token(self._backend, json.loads(backend))

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """Encode texts as they stand, with the tokens of the character spans of each marked as trained.

        Byte-level tokenizers need no offsets: the bytes of the tokens add up to the text, which is checked. A text for
        which they do not (a normalizer changed it), and all texts of other tokenizers, are encoded with offsets.
        """
        if self._num_bytes is None:
            return self._encode_by_offsets(texts, spans)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        encoded = [self._mask_by_bytes(*item) for item in zip(texts, ids, spans, strict=True)]
        unproven = [i for i, item in enumerate(encoded) if item is None]
        again = self._encode_by_offsets([texts[i] for i in unproven], [spans[i] for i in unproven])
        replaced = dict(zip(unproven, again, strict=True))
        return [replaced[i] if item is None else item for i, item in enumerate(encoded)]

    def _mask_by_bytes(self, text: str, ids: NDArray[np.int32], spans: Sequence[Span]) -> Encoded | None:
        assert self._num_bytes is not None
        if not text.isascii() and not unicodedata.is_normalized("NFC", text):
            return None
        ends = np.cumsum(self._num_bytes[ids])
        if (int(ends[-1]) if len(ids) else 0) != (len(text) if text.isascii() else len(text.encode())):
            return None
        starts = ends - self._num_bytes[ids]
        return ids, _mask(starts, ends, _byte_spans(text, spans))

    def _encode_by_offsets(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [_mask_by_offsets(*item) for item in zip(encodings, spans, strict=True)]


def _mask_by_offsets(encoding: Encoding, spans: Sequence[Span]) -> Encoded:
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return np.array(encoding.ids, np.int32), _mask(offsets[:, 0], offsets[:, 1], spans)


def _mask(starts: NDArray[np.int64], ends: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Mark the tokens that end after a span's first character and start before its end; both arrays ascend."""
    mask = np.zeros(len(starts), bool)
    for start, stop in spans:
        if start < stop:
            mask[np.searchsorted(ends, start, side="right") : np.searchsorted(starts, stop, side="left")] = True
    return mask


def _byte_spans(text: str, spans: Sequence[Span]) -> Sequence[Span]:
    if text.isascii():
        return spans
    edges = list(chain.from_iterable(spans))
    places = {edge: len(text[:edge].encode()) for edge in edges}
    return [(places[start], places[stop]) for start, stop in spans]


def _added_around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer itself puts before and after a text (a BOS, for instance)."""
    bare = backend.encode(_PROBE, add_special_tokens=False).ids
    full = backend.encode(_PROBE, add_special_tokens=True).ids
    if not bare:
        return [], []
    begins = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    begin = begins[0] if begins else 0
    return full[:begin], full[begin + len(bare) :]


def _bytes_per_token(backend: Tokenizer, state: dict[str, Any]) -> NDArray[np.int64] | None:
    """Bytes of text that each token id stands for, or None if the tokenizer is not byte-level."""
    if not _is_byte_level(state):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {token["content"] for token in state["added_tokens"]}
    table = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
    for token, i in vocabulary.items():
        table[i] = len(token.encode()) if token in added else len(token)
    return table


def _is_byte_level(state: dict[str, Any]) -> bool:
    """Whether each character of a token stands for one byte of the text, to which nothing but NFC was done before."""
    first = state["pre_tokenizer"] or {}
    parts = first.get("pretokenizers", [first])
    prefixed = any(part.get("add_prefix_space") for part in parts)
    byte_level = any(part.get("type") == "ByteLevel" for part in parts) and not prefixed
    absorbing = any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"])
    return byte_level and not absorbing and (state["normalizer"] or {"type": "NFC"})["type"] == "NFC"
