"""Messages of a chat, in the forms that users have them: what one says, and whether it is trained.

Must not know templates or tokens.
"""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

from trainer.data.jsonl import TRAINED_FLAGS

Message = dict[str, Any]


def is_plain(message: Message) -> bool:
    """Whether it is a role and a text, and nothing else."""
    return len(message) == 2 and "role" in message and isinstance(message.get("content"), str)


def is_wanted(message: Message) -> bool:
    """Whether no field of a message says that it is not trained."""
    return all(message.get(name) in (None, yes) for name, (_, yes) in TRAINED_FLAGS.items())


def is_written(message: Message, text: str) -> bool:
    """Whether a chat's text has all words of a message: its content, its reasoning, the names of tools it calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    words = [part.get("text") for part in content] if isinstance(content, list) else [content or ""]
    words += [message.get(name) or "" for name in ("reasoning_content", "reasoning", "thinking")]
    for call in [*(calls if isinstance(calls, list) else []), message.get("function_call")]:
        named = call.get("function", call) if isinstance(call, dict) else {}
        words.append(named.get("name") or "")
    return all(isinstance(word, str) and word.strip() in text for word in words)


def content_text(message: Message) -> str:
    """Its content as one text."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def call_arguments(message: Message) -> list[Any]:
    """The arguments of each tool call, objects or JSON."""
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [function.get("arguments") for function in functions if isinstance(function, dict)]


def with_parsed_arguments(message: Message) -> Message:
    """The same with arguments that are JSON as what they say."""
    if not any(isinstance(arguments, str) for arguments in call_arguments(message)):
        return message
    copied = copy.deepcopy(message)
    for call in copied["tool_calls"]:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # what is no JSON stays as it is
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copied
