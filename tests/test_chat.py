"""Chats: what is trained is what the assistant writes, whatever the template; or the refusal says why."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.corpora import NON_ASCII, assistant, chat, system, user
from tests.fixtures.tokenizers import BOS, END, TEMPLATES, build_tokenizer
from trainer.config.groups import DataArguments
from trainer.data import chat as chat_module
from trainer.data.chat import ChatFormat, TemplateError
from trainer.data.encode import Encoder
from trainer.data.jsonl import Document, FileKind
from trainer.data.limits import limited_work
from trainer.data.spans import SpanFinder
from trainer.data.tokenize import DocumentTokenizer, Recipe
from trainer.errors import DataError, UsageError
from trainer.training.generate import generation_prompt

CONTENTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TALK = chat("first?", "one.", "second?", "two.")["messages"]


def tokenize(tokenizer: Any, fields: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    document = Document("data.jsonl", 7, fields)
    recipe = Recipe.build(FileKind(document.kind, 1), tokenizer, DataArguments(**options), None)
    batch, _ = DocumentTokenizer(recipe).tokenize([document])
    return batch.input_ids, batch.labels


def trained_text(tokenizer: Any, fields: dict[str, Any], **options: Any) -> list[str]:
    """The runs of trained tokens, as text."""
    ids, labels = tokenize(tokenizer, fields, **options)
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(labels != -100)) + 1)
    return [tokenizer.decode(ids[run]) for run in runs if labels[run[0]] != -100]


@pytest.mark.parametrize("template", ["plain", "marks", "marks_without_end", "adds_bos", "reads_clock"])
def test_every_assistant_turn_and_its_end_are_trained(template: str) -> None:
    tokenizer = build_tokenizer(template)
    assert trained_text(tokenizer, {"messages": TALK}) == ["one." + END, "two." + END]
    tokenizer.pad_token = END
    assert trained_text(tokenizer, {"messages": TALK}) == ["one." + END, "two." + END]


@given(
    contents=st.lists(
        st.lists(st.sampled_from(["<|im_start|>assistant\n", END, "</think>", " ", "a", "é\n"]), max_size=4).map(
            "".join
        ),
        min_size=2,
        max_size=7,
    ),
    begins=st.booleans(),
)
def test_a_turn_that_looks_otherwise_at_the_end_is_trained_whole(contents: list[str], begins: bool) -> None:
    """An assistant's turn is what stands between its header and its end as it is generated, whatever texts say."""
    messages = [(assistant if (i % 2 == 0) == begins else user)(content) for i, content in enumerate(contents)]
    turns = [m["content"] for m in messages if m["role"] == "assistant"]
    samples = SpanFinder(ChatFormat.from_tokenizer(build_tokenizer("shows_no_reasoning"))).samples(messages)
    trained = [sample.text[start:stop] for sample in samples for start, stop in sample.spans]
    assert trained == ["<think>\n\n</think>\n\n" + content + END for content in turns]


def test_tool_calls_of_a_turn_that_looks_otherwise_at_the_end_are_trained() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [user("1+1"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "2"}, assistant("two")]
    said = '[call {"name": "add", "arguments": {"a": 1}}]'
    tokenizer = build_tokenizer("shows_no_reasoning")
    thought = "<think>\n\n</think>\n\n"
    assert trained_text(tokenizer, {"messages": messages}) == [thought + said + END, thought + "two" + END]
    call["function"]["arguments"]["a"] = END  # type: ignore[index]
    said = said.replace("1", f'"{END}"')
    assert trained_text(tokenizer, {"messages": messages}) == [thought + said + END, thought + "two" + END]


@pytest.mark.parametrize("template", ["plain", "marks", "marks_without_end", "strips_reasoning"])
def test_last_trains_the_last_assistant_turn(template: str) -> None:
    messages = [user("a"), assistant("<think>x</think>one."), user("b"), assistant("two."), user("c")]
    assert trained_text(build_tokenizer(template), {"messages": messages}, train_on="last") == ["two." + END]


@pytest.mark.parametrize("template", ["plain", "marks", "mistral", "gemma"])
def test_all_trains_every_token(template: str) -> None:
    ids, labels = tokenize(build_tokenizer(template), {"messages": TALK}, train_on="all")
    np.testing.assert_array_equal(ids, labels)


