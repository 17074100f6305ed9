"""Chats to text and trained spans, through the tokenizer's own template.

Owns which characters of a rendered chat are trained: by the template's generation marks; or by incremental rendering
verified to be a prefix; or, where a turn looks otherwise at the end of a chat than within it (Qwen3), by where its
content stands. Must not know token ids. Invariant: a span is right or the document is refused with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.jsonl import TRAINED_FLAGS
from trainer.data.limits import limited_time
from trainer.data.messages import Message, call_arguments, content_text, is_plain, is_wanted, with_parsed_arguments
from trainer.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character and the one after the last."""

RENDER_SECONDS = 10
"""Most that a template may take for one chat."""

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "Zx7qPW"
_ASKED: Message = {"role": "user", "content": "Q"}
_TURN_FIELDS = {"role", "content", "tool_calls", *TRAINED_FLAGS}  # no others, which could be written too: reasoning
_MARKS_REMEDY = (
    "give a chat_template with {% generation %} marks around what the assistant writes, or use train_on='all'"
)


class TemplateError(Exception):
    """What a template makes of a chat cannot be trained on: the reason, and what to do."""

    def __init__(self, reason: str, remedy: str = "mend the document, or give another chat_template") -> None:
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True)
class Rendered:
    """A chat as text, the spans that are trained, and how many trained turns have no end-of-turn token."""

    text: str
    spans: tuple[Span, ...]
    num_open_turns: int = 0


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with all it reads from its tokenizer: plain strings, so that it can be hashed and sent."""

    template: str
    tool_template: str
    special_tokens: dict[str, str]
    added_tokens: tuple[str, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> ChatFormat:
        """Take the tokenizer's template, or the Jinja file given instead."""
        if chat_template is not None:
            template = tool_template = _read_template(chat_template)
        elif tokenizer.chat_template is None:
            remedy = "give one with chat_template=FILE, or use 'prompt'/'completion' strings or 'text'"
            raise UsageError(f"the tokenizer has no chat template: {remedy}")
        else:
            template = tokenizer.get_chat_template()
            tool_template = tokenizer.get_chat_template(tools=[{}])
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not _is_list(token)}
        return cls(template, tool_template, special, tuple(tokenizer.get_added_vocab()))

    @cached_property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return _MARKS.search(self.template) is not None and _MARKS.search(self.tool_template) is not None

    @cached_property
    def reads_clock(self) -> bool:
        """Whether the template writes today's date into the text."""
        return "strftime_now" in self.template

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template writes before the assistant begins; TemplateError if it refuses to be asked."""
        return self.render([_ASKED], prompt=True)[0].removeprefix(self.render([_ASKED])[0])

    @cached_property
    def ends_of_turn(self) -> tuple[str, ...]:
        """Tokens with which the template ends an assistant turn, last or not; EOS if it refuses to be asked."""
        answered: Message = {"role": "assistant", "content": _PROBE}
        try:
            header = self._generation_prompt
            texts = [self.render(messages)[0] for messages in ([_ASKED, answered], [_ASKED, answered, _ASKED])]
        except TemplateError:
            return tuple(filter(None, [self.special_tokens.get("eos_token")]))
        candidates = [token for token in self.added_tokens if token.strip() and token not in header]
        ends = {_first_token(text.rpartition(_PROBE)[2], candidates) for text in texts}
        return tuple(sorted(end for end in ends if end is not None))

    def render(self, messages: Sequence[Message], tools: Any = None, prompt: bool = False) -> tuple[str, list[Span]]:
        """Return the chat as text and its marked spans; with `prompt`, ending where the assistant begins to write."""
        are_plain = not tools and all(map(is_plain, messages))
        try:
            with limited_time(RENDER_SECONDS):
                if are_plain:
                    return self._render_plain(messages, prompt)
                given = [{key: value for key, value in message.items() if value is not None} for message in messages]
                text, spans = self._render_any(given, tools, prompt)
        except Exception as error:  # noqa: BLE001  a template is a program: it may raise anything
            raise TemplateError(f"the chat template refuses it: {str(error) or type(error).__name__}") from error
        parts = [message["content"] for message in given if isinstance(message.get("content"), list)]
        if any(content and str(content) in text for content in parts):
            raise TemplateError(
                "the chat template knows no contents made of parts, and writes the list itself into the text",
                "make each content a string, or give a chat_template that writes the parts",
            )
        return text, spans

    def _render_any(self, messages: list[Message], tools: Any, prompt: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {"tools": tools or None, "add_generation_prompt": prompt, **self.special_tokens}
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.tool_template if tools else self.template,
            return_assistant_tokens_mask=self.has_marks,
            **options,
        )
        return rendered[0][0], list(rendered[1][0]) if self.has_marks else []

    def _render_plain(self, messages: Sequence[Message], prompt: bool) -> tuple[str, list[Span]]:
        """Do the same for messages of a role and a text, to which the function above does nothing beforehand.

        Its copying and renaming of fields takes as long as the template itself.
        """
        from transformers.utils import chat_template_utils

        template = chat_template_utils._compile_jinja_template(self.template)
        options: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": prompt}
        options |= {"messages": messages, **self.special_tokens}
        if not self.has_marks:
            return template.render(options), []
        text, spans = chat_template_utils._render_with_assistant_indices(template, **options)
        return text, list(spans)

    def with_arguments(self, messages: list[Message], tools: Any = None) -> list[Message]:
        """Give messages with arguments of tool calls, JSON in OpenAI's format, as objects if the template wants those.

        It does where it would write the JSON as a string in JSON.
        """
        parsed = [with_parsed_arguments(message) for message in messages]
        if parsed == messages:
            return messages
        text, _ = self.render(messages, tools)
        given = [arguments for message in messages for arguments in call_arguments(message)]
        quoted = [json.dumps(arguments, ensure_ascii=False) for arguments in given if isinstance(arguments, str)]
        is_written_twice = any(written in text for written in quoted)
        return parsed if is_written_twice else messages

    def render_trained(
        self, messages: Sequence[Message], tools: Any = None, train_on: str = "assistant", first: int = 0
    ) -> Rendered:
        """Render a chat with the spans that are trained; turns before message number `first` never are."""
        if not self.ends_of_turn:
            raise TemplateError(
                "the chat template writes no end-of-turn token after an assistant turn, so that the model would never "
                "learn to stop",
                "give a chat_template that writes one, such as the tokenizer's EOS",
            )
        text, marked = self.render(messages, tools)
        if train_on == "all":
            if not all(map(is_wanted, messages)):
                raise TemplateError("a message says that it is not trained", "leave train_on='all', or take that out")
            return Rendered(text, ((0, len(text)),))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in turns if i >= first and is_wanted(messages[i])][-1 if train_on == "last" else 0 :]
        if self.has_marks:
            spans = _marked_spans(marked, turns, trained)
        else:
            spans = [self._span(text, messages, i, tools) for i in trained]
        return self._with_ends(text, spans)

    def _span(self, text: str, messages: Sequence[Message], i: int, tools: Any) -> Span:
        try:
            return self._incremental_span(text, messages, i, tools)
        except TemplateError:
            if (span := self._span_around_content(text, messages, i, tools)) is None:
                raise
            return span

    def _span_around_content(self, text: str, messages: Sequence[Message], i: int, tools: Any) -> Span | None:
        """From behind the generation prompt before a turn's content to the end-of-turn token behind it; None if unsure.

        Each must stand between the contents of the neighbouring turns, so that no text of theirs is taken for it.
        """
        near = range(max(i - 1, 0), i + 2)
        contents = [span for j in near if (span := self._content_span(text, messages, j, tools)) is not None]
        if len(contents) < len(near) or not messages[i].keys() <= _TURN_FIELDS:
            return None
        *before, content, after = contents
        prompt = self._generation_prompt
        header = text.rfind(prompt, before[-1][1] if before else 0, content[0]) if prompt else -1
        ends = [(text.find(end, content[1], after[0]), end) for end in self.ends_of_turn]
        stop, end = min((found for found in ends if found[0] >= 0), default=(-1, ""))
        said = json.dumps(messages[i].get("tool_calls"), ensure_ascii=False)
        if min(header, stop) < 0 or any(end in said for end in self.ends_of_turn):
            return None
        return header + len(prompt), stop + len(end)

    def _content_span(self, text: str, messages: Sequence[Message], j: int, tools: Any) -> Span | None:
        """Where the content of message j stands whole, seen by what stays when another is in its place."""
        if j == len(messages):
            return len(text), len(text)
        content = messages[j].get("content") or ""
        if not isinstance(content, str):
            return None
        others = [*messages[:j], {**messages[j], "content": _PROBE}, *messages[j + 1 :]]
        before, probe, after = self.render(others, tools)[0].partition(_PROBE)
        if not probe or _PROBE in after or not text.startswith(before):
            return None
        if not content:
            return len(before), len(before)
        stop = len(text) - len(after)
        is_whole = text.endswith(after) and text[len(before) : max(stop, 0)].strip() == content.strip()
        return (len(before), stop) if is_whole else None

    def _incremental_span(self, text: str, messages: Sequence[Message], i: int, tools: Any) -> Span:
        start = self._verified_prefix(text, messages[:i], tools, True)
        is_last = i + 1 == len(messages)
        stop = len(text) if is_last else self._verified_prefix(text, messages[: i + 1], tools, False)
        written = text[start:stop].rstrip()  # a line break behind the end-of-turn token is never generated
        return start, start + len(written) if written.endswith(self.ends_of_turn) else stop

    def _verified_prefix(self, text: str, messages: Sequence[Message], tools: Any, prompt: bool) -> int:
        """Length of the chat up to here, which must be the beginning of the whole chat."""
        part, _ = self.render(messages, tools, prompt)
        if text.startswith(part):
            return len(part)
        at = next((k for k, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), len(text))
        role = "the generation prompt" if prompt else "the assistant's turn"
        raise TemplateError(
            f"the chat template has no {{% generation %}} marks, and renders the first {len(messages)} messages and "
            f"{role} alone otherwise than within the whole chat ({part[at : at + 30]!r} alone, {text[at : at + 30]!r} "
            "within), so what the assistant writes cannot be told",
            _MARKS_REMEDY if prompt else f"{_MARKS_REMEDY} or 'last'",
        )

    def _with_ends(self, text: str, spans: list[Span]) -> Rendered:
        """Stretch each span over the end-of-turn token that follows it; count those that have none."""
        ends, stretched, num_open = self.ends_of_turn, [], 0
        for start, stop in spans:
            following = next((end for end in ends if text.startswith(end, stop)), "")
            if text[start:stop].rstrip().endswith(ends):
                following = ""
            elif not following:
                num_open += 1
            stretched.append((start, stop + len(following)))
        return Rendered(text, tuple(stretched), num_open)


def generation_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Any = None,
    chat_template: str | None = None,
) -> tuple[list[int], str]:
    """Return the token ids from which the last assistant turn is to be generated, and that turn's text."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError("found no assistant turn", "generation needs one as its reference", field="messages")
    reference = content_text(messages[turns[-1]])
    if not reference.strip():
        raise DataError("the last assistant turn has no text", "answers are compared as texts", field="messages")
    chat_format = ChatFormat.from_tokenizer(tokenizer, chat_template)
    try:
        asked = chat_format.with_arguments(list(messages), tools)[: turns[-1]]
        text, _ = chat_format.render(asked, tools, True)
    except TemplateError as error:
        raise DataError(str(error), error.remedy, field="messages") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), reference


def _marked_spans(marked: list[Span], turns: list[int], trained: list[int]) -> list[Span]:
    if len(marked) == len(turns):
        return [span for span, turn in zip(marked, turns, strict=True) if turn in trained]
    if trained == turns and len(marked) > len(turns):
        return marked
    raise TemplateError(
        f"the chat template marks {len(marked)} spans for {len(turns)} assistant turns, so which of its "
        "{% generation %} marks belong to the trained turns cannot be told",
        "give a chat_template with one mark for each assistant turn",
    )


def _first_token(text: str, tokens: Sequence[str]) -> str | None:
    places = [(text.find(token), -len(token), token) for token in tokens if token in text]
    return min(places)[2] if places else None


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"chat_template={path!r} cannot be read as text: {error}") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | dict)
