"""A chat template with all that it reads: how chats become text, and in which forms it takes their messages.

Knows nothing of token ids. What of the text is trained is decided in `spans.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.limits import limited_work
from trainer.data.messages import (
    Message,
    called_functions,
    content_text,
    is_plain,
    is_text_parts,
    with_arguments,
)
from trainer.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character and the one after the last."""

RENDER_SECONDS = 10
"""Most time that a template may take to render one chat."""

RENDER_BYTES = 2**30
"""Most memory that a template may take to render one chat."""

MAX_TEXT = 2**27
"""Most characters that a rendered chat may have."""

Q, W, V, NAME, KEY = "Qzxvka", "Wqjxzb", "Vjkqxz", "wqzjxf", "kqxjzw"
"""Words that stand for a question, what is looked for, another of these, a function, and an argument: they occur in no
template, and trimming or capitalising does not change them."""

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


class TemplateError(Exception):
    """What a template makes of a chat cannot be trained on: the reason, and what to do."""

    def __init__(self, reason: str, remedy: str = "correct the document, or give another chat_template") -> None:
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True)
class CallForms:
    """In which forms a template takes tool calls."""

    objects: bool
    """Arguments may be objects."""
    text: bool
    """Arguments may be JSON text."""
    empty_contents: tuple[str, ...]
    """What may stand in place of a content beside a call: 'null', 'empty', 'absent'."""


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with all it reads from its tokenizer: plain values, so that it can be hashed and sent."""

    template: str
    tool_template: str
    special_tokens: dict[str, str]
    added_tokens: tuple[str, ...]
    kwargs: str = "{}"
    """Further variables of the template (`chat_template_kwargs`), as JSON."""

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> ChatFormat:
        """Take the tokenizer's template, or the Jinja file given instead.

        Raises:
            UsageError: There is no template, or it does not read one of the variables in `kwargs`.
        """
        if chat_template is not None:
            template = tool_template = _read_template(chat_template)
        elif tokenizer.chat_template is None:
            remedy = "give one with chat_template=FILE, or use 'prompt'/'completion' strings or 'text'"
            raise UsageError(f"the tokenizer has no chat template: {remedy}")
        else:
            template = tokenizer.get_chat_template()
            tool_template = tokenizer.get_chat_template(tools=[{}])
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not _is_list(token)}
        _check_kwargs(kwargs or {}, template, tool_template)
        added = tuple(tokenizer.get_added_vocab())
        return cls(template, tool_template, special, added, json.dumps(kwargs or {}, sort_keys=True))

    @cached_property
    def has_marks(self) -> bool:
        """Return whether the template marks what the assistant writes."""
        return _MARKS.search(self.template) is not None and _MARKS.search(self.tool_template) is not None

    @cached_property
    def _unmarked(self) -> str:
        """The template with plain blocks in place of its marks, which are calls of macros and take time."""
        return _MARK_TAG.sub(r"\1\2with\3", self.template)

    @cached_property
    def literals(self) -> tuple[str, ...]:
        """Return the texts in the template's code that it may look for in contents; short words of letters are not."""
        from jinja2 import nodes
        from transformers.utils import chat_template_utils

        try:
            code = chat_template_utils._compile_jinja_template(self.template).environment.parse(self.template)
        except Exception:  # noqa: BLE001  malformed templates are refused when they are rendered
            return ()
        marks = {node.data.strip() for node in code.find_all(nodes.TemplateData)}
        marks |= {node.value.strip() for node in code.find_all(nodes.Const) if isinstance(node.value, str)}
        return tuple(sorted(mark for mark in marks if len(mark) > 2 and not mark.isalnum()))

    @cached_property
    def reads_clock(self) -> bool:
        """Return whether the template writes today's date into the text."""
        return "strftime_now" in self.template

    @cached_property
    def _variables(self) -> dict[str, Any]:
        return {**self.special_tokens, **json.loads(self.kwargs)}

    def render(
        self, messages: Sequence[Message], tools: Any = None, prompt: bool = False, with_marks: bool = True
    ) -> tuple[str, list[Span]]:
        """Return the chat as text and its marked spans; with `prompt`, ending where the assistant begins to write.

        Finding the marks takes longer than rendering; `with_marks` says whether they are needed.
        """
        is_all_plain = not tools and all(map(is_plain, messages))
        try:
            with limited_work(RENDER_SECONDS, RENDER_BYTES):
                if is_all_plain:
                    text, spans = self._render_plain(messages, prompt, with_marks)
                else:
                    # A field that is null says nothing; only a content that is null is read as such by templates.
                    given = [
                        {key: value for key, value in message.items() if value is not None or key == "content"}
                        for message in messages
                    ]
                    text, spans = self._render_any(given, tools, prompt)
        except Exception as error:  # noqa: BLE001  a template is a program: it may raise anything
            reason = str(error) or type(error).__name__
            if isinstance(error, MemoryError):
                reason = f"it needs more than {RENDER_BYTES:,} bytes for one chat"
            raise TemplateError(f"the chat template refuses it: {reason}") from error
        if len(text) > MAX_TEXT:
            raise TemplateError(f"the chat template writes {len(text):,} characters, at most {MAX_TEXT:,} are allowed")
        if not is_all_plain:
            _check_parts(messages, text)
        return text, spans

    def _render_any(self, messages: list[Message], tools: Any, prompt: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.tool_template if tools else self.template,
            return_assistant_tokens_mask=self.has_marks,
            tools=tools or None,
            add_generation_prompt=prompt,
            **self._variables,
        )
        return rendered[0][0], list(rendered[1][0]) if self.has_marks else []

    def _render_plain(self, messages: Sequence[Message], prompt: bool, with_marks: bool) -> tuple[str, list[Span]]:
        """Render messages of a role and a text, to which the function above does nothing beforehand.

        Its copying and renaming of fields takes as long as the template itself.
        """
        from transformers.utils import chat_template_utils

        template = chat_template_utils._compile_jinja_template(self.template if with_marks else self._unmarked)
        options: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": prompt}
        options |= {"messages": messages, **self._variables}
        if not (self.has_marks and with_marks):
            return template.render(options), []
        text, spans = chat_template_utils._render_with_assistant_indices(template, **options)
        return text, list(spans)

    # Forms of messages: what a template takes is found by rendering words that are looked for in the text.

    @cached_property
    def _facts(self) -> dict[Any, Any]:
        return {}

    def adapted(self, messages: Sequence[Message], tools: Any = None) -> list[Message]:
        """Return the messages in the forms that the template takes, where it does not take those that they have.

        Contents become strings or text parts; arguments of tool calls JSON text or objects; the missing content beside
        a tool call null, empty or absent.
        """
        adapted = []
        for message in messages:
            content = message.get("content")
            is_string, is_parts = isinstance(content, str) and content != "", is_text_parts(content)
            if is_string or is_parts:
                takes_strings = self._takes(message["role"], "strings")
                takes_parts = self._takes(message["role"], "parts")
                if is_string and takes_parts and not takes_strings:
                    message = {**message, "content": [{"type": "text", "text": content}]}
                elif is_parts and takes_strings and not takes_parts:
                    message = {**message, "content": content_text(message)}
            if called_functions(message):
                message = self._with_call_forms(message, bool(tools))
            adapted.append(message)
        return adapted

    def _takes(self, role: str, form: str) -> bool:
        """Return whether the content of a role may be a string ('strings') or a list of text parts ('parts')."""
        if (role, form) not in self._facts:
            self._facts[role, form] = any(W in text for text in self._texts_with_content(role, form))
        return bool(self._facts[role, form])

    def _texts_with_content(self, role: str, form: str) -> Iterable[str]:
        content: Any = W if form == "strings" else [{"type": "text", "text": W}]
        asked: Message = {"role": "user", "content": Q}
        if role != "user" and not self._takes("user", "strings"):
            asked = {"role": "user", "content": [{"type": "text", "text": Q}]}
        message: Message = {"role": role, "content": content}
        answered: Message = {"role": "assistant", "content": asked["content"]}
        calling = {"role": "assistant", "content": "", "tool_calls": [self.example_call(as_text=False)]}
        chats = {
            "user": [[message], [message, answered]],
            "assistant": [[asked, message], [message]],
            "system": [[message, asked]],
            "developer": [[message, asked]],
        }.get(role, [[asked, calling, message], [asked, answered, message], [asked, message]])
        for chat in chats:
            try:
                text, _ = self.render(chat)
            except TemplateError:
                continue
            # Parts may be written as code or JSON, which is not how a template means to show them.
            if form == "strings" or not re.search(r"""['"]text['"]""", text):
                yield text

    def _with_call_forms(self, message: Message, has_tools: bool) -> Message:
        forms = self._call_forms(has_tools)
        if isinstance(message.get("content"), str | list) and message["content"]:
            empty = None
        elif "content" not in message:
            empty = "absent"
        else:
            empty = "null" if message["content"] is None else "empty"
        if empty is not None and forms.empty_contents and empty not in forms.empty_contents:
            message = with_empty_content(message, forms.empty_contents[0])
        if forms.objects != forms.text:
            message = with_arguments(message, as_text=forms.text)
        return message

    def _call_forms(self, has_tools: bool) -> CallForms:
        if ("calls", has_tools) not in self._facts:
            combinations = [(text, empty) for text in (False, True) for empty in ("empty", "null", "absent")]
            taken = [pair for pair in combinations if self._writes_call(*pair, has_tools)]
            objects, text = any(not as_text for as_text, _ in taken), any(as_text for as_text, _ in taken)
            # JSON text that is read as an object by no means looks the same as the object written as JSON; a template
            # that takes both is given what the data has.
            empty = tuple(dict.fromkeys(empty for _, empty in taken))
            self._facts["calls", has_tools] = CallForms(objects, text, empty)
        forms: CallForms = self._facts["calls", has_tools]
        return forms

    def _writes_call(self, as_text: bool, empty: str, has_tools: bool) -> bool:
        calling = with_empty_content(
            {"role": "assistant", "tool_calls": [self.example_call(as_text)]},
            empty,
        )
        asked = self.adapted([{"role": "user", "content": Q}])
        answered: Message = {"role": "tool", "content": V, "tool_call_id": "call00001", "name": NAME}
        for more in ([], [answered]):
            try:
                text, _ = self.render([*asked, calling, *more], EXAMPLE_TOOLS if has_tools else None)
            except TemplateError:
                continue
            written = text.rpartition(Q)[2]
            if KEY in written and W in written:
                # Quotes that are escaped, or single, are JSON text in JSON, or an object written as Python code.
                return '\\"' not in written and f"'{KEY}'" not in written and "None" not in written
        return False

    def example_call(self, as_text: bool) -> dict[str, Any]:
        """Return a tool call of words that can be looked for."""
        arguments: Any = {KEY: W}
        if as_text:
            arguments = json.dumps(arguments)
        return {"id": "call00001", "type": "function", "function": {"name": NAME, "arguments": arguments}}