def test_the_space_before_an_answer_belongs_to_it_where_the_template_says_so() -> None:
    assert trained_text(build_tokenizer("mistral"), {"messages": TALK}) == [" one." + END, " two." + END]


@pytest.mark.parametrize("template", sorted(name for name in TEMPLATES if not name.startswith(("never", "opens"))))
@given(questions=st.lists(CONTENTS, min_size=1, max_size=3), answers=st.lists(CONTENTS, min_size=3, max_size=3))
@settings(deadline=None, max_examples=25)
def test_token_ids_are_those_of_apply_chat_template(template: str, questions: list[str], answers: list[str]) -> None:
    tokenizer = build_tokenizer(template)
    messages = [turn for q, a in zip(questions, answers, strict=False) for turn in (user(q), assistant(a))]
    ids, _ = tokenize(tokenizer, {"messages": messages}, on_untrainable="error", train_on="all")
    assert ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


@given(questions=st.lists(CONTENTS, min_size=1, max_size=3), answers=st.lists(CONTENTS, min_size=3, max_size=3))
@settings(deadline=None, max_examples=50)
def test_marks_and_incremental_rendering_agree(questions: list[str], answers: list[str]) -> None:
    messages = [turn for q, a in zip(questions, answers, strict=False) for turn in (user(q), assistant(a))]
    marked, incremental = (tokenize(build_tokenizer(name), {"messages": messages}) for name in ("marks", "plain"))
    np.testing.assert_array_equal(marked[0], incremental[0])
    np.testing.assert_array_equal(marked[1], incremental[1])


@given(texts=st.lists(CONTENTS, min_size=1, max_size=4), cuts=st.data())
@settings(deadline=None, max_examples=200)
def test_masks_by_bytes_are_those_by_offsets(texts: list[str], cuts: st.DataObject) -> None:
    encoder = Encoder(_trimming_backend())
    texts = [text + END + text for text in texts]
    edges = [sorted(cuts.draw(st.lists(st.integers(0, len(text)), min_size=4, max_size=4))) for text in texts]
    spans = [[(a, b), (c, d)] for a, b, c, d in edges]
    assert encoder._num_bytes is not None
    by_bytes = encoder.encode(texts, spans)
    by_offsets = encoder._encode_by_offsets(texts, spans)
    for ours, oracle, text, wanted in zip(by_bytes, by_offsets, texts, spans, strict=True):
        assert ours[0].tolist() == oracle[0].tolist(), text
        assert ours[1].tolist() == oracle[1].tolist(), (text, wanted)


def _trimming_backend() -> str:
    """A backend that, as GPT-2's, leaves spaces out of the offsets it reports."""
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return str(backend.to_str())


def test_spaces_at_the_end_of_a_span_are_trained_also_by_offsets() -> None:
    encoder = Encoder(_trimming_backend())
    ((ids, by_bytes),) = encoder.encode(["ab   c"], [[(0, 4)]])
    ((_, by_offsets),) = encoder._encode_by_offsets(["ab   c"], [[(0, 4)]])
    assert by_bytes.tolist() == by_offsets.tolist()
    assert build_tokenizer().decode(ids[by_bytes]) == "ab  "


def test_a_normalizer_that_changes_a_text_does_not_shift_its_mask() -> None:
    from tokenizers import normalizers

    tokenizer = build_tokenizer("plain")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    messages = [user("e\u0301" * 9), assistant("yes"), user(NON_ASCII), assistant("no e\u0301")]
    assert trained_text(tokenizer, {"messages": messages}) == ["yes" + END, "no \u00e9" + END]
    # two bytes less before the answer, two more after it: the sum is right, the places are not
    messages = [user("e\u0301" * 2), assistant("yes"), user("\u0344")]
    assert trained_text(tokenizer, {"messages": messages}) == ["yes" + END]


def test_a_tokenizer_that_is_not_byte_level_is_masked_alike() -> None:
    tokenizer = build_tokenizer("marks", byte_level=False)
    ids, labels = tokenize(tokenizer, {"messages": TALK})
    trained = tokenizer.convert_ids_to_tokens(ids[labels != -100].tolist())
    assert "".join(trained).replace("<0x2E>", ".") == f"one.{END}two.{END}"


