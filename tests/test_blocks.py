"""Blocks laid end to end are the documents laid end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.corpora import write_jsonl
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.groups import DataArguments
from trainer.data.mixture import split_validation
from trainer.data.prepare import prepare
from trainer.data.store import Sample, TokenBatch
from trainer.data.tokenize import BlockCutter, end_with_eos
from trainer.errors import UsageError

EOS = 9
DOCUMENTS = st.lists(st.lists(st.tuples(st.integers(0, EOS), st.booleans()), max_size=9), max_size=9)


def to_batch(documents: list[list[tuple[int, bool]]], first: int = 1) -> TokenBatch:
    samples = [
        Sample(np.array([t for t, _ in d], np.int32), np.array([t if on else -100 for t, on in d], np.int32))
        for d in documents
    ]
    return TokenBatch.join(samples, range(first, first + len(samples)))


@given(documents=DOCUMENTS)
def test_every_document_ends_with_one_eos(documents: list[list[tuple[int, bool]]]) -> None:
    expected = [d if d and d[-1][0] == EOS else [*d, (EOS, d[-1][1] if d else True)] for d in documents]
    ours, oracle = end_with_eos(to_batch(documents), EOS), to_batch(expected)
    for name in ("input_ids", "labels", "lengths", "documents"):
        assert getattr(ours, name).tolist() == getattr(oracle, name).tolist()


@given(documents=DOCUMENTS, more=DOCUMENTS, block_size=st.integers(2, 12))
def test_blocks_are_the_documents_end_to_end(
    documents: list[list[tuple[int, bool]]], more: list[list[tuple[int, bool]]], block_size: int
) -> None:
    batches = [to_batch(documents), to_batch(more, len(documents) + 1)]
    cutter = BlockCutter(block_size)
    blocks = [*(cutter.cut(batch) for batch in batches), cutter.finish()]
    for name in ("input_ids", "labels"):
        joined = np.concatenate([getattr(block, name) for block in blocks])
        assert joined.tolist() == np.concatenate([getattr(batch, name) for batch in batches]).tolist()
    lengths = np.concatenate([block.lengths for block in blocks])
    assert (lengths[:-1] == block_size).all()
    begins = np.cumsum(lengths) - lengths
    owners = np.concatenate([np.repeat(batch.documents, batch.lengths) for batch in batches])
    assert np.concatenate([block.documents for block in blocks]).tolist() == owners[begins].tolist()


def test_text_is_prepared_in_blocks_and_the_last_is_partial(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"document {i} of a few"} for i in range(9)])
    tokenizer = build_tokenizer(None)
    store = prepare(path, tokenizer, DataArguments(block_size=16, data_cache_dir=str(tmp_path / "cache")))
    assert (store.lengths[:-1] == 16).all()
    assert 0 < store.lengths[-1] <= 16
    text = tokenizer.decode(np.concatenate([store.sample(i).input_ids for i in range(len(store))]))
    assert text == "".join(f"document {i} of a few{tokenizer.eos_token}" for i in range(9))


def test_no_document_of_a_block_is_on_both_sides(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"input_ids": [i] * 7} for i in range(60)])
    args = DataArguments(block_size=16, validation_split=0.25, data_cache_dir=str(tmp_path / "cache"))
    store = prepare(path, build_tokenizer(None), args)
    sides = split_validation(store, 0.25, seed=1)
    seen = [{int(t) for i in range(len(s)) for t in s.sample(i).input_ids} - {2} for s in sides]
    assert seen[0].isdisjoint(seen[1])
    assert seen[0] | seen[1] | {2} == set(range(60))
    assert sum(len(side) for side in sides) == len(store)
    with pytest.raises(UsageError, match="prepared with 0.25"):
        split_validation(store, 0.5, seed=1)


def test_blocks_refuse_what_has_no_effect_or_no_room(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(UsageError, match="block_size=64 is more than the 32 tokens"):
        prepare(path, build_tokenizer(None), DataArguments(block_size=64), limit=32)
    with pytest.raises(UsageError, match="max_length has no effect"):
        prepare(path, build_tokenizer(None), DataArguments(block_size=64, max_length=64))
    for policy in ({"overlong": "truncate"}, {"on_untrainable": "drop"}):
        with pytest.raises(UsageError, match="overlong and on_untrainable have no effect with block_size"):
            prepare(path, build_tokenizer(None), DataArguments(block_size=64, **policy))
