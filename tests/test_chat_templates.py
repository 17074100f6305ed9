"""Minimal chat templates with the traps of published ones: the right mask of each, turn by turn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.corpora import assistant, system, user
from tests.fixtures.tokenizers import END, build_tokenizer
from trainer.config.groups import DataArguments
from trainer.data import chat as chat_module
from trainer.data.chat import ChatFormat, TemplateError
from trainer.data.jsonl import Document, FileKind
from trainer.data.spans import SpanFinder
from trainer.data.tokenize import DocumentTokenizer, Recipe
from trainer.errors import DataError, UsageError
from trainer.training.generate import generation_prompt

FOLDER = Path(__file__).parent / "fixtures" / "chat_templates"
SHORT = [user("Ask zero"), assistant("Reply one")]
LONG = [*SHORT, user("Ask two"), assistant("Reply three")]
THOUGHT = [*SHORT[:1], assistant("Reply one", reasoning_content="Because.")]
NO_THOUGHT = "<think>\n\n</think>\n\n"
FINAL = "<|channel|>final<|message|>"


def calling(arguments: Any, content: Any = "") -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        user("Ask sum"),
        assistant(content, tool_calls=[call]),
        {"role": "tool", "content": "4242"},
        assistant("It is 4242"),
    ]


def tokenizer_of(name: str) -> Any:
    text = (FOLDER / f"{name}.jinja").read_text()
    tokenizer = build_tokenizer(None)
    tokens = sorted(set(re.findall(r"<\|[a-z_A-Z]+\|>", text)) - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.eos_token = "<|eos|>" if "<|eos|>" in text else "<|endoftext|>"
    tokenizer.chat_template = text
    return tokenizer


def spans_of(name: str, messages: list[dict[str, Any]], tools: Any = None) -> list[list[str]]:
    """The trained texts of each sample."""
    samples = SpanFinder(ChatFormat.from_tokenizer(tokenizer_of(name))).samples(messages, tools)
    return [[sample.text[start:stop] for start, stop in sample.spans] for sample in samples]


ONE, THREE = f"Reply one{END}", f"Reply three{END}"


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("always_prompt", LONG, [["\n" + ONE, "\n" + THREE]]),
        ("inner_end", LONG, [[f"Reply one<|end_response|>{END}", f"Reply three<|end_response|>{END}"]]),
        ("no_prompt", LONG, [[ONE, THREE]]),
        ("prompt_in_loop", [*SHORT, assistant("Reply three")], [[ONE, THREE]]),
        ("tail_eos", LONG, [[ONE, THREE]]),
        ("stop_is_next_header", LONG, [["Reply one<|user|>", "Reply three<|user|>"]]),
        (
            "stop_is_next_header",
            calling({"a": 17}),
            [["<tool_call>add a=17</tool_call><|observation|>", "It is 4242<|user|>"]],
        ),
        (
            "stop_is_next_header",
            calling('{"a": 17}'),
            [["<tool_call>add a=17</tool_call><|observation|>", "It is 4242<|user|>"]],
        ),
        ("open_but_behind_results", LONG, [[ONE], [THREE]]),
        ("open_but_behind_results", calling({"a": 17})[:2], [['<tool_call>add {"a": 17}</tool_call>' + END]]),
        (
            "system_in_last_user",
            [system("Be brief"), *LONG],
            [["Reply one<|endoftext|>"], ["Reply three<|endoftext|>"]],
        ),
        ("opens_think_r1", LONG, [["Reply one<|eos|>", "Reply three<|eos|>"]]),
        ("opens_think_r1", LONG[1:], [["Reply one<|eos|>", "Reply three<|eos|>"]]),
        ("opens_think", LONG, [[NO_THOUGHT + ONE], [NO_THOUGHT + THREE]]),
        ("opens_think", THOUGHT, [["<think>\nBecause.\n</think>\n\n" + ONE]]),
        ("opens_think", [*THOUGHT, *LONG[2:]], [["<think>\nBecause.\n</think>\n\n" + ONE], [NO_THOUGHT + THREE]]),
        ("channels", LONG, [[f"{FINAL}Reply one<|return|>"], [f"{FINAL}Reply three<|return|>"]]),
        (
            "channels",
            THOUGHT,
            [[f"<|channel|>analysis<|message|>Because.<|end|><|start|>assistant{FINAL}Reply one<|return|>"]],
        ),
        ("parts_only", LONG, [[" " + ONE, " " + THREE]]),
        (
            "parts_only",
            [user([{"type": "text", "text": "a"}]), assistant([{"type": "text", "text": "b"}])],
            [[f" b{END}"]],
        ),
        ("always_prompt", [user([{"type": "text", "text": "a"}]), assistant("b")], [[f"\nb{END}"]]),
    ],
)
def test_each_turn_is_trained_as_the_model_will_generate_it(name: str, messages: Any, expected: Any) -> None:
    assert spans_of(name, messages) == expected


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("drops_calls", calling({"a": 17}), "leaves out tool calls"),
        ("drops_calls", THOUGHT, "leaves out the reasoning"),
        ("opens_think_r1", [user("a"), assistant("<think>b</think>c")], "leaves out the reasoning"),
    ],
)
def test_a_turn_that_the_template_would_not_show_whole_is_refused(name: str, messages: Any, reason: str) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given in (None, tools):
        with pytest.raises(TemplateError, match=reason) as caught:
            spans_of(name, messages, given)
        assert "give a chat_template" in caught.value.remedy


def prepared(tokenizer: Any, messages: Any, **options: Any) -> Any:
    recipe = Recipe.build(FileKind("messages", 1), tokenizer, DataArguments(**options), None)
    return DocumentTokenizer(recipe).tokenize([Document("d.jsonl", 7, {"messages": messages})])


def test_a_split_chat_is_counted_and_may_be_refused() -> None:
    tokenizer = tokenizer_of("opens_think")
    batch, report = prepared(tokenizer, LONG)
    assert (len(batch.lengths), report["chats_split"], report["samples_of_split_chats"]) == (2, 1, 2)
    assert (report["messages:user"], report["trained_turns:assistant"]) == (2, 2)
    with pytest.raises(DataError, match=r"d.jsonl:7: .*writes 1 of 2 trained turns otherwise .*leave split_chats on"):
        prepared(tokenizer, LONG, split_chats=False)
    assert len(prepared(tokenizer, LONG, split_chats=False, train_on="last")[0].lengths) == 1


def test_a_turn_left_open_gets_its_stop_token_or_is_refused() -> None:
    tokenizer = tokenizer_of("stop_is_next_header")
    batch, report = prepared(tokenizer, SHORT)
    assert report["open_turns_closed"] == 1
    assert tokenizer.decode(batch.input_ids[-1:]) == "<|user|>"
    with pytest.raises(DataError, match="without a token that ends it"):
        prepared(tokenizer, SHORT, on_open_turn="error")


def test_generation_stops_at_what_ends_turns() -> None:
    stops = {
        name: SpanFinder(ChatFormat.from_tokenizer(tokenizer_of(name))).style.stop_tokens
        for name in ("stop_is_next_header", "channels", "inner_end", "tail_eos")
    }
    assert stops == {
        "stop_is_next_header": ("<|observation|>", "<|user|>"),
        "channels": ("<|return|>",),
        "inner_end": (END,),
        "tail_eos": (END,),
    }
    ids, _ = generation_prompt(tokenizer_of("no_prompt"), SHORT)
    assert tokenizer_of("no_prompt").decode(ids).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("role", ["Assistant", "asistant", "assistent", "gpt", "model", "bot"])
def test_a_role_that_is_nearly_assistant_is_refused_with_the_right_word(role: str) -> None:
    messages = [user("a"), {"role": role, "content": "b"}, user("c"), assistant("d")]
    with pytest.raises(DataError, match=r"found the role .*under the role 'assistant': rename it") as caught:
        prepared(build_tokenizer("plain"), messages)
    assert caught.value.field == "messages[1].role"


def test_variables_of_the_template_are_passed_on_and_checked() -> None:
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = "{{ 'quick ' if hurry else '' }}" + tokenizer.chat_template
    batch, _ = prepared(tokenizer, SHORT, chat_template_kwargs={"hurry": True})
    assert tokenizer.decode(batch.input_ids).startswith("quick ")
    with pytest.raises(UsageError, match="'enable_thinking' has no effect: the chat template reads hurry"):
        prepared(tokenizer, SHORT, chat_template_kwargs={"enable_thinking": False})
    made = [
        Recipe.build(FileKind("messages", 1), tokenizer, DataArguments(chat_template_kwargs=kwargs), None).to_json()
        for kwargs in ({}, {"hurry": True})
    ]
    assert made[0] != made[1]


def test_a_template_that_builds_a_huge_text_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = "{{ 'x' * 2000000000 }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="refuses it: it needs more than|writes .* characters"):
        prepared(tokenizer, SHORT)
    monkeypatch.setattr(chat_module, "MAX_TEXT", 1000)
    tokenizer.chat_template = tokenizer.chat_template.replace("2000000000", "2000")
    with pytest.raises(DataError, match="at most 1,000 are allowed"):
        prepared(tokenizer, SHORT)


def test_a_header_never_ends_inside_a_control_token() -> None:
    """As Gemma 4: the generation prompt goes on with <|channel>, the turn with <|tool_call>."""
    tokenizer = build_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel>", "<|tool_call>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}<|tool_call>"
        "{{ c.function | tojson }}{% endfor %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<|channel>{% endif %}"
    )
    (sample,) = SpanFinder(ChatFormat.from_tokenizer(tokenizer)).samples(calling({"a": 17}))
    start, _ = sample.spans[0]
    assert sample.text.startswith("<|tool_call>", start)


def test_a_call_that_is_written_before_the_header_is_refused() -> None:
    """As a kin of DeepSeek R1's: the header stands behind a chat's second call, before its empty content."""
    finder = finder_for(
        "{% set ns = namespace(called=false) %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% for c in m.tool_calls or [] %}{% if not ns.called %}<|assistant|>{% endif %}<|call|>"
        "{{ c.function.arguments | tojson }}{% set ns.called = true %}{% endfor %}"
        "<|assistant|>{{ m.content }}<|im_end|>{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if messages[-1].role == 'tool' %}<|results_end|>{% elif add_generation_prompt %}<|assistant|>{% endif %}"
    )
    first, second = calling({"a": 17}), calling({"a": 39})
    (sample,) = finder.samples(first[:2])
    assert [sample.text[start:stop] for start, stop in sample.spans] == ['<|call|>{"a": 17}<|assistant|><|im_end|>']
    with pytest.raises(TemplateError, match="writes '39' of an assistant turn before the place from which the model"):
        finder.samples([*first[:3], *second[1:3]])


def test_a_turn_that_the_template_never_asks_for_may_stay_untrained() -> None:
    """As Qwen 3.5: a chat without a user is an error, so that a greeting is never generated."""
    finder = finder_for(
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}{{ raise_exception('No user') }}"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [assistant("Hello there"), user("Ask two"), assistant("Reply three")]
    with pytest.raises(TemplateError, match=r"No user \(of the chat up to message 1\)") as caught:
        finder.samples(chat)
    assert caught.value.remedy == "mark message 1 with 'train': false: the model is never asked for it"
    (sample,) = finder.samples([{**chat[0], "train": False}, *chat[1:]])
    assert [sample.text[start:stop] for start, stop in sample.spans] == [THREE]


def finder_for(template: str) -> SpanFinder:
    tokenizer = build_tokenizer(None)
    tokens = sorted(set(re.findall(r"<[|/]?[a-z_]+\|?>", template)) - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    return SpanFinder(ChatFormat.from_tokenizer(tokenizer))


def trained(finder: SpanFinder, messages: Any) -> list[tuple[str, str]]:
    """The trained texts, each with what stands before it."""
    samples = finder.samples(messages)
    return [(sample.text[:start], sample.text[start:stop]) for sample in samples for start, stop in sample.spans]


def test_a_tail_may_hold_the_last_tokens_of_a_header() -> None:
    """As Kimi K3: <|sep|> ends the header of a message, and stands before the token that ends the message."""
    finder = finder_for(
        "{% for m in messages %}<|open|>{{ m.role }}<|sep|>{{ m.content }}<|close|>message<|sep|><|end_of_msg|>"
        "{% endfor %}{% if add_generation_prompt %}<|open|>assistant<|sep|>{% endif %}"
    )
    spans = [span for _, span in trained(finder, LONG)]
    assert spans == [f"Reply {word}<|close|>message<|sep|><|end_of_msg|>" for word in ("one", "three")]


def test_a_prompt_may_go_on_with_an_empty_reasoning_and_begin_a_turn_that_the_chat_does_not() -> None:
    """As Gemma 4: a second assistant turn gets no header of its own, but the model is given one."""
    finder = finder_for(
        "{% for m in messages %}{% if loop.first or m.role != loop.previtem.role %}<|turn>{{ m.role }}\n{% endif %}"
        "{{ m.content }}<turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn>assistant\n<|channel>thought\n<channel|>{% endif %}"
    )
    assert finder.style.header(has_tools=False) == "<|turn>assistant\n"
    (before, span), (before_second, second) = trained(finder, [*SHORT, assistant("Reply three")])
    assert (span, second) == ("Reply one<turn|>", "Reply three<turn|>")
    assert before.endswith("<|turn>assistant\n")
    assert before_second.endswith("Reply one<turn|>\n<|turn>assistant\n<|channel>thought\n<channel|>")
    assert [span for _, span in trained(finder, LONG[1:])] == ["Reply one<turn|>", "Reply three<turn|>"]


def test_a_turn_written_into_the_one_before_it_is_trained_behind_what_the_model_is_given() -> None:
    """As a later Gemma 4: calls, results and the answer share a turn, which the generation prompt begins anew."""
    finder = finder_for(
        "{% for m in messages %}{% if m.role == 'user' %}<|turn>user\n{% elif loop.previtem.role == 'user' %}"
        "<|turn>assistant\n{% endif %}{{ m.content }}{% if loop.last or loop.nextitem.role == 'user' %}<turn|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|turn>assistant\n{% endif %}"
    )
    chat = [*SHORT, {"role": "tool", "content": "4242"}, assistant("Reply three")]
    spans = trained(finder, chat)
    question = "<|turn>user\nAsk zero<|turn>assistant\n"
    assert spans[-1] == (f"{question}Reply one4242<turn|>\n<|turn>assistant\n", "Reply three<turn|>")
    # What is written between the two cannot be told from what the second says.
    apart = finder_for(
        finder.format.template.replace("{{ m.content }}", "{{ ' ' if m.role == 'assistant' }}{{ m.content }}")
    )
    with pytest.raises(TemplateError, match="joins an assistant turn with the message before it") as caught:
        trained(apart, chat)
    assert "mark that turn with 'train': false" in caught.value.remedy
    assert [span for _, span in trained(apart, [*chat[:-1], {**chat[-1], "train": False}])] == [" Reply one<turn|>"]


def test_a_turn_that_would_be_trained_with_the_turn_before_it_is_refused() -> None:
    """The prompt leaves out an assistant turn that stands last, so that the next seems to begin where that one did."""
    finder = finder_for(
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% else %}"
        "{% if loop.previtem.role == 'user' %}<|im_start|>assistant\n{% endif %}"
        "{% if not (loop.last and add_generation_prompt) %}{{ m.content }}"
        "{% if loop.last or loop.nextitem.role == 'user' %}<|im_end|>\n{% endif %}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role == 'user' %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [*SHORT, assistant(" and three")]
    with pytest.raises(TemplateError, match="joins an assistant turn with the message before it") as caught:
        trained(finder, chat)
    assert "join the two in the document" in caught.value.remedy
    assert [span for _, span in trained(finder, SHORT)] == [ONE]
    # A turn may say again what the one before it said: then its own words tell nothing of whose they are.
    again = finder_for(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    repeated = [*SHORT, assistant("Reply one and three")]
    assert [span for _, span in trained(again, repeated)] == [ONE, f"Reply one and three{END}"]


def test_an_open_last_turn_gets_the_token_that_ends_turns_within_the_chat() -> None:
    """As Apertus and Apriel 1.6: behind a system prompt of the template, the user's header is not the chat's first."""
    finder = finder_for(
        "<|system_start|>Be brief<|system_end|>{% for m in messages %}<|{{ m.role }}_start|>{{ m.content }}"
        "{% if m.role == 'user' %}<|user_end|>{% elif not loop.last %}<|assistant_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant_start|>{% endif %}{# <|user_start|> #}"
    )
    assert [span for _, span in trained(finder, LONG)] == [
        f"Reply {word}<|assistant_end|>" for word in ("one", "three")
    ]
    assert finder.style.stop_tokens[:1] == ("<|assistant_end|>",)


CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_a_closing_tag_ends_a_turn_that_its_opening_tag_began() -> None:
    """As Laguna: the next message's header, also a token, is not trained; nor is a header that the mark covers."""
    turn = "{% generation %}<assistant>{{ m.content }}</assistant>\n{% endgeneration %}"
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</user>\n{% else %}" + turn
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )  # fmt: skip
    for given in (template, re.sub(r"{% (?:end)?generation %}", "", template)):
        finder = finder_for(given)
        assert finder.style.stop_tokens == ("</assistant>",)
        spans = trained(finder, LONG)
        assert [span for _, span in spans] == [f"Reply {word}</assistant>" for word in ("one", "three")]
        assert all(before.endswith("<assistant>") for before, _ in spans)
    assert finder_for(template).samples(LONG)[0].num_marked_headers == 2


