"""Messages of a chat in the forms that users have them: contents, tool calls, reasoning, roles, training flags."""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trainer.data.jsonl import PRETRAIN_ROLE, TRAINED_FLAGS

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which data sets hold what an assistant thinks before it answers."""

KNOWN_ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", PRETRAIN_ROLE}
)
"""Roles that chat templates know. Messages of other roles are counted by role."""

_NAMES_OF_ASSISTANTS = frozenset({"gpt", "chatgpt", "model", "bot", "chatbot", "ai", "agent", "assist", "response"})


def is_plain(message: Message) -> bool:
    """Return whether a message is a role and a text, and nothing else."""
    return len(message) == 2 and "role" in message and isinstance(message.get("content"), str)


def is_wanted(message: Message) -> bool:
    """Return whether no field of a message says that it is not trained."""
    return all(message.get(name) in (None, yes) for name, (_, yes) in TRAINED_FLAGS.items())


def is_nearly_assistant(role: str) -> bool:
    """Return whether a role is most likely meant to be 'assistant', and would silently not be trained."""
    word = role.strip().lower()
    if role == "assistant" or role in KNOWN_ROLES:
        return False
    return word in _NAMES_OF_ASSISTANTS or difflib.SequenceMatcher(None, word, "assistant").ratio() >= 0.8


def is_written(message: Message, text: str) -> bool:
    """Return whether a chat's text has all words of a message: content, reasoning, names of the tools that it calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    words = [part.get("text") for part in content] if isinstance(content, list) else [content or ""]
    words += [message.get(name) or "" for name in REASONING_FIELDS]
    for call in [*(calls if isinstance(calls, list) else []), message.get("function_call")]:
        named = call.get("function", call) if isinstance(call, dict) else {}
        words.append(named.get("name") or "")
    return all(isinstance(word, str) and word.strip() in text for word in words)


def content_text(message: Message) -> str:
    """Return the content as one text."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def is_text_parts(content: Any) -> bool:
    """Return whether a content is a list of parts that are all text."""
    return (
        isinstance(content, list)
        and len(content) > 0
        and all(part.get("type", "text") == "text" and isinstance(part.get("text"), str) for part in content)
    )


def with_text(message: Message, change: Callable[[str], str]) -> Message:
    """Return the message with its content changed: the string, or the last text part."""
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": change(content or "")}
    texts = [k for k, part in enumerate(content) if isinstance(part.get("text"), str)]
    if not texts:
        return {**message, "content": [*content, {"type": "text", "text": change("")}]}
    last = content[texts[-1]]
    changed = {**last, "text": change(last["text"])}
    return {**message, "content": [*content[: texts[-1]], changed, *content[texts[-1] + 1 :]]}


def begun_with(word: str, message: Message) -> Message:
    """Return the message with a word before all of it that a template may write first: content and reasoning."""
    changed = with_text(message, lambda said: word + said)
    for name in REASONING_FIELDS:
        if isinstance(message.get(name), str) and message[name]:
            changed[name] = word + message[name]
    return changed


def called_functions(message: Message) -> list[dict[str, Any]]:
    """Return name and arguments of each tool call."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return []
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [function for function in functions if isinstance(function, dict)]


def with_functions(message: Message, change: Callable[[int, dict[str, Any]], None]) -> Message:
    """Return a copy of the message; `change` is given number, name and arguments of each call to change in place."""
    copied = copy.deepcopy(message)
    for k, function in enumerate(called_functions(copied)):
        change(k, function)
    return copied


def with_arguments(message: Message, as_text: bool) -> Message:
    """Return the message with the arguments of its tool calls as JSON text, or as what that text says."""

    def change(_: int, function: dict[str, Any]) -> None:
        arguments = function.get("arguments")
        if as_text and isinstance(arguments, dict):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # what is not JSON stays as it is
                function["arguments"] = json.loads(arguments)

    return with_functions(message, change)


def leaf_texts(value: Any) -> Iterable[str]:
    """Yield all texts and numbers in a JSON value, as texts."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaf_texts(part)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def roles_of(messages: Sequence[Message]) -> list[str]:
    """Return the role of each message."""
    return [message["role"] for message in messages]