def test_tool_calls_and_tools_reach_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [user("1+1"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "2"}, assistant("two")]
    tools = [{"type": "function", "function": {"name": "add"}}]
    expected = ['[call {"name": "add", "arguments": {"a": 1}}]' + END, "two" + END]
    for template in ("plain", "marks"):
        fields = {"messages": messages, "tools": tools}
        tokenizer = build_tokenizer(template)
        assert trained_text(tokenizer, fields) == expected
        assert tokenizer.decode(tokenize(tokenizer, fields)[0]).startswith('<|im_start|>tools\n[{"type": "function"')


def calls(*functions: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in functions]


@pytest.mark.parametrize("template", ["plain", "marks", "shows_no_reasoning"])
def test_each_of_several_tool_calls_is_trained(template: str) -> None:
    messages = [user("x"), assistant(None, tool_calls=calls(("add", '{"a": "p"}'), ("mul", '{"b": "q"}')))]
    said = '[call {"name": "add", "arguments": {"a": "p"}}][call {"name": "mul", "arguments": {"b": "q"}}]'
    thought = "<think>\n\n</think>\n\n" if template == "shows_no_reasoning" else ""
    assert trained_text(build_tokenizer(template), {"messages": messages}) == [thought + said + END]


def test_a_template_that_loses_or_moves_the_second_tool_call_is_refused() -> None:
    messages = [user("x"), assistant(None, tool_calls=calls(("add", {"a": "p"}), ("mul", {"b": "q"})))]
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = TEMPLATES["plain"].replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
    with pytest.raises(DataError, match="leaves out some of the tool calls"):
        tokenize(tokenizer, {"messages": messages})
    before = "{% for call in (message.tool_calls or [])[1:] %}[call {{ call.function | tojson }}]{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>{{ message.role }}", before + "<|im_start|>{{ message.role }}"
    )
    with pytest.raises(DataError, match="before the place from which the model goes on"):
        tokenize(tokenizer, {"messages": messages})


@pytest.mark.parametrize("template", ["plain", "marks", "shows_no_reasoning"])
@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}], ids=str)
def test_a_turn_that_says_so_is_not_trained(template: str, flag: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(template)
    messages = [user("a"), assistant("bad", **flag), user("b"), assistant("good", weight=1), user("c", weight=None)]
    good = ("<think>\n\n</think>\n\n" if template == "shows_no_reasoning" else "") + "good" + END
    assert trained_text(tokenizer, {"messages": messages}) == [good]
    assert trained_text(tokenizer, {"messages": messages[:4][::-1]}, train_on="last") == [good]
    with pytest.raises(DataError, match="a message says that it is not trained"):
        tokenize(tokenizer, {"messages": messages}, train_on="all")


@pytest.mark.parametrize("template", ["plain", "marks"])
def test_arguments_in_json_are_not_written_as_a_string_in_json(template: str) -> None:
    function = {"name": "add", "arguments": '{"a": "é"}'}  # as OpenAI's format has them
    messages = [user("1+1"), assistant(None, tool_calls=[{"type": "function", "function": function}])]
    written = '[call {"name": "add", "arguments": {"a": "é"}}]' + END
    assert trained_text(build_tokenizer(template), {"messages": messages}) == [written]
    as_they_are = build_tokenizer("plain")
    as_they_are.chat_template = TEMPLATES["plain"].replace("call.function | tojson", "call.function.arguments")
    assert trained_text(as_they_are, {"messages": messages}) == ['[call {"a": "é"}]' + END]


@pytest.mark.parametrize(
    "message",
    [
        assistant("a", train=False, reasoning_content="because"),
        assistant("a", function_call={"name": "add", "arguments": "{}"}),
        assistant("add", train=False, tool_calls=[{"function": {"name": name}} for name in ("add", "mul")]),
        {"role": "developer", "content": "be brief"},
        user([{"type": "image_url", "image_url": "x"}]),
    ],
    ids=str,
)
def test_what_the_template_leaves_out_is_counted(message: dict[str, Any]) -> None:
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'developer' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if m.content is string }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    recipe = Recipe.build(FileKind("messages", 1), tokenizer, DataArguments(), None)
    for messages, count in ((TALK, 0), ([*TALK[:2], message, *TALK[2:]], 1)):
        _, report = DocumentTokenizer(recipe).tokenize([Document("p", 1, {"messages": messages})])
        assert report["messages_not_written_whole"] == count


