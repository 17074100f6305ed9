"""JSONL: whatever stands in a line, it is a document or an error that names file, line and field."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fixtures.corpora import assistant, chat, user, write_jsonl, write_mixed
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.groups import DataArguments
from trainer.data.jsonl import detect_kind
from trainer.data.prepare import prepare
from trainer.data.store import TokenStore
from trainer.errors import DataError

TOKENIZER = build_tokenizer()


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., DataArguments]:
    return lambda **more: DataArguments(data_cache_dir=str(tmp_path / "cache"), **more)


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        (b'{"messages": [', None, "not JSON"),
        (b"[1]", None, "found a list of 1; each line must be one JSON object"),
        (b"\xff\xfe{", None, "is not UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "half a surrogate pair"),
        (b'{"messages": NaN}', None, "NaN is not a JSON number"),
        (b'{"messages": [], "messages": []}', None, "the name 'messages' stands twice in one object"),
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', None, "'content' stands twice"),
        (b"[" * 100_000, None, "nested too deeply|not JSON"),
        (b'{"id": 3}', None, "found 'id'; each line needs 'messages'"),
        (b"{}", None, "no fields"),
        (b'{"messages": []}', "messages", "an empty list"),
        (b'{"messages": [3]}', "messages[0]", "found 3; a message must be an object"),
        (b'{"messages": [{"role": 3, "content": ""}]}', "messages[0].role", "found 3"),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content", "found nothing"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "messages[0].content", "string or a list"),
        (b'{"messages": [{"role": "user", "content": ""}], "tools": {}}', "tools", "list of objects"),
        (b'{"messages": [{"role": "pretrain", "content": []}]}', "messages[0].content", "must be a string"),
        (
            b'{"messages": [{"role": "pretrain", "content": "a"}, {"role": "user", "content": ""}]}',
            "messages",
            "only one",
        ),
    ],
)
def test_a_line_that_cannot_be_read_is_refused(
    tmp_path: Path, options: Any, line: bytes, field: str | None, message: str
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b"), "", line])
    with pytest.raises(DataError, match=message) as caught:
        prepare(path, TOKENIZER, options())
    assert (caught.value.path, caught.value.line, caught.value.field) == (str(path), 3, field)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": "a"}, "completion", "without"),
        ({"prompt": "a", "completion": [user("a")]}, "completion", "both must be strings"),
        ({"text": 3}, "text", "must be a string"),
        ({"input_ids": []}, "input_ids", "an empty list"),
        ({"input_ids": [1, 2.5]}, "input_ids[1]", "found 2.5"),
        ({"input_ids": [1, True]}, "input_ids[1]", "found true"),
        ({"input_ids": [1, -1]}, "input_ids", "token id -1; ids must be 0 to"),
        ({"input_ids": [1, 10**30]}, "input_ids", "token id 1000"),
        ({"input_ids": [1, 319]}, "input_ids", "token id 319"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels", "found 1 labels; one for each of 2"),
        ({"input_ids": [1, 2], "labels": [1, -99]}, "labels", "or -100"),
        ({"input_ids": [1, 2], "len": 3}, "len", "'len' must be 2"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "loss_mask", "found 1 loss_mask; one for each of 2"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask", "found 2; a mask holds 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1], "labels": [1, 2]}, "loss_mask", "one of them says"),
        ({"input_ids": [1, 2], "attention_mask": [0, 1]}, "attention_mask", "found padding"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "messages[1].weight", "found 0.5; it must be 0 or 1"),
        ({"messages": [user("a"), assistant("b", train="no")]}, "messages[1].train", "it must be false or true"),
        ({"conversations": []}, None, "give data_format=sharegpt"),
        ({"instruction": "a", "output": "b"}, None, "give data_format=alpaca"),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(
    tmp_path: Path, options: Any, fields: dict[str, Any], field: str, message: str
) -> None:
    tokenizer = build_tokenizer(vocabulary_size=300)
    path = write_jsonl(tmp_path / "data.jsonl", [fields])
    with pytest.raises(DataError, match=message) as caught:
        prepare(path, tokenizer, options())
    assert (caught.value.line, caught.value.field) == (1, field)


@pytest.mark.parametrize("mask", ["loss_mask", "completion_mask", "assistant_masks"])
def test_a_mask_says_what_is_trained(tmp_path: Path, options: Any, mask: str) -> None:
    fields = {"input_ids": [5, 6, 7, 8], mask: [0, 0, 1, 1], "attention_mask": [1, 1, 1, 1]}
    nothing = {"input_ids": [5, 6], mask: None, "attention_mask": None, "labels": None}  # as Arrow fills lines up
    store = prepare(write_jsonl(tmp_path / "data.jsonl", [fields, nothing]), None, options())
    assert [store.sample(i).labels.tolist() for i in range(2)] == [[-100, -100, 7, 8], [5, 6]]
    assert store.metadata["report"]["ignored_fields"] == {}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "tool_calls", "type"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = ["messages", "prompt", "completion", "text", "input_ids", "labels", "len", "num_loss_counted_tokens", "tools"]


@given(lines=st.lists(st.binary(max_size=40) | st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1), min_size=1))
@example(lines=[b'{"text": "' + b"\\u0000" + b'"}'])
@settings(deadline=None)
def test_arbitrary_bytes_give_samples_or_an_error_with_file_and_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    path = write_jsonl(folder / "data.jsonl", lines)
    caught, store = _attempt(path, DataArguments(data_cache_dir=str(folder / "cache")))
    if caught is None:
        assert len(store) > 0
        assert (store.num_loss_tokens > 0).all()
    else:
        assert str(caught.path) == str(path)
        assert caught.line is not None or "found no document" in str(caught)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (chat("a", "b"), "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, "prompt_completion"),
        ({"text": "a b"}, "text"),
        ({"input_ids": [1, 2], "messages": []}, "tokens"),
    ],
)
def test_the_kind_is_detected(tmp_path: Path, options: Any, fields: dict[str, Any], kind: str) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [b"", fields])
    assert detect_kind(path) == kind
    assert prepare(path, TOKENIZER, options()).metadata["kind"] == kind


def test_mixed_kinds_are_refused_with_both_lines(tmp_path: Path, options: Any) -> None:
    with pytest.raises(DataError, match="line 3 is 'text', but line 1 is 'messages'"):
        prepare(write_mixed(tmp_path / "data.jsonl"), TOKENIZER, options())
    late = write_jsonl(tmp_path / "late.jsonl", [chat("a", "b")] * 500 + [{"text": "c"}])
    with pytest.raises(DataError, match="line 501 is 'text', but line 1 is 'messages'"):
        prepare(late, TOKENIZER, options())


def test_empty_missing_and_marked_files(tmp_path: Path, options: Any) -> None:
    with pytest.raises(DataError, match="found no document"):
        prepare(write_jsonl(tmp_path / "empty.jsonl", []), TOKENIZER, options())
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read \(No such file"):
        prepare(tmp_path / "none.jsonl", TOKENIZER, options())
    with pytest.raises(DataError, match=r"x: cannot be read"):
        prepare("x" * 5000, TOKENIZER, options())
    with pytest.raises(DataError, match="cannot be read"):
        prepare("a\0b", TOKENIZER, options())
    marked = write_jsonl(tmp_path / "marked.jsonl", [b"\xef\xbb\xbf" + json.dumps({"text": "a b"}).encode() + b"\r"])
    assert len(prepare(marked, TOKENIZER, options())) == 1


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, options: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a regular file; give the path of a data file"):
        prepare(tmp_path / "pipe", TOKENIZER, options())


def _attempt(path: Path, args: DataArguments) -> tuple[DataError | None, TokenStore]:
    try:
        return None, prepare(path, TOKENIZER, args)
    except DataError as error:
        return error, TokenStore.from_samples([])
