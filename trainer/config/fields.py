"""How one option is declared and checked: default, help text, allowed range.

Knows nothing of which options exist. A declared range is checked for every value, wherever it came from.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
import types
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.errors import UsageError

_RANGES: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


class Help(str):
    """What an option means, with the bounds it lies in; parsers of others take a field's metadata for their own."""

    ranges: dict[str, float]


def option(default: Any, help: str, *, is_secret: bool = False, **ranges: float) -> Any:
    """Declare one option of a group: its default, its help, and any of minimum=, above=, maximum=, below=.

    A list or dict default is copied for every instance. What is secret is never shown or written.
    """
    unknown = ranges.keys() - _RANGES.keys()
    assert not unknown, unknown
    text = Help(help)
    text.ranges = ranges
    metadata = {"help": text}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


@cache
def types_of(configuration: type) -> dict[str, Any]:
    """Types of a dataclass's fields, by name; resolving their names takes milliseconds."""
    return get_type_hints(configuration)


def check_options(configuration: Any) -> None:
    """Raise UsageError where a value of the dataclass has the wrong type or lies outside its declared range."""
    hints = types_of(configuration.__class__)
    for field in dataclasses.fields(configuration):
        value, hint = getattr(configuration, field.name), hints[field.name]
        if not _fits(value, hint):
            raise UsageError(f"{field.name} = {value!r}: expected {describe(hint)}")
        if isinstance(value, str) and (not value or "\0" in value):
            raise UsageError(
                f"{field.name} = {value!r}: expected text that is not empty; leave the option out for none"
            )
        _check_range(field, value)


def describe(hint: Any) -> str:
    """Say in words which values a type annotation allows."""
    if hint is type(None):
        return "nothing"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if _is_union(hint):
        return " or ".join(describe(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each {describe(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "an object of names and values"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def as_list(given: str | Iterable[str] | None) -> list[str]:
    """Give one word, several or none as a list."""
    return [given] if isinstance(given, str) else list(given or ())


def plain(value: Any) -> Any:
    """Write a torch dtype, as scripts' own options may be, by its name; all else is as it is."""
    return str(value).removeprefix("torch.") if type(value).__qualname__ == "dtype" else value


def parse_json(text: str) -> dict[str, Any]:
    """Read a JSON object given as one word.

    Raises:
        UsageError: it is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f'{text!r} is not JSON ({error}); write it as {{"name": value}}') from error
    if not isinstance(value, dict):
        raise UsageError(f'{text!r} is not a JSON object; write it as {{"name": value}}')
    return value


def as_meant(value: Any, hint: Any) -> Any:
    """Read text as a number where the option is a float, false as no where it is a choice: YAML takes 1e-4 for text."""
    if value is False and "no" in get_args(hint):
        return "no"
    if hint is not float or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _fits(value: Any, hint: Any) -> bool:
    if _is_union(hint):
        return any(_fits(value, part) for part in get_args(hint))
    origin = get_origin(hint) or hint
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if origin in (int, float) and isinstance(value, bool):
        return False
    return origin is Any or isinstance(value, (int, float) if origin is float else origin)


def _check_range(field: dataclasses.Field[Any], value: Any) -> None:
    if not isinstance(value, int | float):
        return
    ranges: dict[str, float] = getattr(field.metadata.get("help"), "ranges", {})
    for key, bound in ranges.items():
        if not _RANGES[key][0](value, bound):
            raise UsageError(f"{field.name} = {value!r}: must be {_RANGES[key][1]} {bound}")
