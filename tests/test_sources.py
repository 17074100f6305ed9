"""Sources: the same rows give the same samples in every format, and what is no data is named for what it is."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.corpora import assistant, chat, random_chats, user, write_jsonl, write_tokens
from tests.fixtures.hub import HubAnswers
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.groups import DataArguments
from trainer.data.cache import cache_home
from trainer.data.loader import JsonlDataset
from trainer.data.prepare import load_data, prepare
from trainer.data.sources import Source
from trainer.data.store import TokenStore
from trainer.errors import DataError, UsageError

REPOSITORY = Path(__file__).parents[1]
TOKENIZER = build_tokenizer()
Rows = list[dict[str, Any]]


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., DataArguments]:
    return lambda **more: DataArguments(data_cache_dir=str(tmp_path / "cache"), **more)


def lines_of(rows: Rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def write_arrow(path: Path, rows: Rows, is_stream: bool) -> None:
    table = pa.Table.from_pylist(rows)
    begin = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, begin(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "rows.jsonl": lambda path, rows: path.write_bytes(lines_of(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines_of(rows))),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(zstd(lines_of(rows))),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8"),
    "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3),
    "rows.arrow": lambda path, rows: write_arrow(path, rows, is_stream=False),
    "stream.arrow": lambda path, rows: write_arrow(path, rows, is_stream=True),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
}


def store_files(store: TokenStore, args: DataArguments) -> dict[str, bytes]:
    folder = cache_home(args.data_cache_dir) / store.metadata["fingerprint"]
    return {name: (folder / name).read_bytes() for name in ("tokens.arrow", "index.arrow")}


def check_formats(folder: Path, rows: Rows, tokenizer: Any) -> None:
    """Every format gives the bytes of the store that one JSONL file gives."""
    args = DataArguments(data_cache_dir=str(folder / "cache"))
    stores = {}
    for name, write in WRITERS.items():
        write(folder / name, rows)
        stores[name] = store_files(prepare(folder / name, tokenizer, args), args)
    stores["memory"] = store_files(prepare(datasets.Dataset.from_list(rows), tokenizer, args), args)
    assert {name: files == stores["rows.jsonl"] for name, files in stores.items()} == dict.fromkeys(stores, True)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CHATS = st.lists(
    st.lists(TEXT.filter(str.strip), min_size=2, max_size=4).map(lambda turns: chat(*turns)), min_size=1, max_size=6
)
IDS = st.lists(st.integers(0, 90), min_size=2, max_size=9)


@given(
    rows=st.one_of(
        CHATS, st.lists(st.builds(lambda ids: {"input_ids": ids, "labels": ids}, IDS), min_size=1, max_size=7)
    )
)
@settings(deadline=None, max_examples=10)
def test_formats_give_the_same_store(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> None:
    check_formats(tmp_path_factory.mktemp("formats"), rows, TOKENIZER)


def test_tool_calls_survive_every_format(tmp_path: Path) -> None:
    # Their names ascend: older pyarrow (21) writes them in this order.
    call = {"function": {"arguments": {"place": "Rome"}, "name": "weather"}, "type": "function"}
    other = {"function": {"arguments": {"zone": "CET"}, "name": "time"}, "type": "function"}
    rows = [
        {"messages": [user("a"), assistant("", tool_calls=[call]), {"role": "tool", "content": "b"}, assistant("c")]},
        {"messages": [user("a"), assistant("", tool_calls=[other]), {"role": "tool", "content": "b"}, assistant("d")]},
    ]
    check_formats(tmp_path, rows, TOKENIZER)


def test_chunks_of_any_size_give_the_same_rows(tmp_path: Path, options: Any, monkeypatch: Any) -> None:
    rows = random_chats(40)
    for name, write in WRITERS.items():
        write(tmp_path / name, rows)
    whole = prepare(tmp_path / "rows.jsonl", TOKENIZER, options())
    monkeypatch.setattr("trainer.data.sources.CHUNK_BYTES", 300)
    monkeypatch.setattr("trainer.data.sources.ROWS_PER_TABLE", 3)
    for name in WRITERS:
        store = prepare(
            tmp_path / name, TOKENIZER, DataArguments(data_cache_dir=str(tmp_path / name.replace(".", "-")))
        )
        assert store.documents.tolist() == whole.documents.tolist(), name
        assert store.contents.tolist() == whole.contents.tolist(), name


def test_several_processes_read_every_format(tmp_path: Path, options: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("trainer.data.sources.CHUNK_BYTES", 2_000)
    monkeypatch.setattr("trainer.data.sources.ROWS_PER_TABLE", 8)
    rows = random_chats(60)
    one = None
    for name in ("rows.jsonl", "rows.json.gz", "rows.parquet"):
        WRITERS[name](tmp_path / name, rows)
        store = prepare(tmp_path / name, TOKENIZER, options(dataset_num_proc=3))
        one = store if one is None else one
        assert store.contents.tolist() == one.contents.tolist()


def test_globs_folders_and_lists_give_their_files_in_order(tmp_path: Path, options: Any) -> None:
    (tmp_path / "shards").mkdir()
    rows = random_chats(9)
    for i in range(3):
        write_jsonl(tmp_path / "shards" / f"part-{i}.jsonl", rows[3 * i : 3 * i + 3])
    (tmp_path / "shards" / "README.md").write_text("not data")
    whole = prepare(write_jsonl(tmp_path / "all.jsonl", rows), TOKENIZER, options())
    names = [str(tmp_path / "shards" / f"part-{i}.jsonl") for i in range(3)]
    for data in (tmp_path / "shards", f"{tmp_path}/shards/*.jsonl", names):
        store = prepare(data, TOKENIZER, options())
        assert store.contents.tolist() == whole.contents.tolist()
        assert [store.place(i) for i in (0, 5, 8)] == [(names[0], 1), (names[1], 3), (names[2], 3)]
        read = store.read([8, 0, 4])
        expected = whole.read([8, 0, 4])
        assert read.input_ids.tolist() == expected.input_ids.tolist()
        assert read.labels.tolist() == expected.labels.tolist()
    assert store.source_names == ["part-0", "part-1", "part-2"]
    assert store.sources.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_only_a_new_file_is_prepared(tmp_path: Path, options: Any) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        write_jsonl(folder / f"{i}.jsonl", random_chats(3, seed=i))
    prepare(folder, TOKENIZER, options())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/tokens.arrow")}
    stores = {path.parent.name for path in (tmp_path / "cache").glob("*/tokens.arrow")}
    write_jsonl(folder / "3.jsonl", random_chats(3, seed=3))
    assert len(prepare(folder, TOKENIZER, options())) == 12
    after = {path.parent.name for path in (tmp_path / "cache").glob("*/tokens.arrow")}
    assert stores < after
    assert len(after) == 4
    assert before


def test_a_large_file_is_prepared_in_parts_and_only_what_was_added_anew(
    tmp_path: Path, options: Any, monkeypatch: Any
) -> None:
    rows = random_chats(60)
    whole = prepare(write_jsonl(tmp_path / "all.jsonl", rows), TOKENIZER, options())
    monkeypatch.setattr("trainer.data.sources.CHUNK_BYTES", 1_000)
    monkeypatch.setattr("trainer.data.prepare.PART_BYTES", 4_000)
    path = write_jsonl(tmp_path / "growing.jsonl", rows[:40])
    args = DataArguments(data_cache_dir=str(tmp_path / "parts"))
    prepare(path, TOKENIZER, args)
    parts = {folder.name for folder in (tmp_path / "parts").iterdir() if folder.is_dir()}
    write_jsonl(path, rows)
    store = prepare(path, TOKENIZER, args)
    kept = parts & {folder.name for folder in (tmp_path / "parts").iterdir() if folder.is_dir()}
    assert len(kept) >= len(parts) - 1 > 1
    assert store.documents.tolist() == whole.documents.tolist() == list(range(1, 61))
    assert store.contents.tolist() == whole.contents.tolist()
    report, expected = dict(store.metadata["report"]), dict(whole.metadata["report"])
    assert report == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "is a zip archive; unpack it first"),
        (b"BZh91AY", "is compressed with bzip2"),
        ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16; convert it"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "is UTF-16; convert it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer, not the data"),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
        (gzip.compress(b'{"text": "abc"}\n' * 2000)[:-20], "ends too early: it was cut off"),
        (zstd(b'{"text": "abc"}\n' * 2000)[:-20], "ends too early|is damaged|cannot be read"),
        (gzip.compress(b'{"text": "abc"}\n' * 99)[:30] + b"\xff" * 30, "is damaged|ends too early"),
        (b'[{"text": "a"}, {"text"', "not JSON|ends too early"),
        (b'[{"text": "a"}] {"text": "b"}', "more follows after the array"),
        (b'[["a"], 5]', "each line must be one JSON object"),
        (b"PAR1\x15\x04\x15\xff", "is damaged"),
        (b"ARROW1\0\0\x15", "is damaged"),
        (b"", "found no document"),
    ],
    ids=[
        "zip",
        "bzip2",
        "utf-16",
        "utf-16-le",
        "lfs",
        "html",
        "cut-gzip",
        "cut-zstd",
        "gzip",
        "cut-array",
        "array",
        "rows",
        "parquet",
        "arrow",
        "empty",
    ],
)
def test_what_is_no_data_is_named_for_what_it_is(tmp_path: Path, options: Any, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(path, TOKENIZER, options())


def test_a_folder_of_two_formats_and_a_pattern_without_a_match_are_refused(tmp_path: Path, options: Any) -> None:
    for name in ("rows.jsonl", "rows.parquet"):
        WRITERS[name](tmp_path / name, random_chats(2))
    with pytest.raises(DataError, match="files of several formats"):
        prepare(tmp_path, TOKENIZER, options())
    with pytest.raises(DataError, match="no file matches"):
        prepare(f"{tmp_path}/*.txt", TOKENIZER, options())
    with pytest.raises(UsageError, match="split has no effect"):
        prepare(tmp_path / "rows.jsonl", TOKENIZER, options(dataset_split="test"))


def test_a_saved_data_set_with_splits_says_which_it_has(tmp_path: Path, options: Any) -> None:
    rows = datasets.Dataset.from_list(random_chats(4))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "saved"))
    assert len(prepare(tmp_path / "saved", TOKENIZER, options())) == 4
    assert len(prepare(tmp_path / "saved", TOKENIZER, options(dataset_split="test"))) == 1
    with pytest.raises(DataError, match=r"has no split 'dev'; it has train, test"):
        prepare(tmp_path / "saved", TOKENIZER, options(dataset_split="dev"))


def test_columns_and_foreign_formats_give_what_messages_give(tmp_path: Path, options: Any) -> None:
    plain = [chat("a", "b", "c", "d")]
    expected = prepare(write_jsonl(tmp_path / "m.jsonl", plain), TOKENIZER, options()).contents.tolist()
    renamed = write_jsonl(tmp_path / "r.jsonl", [{"dialogue": plain[0]["messages"]}])
    assert prepare(renamed, TOKENIZER, options(columns={"messages": "dialogue"})).contents.tolist() == expected
    names = ("human", "gpt") * 2
    turns = [{"from": name, "value": text} for name, text in zip(names, "abcd", strict=True)]
    sharegpt = write_jsonl(tmp_path / "s.jsonl", [{"conversations": turns}])
    assert prepare(sharegpt, TOKENIZER, options(data_format="sharegpt")).contents.tolist() == expected
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}
    alpaca = write_jsonl(tmp_path / "a.jsonl", [row])
    assert prepare(alpaca, TOKENIZER, options(data_format="alpaca")).contents.tolist() == expected
    wrong = write_jsonl(tmp_path / "w.jsonl", [{"conversations": [{"from": "pirate", "value": "a"}]}])
    with pytest.raises(DataError, match=r"field 'conversations\[0\].from': found from 'pirate'"):
        prepare(wrong, TOKENIZER, options(data_format="sharegpt"))
    with pytest.raises(DataError, match=r"found no column 'dialog'"):
        prepare(renamed, TOKENIZER, options(columns={"messages": "dialog"}))


def test_all_broken_rows_are_told_at_once_or_dropped_and_counted(tmp_path: Path, options: Any) -> None:
    good = chat("a", "b")
    lines: list[Any] = [good, "{", {"messages": []}, good, "nothing", {"messages": [user("a"), {"role": 5}]}, good]
    one = write_jsonl(tmp_path / "1.jsonl", lines)
    two = write_jsonl(tmp_path / "2.jsonl", [good, {"messages": [user(7)]}, good])
    with pytest.raises(DataError, match=r"1.jsonl:2: not JSON") as caught:
        prepare([str(one), str(two)], TOKENIZER, options())
    text = str(caught.value)
    assert "5 rows cannot be used" in text
    places = [f"{path}:{line}: " for path, line in ((one, 2), (one, 3), (one, 5), (one, 6), (two, 2))]
    assert [text.count(place) for place in places[1:]] == [1] * 4
    assert sorted(text.index(place) for place in places[1:]) == [text.index(place) for place in places[1:]]
    assert "2 x each line must be one JSON object" in text
    store = prepare([str(one), str(two)], TOKENIZER, options(on_broken="drop"))
    assert (len(store), store.metadata["report"]["broken_dropped"]) == (5, 5)


def test_a_preparation_that_ended_early_goes_on_with_what_is_missing(tmp_path: Path, options: Any) -> None:
    one = write_jsonl(tmp_path / "1.jsonl", random_chats(3))
    two = write_jsonl(tmp_path / "2.jsonl", [chat("a", "b"), "{"])
    with pytest.raises(DataError, match="2.jsonl:2"):
        prepare([str(one), str(two)], TOKENIZER, options())
    (kept,) = (tmp_path / "cache").glob("*/tokens.arrow")
    before = kept.stat().st_mtime_ns
    write_jsonl(two, random_chats(2, seed=1))
    assert len(prepare([str(one), str(two)], TOKENIZER, options())) == 5
    assert kept.stat().st_mtime_ns == before


def test_dropping_broken_rows_does_not_drop_what_other_options_decide(tmp_path: Path, options: Any) -> None:
    rows = write_jsonl(tmp_path / "t.jsonl", [{"input_ids": [1, 2]}, {"input_ids": "x"}, {"input_ids": [1] * 9}])
    with pytest.raises(DataError, match=r"t.jsonl:3: found a sample of 9 tokens"):
        prepare(rows, None, options(on_broken="drop", max_length=5))
    store = prepare(rows, None, options(on_broken="drop", max_length=5, overlong="drop"))
    assert (len(store), store.metadata["report"]["broken_dropped"]) == (1, 1)


def test_packed_rows_are_split_where_positions_restart(tmp_path: Path, options: Any) -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, -100, 4, 5], "position_ids": [0, 1, 0, 1, 2], "len": 5},
        {"input_ids": [6, 7, 8, 9], "seq_lengths": [2, 2]},
        {"input_ids": [6, 7], "position_ids": [0, 1]},
    ]
    store = prepare(write_jsonl(tmp_path / "t.jsonl", rows), None, options())
    assert [store.sample(i).input_ids.tolist() for i in range(5)] == [[1, 2], [3, 4, 5], [6, 7], [8, 9], [6, 7]]
    assert store.sample(1).labels.tolist() == [-100, 4, 5]
    assert store.documents.tolist() == [1, 1, 2, 2, 3]
    assert store.metadata["report"]["packed_rows_split"] == 2
    wrong = write_jsonl(tmp_path / "w.jsonl", [{"input_ids": [1, 2, 3], "position_ids": [0, 2, 0]}])
    with pytest.raises(DataError, match=r"field 'position_ids': found position_ids that do not fit 3 input_ids"):
        prepare(wrong, None, options())


def test_nulls_that_arrow_pads_tools_and_calls_with_are_removed_and_counted(tmp_path: Path, options: Any) -> None:
    def row(arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {
            "messages": [user("a"), assistant("", tool_calls=[call]), {"role": "tool", "content": "x"}, assistant("b")]
        }

    clean = [row({"city": "Rome"}), row({"zone": "CET"})]
    padded = [row({"city": "Rome", "zone": None}), row({"city": None, "zone": "CET"})]
    expected = prepare(write_jsonl(tmp_path / "clean.jsonl", clean), TOKENIZER, options())
    store = prepare(write_jsonl(tmp_path / "padded.jsonl", padded), TOKENIZER, options())
    assert store.contents.tolist() == expected.contents.tolist()
    assert (expected.metadata["report"]["nulls_removed"], store.metadata["report"]["nulls_removed"]) == (0, 2)


def test_duplicates_are_counted_and_held_out_samples_that_are_trained_found(tmp_path: Path, options: Any) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", [chat("a", "b"), chat("c", "d"), chat("a", "b")])
    held_out = write_jsonl(tmp_path / "v.jsonl", [chat("e", "f"), chat("c", "d")])
    assert prepare(train, TOKENIZER, options()).metadata["report"]["exact_duplicates"] == 1
    args = options(data_path=str(train), validation_data_path=str(held_out))
    _, _, notes = load_data(args, TOKENIZER, 0)
    assert any(f"1 of 2 held-out samples are trained on as well, first {held_out}:2" in note for note in notes)
    args = options(data_path=str(train), validation_data_path=str(held_out), on_overlap="error")
    with pytest.raises(DataError, match="1 of 2 held-out samples"):
        load_data(args, TOKENIZER, 0)


def test_prepared_data_that_was_changed_is_prepared_anew(tmp_path: Path, options: Any, caplog: Any) -> None:
    path = write_tokens(tmp_path / "t.jsonl", [50] * 40)
    first = prepare(path, None, options())
    file = cache_home(str(tmp_path / "cache")) / first.metadata["fingerprint"] / "tokens.arrow"
    data = bytearray(file.read_bytes())
    for place in range(2_000, 6_000, 23):
        data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="its tokens were changed since they were prepared"):
        TokenStore.open(file.parent).sample(20)
    with caplog.at_level(logging.WARNING):
        again = prepare(path, None, options())
    assert "prepared anew" in caplog.text
    assert not again.metadata["cached"]
    assert again.sample(20).input_ids.tolist() == JsonlDataset(path).store.sample(20).input_ids.tolist()


def test_only_what_is_a_store_is_removed_from_the_cache(tmp_path: Path, options: Any) -> None:
    path = write_tokens(tmp_path / "t.jsonl", [5])
    folder = cache_home(str(tmp_path / "cache")) / prepare(path, None, options()).metadata["fingerprint"]
    (folder / "metadata.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds more than prepared data"):
        prepare(path, None, options())
    mine = [tmp_path / "cache" / name for name in ("work.tmp-1", f"{'a' * 32}.tmp-1")]
    for place in mine:
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    prepare(write_tokens(tmp_path / "u.jsonl", [7]), None, options())
    assert all((place / "notes.txt").exists() for place in [folder, *mine])


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    stop=st.sampled_from(["first_exhausted", "all_exhausted"]),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_a_weighted_mixture_has_the_shares_that_were_asked_for(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], weights: list[float], stop: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    entries = []
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=False)):
        rows = [{"input_ids": [i, n, 1]} for n in range(size)]
        entries.append({"path": str(write_jsonl(folder / f"{i}.jsonl", rows)), "weight": weight, "name": f"s{i}"})
    args = DataArguments(data_cache_dir=str(folder / "cache"), data_mixture=entries, mixture_stop=stop)
    store, _, _ = load_data(args, None, seed)
    counts = np.bincount(store.sources, minlength=len(sizes))
    shares = np.array(weights[: len(sizes)]) / sum(weights[: len(sizes)])
    times = shares * (min if stop == "first_exhausted" else max)(np.array(sizes) / shares) / sizes
    assert np.abs(counts - np.maximum(times * sizes, 1)).max() <= 1
    of_each = Counter(tuple(store.sample(i).input_ids[:2].tolist()) for i in range(len(store)))
    for i, size in enumerate(sizes):
        uses = [of_each[i, n] for n in range(size)]
        assert max(uses) - min(uses) <= 1  # as even as can be
    again, _, _ = load_data(args, None, seed)
    assert again.documents.tolist() == store.documents.tolist()


def test_a_source_is_repeated_in_whole_and_in_part_with_options_of_its_own(tmp_path: Path, options: Any) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", random_chats(4))
    two = write_jsonl(tmp_path / "two.jsonl", random_chats(6, seed=1))
    entries = [{"path": str(one), "repeat": 2}, {"path": str(two), "repeat": 0.5, "train_on": "all", "name": "half"}]
    store, _, _ = load_data(options(data_mixture=entries), TOKENIZER, 0)
    assert (store.source_names, np.bincount(store.sources).tolist()) == (["one", "half"], [8, 3])
    assert all((store.sample(i).labels != -100).all() for i in np.flatnonzero(store.sources == 1))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"path": "a", "wieght": 1}], "unknown 'wieght': did you mean 'weight'"),
        ([{"weight": 1}], "path is missing"),
        ([{"path": "a", "weight": 0}], "weight = 0: must be a number above 0"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "'b' has no weight"),
        ([{"path": "a", "weight": 1, "repeat": 2}], "exclude each other"),
        ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], "the name 'x' is given twice"),
    ],
)
def test_a_mixture_described_wrongly_is_refused(options: Any, entries: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data(options(data_mixture=entries), None, 0)


def test_an_error_of_the_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_tokens(tmp_path / "t.jsonl", [5])

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DataError, match=r"t.jsonl: cannot be read \(Input/output error\)"):
        Source.scan(path)


def test_a_disk_that_fails_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.symlink_to("/proc/self/mem")  # reading its start is EIO
    with pytest.raises(DataError, match=r"chats.jsonl: cannot be read \(Input/output error\)"):
        prepare(path, None, DataArguments(data_cache_dir=str(tmp_path / "cache")))


HUB_ROWS = {  # (revision, file) -> rows
    ("a" * 40, "train.jsonl"): [chat("one", "two")],
    ("a" * 40, "test.jsonl"): [chat("held", "out")],
    ("b" * 40, "train.jsonl"): [chat("three", "four"), chat("five", "six")],
}
REVISIONS = {"main": "a" * 40, "next": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}
READ_FROM_HUB = """
import json
from trainer.config.groups import DataArguments
from trainer.data.sources import find_sources, raw_rows
from trainer.errors import DataError