EXAMPLE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {KEY: {"type": "string", "description": "d"}},
                "required": [KEY],
            },
        },
    }
]


def with_empty_content(message: Message, form: str) -> Message:
    """Return the message with a content that is 'null', 'empty' or 'absent'."""
    others = {name: value for name, value in message.items() if name != "content"}
    if form == "absent":
        return others
    return {**others, "content": None if form == "null" else ""}


def _check_parts(messages: Sequence[Message], text: str) -> None:
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    if any(content and str(content) in text for content in contents):
        raise TemplateError(
            "the chat template knows no contents made of parts, and writes the list itself into the text",
            "make each content a string, or give a chat_template that writes the parts",
        )


def _check_kwargs(kwargs: dict[str, Any], *templates: str) -> None:
    if not kwargs:
        return
    from transformers.utils import chat_template_utils

    try:
        read = set().union(*map(chat_template_utils._get_template_variables, templates))
    except Exception as error:  # noqa: BLE001  a template is a program: it may be malformed in any way
        raise UsageError(f"chat_template_kwargs: the chat template cannot be read: {error}") from None
    given = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
    for name in kwargs:
        if name in given or name not in read:
            own = ", ".join(sorted(read - given - {"raise_exception", "strftime_now", "namespace"})) or "none"
            raise UsageError(f"chat_template_kwargs: {name!r} has no effect: the chat template reads {own}")


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"chat_template={path!r} cannot be read as text: {error}") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | dict)
