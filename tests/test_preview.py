"""`trainer preview`: what it shows is the sample, what it marks are the targets; the data cannot steer it."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.fixtures.corpora import chat, write_jsonl
from tests.fixtures.tokenizers import END, build_tokenizer
from trainer.cli.main import main
from trainer.cli.preview import build_decoder, cut, render, show_samples
from trainer.data.store import StoreWriter, TokenStore

TOKENIZERS = [build_tokenizer(), build_tokenizer(byte_level=False)]
PLAIN = st.text(st.sampled_from("abc hello,\n\\[]éßЖ世界🙂👩🚀"), min_size=1)
"""Nothing that is shown as something else but line breaks; many characters of several tokens."""

Run = Callable[..., str]


@pytest.fixture
def preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command on documents, with more words; give what it printed."""

    def run(documents: list[Any], *words: str) -> str:
        file = write_jsonl(tmp_path / "data.jsonl", documents)
        assert main(["preview", f"--data-path={file}", f"--data-cache-dir={tmp_path / 'cache'}", *words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def preview_text(tmp_path: Path, preview: Run) -> Run:
    """Run the command with a tokenizer."""
    TOKENIZERS[0].save_pretrained(tmp_path / "tokenizer")
    tokenizer = f"--tokenizer-name-or-path={tmp_path / 'tokenizer'}"
    return lambda documents, *words: preview(documents, tokenizer, *words)


def between_marks(shown: str) -> str:
    """What is shown as trained, joined, line breaks as they were."""
    return "".join(re.findall("⟦(.*?)⟧", shown, flags=re.DOTALL)).replace("↵\n", "\n")


def shown_in_colour(store: TokenStore) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", no_color=False, width=20)
    show_samples(console, store, [0], build_decoder(TOKENIZERS[0]))
    return file.getvalue()


@given(st.sampled_from(TOKENIZERS), PLAIN, st.data())
def test_a_preview_marks_what_is_trained(tokenizer: Any, text: str, data: st.DataObject) -> None:
    text = f"a{text}"  # one like SentencePiece keeps no space in front
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, n = encoded["input_ids"], len(encoded["input_ids"])
    is_target = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    pieces = cut(build_decoder(tokenizer), ids, np.array(is_target))
    places = {i for span, is_ in zip(encoded["offset_mapping"], is_target, strict=True) if is_ for i in range(*span)}
    assert "".join(piece for piece, _ in pieces) == text
    assert between_marks(render(pieces, has_colour=False).plain) == "".join(text[i] for i in sorted(places))


@given(st.sampled_from(TOKENIZERS), st.lists(st.tuples(st.integers(0, 319), st.booleans()), min_size=1))
def test_no_token_is_lost_whatever_the_ids(tokenizer: Any, tokens: list[tuple[int, bool]]) -> None:
    ids, is_target = [token for token, _ in tokens], np.array([is_ for _, is_ in tokens])
    pieces = cut(build_decoder(tokenizer), ids, is_target)
    assert "".join(piece for piece, _ in pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    assert any(is_trained for _, is_trained in pieces) == is_target.any()


@given(st.text(), st.booleans(), st.booleans())
def test_nothing_from_the_data_is_a_control_character_or_a_mark(text: str, is_trained: bool, has_colour: bool) -> None:
    shown = render([(text, is_trained)], has_colour).plain
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert shown.count("⟦") == shown.count("⟧") == (is_trained and not has_colour)


def test_the_answers_of_a_chat_are_trained_to_the_end_of_turn(preview_text: Run) -> None:
    shown = preview_text([chat("one", "two🙂", "three", "four\n")])
    assert f"assistant\n⟦two🙂{END}⟧\n" in shown
    assert f"assistant\n⟦four↵\n{END}⟧\n" in shown
    assert "user\none" in shown


def test_a_preview_names_place_and_counts_of_each_sample(preview: Run) -> None:
    lines = [{"input_ids": [5]}, {"input_ids": [7, 8, 9, 6]}, {"input_ids": [7, 8, 9], "labels": [7, -100, 9]}]
    shown = preview(lines, "--on-untrainable=drop")
    assert "2 samples; ⟦this⟧ is trained" in shown
    assert "sample 0, line 2: 4 tokens, 3 trained\n7 ⟦8 9 6 ⟧\n" in shown
    assert "sample 1, line 3: 3 tokens, 1 trained\n7 8 ⟦9 ⟧\n" in shown


def test_a_preview_says_where_a_chat_was_split_and_counts_it(tmp_path: Path, preview: Run) -> None:
    tokenizer = build_tokenizer("strips_reasoning")
    tokenizer.save_pretrained(tmp_path / "strips")
    thinking = [[f"Ask {k}", f"<think>{k}</think>Reply {k}"] for k in range(2)]
    turns = [
        {"role": role, "content": text}
        for pair in thinking
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    documents = [{"messages": turns[:2]}, {"messages": turns}]
    shown = preview(documents, f"--tokenizer-name-or-path={tmp_path / 'strips'}")
    assert "3 samples; 1 lines became 2 of them; ⟦this⟧ is trained" in shown
    assert re.search(r"sample 0, line 1: ", shown)
    assert re.search(r"sample 1, line 2 \(1 of 2 samples of it\): ", shown)
    prefix = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert f"sample 2, line 2 (2 of 2 samples of it; its first {len(prefix)} tokens are those of sample 1): " in shown
    assert between_marks(shown).endswith(f"<think>0</think>Reply 0{END}<think>1</think>Reply 1{END}")


def test_labels_that_are_other_tokens_are_shown_and_counted(preview: Run) -> None:
    shown = preview([{"input_ids": [5, 6, 7, 8], "labels": [6, 7, 8, -100]}])
    assert "4 tokens, 2 trained (2 on another token than stands there" in shown
    assert "5 ⟦7 8 ⟧8" in shown


def test_a_preview_shows_as_many_samples_as_asked_from_where_asked(preview_text: Run) -> None:
    documents = [{"text": f"number {i}"} for i in range(6)]
    assert re.findall("sample [0-9]", preview_text(documents)) == ["sample 0", "sample 1", "sample 2"]
    assert re.findall("sample [0-9]", preview_text(documents, "--start=3", "--num-samples=1")) == ["sample 3"]
    assert re.findall("sample [0-9]", preview_text(documents, "--start=4")) == ["sample 4", "sample 5"]


def test_text_is_neither_markup_nor_control_sequences(preview_text: Run) -> None:
    shown = preview_text([chat("[red]hi[/red] :smile:", "\x1b[31mred\x07 ⟦no⟧")])
    assert "[red]hi[/red] :smile:" in shown
    assert rf"⟦\x1b[31mred\x07 \u27e6no\u27e7{END}⟧" in shown


def test_long_samples_are_shown_whole_and_unwrapped(preview_text: Run) -> None:
    text = "hello world " * 500
    assert f"he⟦{text.removeprefix('he')}{END}⟧" in preview_text([{"text": text}])  # "he" is the first token


def test_colour_replaces_the_marks_on_a_terminal() -> None:
    ids = TOKENIZERS[0]("hello world \n over a lazy dog")["input_ids"]
    shown = shown_in_colour(TokenStore.from_samples([(ids, [-100, *ids[1:]])]))
    assert "⟦" not in shown
    coloured = "".join(re.findall(r"\x1b\[30;42m(.*?)\x1b\[0m", shown, flags=re.DOTALL))
    trained = TOKENIZERS[0].decode(ids[1:])
    assert coloured == "this" + trained.replace("\n", "↵")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_asks_for_marks_on_a_terminal_too(
    preview_text: Run, monkeypatch: pytest.MonkeyPatch, no_color: str
) -> None:
    for name, value in {"TERM": "xterm", "FORCE_COLOR": "1", "NO_COLOR": no_color}.items():
        monkeypatch.setenv(name, value)
    assert ("⟦" in preview_text([chat("a", "b")])) == (no_color == "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start=2"], "start = 2: .* holds 2 samples, 0 to 1"),
        (["--num-samples=0"], "num_samples = 0: must be at least 1"),
        (["--start=-1"], "start = -1: must be at least 0"),
    ],
    ids=str,
)
def test_numbers_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [{"input_ids": [1, 2]}] * 2)
    assert main(["preview", f"--data-path={file}", f"--data-cache-dir={tmp_path / 'c'}", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_tokenizer_that_lacks_ids_of_the_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StoreWriter(tmp_path / "prepared") as writer:
        writer.append([1, 5000], [1, 5000])
    TOKENIZERS[0].save_pretrained(tmp_path)
    assert main(["preview", f"--data-path={tmp_path / 'prepared'}", f"--tokenizer-name-or-path={tmp_path}"]) == 2
    assert f"holds token id 5000, the tokenizer only {len(TOKENIZERS[0])} ids" in capsys.readouterr().err