def rows(split, revision):
    ((source,),) = find_sources("hf://datasets/me/chats", split, revision)
    return [json.loads(row) for row in raw_rows(source, range(1, 9)).values()]

try:
    rows("absent", None)
except DataError as error:
    told = str(error)
print(json.dumps([rows(None, None), rows("test", None), rows(None, "next"), told]))
"""


class HubOfData(HubAnswers):
    """Answers as the hub does where `datasets` asks for a data set, its revisions and files."""

    def do_GET(self) -> None:
        missing = (404, b"{}", {"X-Error-Code": "EntryNotFound"})
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "datasets", "me", "chats", *rest] if rest[:1] != ["tree"]:
                commit = REVISIONS[rest[1] if rest else "main"]
                files = [{"rfilename": name} for revision, name in HUB_ROWS if revision == commit]
                about = {"id": "me/chats", "sha": commit, "siblings": files, "private": False, "tags": []}
                self.answer(200, json.dumps({**about, "downloads": 0, "likes": 0}).encode())
            case ["api", "datasets", "me", "chats", "tree", commit]:
                found = [(name, lines_of(rows)) for (revision, name), rows in HUB_ROWS.items() if revision == commit]
                tree = [{"type": "file", "oid": commit, "size": len(data), "path": name} for name, data in found]
                self.answer(200, json.dumps(tree).encode())
            case ["datasets", "me", "chats", "resolve", revision, name] if (REVISIONS[revision], name) in HUB_ROWS:
                commit = REVISIONS[revision]
                marks = {"ETag": f'"{commit}{name}"', "X-Repo-Commit": commit}
                self.answer(200, lines_of(HUB_ROWS[commit, name]), marks)
            case _:
                self.answer(*missing)

    do_HEAD = do_GET


def test_a_data_set_of_the_hub_is_read_in_its_split_and_revision(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), HubOfData) as hub:
        Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        there = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", READ_FROM_HUB]  # the address is read when `datasets` is imported
        done = subprocess.run(command, env={**os.environ, **there}, capture_output=True, text=True, cwd=REPOSITORY)
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    main, held_out, later, told = json.loads(done.stdout.splitlines()[-1])
    assert main == HUB_ROWS["a" * 40, "train.jsonl"]
    assert held_out == HUB_ROWS["a" * 40, "test.jsonl"]
    assert later == HUB_ROWS["b" * 40, "train.jsonl"]
    assert "absent" in told
    assert "check name, split and revision" in told
