"""How one option is declared and checked: its default, help, range, and whether it may change at resume.

Knows nothing of which options exist. A declared type and range are checked for every value, wherever it came from.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
import re
import types
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.errors import UsageError

AtResume = Literal["fixed", "free"]
_RANGES: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


class OptionHelp(str):
    """What an option means, and what else is declared of it.

    All of it hides in the help text because parsers of others, such as HfArgumentParser, hand every other entry of a
    field's metadata to argparse.
    """

    ranges: dict[str, float]
    at_resume: AtResume


def option(default: Any, help: str, *, at_resume: AtResume = "fixed", is_secret: bool = False, **ranges: float) -> Any:
    """Declare one option of a group.

    Args:
        default: its value where none is given; a list or dict is copied for every instance.
        help: what it means, in a sentence.
        at_resume: "free" where a resumed run may change it, because it moves no number beyond the order of a sum.
        is_secret: never show or write its value.
        ranges: any of minimum=, above=, maximum=, below=.
    """
    unknown = ranges.keys() - _RANGES.keys()
    assert not unknown, unknown
    text = OptionHelp(help)
    text.ranges, text.at_resume = ranges, at_resume
    metadata = {"help": text}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


def is_free_at_resume(field: dataclasses.Field[Any]) -> bool:
    """Return whether a resumed run may change an option; one that a script declares by itself is fixed."""
    return getattr(field.metadata.get("help"), "at_resume", "fixed") == "free"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the value of an option that is not given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@cache
def types_of(configuration: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name; resolving them takes milliseconds."""
    return get_type_hints(configuration)


def check_options(configuration: Any) -> None:
    """Raise UsageError where a value of the dataclass has the wrong type or lies outside its declared range."""
    hints = types_of(configuration.__class__)
    for field in dataclasses.fields(configuration):
        check_value(field, hints[field.name], getattr(configuration, field.name))


def check_value(field: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    """Raise UsageError where a value of one option has the wrong type or lies outside its declared range."""
    if not fits(value, hint):
        raise UsageError(f"{field.name} = {value!r}: expected {describe(hint)}")
    if isinstance(value, str) and (not value or "\0" in value):
        raise UsageError(f"{field.name} = {value!r}: expected text that is not empty; leave the option out for none")
    if isinstance(value, int | float):
        ranges: dict[str, float] = getattr(field.metadata.get("help"), "ranges", {})
        for key, bound in ranges.items():
            is_inside, words = _RANGES[key]
            if not is_inside(value, bound):
                raise UsageError(f"{field.name} = {value!r}: must be {words} {bound}")


def describe(hint: Any) -> str:
    """Say in words which values a type annotation allows."""
    if hint is type(None):
        return "nothing"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if is_union(hint):
        return " or ".join(describe(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each {describe(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        value = get_args(hint)[1]
        return "an object of names and values" if value is Any else f"an object of names, each with {describe(value)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def as_list(given: str | Iterable[str] | None) -> list[str]:
    """Return one word, several or none as a list."""
    return [given] if isinstance(given, str) else list(given or ())


def plain(value: Any) -> Any:
    """Return a torch dtype, which scripts' own options may be, as its name, and an enum as its value."""
    if type(value).__qualname__ == "dtype":
        return str(value).removeprefix("torch.")
    return value


class Scalar(str):
    """A word of a YAML file or of the command line, not yet read as a number, a truth value or text.

    What it means depends on the type of its option: `no` is text for eval_strategy and false for bf16; YAML's own
    rules take 1e-4 for text, 2026-12-01 for a date and 007 for seven.
    """


def as_option(value: Any, hint: Any) -> Any:
    """Read a value as its option's type, at any depth; what cannot be read so stays as it is, and fails its check."""
    if isinstance(value, Scalar):
        return _read_scalar(value, hint)
    parts = get_args(hint) if is_union(hint) else (hint,)
    if isinstance(value, dict):
        inner = next((get_args(part)[1] for part in parts if get_origin(part) is dict), Any)
        return {_text(name): as_option(item, inner) for name, item in value.items()}
    if isinstance(value, list):
        inner = next((get_args(part)[0] for part in parts if get_origin(part) is list), Any)
        return [as_option(item, inner) for item in value]
    if value is False and any("no" in get_args(part) for part in parts if get_origin(part) is Literal):
        return "no"  # what YAML makes of `no`
    if isinstance(value, str) and float in parts and str not in parts:
        return _number(value, float)  # what YAML makes of 1e-4
    return value


def _read_scalar(word: Scalar, hint: Any) -> Any:
    parts = get_args(hint) if is_union(hint) else (hint,)
    text, lower = _text(word), word.lower()
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    for choice in choices:
        if str(choice).lower() == lower:
            return choice
    if type(None) in parts and lower in ("", "~", "null", "none"):
        return None
    if bool in parts and lower in _TRUTH:
        return _TRUTH[lower]
    if any(get_origin(part) is dict for part in parts):
        return parse_json(text)
    for kind in (int, float):
        if kind in parts and (number := _number(text, kind)) is not text:
            return number
    return _core_value(text) if Any in parts else text


_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _text(word: Any) -> Any:
    return str.__str__(word) if isinstance(word, Scalar) else word


def _number(text: str, kind: type[int] | type[float]) -> Any:
    words = text.lower()
    try:
        if kind is float and words.lstrip("+-") in (".inf", ".nan"):
            return float(words.replace(".", ""))
        return kind(text)
    except ValueError:
        return text


def _core_value(text: str) -> Any:
    """Read a word whose type nobody declares by YAML 1.2's core schema, where 1e-4 is a number and `no` is text."""
    if text.lower() in ("", "~", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    whole = _number(text, int)
    return whole if whole is not text else _number(text, float)


def parse_json(text: str) -> dict[str, Any]:
    """Read a JSON object given as one word, or pairs of names and values as name=value,name=value.

    Raises:
        UsageError: it is neither.
    """
    if re.fullmatch(r"\w+=[^,={}]+(,\w+=[^,={}]+)*", text):
        pairs = [pair.split("=") for pair in text.split(",")]
        return {name: _core_value(value) for name, value in pairs}
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f'{text!r} is not JSON ({error}); write it as {{"name": value}}') from error
    if not isinstance(value, dict):
        raise UsageError(f'{text!r} is not a JSON object; write it as {{"name": value}}')
    return value


def is_union(hint: Any) -> bool:
    """Return whether a type annotation allows several types."""
    return get_origin(hint) in (Union, types.UnionType)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type."""
    if is_union(hint):
        return any(fits(value, part) for part in get_args(hint))
    origin = get_origin(hint) or hint
    if origin is Literal:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in get_args(hint))
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if origin is dict and get_args(hint):
        return isinstance(value, dict) and all(fits(item, get_args(hint)[1]) for item in value.values())
    if origin in (int, float) and isinstance(value, bool):
        return False
    return origin is Any or isinstance(value, (int, float) if origin is float else origin)
