"""What a chat template writes around an assistant turn: the header before it, and the token that ends it.

Both are learned from small chats of words that occur in no template, once for each template; no data is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.chat import EXAMPLE_TOOLS, NAME, ChatFormat, Q, TemplateError, V, W, with_empty_content
from trainer.data.messages import Message

_REASONING_TAG = (
    r"<(?:\w+:)?(?:think|thinking|thought|thoughts|reason|reasoning|analysis|scratchpad)>"
    r"|\[(?:THINK|BEGIN_THINK)\]|<\|?START_THINKING\|?>|<\|(?:begin_of_thought|think_start|think|inner_prefix)\|>"
    r"|<\|channel>(?:thought)?|<\|begin\|>assistant<\|think\|>|Here are my reasoning steps:"
)
_OPENED_REASONING = re.compile(rf"(?:{_REASONING_TAG})\s*\Z")
_ANY_REASONING = re.compile(rf"\s*(?:{_REASONING_TAG})")

# Tokens that close a part of a turn, such as a tool call or an inner response, and never the turn.
_PART = r"(?:tool|call|response|think|thought|channel|action|box|arg)"
_CLOSES_PART = re.compile(
    rf"^</[^>]*{_PART}|^\[/|^<\|/|{_PART}[^>]*end|end[^>]*{_PART}|^<(?:tool_call|tool_response|channel)\|>$",
    re.IGNORECASE,
)


# What may stand between a turn that the template leaves open and the token that stops it.
_WORDS = re.compile(r"\w\W*\s\W*\w")
_BETWEEN = re.compile(r"</[^>]*>|[\s}\"'\])]")

# A turn without a token of its own at its end may stop at the one that begins the next message, if that names its role.
_NAMES_NEXT = re.compile("user|human|observation|tool|function|ipython|environment", re.IGNORECASE)


_RESULT: Message = {"role": "tool", "content": V, "tool_call_id": "call00001", "name": NAME}
"""What a tool answers to the example of a call."""


@dataclass(frozen=True)
class TurnEnd:
    """How the last turn of a chat ends."""

    token: str
    tail: str
    """All that the template writes behind the turn's content."""