def test_a_turn_that_nothing_ends_stops_at_eos_or_where_the_next_role_is_named() -> None:
    """As DeepSeek's early templates, which write EOS behind tool results only; and others, which never end a turn."""
    named = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|user|> <|assistant|> #}"
    )
    assert [span for _, span in trained(finder_for(named), LONG)] == ["Reply one<|user|>", "Reply three<|user|>"]
    with_eos = named.replace("{% endfor %}", "{{ eos_token if m.role == 'tool' }}{% endfor %}")
    assert [span for _, span in trained(finder_for(with_eos), LONG)] == [ONE, THREE]
    bare = "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    with pytest.raises(TemplateError, match="writes no end-of-turn token"):
        trained(finder_for(bare), LONG)


def test_history_that_the_generation_prompt_rewrites_is_not_trained() -> None:
    """As A.X 4.0: the prompt drops the reasoning of all turns, a chat without a prompt keeps it."""
    finder = finder_for(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] if add_generation_prompt else m.content }}<|im_end|>\n{% endfor %}"
        + CHATML_PROMPT
    )
    thinking = [
        SHORT[0],
        assistant("<think>a</think>Reply one"),
        user("Ask two"),
        assistant("<think>b</think>Reply three"),
    ]
    (_, first), (before, second) = trained(finder, thinking)
    assert (first, second) == (f"<think>a</think>{ONE}", f"<think>b</think>{THREE}")
    assert "<think>a" not in before
    assert before.endswith(f"\n{ONE}\n<|im_start|>user\nAsk two{END}\n<|im_start|>assistant\n")


