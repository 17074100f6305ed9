"""Rows of other shapes to the fields that documents have: renamed columns, ShareGPT, Alpaca, packed rows, padded nulls.

A format is applied only when it is asked for; errors propose it. Nothing here knows files or tokenizers.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Fields = dict[str, Any]

FORMAT_COLUMNS = {
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
}
"""Columns that each format reads."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
PACKED_SIGNS = ("position_ids", "seq_lengths")
_PER_TOKEN = ("input_ids", "labels", "loss_mask", "completion_mask", "assistant_masks", "attention_mask")


class FormatError(Exception):
    """A row does not have the form that was asked for: what was found, what is allowed, in which field."""

    def __init__(self, found: str, allowed: str, field: str) -> None:
        super().__init__(found)
        self.found, self.allowed, self.field = found, allowed, field


@dataclass(frozen=True)
class Reading:
    """How rows are read: `columns` are (field, column it stands in), `format` is None, "sharegpt" or "alpaca"."""

    columns: tuple[tuple[str, str], ...] = ()
    format: str | None = None

    @property
    def column_names(self) -> set[str]:
        """Columns that are read beside the fields of documents."""
        return {column for _, column in self.columns} | set(FORMAT_COLUMNS.get(self.format or "", ()))

    def apply(self, fields: Fields) -> Fields:
        """Return a row's fields under the names that documents have.

        Raises:
            FormatError: the row has not the columns or the format that were asked for.
        """
        for field, column in self.columns:
            if column not in fields:
                raise FormatError(f"found no column {column!r}", f"columns says that {field!r} stands there", column)
            if field in fields and field != column:
                raise FormatError(f"found {column!r} and {field!r}", "columns would put one over the other", field)
            fields = {(field if name == column else name): value for name, value in fields.items()}
        if self.format == "sharegpt":
            return _from_sharegpt(fields)
        if self.format == "alpaca":
            return _from_alpaca(fields)
        return fields


AS_IT_IS = Reading()


def drop_nulls(fields: Fields, report: Counter[str]) -> Fields:
    """Return the fields without the nulls that Arrow pads objects with: in tools, in calls, in messages.

    A message's content may be null, as OpenAI's format has it beside tool calls. Counted are those in tools and calls,
    which a template writes out: only there do they change the prompt.
    """
    changed = dict(fields)
    if fields.get("tools"):
        changed["tools"] = _without_nulls(fields["tools"], report)
    for name in ("messages", "prompt", "completion"):
        messages = fields.get(name)
        if isinstance(messages, list):
            changed[name] = [_message_without_nulls(message, report) for message in messages]
    return changed


def split_packed(fields: Fields, report: Counter[str]) -> list[Fields]:
    """Return the samples of a tokenized row: several, where positions that restart or lengths say that it is packed.

    Raises:
        FormatError: positions or lengths do not fit the tokens.
    """
    given = [name for name in PACKED_SIGNS if fields.get(name) is not None]
    ids = fields.get("input_ids")
    if not given or not isinstance(ids, list):
        return [fields]
    name = given[0]
    numbers = fields[name]
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise FormatError(f"found {name} that are not integers", f"{name} must be a list of integers", name)
    if name == "seq_lengths":
        starts = [sum(numbers[:i]) for i in range(len(numbers))]
        is_right = sum(numbers) == len(ids) and all(number > 0 for number in numbers)
    else:
        starts = [i for i, number in enumerate(numbers) if number == 0]
        borders = [*starts, len(numbers)]
        whole = [i - start for start, end in pairwise(borders) for i in range(start, end)]
        is_right = len(numbers) == len(ids) and numbers == whole
    if not is_right:
        allowed = f"{name} must describe the input_ids: positions from 0 in every sample, or lengths that add up"
        raise FormatError(f"found {name} that do not fit {len(ids)} input_ids", allowed, name)
    rest = {key: value for key, value in fields.items() if key not in PACKED_SIGNS}
    if len(starts) == 1:
        return [rest]
    report["packed_rows_split"] += 1
    for key in ("len", "num_loss_counted_tokens"):
        rest.pop(key, None)
    samples = []
    for start, end in pairwise([*starts, len(ids)]):
        sample = dict(rest)
        for key in _PER_TOKEN:
            if isinstance(rest.get(key), list):
                sample[key] = rest[key][start:end]
        samples.append(sample)
    return samples


def _without_nulls(value: Any, report: Counter[str]) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item, report) for item in value]
    if isinstance(value, dict):
        kept = {name: _without_nulls(item, report) for name, item in value.items() if item is not None}
        report["nulls_removed"] += len(value) - len(kept)
        return kept
    return value


def _message_without_nulls(message: Any, report: Counter[str]) -> Any:
    if not isinstance(message, dict):
        return message
    kept = {name: value for name, value in message.items() if value is not None or name == "content"}
    for name in ("tool_calls", "function_call"):
        if name in kept:
            kept[name] = _without_nulls(kept[name], report)
    if isinstance(kept.get("content"), list):
        parts = kept["content"]
        kept["content"] = [
            {n: v for n, v in part.items() if v is not None} if isinstance(part, dict) else part for part in parts
        ]
    return kept


def _from_sharegpt(fields: Fields) -> Fields:
    """Convert `conversations` of {"from", "value"} to `messages`; `system` and `tools` may stand beside them."""
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        allowed = "data_format=sharegpt needs a list of {'from', 'value'}"
        raise FormatError("found no 'conversations'", allowed, "conversations")
    messages: list[Fields] = []
    system = fields.get("system")
    if system:
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(turns):
        place = f"conversations[{i}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise FormatError("found a turn without text", "a turn is {'from', 'value'}, the value a string", place)
        speaker = turn.get("from")
        if speaker not in _SHAREGPT_ROLES:
            raise FormatError(f"found from {speaker!r}", f"known are {', '.join(_SHAREGPT_ROLES)}", f"{place}.from")
        rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(turn["value"], place), **rest})
        else:
            messages.append({"role": _SHAREGPT_ROLES[speaker], "content": turn["value"], **rest})
    converted = {name: value for name, value in fields.items() if name not in ("conversations", "system", "tools")}
    converted["messages"] = messages
    tools = fields.get("tools")
    if tools:
        converted["tools"] = _parsed(tools, "tools") if isinstance(tools, str) else tools
    return converted


def _from_alpaca(fields: Fields) -> Fields:
    """Convert `instruction`, `input` and `output` to `messages`; `system` and `history` may stand beside them."""
    for name in ("instruction", "output"):
        if not isinstance(fields.get(name), str):
            raise FormatError(f"found no text in {name!r}", "data_format=alpaca needs 'instruction' and 'output'", name)
    messages: list[Fields] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": fields["system"]})
    for i, pair in enumerate(fields.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            allowed = "history is a list of [question, answer]"
            raise FormatError("found something else than a pair", allowed, f"history[{i}]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    given = fields.get("input")
    question = f"{fields['instruction']}\n\n{given}" if given else fields["instruction"]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]
    rest = {name: value for name, value in fields.items() if name not in FORMAT_COLUMNS["alpaca"]}
    return {**rest, "messages": messages}


def _calls(text: str, place: str) -> list[Fields]:
    calls = _parsed(text, f"{place}.value")
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise FormatError(f"not JSON ({error})", "calls and tools are JSON", place) from None
