"""Options as they stand in a YAML file: read without surprises, and what YAML misreads put right.

Knows nothing of which options exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from trainer.errors import UsageError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        UsageError: the file cannot be read, is not YAML, or is not a list of `name: value`.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        options = yaml.safe_load(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"configuration {path}: {error}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        found = ", ".join(map(repr, options)) if isinstance(options, dict) else type(options).__name__
        raise UsageError(f"configuration {path}: expected lines of `option: value`, found {found}")
    node: Any = yaml.compose(text, yaml.SafeLoader)
    names = [name.value for name, _ in node.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"configuration {path}: {', '.join(twice)} stands there more than once: give it once")
    return options


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