def test_a_turn_is_trained_behind_what_the_prompt_gives_however_the_template_writes_it() -> None:
    """As Molmo 2, whose turns have a space before their header; as HiPO, whose prompt opens more than the header."""
    turn = "{{ ' ' if m.role == 'assistant' }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    spaced = "{% for m in messages %}" + turn + "{% endfor %}" + CHATML_PROMPT
    opened = spaced.replace("{{ ' ' if m.role == 'assistant' }}", "").replace(
        "assistant\n{% endif", "assistant\n<judge>{% endif"
    )
    for template, given in ((spaced, "assistant\n"), (opened, "assistant\n<judge>")):
        spans = trained(finder_for(template), LONG)
        assert [span for _, span in spans] == [ONE, THREE]
        assert all(before.endswith(f"<|im_end|>\n<|im_start|>{given}") for before, _ in spans)


def test_templates_that_are_not_of_a_model_that_answers_are_refused() -> None:
    """As Llama Guard: the chat is quoted in a question. As UserLM: the prompt begins a user's turn."""
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    judged = "<|im_start|>user\n" + turns + "Is the last message above safe?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(TemplateError, match="goes on with words of its own|generation prompt ends in") as caught:
        trained(finder_for(judged), SHORT)
    assert "give a chat_template" in caught.value.remedy
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(TemplateError, match="begins an assistant turn with .*, but its generation prompt ends in"):
        trained(finder_for(chatml + CHATML_PROMPT.replace("assistant", "user")), SHORT)


def test_a_number_of_a_tool_call_that_the_template_cuts_is_noticed() -> None:
    """Quotes are taken off JSON text by counting, which cuts a number that stands last."""
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ call.function | tojson }}",
        "{% if call.function.arguments is string %}{{ call.function.name }}({{ call.function.arguments[2:-2] }})"
        "{% else %}{{ call.function | tojson }}{% endif %}",
    )
    finder = SpanFinder(ChatFormat.from_tokenizer(tokenizer))
    assert len(finder.samples(calling({"a": 1717}))) == 1
    with pytest.raises(TemplateError, match="leaves out tool calls"):
        finder.samples(calling('{"a": 1717}'))


def test_an_answer_that_begins_with_the_text_of_a_header_is_trained_whole() -> None:
    finder = finder_for(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
    )
    chat = [SHORT[0], assistant("<|im_start|>assistant\nReply one"), *LONG[2:]]
    assert [span for _, span in trained(finder, chat)] == [f"<|im_start|>assistant\n{ONE}", THREE]