class TurnStyle:
    """Headers and ends of assistant turns in one chat format."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self.format = chat_format
        tokens = [token for token in chat_format.added_tokens if token.strip()]
        tokens += [token for token in [chat_format.special_tokens.get("eos_token")] if token]
        longest_first = sorted(set(tokens), key=lambda token: (-len(token), token))
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._facts: dict[Any, Any] = {}

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """Tokens with which the model ends what it writes: an answer, or a tool call."""
        found = [self._try_end(calls, tools) for calls in (False, True) for tools in (False, True)]
        return tuple(sorted({end.token for end in found if end is not None}))

    def header(self, has_tools: bool) -> str:
        """Return what the template writes before what an assistant writes, if that is more than spaces."""
        key = ("header", has_tools)
        if key not in self._facts:
            self._facts[key] = self._find_header(has_tools)
        header: str = self._facts[key]
        return header

    def _find_header(self, has_tools: bool) -> str:
        tools = EXAMPLE_TOOLS if has_tools else None
        asked = self.format.adapted([{"role": "user", "content": Q}], tools)
        answered = self.format.adapted([*asked, {"role": "assistant", "content": W}], tools)
        # Some templates write their instructions otherwise for other chats: what counts stands behind the question.
        prompt = _behind_question(self.try_render(asked, tools, prompt=True))
        before = _behind_question(self.try_render(asked, tools))
        text = _behind_question(self.try_render(answered, tools))
        if prompt is not None and before is not None:
            begin = self.token_start(prompt, common_prefix(prompt, before))
            stop = without_opened_reasoning(prompt, len(prompt))
            if text is not None:
                # The prompt may go on with an empty reasoning that the turn does not show.
                common = self.token_start(prompt, common_prefix(prompt, text))
                if prompt[begin:common].strip():
                    stop = min(stop, common)
            header = prompt[begin:stop]
            if header.strip():
                return header
        # There is no generation prompt, or it is always there.
        if text is None or before is None or W not in text:
            return ""
        common = self.token_start(text, common_prefix(before, text))
        if prompt == before and _ANY_REASONING.match(before, common):
            return ""  # it is always there, and goes on with a reasoning that the turn does not show
        between = text[common : text.index(W)]
        reasoning = _ANY_REASONING.search(between)
        header = between[: reasoning.start()] if reasoning else between
        return header if header.strip() else ""

    # How turns end, by kind and by whether there are tools.

    def end(self, calls: bool, has_tools: bool) -> TurnEnd:
        """Return how a chat's last turn ends, with tool calls or without, and with tools in the chat or without.

        Raises:
            TemplateError: The template writes no token that could end a turn.
        """
        end = self._try_end(calls, has_tools) or self._try_end(False, has_tools)
        if end is None:
            raise TemplateError(
                "the chat template writes no end-of-turn token after an assistant turn, so that the model would never "
                "learn to stop",
                "give a chat_template that writes one, such as the tokenizer's EOS",
            )
        if not calls and _WORDS.search(self._tokens.sub("", end.tail.partition(end.token)[0])):
            raise TemplateError(
                "the chat template goes on with words of its own behind what an assistant turn says, as templates of "
                "models that judge a chat do",
                "give a chat_template of a model that answers",
            )
        return end

    def _try_end(self, calls: bool, has_tools: bool) -> TurnEnd | None:
        key = (calls, has_tools)
        if key not in self._facts:
            self._facts[key] = self._find_end(calls, has_tools)
        end: TurnEnd | None = self._facts[key]
        return end

    def _find_end(self, calls: bool, has_tools: bool) -> TurnEnd | None:
        """Find the token that ends a turn: the last of those that follow it both within a chat and at its end."""
        tools = EXAMPLE_TOOLS if has_tools else None
        turn: Message = {"role": "assistant", "content": W}
        if calls:
            turn = with_empty_content({**turn, "tool_calls": [self.format.example_call(as_text=False)]}, "empty")
        asked = self.format.adapted([{"role": "user", "content": Q}], tools)
        chat = self.format.adapted([*asked, turn], tools)
        text = self.try_render(chat, tools)
        if text is None or W not in text:
            return self._end_by_eos() if not calls else None
        as_user = self.format.adapted([*asked, {"role": "user", "content": W}])
        eos = self._end_by_eos()
        if not calls and eos is None and text == self.try_render(as_user, tools):
            return None  # a template of texts, not of turns
        begin, _, rest = text.partition(Q)
        between, _, tail = rest.rpartition(W)
        openers = self._openers(begin, has_tools)
        header = self.header(has_tools)
        if header in between:
            openers -= set(self._tokens.findall(between[: between.index(header)])[:1])  # it ends the question
        at_end = self._before_openers(tail, openers, between)
        if not at_end:
            # At the end of a chat, a token that does not stand before a turn ends the one before it.
            at_end = [token for token in self._closing(tail, between)[:1] if token not in between]
        within = self._within(chat, calls, tools)
        plain = None if not calls else self._try_end(False, has_tools)
        if at_end:
            followed = [] if within is None else self._before_openers(within, openers, between)
            common = []
            for token, other in zip(at_end, followed, strict=False):
                if token != other:
                    break
                common.append(token)
            if common:
                return TurnEnd(common[-1], tail)
            if plain is not None and plain.token in at_end:
                return TurnEnd(plain.token, tail)
            also_of_user = [token for token in at_end if token in between]
            return TurnEnd(also_of_user[0] if also_of_user else at_end[-1], tail)
        if within is None:
            return None
        # The next message is the user's again: it begins with what both have before its content.
        next_header = begin[len(begin) - common_prefix(begin[::-1], within[::-1]) :]
        followed = self._before_openers(within, openers | set(self._tokens.findall(next_header)[:1]), between)
        if not followed:
            known = eos or self._end_behind_result()
            if known is not None:
                return TurnEnd(known.token, tail)
            # It may stop where the next message begins (GLM), if that does not begin as the model's own turns do.
            begins_own = set(self._tokens.findall(header + between))
            followed = [
                token
                for token in self._closing(within, between)[:1]
                if token not in begins_own and _NAMES_NEXT.search(token)
            ]
        if followed and not _BETWEEN.sub("", within.partition(followed[-1])[0]):
            return TurnEnd(followed[-1], tail)
        return plain

    def _end_by_eos(self) -> TurnEnd | None:
        eos = self.format.special_tokens.get("eos_token")
        return (
            TurnEnd(eos, "") if eos and (eos in self.format.template or "eos_token" in self.format.template) else None
        )

    def _end_behind_result(self) -> TurnEnd | None:
        """Find how an answer to a tool's result ends: some templates (DeepSeek's kin) leave only plain answers open."""
        call: Message = {"role": "assistant", "content": None, "tool_calls": [self.format.example_call(as_text=False)]}
        chat = [{"role": "user", "content": Q}, call, _RESULT, {"role": "assistant", "content": W}]
        text = self.try_render(self.format.adapted(chat, EXAMPLE_TOOLS), EXAMPLE_TOOLS)
        if text is None or W not in text:
            return None
        tail = text.rpartition(W)[2]
        return next((TurnEnd(token, tail) for token in self._closing(tail, "")), None)

    def _within(self, chat: list[Message], calls: bool, tools: Any) -> str | None:
        """Return what the template writes between a turn and the next message's content."""
        nexts: list[Message] = [{"role": "user", "content": V}]
        if calls:
            nexts.insert(0, _RESULT)
        for message in nexts:
            for more in ([], [{"role": "assistant", "content": Q}]):
                text = self.try_render(self.format.adapted([*chat, message, *more], tools), tools)
                if text is not None and W in text and V in text.rpartition(W)[2]:
                    return text.rpartition(W)[2].partition(V)[0]
        return None

    def _openers(self, begin: str, has_tools: bool) -> set[str]:
        """Tokens that begin messages: the first of the generation prompt, and the first of a chat.

        Further tokens of the prompt may stand within the tail of a turn as well (Kimi K3's <|sep|>).
        """
        openers = set(self._tokens.findall(self.header(has_tools))[:1])
        at = 0
        for match in self._tokens.finditer(begin):
            if begin[at : match.start()].strip():
                break
            openers.add(match.group())
            at = match.end()
        return openers - {self.format.special_tokens.get("eos_token")}

    def _closing(self, text: str, before: str) -> list[str]:
        """Return the tokens in a text that do not close a part of the turn that `before` begins."""
        eos = self.format.special_tokens.get("eos_token")
        found = []
        for token in self._tokens.findall(text):
            # </name> closes what <name> began, which is the turn if its header did.
            begun = "<" + token[2:] if token.startswith("</") and token != "</s>" else None
            is_part = begun is not None and begun not in before and begun in self.format.template
            if token == eos or not (is_part or _CLOSES_PART.search(token)):
                found.append(token)
        return found

    def _before_openers(self, text: str, openers: set[str], before: str) -> list[str]:
        found = []
        for token in self._closing(text, before):
            if token in openers:
                break
            found.append(token)
        return found

    def has_words(self, text: str) -> bool:
        """Whether there are letters in a text beside control tokens."""
        return re.search(r"\w", self._tokens.sub("", text)) is not None

    def token_start(self, text: str, position: int) -> int:
        """Return where the control token begins that a position lies inside of, or the position."""
        for match in self._tokens.finditer(text, max(position - 100, 0), position + 100):
            if match.start() < position < match.end():
                return match.start()
        return position

    def try_render(self, messages: Sequence[Message], tools: Any, prompt: bool = False) -> str | None:
        """Return the chat as text, or None if the template refuses it."""
        try:
            return self.format.render(messages, tools, prompt)[0]
        except TemplateError:
            return None


def _behind_question(text: str | None) -> str | None:
    return None if text is None else text.rpartition(Q)[2]


def is_reasoning(text: str) -> bool:
    """Whether a text is a reasoning without words, opened or closed, or no text at all."""
    begun = _ANY_REASONING.match(text)
    if begun is None:
        return not text.strip()
    return not re.sub(r"<[^<>]*>|\[[^\[\]]*\]", "", text[begun.end() :]).strip()


def without_opened_reasoning(text: str, stop: int) -> int:
    """Return where in the text before `stop` a reasoning begins that is still open there, or `stop`."""
    opened = _OPENED_REASONING.search(text, max(stop - 80, 0), stop)
    return opened.start() if opened else stop


def common_prefix(a: str, b: str) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a.startswith(b[:middle]):
            low = middle
        else:
            high = middle - 1
    return low
