"""Preparing: every document ends as samples, as a count, or as an error; once, whoever prepares."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.fixtures.corpora import (
    chat,
    write_chats,
    write_jsonl,
    write_malformed,
    write_tokens,
)
from tests.fixtures.tokenizers import END, START, TEMPLATES, TEXT_END, build_tokenizer
from trainer.config.groups import DataArguments
from trainer.data import tokenize
from trainer.data.cache import cache_home
from trainer.data.jsonl import FileKind, detect_file_kind, read_documents
from trainer.data.mixture import split_validation
from trainer.data.prepare import prepare
from trainer.data.sources import Chunk, Source
from trainer.data.store import TokenBatch, TokenStore
from trainer.data.tokenize import DocumentTokenizer, Recipe
from trainer.data.workers import Task, TokenizerPool, tokenize_chunk
from trainer.errors import DataError, UsageError

TOKENIZER = build_tokenizer()
IGNORED = -100


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., DataArguments]:
    return lambda **more: DataArguments(data_cache_dir=str(tmp_path / "cache"), **more)


def contents(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    return [(store.sample(i).input_ids.tolist(), store.sample(i).labels.tolist()) for i in range(len(store))]


def test_tokens_pass_unchanged_and_labels_default_to_them(tmp_path: Path, options: Any) -> None:
    lines = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6], "labels": [-100, 9], "len": 2}]
    store = prepare(write_jsonl(tmp_path / "t.jsonl", lines), None, options())
    assert contents(store) == [([5, 6, 7], [5, 6, 7]), ([5, 6], [-100, 9])]
    assert store.num_loss_tokens.tolist() == [2, 1]


def test_a_stated_count_of_loss_tokens_is_recomputed_and_reported(tmp_path: Path, options: Any) -> None:
    lines = [{"input_ids": [5, 6, 7], "num_loss_counted_tokens": n} for n in (2, 2, 3, "x")]
    store = prepare(write_jsonl(tmp_path / "t.jsonl", lines), None, options())
    assert store.num_loss_tokens.tolist() == [2, 2, 2, 2]
    assert store.metadata["report"]["stated_loss_tokens_differ"] == 2


@pytest.mark.parametrize("limits", [{"max_length": 10}, {"limit": 10}, {"max_length": 12, "limit": 10}])
def test_a_sample_at_the_limit_passes_and_one_over_it_is_an_error(tmp_path: Path, options: Any, limits: Any) -> None:
    limit, args = limits.pop("limit", None), options(**limits)
    at = write_tokens(tmp_path / "at.jsonl", [10, 9])
    assert prepare(at, None, args, limit).lengths.tolist() == [10, 9]
    with pytest.raises(DataError, match=r"over.jsonl:2: found a sample of 11 tokens; at most 10 .* overlong=drop"):
        prepare(write_tokens(tmp_path / "over.jsonl", [9, 11]), None, args, limit)


def test_overlong_samples_are_dropped_or_truncated_and_counted(tmp_path: Path, options: Any) -> None:
    path = write_tokens(tmp_path / "t.jsonl", [9, 14, 40, 10])
    dropped = prepare(path, None, options(max_length=10, overlong="drop"))
    assert dropped.lengths.tolist() == [9, 10]
    assert dropped.documents.tolist() == [1, 4]
    assert _said(dropped) == {"overlong_dropped": 2, "tokens_dropped": 54}
    truncated = prepare(path, None, options(max_length=10, overlong="truncate"))
    assert truncated.documents.tolist() == [1, 2, 4]
    assert _said(truncated) == {"overlong_truncated": 2, "tokens_truncated": 34, "untrainable_pieces_dropped": 1}


@given(lengths=st.lists(st.integers(2, 50), min_size=1, max_size=5), limit=st.integers(2, 12), seed=st.integers(0, 9))
@settings(deadline=None)
def test_splitting_trains_every_label_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    path = write_tokens(folder / "t.jsonl", lengths, seed=seed)
    args = DataArguments(max_length=limit, overlong="split", data_cache_dir=str(folder / "cache"))
    store = prepare(path, None, args)
    assert int(store.lengths.max()) <= limit
    for document in read_documents(path):
        wanted = [label for label in document.fields["labels"][1:] if label != IGNORED]
        pieces = [store.sample(int(i)) for i in np.flatnonzero(store.documents == document.line)]
        assert [int(x) for piece in pieces for x in piece.labels[1:] if x != IGNORED] == wanted


def test_a_sample_without_a_trained_token_is_an_error_or_counted(tmp_path: Path, options: Any) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [chat("a", "b"), chat("only a question")])
    with pytest.raises(DataError, match=r"c.jsonl:2: found no token to train \(roles: user; train_on='assistant'\)"):
        prepare(path, TOKENIZER, options())
    store = prepare(path, TOKENIZER, options(on_untrainable="drop"))
    said = _said(store)
    roles = said.pop("roles")
    assert roles["assistant"] == {"messages": 1, "trained_turns": 1, "trained_tokens": int(store.num_loss_tokens.sum())}
    assert (len(store), said, roles["user"]) == (1, {"untrainable_dropped": 1}, {"messages": 2})
    first = write_jsonl(tmp_path / "e.jsonl", [{"input_ids": [1, 2], "labels": [1, -100]}])
    with pytest.raises(DataError, match=r"e.jsonl:1: found no token to train"):
        prepare(first, None, options())
    only = write_jsonl(tmp_path / "d.jsonl", [chat("only a question")])
    with pytest.raises(DataError, match="no sample is left"):
        prepare(only, TOKENIZER, options(on_untrainable="drop"))


def test_fields_that_are_not_read_are_reported(tmp_path: Path, options: Any) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{**chat("a", "b"), "id": 1}, {**chat("a", "b"), "id": 2, "note": ""}])
    assert prepare(path, TOKENIZER, options()).metadata["report"]["ignored_fields"] == {"id": 2, "note": 1}


@pytest.mark.parametrize(
    ("fields", "more", "message"),
    [
        ({"input_ids": [1, 2]}, {"train_on": "all"}, "train_on='all' has no effect"),
        ({"text": "a"}, {"train_on": "last"}, "train_on='last' has no effect"),
        ({"text": "a"}, {"chat_template": "x"}, "chat_template has no effect"),
        ({"text": "a"}, {"overlong": "split", "max_length": 1}, "room for two tokens"),
    ],
)
def test_an_option_without_effect_is_an_error(
    tmp_path: Path, options: Any, fields: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(write_jsonl(tmp_path / "t.jsonl", [fields]), TOKENIZER, options(**more))


def test_text_needs_a_tokenizer(tmp_path: Path, options: Any) -> None:
    with pytest.raises(UsageError, match="a tokenizer is needed"):
        prepare(write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}]), None, options())


def test_the_report_adds_up_and_progress_reaches_the_end(tmp_path: Path, options: Any) -> None:
    path, calls = write_chats(tmp_path / "c.jsonl", 50), []
    store = prepare(path, TOKENIZER, options(), progress=lambda done, total: calls.append((done, total)))
    report = store.metadata["report"]
    assert (report["documents"], report["samples"]) == (50, len(store)) == (50, 50)
    assert report["tokens"] == int(store.lengths.sum()) == store.metadata["num_tokens"]
    assert report["loss_tokens"] == int(store.num_loss_tokens.sum())
    assert calls[-1] == (path.stat().st_size, path.stat().st_size)


def test_several_processes_prepare_what_one_does(tmp_path: Path, options: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("trainer.data.sources.CHUNK_BYTES", 2_000)
    path = write_chats(tmp_path / "c.jsonl", 80)
    one = prepare(path, TOKENIZER, options(dataset_num_proc=1))
    several = prepare(path, TOKENIZER, DataArguments(dataset_num_proc=3, data_cache_dir=str(tmp_path / "other")))
    assert contents(one) == contents(several)
    assert one.documents.tolist() == several.documents.tolist() == list(range(1, 81))
    assert one.metadata == several.metadata


def test_workers_give_what_the_caller_would_in_the_order_of_the_file(
    tmp_path: Path, options: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("trainer.data.sources.CHUNK_BYTES", 2_000)
    path = write_chats(tmp_path / "c.jsonl", 150)
    chunks = Source.scan(path).chunks
    recipe = Recipe.build(detect_file_kind(Source.scan(path)), TOKENIZER, options(), None)

    drawers = set()

    def drawn() -> Iterator[Task]:
        for chunk in chunks:
            drawers.add(threading.current_thread())
            yield Task(str(path), chunk)

    with TokenizerPool(recipe, 2) as pool:
        results = []
        for result in pool.map(drawn()):
            while len(drawers) < 2:  # the caller is busy until a worker has started and takes the next chunks
                time.sleep(0.01)
            results.append(result)
    assert len(results) == len(chunks) > 20
    for result, chunk in zip(results, chunks, strict=True):
        expected = tokenize_chunk(DocumentTokenizer(recipe), Task(str(path), chunk))
        assert result.report == expected.report
        for field in dataclasses.fields(TokenBatch):
            assert getattr(result.batch, field.name).tolist() == getattr(expected.batch, field.name).tolist()


def test_an_error_names_file_and_line_and_leaves_nothing(tmp_path: Path, options: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("trainer.data.sources.CHUNK_BYTES", 2_000)
    path = write_malformed(tmp_path / "c.jsonl", 150, num_documents=160)
    with pytest.raises(DataError, match=r"c.jsonl:150: not JSON"):
        prepare(path, TOKENIZER, options(dataset_num_proc=2))
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]


def test_an_error_in_a_worker_is_that_of_the_caller(tmp_path: Path, options: Any) -> None:
    path = write_malformed(tmp_path / "c.jsonl", 3)
    recipe = Recipe.build(FileKind("messages", 1), TOKENIZER, options(), None)
    whole = Task(str(path), Chunk(0, path.stat().st_size, 1))
    expected = tokenize_chunk(DocumentTokenizer(recipe), whole)
    with TokenizerPool(recipe, 1) as pool:
        pool._workers[0].wait_until_ready()
        found = pool._workers[0].tokenize(whole)
    assert [str(error) for error in found.broken.errors] == [str(error) for error in expected.broken.errors]
    assert (found.broken.counts, found.broken.total) == (expected.broken.counts, 1)


def test_the_first_error_of_the_file_is_told_whoever_finds_one_first(tmp_path: Path, options: Any) -> None:
    path = write_chats(tmp_path / "c.jsonl", 5)
    begin, end = "{", "nothing"
    path.write_text("\n".join([begin, *path.read_text().splitlines(), end]))
    recipe = Recipe.build(FileKind("messages", 2), TOKENIZER, options(), None)
    whole = path.stat().st_size
    chunks = [Chunk(0, 1, 1), Chunk(2, whole - len(end) - 2, 2), Chunk(whole - len(end), len(end), 7)]
    with TokenizerPool(recipe, 1) as pool:
        results = list(pool.map(Task(str(path), chunk) for chunk in chunks))
    lines = [[error.line for error in result.broken.errors] for result in results]
    assert lines == [[1], [], [7]]
    with pytest.raises(DataError, match=r"c.jsonl:1: not JSON"):
        prepare(path, TOKENIZER, options())


def test_a_process_that_dies_is_reported(tmp_path: Path, options: Any) -> None:
    path = write_chats(tmp_path / "c.jsonl", 5)
    recipe = Recipe.build(detect_file_kind(Source.scan(path)), TOKENIZER, options(), None)
    with TokenizerPool(recipe, 1) as pool:
        pool._workers[0]._process.kill()
        pool._workers[0]._process.wait()
        with pytest.raises(DataError, match=r"c.jsonl:1: a tokenizing process died \(exit status -9\)"):
            list(pool.map([Task(str(path), Chunk(0, path.stat().st_size, 1))] * 100))


def test_the_cache_knows_content_and_options(tmp_path: Path, options: Any) -> None:
    path = write_chats(tmp_path / "c.jsonl", 10)
    first = prepare(path, TOKENIZER, options())
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(path.read_bytes())
    again = prepare(moved, build_tokenizer(), options())
    assert (first.metadata["cached"], again.metadata["cached"]) == (False, True)
    assert contents(first) == contents(again)
    assert again.metadata["source"] == str(moved)
    others = [
        prepare(write_chats(tmp_path / "d.jsonl", 10, seed=1), TOKENIZER, options()),
        prepare(path, TOKENIZER, options(train_on="last")),
        prepare(path, TOKENIZER, options(), limit=1_000),
        prepare(path, build_tokenizer("plain"), options()),
        prepare(path, build_tokenizer(vocabulary_size=300), options()),
    ]
    assert not any(store.metadata["cached"] for store in others)
    assert len({store.metadata["fingerprint"] for store in [first, *others]}) == 1 + len(others)


def test_what_was_prepared_by_other_rules_is_prepared_anew(
    tmp_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [chat("a", "b")])
    prepare(path, TOKENIZER, options())
    monkeypatch.setattr(tokenize, "RULES_VERSION", tokenize.RULES_VERSION + 1)
    assert not prepare(path, TOKENIZER, options()).metadata["cached"]


@pytest.mark.parametrize("name", ["tokens.arrow", "index.arrow", "metadata.json"])
def test_a_torn_cache_is_rebuilt(tmp_path: Path, options: Any, name: str) -> None:
    path = write_chats(tmp_path / "c.jsonl", 10)
    first = prepare(path, TOKENIZER, options())
    expected = contents(first)
    file = cache_home(str(tmp_path / "cache")) / first.metadata["fingerprint"] / name
    file.write_bytes(file.read_bytes()[:40])
    again = prepare(path, TOKENIZER, options())
    assert not again.metadata["cached"]
    assert contents(again) == expected


def test_processes_that_prepare_at_once_prepare_once(tmp_path: Path, options: Any) -> None:
    path, stores = write_chats(tmp_path / "c.jsonl", 200), []
    threads = [threading.Thread(target=lambda: stores.append(prepare(path, TOKENIZER, options()))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(store.metadata["cached"] for store in stores) == [False] + [True] * 5
    assert all(contents(store) == contents(stores[0]) for store in stores)


def test_a_prepared_folder_is_opened(tmp_path: Path, options: Any) -> None:
    store = prepare(write_tokens(tmp_path / "t.jsonl", [5, 7]), None, options())
    folder = tmp_path / "cache" / store.metadata["fingerprint"]
    assert contents(prepare(folder, None, options())) == contents(store)
    with pytest.raises(DataError, match="a sample of 7 tokens"):
        prepare(folder, None, options(), limit=6)


def test_a_prepared_folder_knows_its_vocabulary(tmp_path: Path, options: Any) -> None:
    store = prepare(write_chats(tmp_path / "c.jsonl", 3), TOKENIZER, options())
    folder = tmp_path / "cache" / store.metadata["fingerprint"]
    assert contents(prepare(folder, build_tokenizer("marks"), options())) == contents(store)
    state = TOKENIZER.backend_tokenizer.to_str()
    renamed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state.replace("im_end", "im_off")))
    assert len(renamed) == len(TOKENIZER)
    with pytest.raises(DataError, match="was prepared with a tokenizer of another vocabulary; name the tokenizer"):
        prepare(folder, renamed, options())


@pytest.mark.parametrize(
    ("document", "count"),
    [
        (chat("What does <|im_end|> mean?", "It ends a turn."), 1),
        (chat("What does it mean?", f"It {START}s a turn."), 1),
        (chat("What does <|im_ending|> mean?", "Nothing."), 0),
        ({"text": f"one{TEXT_END}two"}, 1),
        ({"text": "one two", "from": f"a page about {END}"}, 0),
        ({"prompt": f"one {END}", "completion": "two"}, 1),
    ],
)
def test_text_that_becomes_a_control_token_is_counted(tmp_path: Path, options: Any, document: Any, count: int) -> None:
    store = prepare(write_jsonl(tmp_path / "c.jsonl", [document]), TOKENIZER, options())
    assert store.metadata["report"]["control_tokens_in_text"] == count


def test_text_that_stays_text_is_not_counted(tmp_path: Path, options: Any) -> None:
    tokenizer = build_tokenizer()
    tokenizer.split_special_tokens = True
    store = prepare(write_jsonl(tmp_path / "c.jsonl", [{"text": f"one {END}"}]), tokenizer, options())
    assert store.metadata["report"]["control_tokens_in_text"] == 0


def test_options_that_a_prepared_folder_has_decided_already_are_refused(tmp_path: Path, options: Any) -> None:
    store = prepare(write_tokens(tmp_path / "t.jsonl", [5, 7]), None, options())
    folder = tmp_path / "cache" / store.metadata["fingerprint"]
    for more in ({"train_on": "all"}, {"overlong": "drop"}, {"block_size": 4}, {"chat_template": "x.jinja"}):
        with pytest.raises(UsageError, match=rf"{next(iter(more))} = .* has no effect: .* was prepared already"):
            prepare(folder, None, options(**more))


def test_a_folder_of_something_else_is_never_to_be_deleted(tmp_path: Path, options: Any) -> None:
    with pytest.raises(DataError, match=r"a folder without metadata.json and without data files; give") as caught:
        prepare(tmp_path, None, options())
    assert "delete" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "t.jsonl", [5])
    with pytest.raises(UsageError, match="with data_cache_dir"):
        prepare(path, None, DataArguments(data_cache_dir=str(path / "cache")))


@given(num_documents=st.integers(2, 60), fraction=st.floats(0.01, 0.6), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_the_split_is_disjoint_complete_and_by_document(num_documents: int, fraction: float, seed: int) -> None:
    pieces = TokenStore.from_samples([([i, i], [i, i]) for i in range(num_documents * 2)])
    store = pieces.select(np.arange(len(pieces)))
    store.documents[:] = np.repeat(np.arange(num_documents), 2)
    sides = split_validation(store, fraction, seed)
    documents = [set(side.documents.tolist()) for side in sides]
    assert documents[0].isdisjoint(documents[1])
    assert sum(len(side) for side in sides) == len(store)
    assert len(documents[1]) == max(1, round(fraction * num_documents))
    again = split_validation(store, fraction, seed)
    assert contents(again[1]) == contents(sides[1])


def test_the_seed_decides_the_split_and_held_out_documents_can_be_read_again(tmp_path: Path, options: Any) -> None:
    path = write_chats(tmp_path / "c.jsonl", 40)
    store = prepare(path, TOKENIZER, options())
    _, held_out = split_validation(store, 0.25, seed=1)
    assert held_out.documents.tolist() != split_validation(store, 0.25, seed=2)[1].documents.tolist()
    documents = {document.line: document for document in read_documents(store.metadata["source"])}
    for i, line in enumerate(held_out.documents.tolist()):
        question = documents[line].fields["messages"][-2]["content"]
        assert question in TOKENIZER.decode(held_out.sample(i).input_ids)


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves one side"):
        split_validation(TokenStore.from_samples([([1, 2], [1, 2])]), 0.5, seed=0)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older transformers load torch for a tokenizer"
)
def test_preparing_loads_neither_torch_nor_pandas(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "c.jsonl", 3)
    code = (
        "import sys; from tests.fixtures.tokenizers import build_tokenizer; from trainer.data.prepare import prepare;"
        "from trainer.config.groups import DataArguments;"
        f"prepare({str(path)!r}, build_tokenizer(), DataArguments(data_cache_dir={str(tmp_path / 'cache')!r}));"
        "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:trainer", "-c", code], check=True, cwd=root)


def test_a_template_that_reads_the_clock_is_reported(tmp_path: Path, options: Any) -> None:
    path = write_chats(tmp_path / "c.jsonl", 3)
    assert "strftime_now" in TEMPLATES["reads_clock"]
    assert prepare(path, build_tokenizer("reads_clock"), options()).metadata["template_reads_clock"]
    assert not prepare(path, build_tokenizer("plain"), options()).metadata["template_reads_clock"]


def _said(store: TokenStore) -> dict[str, int]:
    """The counts of the report that are not 0, but for those of what is in the store."""
    inside = {"documents", "samples", "tokens", "loss_tokens", "ignored_fields"}
    return {name: count for name, count in store.metadata["report"].items() if count and name not in inside}


def test_a_last_block_of_one_token_has_nothing_to_train_and_is_counted(tmp_path: Path, options: Any) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"input_ids": [5] * 8}])  # and EOS behind them
    store = prepare(path, TOKENIZER, options(block_size=4))
    assert store.lengths.tolist() == [4, 4]
    assert store.metadata["report"]["untrainable_blocks_dropped"] == 1