def test_control_tokens_are_counted_wherever_they_stand() -> None:
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = TEMPLATES["plain"].replace("message.content or ''", "message.content[0].text")
    recipe = Recipe.build(FileKind("messages", 1), tokenizer, DataArguments(), None)
    for said in (f"x{END}", "x"):
        parts = [{"type": "text", "text": said}]
        document = Document("p", 1, {"messages": [user(parts), assistant(parts)]})
        _, report = DocumentTokenizer(recipe).tokenize([document])
        assert report["control_tokens_in_text"] == (END in said)


def test_a_text_without_eos_is_counted() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    recipe = Recipe.build(FileKind("prompt_completion", 1), tokenizer, DataArguments(), None)
    _, report = DocumentTokenizer(recipe).tokenize([Document("p", 1, {"prompt": "x", "completion": "yes"})])
    assert report["turns_without_end_of_turn"] == 1


def test_a_control_token_that_takes_in_spaces_is_not_trained_for_them() -> None:
    from transformers import AddedToken

    tokenizer = build_tokenizer("plain")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|says|>", rstrip=True)]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}<|says|>{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant<|says|>{% endif %}"
    )
    assert trained_text(tokenizer, {"messages": [user("a"), assistant("   return 1")]}) == ["return 1" + END]


def test_a_chat_may_begin_with_the_assistant() -> None:
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = "{{ '' if messages[0].role }}" + TEMPLATES["plain"]  # as Qwen2.5 looks at the first
    assert trained_text(tokenizer, {"messages": [assistant("hello"), *TALK]}) == [
        answer + END for answer in ("hello", "one.", "two.")
    ]


