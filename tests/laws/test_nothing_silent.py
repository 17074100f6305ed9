"""L12 and L3 for data: every document and every trained token is in the store or in the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.corpora import write_jsonl
from trainer.config.groups import DataArguments
from trainer.data.prepare import prepare
from trainer.errors import DataError

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=8)
"""Per document: its tokens, and how many of them, at its end, are trained."""


def write(folder: Any, documents: list[tuple[int, int]]) -> Any:
    lines = []
    for length, num_trained in documents:
        ids = list(range(1, length + 1))
        lines.append(
            {"input_ids": ids, "labels": [-100] * (length - num_trained) + ids[max(length - num_trained, 0) :]}
        )
    return write_jsonl(folder / "t.jsonl", lines)


@given(documents=LENGTHS, limit=st.integers(2, 20), policy=st.sampled_from(["drop", "truncate", "split"]))
@settings(deadline=None)
def test_documents_and_tokens_are_kept_or_counted(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[int, int]], limit: int, policy: Any
) -> None:
    folder = tmp_path_factory.mktemp("law")
    path = write(folder, [(n, min(k, n)) for n, k in documents] + [(2, 2)])
    args = DataArguments(max_length=limit, overlong=policy, on_untrainable="drop", data_cache_dir=str(folder / "cache"))
    store = prepare(path, None, args)
    report, documents = store.metadata["report"], [(n, min(k, n)) for n, k in documents] + [(2, 2)]

    untrainable = [n for n, k in documents if min(k, n - 1) == 0]
    overlong = [n for n, k in documents if n > limit and min(k, n - 1) > 0]
    assert report["documents"] == len(documents)
    assert report["untrainable_dropped"] == len(untrainable)
    assert sum(report[f"overlong_{p}"] for p in ("dropped", "truncated", "split")) == len(overlong)
    gone = report["untrainable_dropped"] + report["overlong_dropped"]
    if policy == "drop":
        assert len(np.unique(store.documents)) + gone == len(documents)
        assert report["tokens"] + report["tokens_dropped"] + sum(untrainable) == sum(n for n, _ in documents)
    if policy == "truncate":
        assert report["samples"] + report["untrainable_pieces_dropped"] + gone == len(documents)
        assert report["tokens_truncated"] == sum(n - limit for n in overlong)
    if policy == "split":
        assert report["loss_tokens"] == sum(min(k, n - 1) for n, k in documents)
        assert report["samples"] == report["split_pieces"] - report["untrainable_pieces_dropped"] + (
            len(documents) - gone - len(overlong)
        )


@given(documents=LENGTHS)
@settings(deadline=None)
def test_no_sample_is_left_out_by_default(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("law")
    documents = [(n, min(k, n)) for n, k in documents]
    path, args = write(folder, documents), DataArguments(max_length=20, data_cache_dir=str(folder / "cache"))
    if any(n > 20 or min(k, n - 1) == 0 for n, k in documents):
        with pytest.raises(DataError, match=r"t.jsonl:\d+: found (no token to train|a sample of \d+ tokens)"):
            prepare(path, None, args)
    else:
        assert prepare(path, None, args).lengths.tolist() == [n for n, _ in documents]
