"""Chat templates composed of parts: the spans of every chat against what is known of the composition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.tokenizers import build_tokenizer
from trainer.data.chat import ChatFormat, TemplateError
from trainer.data.spans import SpanFinder

HEADERS = ("<|im_start|>ROLE\n", "<|im_start|>ROLE<|message|>", "<|ROLE|>", "[ROLE] ")
ENDS = ("<|im_end|>\n", "<|im_end|>", "<|endoftext|>", "<|end_response|><|im_end|>\n", "<|message|><|im_end|>")
TOKENS = ["<|message|>", "<|end_response|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]


@dataclass(frozen=True)
class Composition:
    header: str
    end: str
    trims: bool
    reasoning: str
    """Where it is written: 'never', 'always', or 'last' (behind the last question)."""
    opens_reasoning: bool
    writes_calls: bool
    system_in_last_user: bool
    marks: bool

    def template(self) -> str:
        header, content = self.header.replace("ROLE", "{{ m.role }}"), "{{ m.content }}"
        if self.trims:
            content = "{{ m.content | trim }}"
        shown = {"never": "false", "always": "true", "last": "loop.index0 > ns.last"}[self.reasoning]
        body = (
            "{% if m.reasoning_content and SHOWN %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        ).replace("SHOWN", shown) + content
        if self.writes_calls:
            body += "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        body += self.end
        if self.marks:
            body = "{% generation %}" + body + "{% endgeneration %}"
        before_question = "{% if loop.index0 == ns.last and system %}{{ system }}\n\n{% endif %}"
        prompt = self.header.replace("ROLE", "assistant") + ("<think>\n" if self.opens_reasoning else "")
        placed = "messages[0].content if messages[0].role == 'system' else ''" if self.system_in_last_user else "''"
        skipped = "m.role == 'system'" if self.system_in_last_user else "false"
        return (
            "{% set ns = namespace(last=-1) %}{% set system = PLACED %}"
            "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
            "{% for m in messages %}"
            "{% if m.role == 'assistant' %}" + header + body + "{% elif not (SKIPPED) %}" + header
            + before_question + content + self.end + "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}" + prompt + "{% endif %}"
        ).replace("PLACED", placed).replace("SKIPPED", skipped)  # fmt: skip

    def span(self, turn: dict[str, Any]) -> str | None:
        """What is trained of a turn; None if the template loses a part of it."""
        content = turn["content"].strip() if self.trims else turn["content"]
        if "reasoning_content" in turn:
            if self.reasoning == "never":
                return None
            content = f"<think>\n{turn['reasoning_content']}\n</think>\n\n{content}"
        if "tool_calls" in turn:
            if not self.writes_calls:
                return None
            content += '<call>{"name": "add", "arguments": {"a": 17}}</call>'
        return content + self.end.strip()


COMPOSITIONS = st.builds(
    Composition,
    header=st.sampled_from(HEADERS),
    end=st.sampled_from(ENDS),
    trims=st.booleans(),
    reasoning=st.sampled_from(("never", "always", "last")),
    opens_reasoning=st.booleans(),
    writes_calls=st.booleans(),
    system_in_last_user=st.booleans(),
    marks=st.booleans(),
)


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": "Be brief"})
    for k in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": f"Ask {k}"})
        if draw(st.integers(0, 3)) == 0:
            call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"a": 17}}}
            messages.append({"role": "assistant", "content": f"I add {k}", "tool_calls": [call]})
            messages.append({"role": "tool", "content": f"4242{k}"})
        space = draw(st.sampled_from(("", "", " ", "\n")))
        turn = {"role": "assistant", "content": f"{space}Reply {k}{space}"}
        if draw(st.integers(0, 3)) == 0:
            turn["reasoning_content"] = f"Because {k}."
        messages.append(turn)
    return messages


@settings(max_examples=60, deadline=None)
@given(COMPOSITIONS, chats())
def test_spans_are_those_that_the_composition_says(composition: Composition, messages: list[dict[str, Any]]) -> None:
    tokenizer = build_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", composition.template()
    finder = SpanFinder(ChatFormat.from_tokenizer(tokenizer))
    expected = [composition.span(turn) for turn in messages if turn["role"] == "assistant"]
    if None in expected:
        with pytest.raises(TemplateError, match="leaves out"):
            finder.samples(messages)
        return
    samples = finder.samples(messages)
    spans = [sample.text[start:stop] for sample in samples for start, stop in sample.spans]
    assert sorted(spans) == sorted(expected)
    header = composition.header.replace("ROLE", "assistant")
    assert all(sample.text[:start].endswith(header) for sample in samples for start, _ in sample.spans)