def test_only_the_completion_of_a_conversational_prompt_is_trained() -> None:
    fields = {"prompt": TALK[:3], "completion": TALK[3:]}
    for template in ("plain", "marks"):
        assert trained_text(build_tokenizer(template), fields) == ["two." + END]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("plain", [user("a"), assistant("b", reasoning_content="c")], "leaves out the reasoning"),
        ("never_ends", TALK, "no end-of-turn token"),
        ("never_ends_but_begins", TALK, "no end-of-turn token"),
        ("gemma", [system("s"), *TALK], "System role not supported"),
        ("gemma", [user("a"), user("b")], "must alternate"),
        ("mistral", [{"role": "tool", "content": "x"}], "Only user and assistant"),
        (None, TALK, "no chat template"),
    ],
)
def test_a_chat_that_cannot_be_masked_is_refused_with_the_reason(template: str, messages: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        tokenize(build_tokenizer(template), {"messages": messages})
    assert (caught.value.path, caught.value.line, caught.value.field) == ("data.jsonl", 7, "messages")


def test_a_template_that_marks_fewer_spans_than_turns_cannot_train_some_of_them() -> None:
    tokenizer = build_tokenizer("marks")
    tokenizer.chat_template = (
        "{% generation %}x<|im_end|>{% endgeneration %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    )
    for train_on in ("last", "assistant"):
        with pytest.raises(DataError, match="does not mark what an assistant turn says"):
            tokenize(tokenizer, {"messages": TALK}, train_on=train_on)


def test_turns_without_an_end_are_counted() -> None:
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %} over{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    for template, count in (
        (tokenizer.chat_template, 2),
        (tokenizer.chat_template.replace(" over", "{{ ' over' if 'one' in m.content }}"), 1),
    ):
        tokenizer.chat_template = template
        recipe = Recipe.build(FileKind("messages", 1), tokenizer, DataArguments(), None)
        _, report = DocumentTokenizer(recipe).tokenize([Document("p", 1, {"messages": TALK})])
        assert report["turns_without_end_of_turn"] == count


def test_bos_stands_once() -> None:
    tokenizer = build_tokenizer("adds_bos", adds_bos=True)
    for fields in ({"messages": TALK}, {"text": "hello"}, {"text": BOS + "hello"}, {"prompt": "a", "completion": "b"}):
        ids, _ = tokenize(tokenizer, fields)
        assert ids.tolist().count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_raw_text_ends_with_one_eos_that_is_trained() -> None:
    tokenizer = build_tokenizer(adds_bos=True)
    assert trained_text(tokenizer, {"text": "hello"}) == [BOS + "hello" + END]
    assert trained_text(tokenizer, {"text": "hello" + END}) == [BOS + "hello" + END]
    assert trained_text(tokenizer, {"prompt": "2+2=", "completion": "4"}) == ["4" + END]
    assert trained_text(tokenizer, {"prompt": "2+2=", "completion": "4"}, train_on="all") == [BOS + "2+2=4" + END]


def test_an_eos_that_the_tokenizer_adds_itself_is_the_only_one() -> None:
    from tokenizers import processors

    tokenizer = build_tokenizer()
    ends = [(END, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=ends
    )
    assert trained_text(tokenizer, {"text": "hello"}) == ["hello" + END]


def test_a_pretrain_message_is_raw_text() -> None:
    tokenizer = build_tokenizer(adds_bos=True)
    pretrain = {"messages": [{"role": "pretrain", "content": "hello world"}]}
    np.testing.assert_array_equal(tokenize(tokenizer, pretrain), tokenize(tokenizer, {"text": "hello world"}))


def test_a_template_file_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATES["marks"])
    tokenizer = build_tokenizer(None)
    assert trained_text(tokenizer, {"messages": TALK}, chat_template=str(path)) == ["one." + END, "two." + END]
    with pytest.raises(UsageError, match="cannot be read"):
        tokenize(tokenizer, {"messages": TALK}, chat_template=str(tmp_path / "none"))


@pytest.mark.parametrize("template", ["plain", "marks", "mistral", "gemma"])
def test_generation_begins_where_the_trained_turn_does(template: str) -> None:
    tokenizer = build_tokenizer(template)
    prompt, reference = generation_prompt(tokenizer, TALK)
    ids, labels = tokenize(tokenizer, {"messages": TALK}, train_on="last")
    begin = int(np.flatnonzero(labels != -100)[0])
    assert prompt == ids[:begin].tolist()
    assert tokenizer.decode(ids[begin:], skip_special_tokens=True).strip() == reference == "two."


def test_generation_needs_an_assistant_turn() -> None:
    with pytest.raises(DataError, match="no assistant turn"):
        generation_prompt(build_tokenizer(), [user("a")])
    with pytest.raises(DataError, match="the last assistant turn has no text"):
        generation_prompt(build_tokenizer(), [user("a"), assistant(None, tool_calls=[])])


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(TemplateError, match="refuses"):
        ChatFormat.from_tokenizer(tokenizer).render(TALK)


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.2)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    with pytest.raises(TemplateError, match="refuses it: it was still at work after 0.2 s"):
        ChatFormat.from_tokenizer(tokenizer).render(TALK)
    assert before == (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0)


def test_each_piece_of_work_has_its_own_time() -> None:
    with limited_work(0.4):
        for _ in range(4):
            with limited_work(0.4):
                time.sleep(0.15)
    with pytest.raises(TimeoutError), limited_work(0.1), limited_work(0.1):
        time.sleep(5)


@pytest.mark.parametrize("template", ["marks", "plain"])
def test_text_parts_become_strings_where_the_template_would_write_them_as_code(template: str) -> None:
    parts = [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]
    for messages in ([user("2+2"), assistant(parts)], [user(parts), assistant("four")]):
        assert trained_text(build_tokenizer(template), {"messages": messages}) == ["four" + END]
    picture = [{"type": "image", "url": "x"}]
    with pytest.raises(DataError, match="writes the list itself into the text; make each content a string"):
        tokenize(build_tokenizer(template), {"messages": [user(picture), assistant("four")]})


def test_parts_that_the_template_writes_are_trained() -> None:
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = TEMPLATES["plain"].replace("message.content or ''", "message.content[0].text")
    parts = [{"type": "text", "text": "four"}]
    ids, labels = tokenize(tokenizer, {"messages": [user(parts), assistant(parts)]})
    assert tokenizer.decode(ids[labels != -100]) == f"four{END}"
