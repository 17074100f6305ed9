"""Which characters of a rendered chat are trained: each assistant turn as the model will generate it.

A turn is looked at as the last of its chat, which is how it comes about at inference: its header is what the generation
prompt and the turn have in common, its end the token that ends turns behind all of its content. Where the whole chat
holds it in just this form, the whole chat is one sample; where the template writes it otherwise in a chat that goes on
(reasoning dropped from history, another end), the chat is split into samples with the same prefix. A span is right, or
the chat is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.data.chat import KEY, NAME, ChatFormat, Span, TemplateError, V, W
from trainer.data.messages import (
    REASONING_FIELDS,
    Message,
    begun_with,
    called_functions,
    content_text,
    is_plain,
    is_wanted,
    leaf_texts,
    roles_of,
    with_arguments,
    with_functions,
    with_text,
)
from trainer.data.turn_style import TurnStyle, common_prefix, is_reasoning, without_opened_reasoning

_CLOSED_REASONING = re.compile(r"</(?:\w+:)?(?:think|thinking|thought|reasoning)>")
_MAX_PATTERNS = 4096
_MARKED_TEMPLATE = "give a chat_template with {% generation %} marks around what the assistant writes"


@dataclass(frozen=True)
class Rendered:
    """A sample as text, the spans of it that are trained, and what there is to say of them."""

    text: str
    spans: tuple[Span, ...]
    num_turns: int = 0
    """Trained turns."""
    num_open_turns: int = 0
    """Trained turns in which no token is trained that ends turns."""
    num_closed_turns: int = 0
    """Turns left open by the template, which got the token that stops them."""
    num_marked_headers: int = 0
    """Turns whose generation mark covers the header that the model is given at inference, which is not trained."""
    num_messages: int = 0
    """Messages that the sample shows, from the first."""


@dataclass(frozen=True)
class _Turn:
    """One assistant turn, as it looks when it is the last of the chat."""

    index: int
    text: str
    """The chat up to this turn."""
    start: int
    """Where in the text the model begins to write."""
    stop: int
    """Where it ends, its end token included."""
    spans: tuple[Span, ...]
    is_open: bool = False
    is_closed: bool = False
    is_header_marked: bool = False

    @property
    def shown(self) -> str:
        """The text up to the end of the turn."""
        return self.text[: self.stop]


@dataclass(frozen=True)
class _Pattern:
    """What the template writes around the contents of a chat of certain roles, and where its spans begin and end."""

    rendered: tuple[str, ...]
    sample: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    """Of each edge of a span: number of contents before it, and of characters that the template wrote."""
    example: Rendered


class SpanFinder:
    """Finds what is trained of chats in one format."""

    def __init__(self, chat_format: ChatFormat, split: bool = True, close_open_turns: bool = True) -> None:
        self.format = chat_format
        self.style = TurnStyle(chat_format)
        self._split, self._close_open_turns = split, close_open_turns
        self._patterns: dict[Any, tuple[_Pattern, ...] | None] = {}

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """Return the text from which an answer is generated; it ends in the header even if the template leaves it out.

        A reasoning that the generation prompt opens stays open: the model goes on with it.
        """
        adapted = self.format.adapted(messages, tools)
        text, _ = self.format.render(adapted, tools, prompt=True)
        header = self.style.header(bool(tools))
        if header and header not in text[-len(header) - 80 :]:
            text += header
        return text

    def samples(
        self, messages: Sequence[Message], tools: Any = None, train_on: str = "assistant", first: int = 0
    ) -> list[Rendered]:
        """Return the samples of a chat; turns before message number `first` are not trained.

        Raises:
            TemplateError: What the assistant writes cannot be told, or the template loses part of it.
        """
        if train_on == "all":
            if not all(map(is_wanted, messages)):
                raise TemplateError("a message says that it is not trained", "leave train_on='all', or take that out")
            adapted = self.format.adapted(messages, tools)
            text, _ = self.format.render(adapted, tools)
            self.style.end(calls=False, has_tools=bool(tools))
            num_turns = roles_of(messages).count("assistant")
            return [Rendered(text, ((0, len(text)),), num_turns=num_turns, num_messages=len(messages))]
        turns = [i for i, role in enumerate(roles_of(messages)) if role == "assistant" and i >= first]
        trained = [i for i in turns if is_wanted(messages[i])][-1 if train_on == "last" else 0 :]
        if not tools and all(map(is_plain, messages)):
            samples = self._by_pattern(messages, tuple(trained))
            if samples is not None:
                return samples
        return self._by_probing(self.format.adapted(messages, tools), tools, trained)

    # The fast way: chats of the same roles differ in their contents alone, which is checked for each.

    def _by_pattern(self, messages: Sequence[Message], trained: tuple[int, ...]) -> list[Rendered] | None:
        contents = [message["content"] for message in messages]
        if not all(map(str.strip, contents)):
            return None
        together = "\0".join(contents)
        # A template may look for these in a content, and write the turn otherwise then.
        if any(literal in together for literal in self.format.literals):
            return None
        key = (tuple(roles_of(messages)), trained)
        if key not in self._patterns:
            if len(self._patterns) >= _MAX_PATTERNS:
                self._patterns.clear()
            self._patterns[key] = self._learn_patterns(messages, list(trained))
        patterns = self._patterns[key]
        if patterns is None:
            return None
        samples = []
        for pattern in patterns:
            num_messages = pattern.example.num_messages
            text, _ = self.format.render(messages[:num_messages], with_marks=False)
            shown = contents[:num_messages]
            if text != _filled(pattern.rendered, shown):
                shown = [content.strip() for content in shown]
                if text != _filled(pattern.rendered, shown):
                    return None
            lengths = [0]
            for content in shown:
                lengths.append(lengths[-1] + len(content))
            edges = [written + lengths[k] for k, written in pattern.edges]
            spans = tuple(zip(edges[::2], edges[1::2], strict=True))
            if pattern.sample is not pattern.rendered:
                text = _filled(pattern.sample, shown)
            samples.append(replace(pattern.example, text=text, spans=spans))
        return samples

    def _learn_patterns(self, messages: Sequence[Message], trained: list[int]) -> tuple[_Pattern, ...] | None:
        words = [f"Q{_letters(k)}zxvk" for k in range(len(messages))]
        example = [{"role": message["role"], "content": word} for message, word in zip(messages, words, strict=True)]
        try:
            samples = self._by_probing(self.format.adapted(example), None, trained)
            rendered = [self.format.render(example[: sample.num_messages])[0] for sample in samples]
        except TemplateError:
            return None
        patterns = []
        for sample, text in zip(samples, rendered, strict=True):
            shown = words[: sample.num_messages]
            parts, written = _cut(text, shown), _cut(sample.text, shown)
            if parts is None or written is None:
                return None
            edges = []
            for edge in (edge for span in sample.spans for edge in span):
                before = [word for word in shown if sample.text.index(word) < edge]
                edges.append((len(before), edge - sum(map(len, before))))
            patterns.append(_Pattern(parts, parts if written == parts else written, tuple(edges), sample))
        return tuple(patterns)

    # The careful way.

    def _by_probing(self, messages: list[Message], tools: Any, trained: list[int]) -> list[Rendered]:
        """Look at each trained turn as the last of its chat; put as many as possible into one sample."""
        whole, _ = self.format.render(messages, tools)
        if not trained:
            self.style.end(calls=False, has_tools=bool(tools))
            return [Rendered(whole, (), num_messages=len(messages))]
        left = [self._turn(messages, i, tools, whole) for i in trained]
        samples: list[Rendered] = []
        while left:
            last = left[-1]
            text, num_messages = last.text, last.index + 1
            if not samples and whole.startswith(last.shown):
                num_messages = len(messages)
                if num_messages > last.index + 1:
                    text = whole
            held = [turn for turn in left if text.startswith(turn.shown)]
            left = [turn for turn in left if turn not in held]
            num_closed = int(text is last.text and last.is_closed)
            if num_closed and not self._close_open_turns:
                raise TemplateError(
                    "the chat template leaves the last turn without a token that ends it",
                    "choose on_open_turn='close', which appends the token that stops the model there",
                )
            samples.append(
                Rendered(
                    text,
                    tuple(span for turn in held for span in turn.spans),
                    num_turns=len(held),
                    num_open_turns=sum(turn.is_open for turn in held),
                    num_closed_turns=num_closed,
                    num_marked_headers=sum(turn.is_header_marked for turn in held),
                    num_messages=num_messages,
                )
            )
        if len(samples) > 1 and not self._split:
            raise TemplateError(
                f"the chat template writes {len(samples) - 1} of {len(trained)} trained turns otherwise once the chat "
                "goes on, so that no one sample shows each as the model will generate it",
                "leave split_chats on, or use train_on='last'",
            )
        return samples[::-1]

    def _turn(self, messages: list[Message], i: int, tools: Any, whole: str) -> _Turn:
        """Find one turn in the chat that ends with it."""
        try:
            text, marks = self.format.render(messages[: i + 1], tools)
        except TemplateError as error:  # the whole chat was rendered before: only this beginning of it is refused
            remedy = f"mark message {i + 1} with 'train': false: the model is never asked for it"
            raise TemplateError(f"{error} (of the chat up to message {i + 1})", remedy) from error
        tail = self._tail(messages, i, tools, text)
        prefix, start = self._start(messages, i, tools, text)
        is_second = i > 0 and messages[i - 1]["role"] == "assistant"
        before = content_text(messages[i - 1]).strip() if is_second else ""
        said = text[start : max(start, len(text) - len(tail))]
        if before and said.startswith(before) and before not in str(messages[i]):  # with its reasoning and calls
            raise _joined(messages, i)
        if len(tail) > len(text) - start:
            tail = text[start:]
        has_calls = bool(called_functions(messages[i]))
        end = self.style.end(has_calls, bool(tools))
        at = text.find(end.token, len(text) - len(tail))
        is_closed = at < 0
        if is_closed:
            text = text.rstrip()
            at = len(text)
            text += end.token
        stop = at + len(end.token)
        if has_calls or content_text(messages[i]).strip() not in text[start:stop]:
            self._check_start(messages, i, tools, text, (start, stop))
        if prefix is not None:
            # What the model is given at inference, in place of a history that the template writes otherwise here.
            text, stop = prefix + text[start:], stop - start + len(prefix)
            marks = [(a - start + len(prefix), b - start + len(prefix)) for a, b in marks if b > start]
            start = len(prefix)
        turn = _Turn(i, text, start, stop, ((start, stop),), is_closed=is_closed)
        if self.format.has_marks:
            return self._by_marks(turn, marks, end.token, content_text(messages[i]))
        return turn

    def _check_start(self, messages: list[Message], i: int, tools: Any, text: str, span: Span) -> None:
        """Refuse a turn of which the template writes a part before the place from which the model goes on."""
        said = [content_text(messages[i]).strip()]
        for function in called_functions(with_arguments(messages[i], as_text=False)):
            said += leaf_texts(function.get("arguments"))
        trained = text[slice(*span)]
        lost = [word for word in said if word not in trained]
        if not lost:
            return
        before = self.style.try_render(messages[:i], tools) or ""
        own = text[common_prefix(before, text) : span[0]]
        lost = [word for word in lost if word in own]
        if lost:
            raise TemplateError(
                f"the chat template writes {lost[0][:40]!r} of an assistant turn before the place from which the model "
                "goes on",
                "mark that turn with 'train': false, or give another chat_template",
            )

    def _by_marks(self, turn: _Turn, marks: Sequence[Span], end: str, content: str) -> _Turn:
        """Take the spans from the template's generation marks; the end token that follows them is trained too."""
        is_header_marked = any(a < turn.start < b for a, b in marks)
        own = [(max(a, turn.start), min(b, turn.stop)) for a, b in marks if b > turn.start and a < turn.stop]
        answer = _CLOSED_REASONING.split(content)[-1].strip()
        if not any(answer in turn.text[a:b] for a, b in own):
            raise TemplateError(
                "the chat template does not mark what an assistant turn says with its {% generation %} marks",
                "give a chat_template with marks around all that the assistant writes",
            )
        is_open = bool(turn.text[own[-1][1] : turn.stop - len(end)].strip())
        if not is_open:
            own[-1] = (own[-1][0], turn.stop)
        return replace(turn, spans=tuple(own), is_open=is_open, is_header_marked=is_header_marked)

    def _start(self, messages: list[Message], i: int, tools: Any, text: str) -> tuple[str | None, int]:
        """Find where in the text of the turn the model begins to write.

        Return None, or what stands before it at inference, where the template writes another history there.
        """
        header = self.style.header(bool(tools))
        asked = self.style.try_render(messages[:i], tools, prompt=True)
        if asked is None:
            return None, self._start_by_header(messages, i, tools, text, header)
        if text.startswith(asked):
            return None, self._behind_header(text, without_opened_reasoning(text, len(asked)), header)
        changed = [*messages[:i], begun_with(W, messages[i])]
        other = self.style.try_render(changed, tools)
        common = common_prefix(asked, text)
        if other is not None:
            common = min(common, common_prefix(asked, other))
        start = min(self.style.token_start(asked, common), self.style.token_start(text, common))
        start = without_opened_reasoning(text, start)
        if is_reasoning(asked[start:]):
            return None, self._behind_header(text, start, header)
        # Something else follows at inference: another history, a header of this turn's own, or words of the prompt.
        given = asked[: without_opened_reasoning(asked, len(asked))]
        before = self.style.try_render(messages[:i], tools) or ""
        own = 0 if other is None else common_prefix(text, other)
        if not (common < common_prefix(asked, before) or header and text.rfind(header, 0, own) > common):
            start = self._behind_header(text, start, header)
            another = self.style.try_render([*messages[:i], begun_with(V, messages[i])], tools)
            if other is None or another is None:
                raise self._other_header(header, given)
            begun = other[start : common_prefix(other, another)]
            if begun.strip() and begun.strip() == header.strip():
                start += len(begun)  # the same header, with other spaces before it
            elif self.style.has_words(begun):
                raise self._other_header(begun, given)
            return given, start
        begin = self._start_by_header(messages, i, tools, text, header)
        if text[:begin] == asked[:begin]:
            # What follows this header at inference is history: it is the header of an earlier turn, which goes on.
            joined, said = common_prefix(text, before), content_text(messages[i]).strip()
            if said and text.startswith(said, joined) and given.endswith(header):
                return given, joined
            raise _joined(messages, i)
        if asked == before:
            given += header  # generation adds it
        elif not given.rstrip().endswith(header.rstrip()):
            raise self._other_header(header, given)
        return given, begin

    def _other_header(self, header: str, given: str) -> TemplateError:
        return TemplateError(
            f"the chat template begins an assistant turn with {header!r}, but its generation prompt ends in "
            f"{given[-max(len(header), 20) :]!r}",
            "give a chat_template whose generation prompt is the header of assistant turns",
        )

    def _behind_header(self, text: str, start: int, header: str) -> int:
        """Skip a header that the generation prompt leaves out: behind another assistant turn, or always."""
        if header and text.startswith(header, start) and not text.endswith(header, 0, start):
            return start + len(header)
        return start

    def _start_by_header(self, messages: list[Message], i: int, tools: Any, text: str, header: str) -> int:
        changed = [*messages[:i], begun_with(W, messages[i])]
        other = self.style.try_render(changed, tools)
        begin = len(text) if other is None else common_prefix(text, other)
        if not header:
            return begin
        at = text.rfind(header, 0, begin)
        if at < 0:
            raise TemplateError(
                f"the chat template writes no {header!r} before an assistant turn, as its generation prompt does",
                _MARKED_TEMPLATE,
            )
        return at + len(header)

    def _tail(self, messages: list[Message], i: int, tools: Any, text: str) -> str:
        """Return what the template writes behind all of a turn; check that the text has all of it."""
        turn = messages[i]
        calls = called_functions(turn)
        content = content_text(turn).strip()
        reasoning = [name for name in REASONING_FIELDS if isinstance(turn.get(name), str) and turn[name].strip()]
        closed = _CLOSED_REASONING.search(content)
        if content and not calls and not reasoning and not closed:
            # Most turns: what a content is followed by is known.
            tail = self.style.end(calls=False, has_tools=bool(tools)).tail
            if text.endswith((content + tail, content_text(turn) + tail)):
                return tail
        changed = {**turn, **{name: turn[name] + W for name in reasoning}}
        if reasoning and self._word_behind(messages, i, tools, changed) is None:
            raise TemplateError(
                f"the chat template leaves out the reasoning of an assistant turn (field {reasoning[0]!r}), "
                "even of the last turn",
                "remove the reasoning, put it into the content if the model is to write it there, or give a "
                "chat_template that writes it",
            )
        if closed:
            cut = content_text(turn).rfind(closed.group())
            marked = with_text(turn, lambda said: said[:cut] + W + said[cut:])
            if isinstance(turn.get("content"), str) and self._word_behind(messages, i, tools, marked) is None:
                raise TemplateError(
                    f"the chat template leaves out the reasoning of an assistant turn (up to {closed.group()!r} in its "
                    "content), even of the last turn",
                    "remove the reasoning, or give a chat_template that writes it",
                )
        tails = []
        behind_content = self._word_behind(messages, i, tools, with_text(turn, lambda said: said + W))
        if behind_content is not None:
            tails.append(behind_content)
        elif content:
            beside = "beside a tool call" if calls else "of an assistant turn"
            raise TemplateError(
                f"the chat template leaves out the content {beside}",
                "remove the content, or give a chat_template that writes it",
            )
        if calls:
            tails.append(self._behind_calls(messages, i, tools, text))
        if not tails:
            return ""
        tail = min(tails, key=len)
        if not text.endswith(tail):
            tail = text[len(text) - common_prefix(text[::-1], tail[::-1]) :]
        return tail

    def _word_behind(self, messages: list[Message], i: int, tools: Any, changed: Message) -> str | None:
        """Return what follows W in the chat with this turn changed; None if W is not written."""
        text = self.style.try_render([*messages[:i], changed], tools)
        if text is None or W not in text:
            return None
        return text.rpartition(W)[2]

    def _behind_calls(self, messages: list[Message], i: int, tools: Any, text: str) -> str:
        turn = messages[i]
        names = [f"{NAME}{_letters(k)}" for k in range(len(called_functions(turn)))]
        words = [f"{W}{_letters(k)}" for k in range(len(names))]

        def change(k: int, function: dict[str, Any]) -> None:
            function["name"] = names[k]
            as_text = isinstance(function.get("arguments"), str)
            function["arguments"] = f'{{"{KEY}": "{words[k]}"}}' if as_text else {KEY: words[k]}

        other = self.style.try_render([*messages[:i], with_functions(turn, change)], tools)
        if other is None:  # it may know the tools by name
            said = [str(f.get("name")) for f in called_functions(turn)]
            said += [leaf for f in called_functions(turn) for leaf in leaf_texts(f.get("arguments"))]
            missing = [word for word in said if word not in text]
            last = max((text.rfind(word) + len(word) for word in said if word in text), default=0)
        else:
            missing = [word for word in words if word not in other]
            last = len(text) - common_prefix(text[::-1], other[::-1])
        # Words are found; numbers may still be cut (a template that takes quotes off JSON text by counting).
        numbers = []
        for function in called_functions(with_arguments(turn, as_text=False)):
            numbers += [leaf for leaf in leaf_texts(function.get("arguments")) if leaf.isdecimal()]
        missing += [number for number in numbers if number not in text]
        if missing:
            lost = "tool calls" if other is None or len(missing) >= len(words) else "some of the tool calls"
            raise TemplateError(
                f"the chat template leaves out {lost} of an assistant turn",
                "give a chat_template that writes tool calls, or mark the turn with 'train': false",
            )
        return text[last:]


def _joined(messages: Sequence[Message], i: int) -> TemplateError:
    if messages[i - 1]["role"] == "assistant":
        remedy = "join the two in the document, or mark the second with 'train': false"
    else:
        remedy = "mark that turn with 'train': false, or give another chat_template"
    return TemplateError("the chat template joins an assistant turn with the message before it", remedy)


def _filled(parts: Sequence[str], contents: Sequence[str]) -> str:
    return parts[0] + "".join(content + part for content, part in zip(contents, parts[1:], strict=True))


def _cut(text: str, words: Sequence[str]) -> tuple[str, ...] | None:
    """Cut the text at the words, which must stand in it once each, in order."""
    parts = []
    for word in words:
        part, found, text = text.partition(word)
        if not found or word in text:
            return None
        parts.append(part)
    return (*parts, text)


def _letters(number: int) -> str:
    """Write a number in letters, all such words of the same length."""
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:05}")
