"""Text and character spans to token ids and label masks, a batch at a time.

Owns the tokenizer's backend and where a token begins and ends. Must not know chats or files. Invariant: a token is
trained if and only if one of its characters lies in a trained span.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from itertools import chain, pairwise
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
        state = json.loads(backend)
        self._num_bytes = _bytes_per_token(self._backend, state)
        self._absorbing = {
            token["id"]: token["content"] for token in state["added_tokens"] if token["lstrip"] or token["rstrip"]
        }
        self._control = None if split_special_tokens else _control_texts(state)

    def has_control_text(self, text: str) -> bool:
        """Return whether some of this text would become a control token, as if the template had written it."""
        return self._control is not None and self._control.search(text) is not None

    def token_ids(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of tokens, without those that the vocabulary lacks."""
        ids = [self._backend.token_to_id(token) for token in tokens]
        return [i for i in ids if i is not None]

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """Encode texts as they stand, with the tokens of the character spans of each marked as trained.

        Byte-level tokenizers need no offsets: the bytes of the tokens add up to the text, which is checked. A text for
        which they do not (a normalizer changed it), and all texts of other tokenizers, are encoded with offsets.
        """
        if self._num_bytes is None:
            return self._encode_by_offsets(texts, spans)
        encoded, proven = self._encode_by_bytes(texts, spans, self._num_bytes)
        again = np.flatnonzero(~proven).tolist()
        by_offsets = self._encode_by_offsets([texts[i] for i in again], [spans[i] for i in again])
        for i, item in zip(again, by_offsets, strict=True):
            encoded[i] = item
        return encoded

    def _encode_by_bytes(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], num_bytes: NDArray[np.int64]
    ) -> tuple[list[Encoded], NDArray[np.bool_]]:
        """Encode all texts in one array; say for which of them the bytes of the tokens add up to the text."""
        lists = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        borders = np.cumsum([0, *map(len, lists)])
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(borders[-1]))
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_bytes[ids])])
        begins = ends[borders]
        proven = np.diff(begins) == [_text_bytes(text) for text in texts]
        placed = [
            (begin + start, begin + stop)
            for text, text_spans, begin, is_proven in zip(texts, spans, begins.tolist(), proven, strict=False)
            if is_proven
            for start, stop in _byte_spans(text, text_spans)
        ]
        mask = _mask(ends[:-1], ends[1:], placed)
        places = borders.tolist()
        return [(ids[a:b], mask[a:b]) for a, b in pairwise(places)], proven

    def _encode_by_offsets(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [self._mask_by_offsets(*item) for item in zip(encodings, texts, spans, strict=True)]

    def _mask_by_offsets(self, encoding: Encoding, text: str, spans: Sequence[Span]) -> Encoded:
        """Mask by where tokens begin and end; one that takes in the spaces around it stands where its own text does."""
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        for i in np.flatnonzero(np.isin(encoding.ids, list(self._absorbing))):
            content = self._absorbing[encoding.ids[i]]
            if (at := text.find(content, *offsets[i])) >= 0:
                offsets[i] = at, at + len(content)
        return np.array(encoding.ids, np.int32), _mask(offsets[:, 0], offsets[:, 1], spans)


def _mask(starts: NDArray[np.int64], ends: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Mark the tokens that end after a span's first character and start before its end; both arrays ascend."""
    edges = np.array([span for span in spans if span[0] < span[1]], np.int64).reshape(-1, 2)
    depth = np.zeros(len(starts) + 1, np.int64)
    np.add.at(depth, np.searchsorted(ends, edges[:, 0], side="right"), 1)
    np.add.at(depth, np.searchsorted(starts, edges[:, 1], side="left"), -1)
    return np.cumsum(depth[:-1]) > 0


def _text_bytes(text: str) -> int:
    """Bytes of a text in UTF-8, -1 if NFC would change it."""
    if text.isascii():
        return len(text)
    return len(text.encode()) if unicodedata.is_normalized("NFC", text) else -1


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


def _control_texts(state: dict[str, Any]) -> re.Pattern[str] | None:
    texts = [token["content"] for token in state["added_tokens"] if token["special"]]
    return re.compile("|".join(map(re.escape, texts))) if texts else None


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
    """Return whether each character of a token stands for one byte of the text, which at most NFC has changed."""
    first = state["pre_tokenizer"] or {}
    parts = first.get("pretokenizers", [first])
    prefixed = any(part.get("add_prefix_space") for part in parts)
    byte_level = any(part.get("type") == "ByteLevel" for part in parts) and not prefixed
    absorbing = any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"])
    return byte_level and not absorbing and (state["normalizer"] or {"type": "NFC"})["type"] == "NFC"
