"""From words to TrainingArguments: an optional YAML file first, then options that override it.

Options, types, help and defaults come from the groups of `trainer.config.groups`; nothing is declared twice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from trainer.config.arguments import TrainingArguments, read_yaml
from trainer.config.fields import check_options, parse_json
from trainer.config.foreign_names import ALIASES

Extra = TypeVar("Extra")
_registry = ConstructorRegistry()


def parse(
    command: str, words: Sequence[str], groups: Sequence[type[Any]], extra: type[Extra], description: str
) -> tuple[TrainingArguments, Extra]:
    """Parse the words of one command.

    Args:
        command: its name, for the usage line.
        words: what the user typed behind it; the first may name a YAML file.
        groups: the option groups that the command takes.
        extra: a dataclass of options that only this command has.
        description: one sentence for `--help`.

    Raises:
        UsageError: a value is wrong. (An unknown flag ends the process with code 2, naming the nearest.)
    """
    config, flags = split_config(words)
    base = TrainingArguments.from_mapping(read_yaml(config) if config else {})
    unprefixed: Any = tyro.conf.OmitArgPrefixes
    form = dataclasses.make_dataclass("Options", [(_title(kind), unprefixed[kind]) for kind in (*groups, extra)])
    defaults = {_title(kind): _part(kind, base.as_given()) for kind in groups} | {_title(extra): extra()}
    parsed = tyro.cli(
        form,
        args=[_unaliased(flag) for flag in flags],
        default=form(**defaults),
        prog=f"trainer {command} [CONFIG.yaml]",
        description=description,
        config=(tyro.conf.HelptextFromCommentsOff,),  # else it reads sources for the title of each group: half the time
        registry=_registry,
    )
    given = {name: value for kind in groups for name, value in vars(getattr(parsed, _title(kind))).items()}
    check_options(getattr(parsed, _title(extra)))
    return dataclasses.replace(base, **given), getattr(parsed, _title(extra))


def split_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take a leading word that is no option as the YAML file."""
    if words and not words[0].startswith("-"):
        return words[0], list(words[1:])
    return None, list(words)


def _title(group: type[Any]) -> str:
    return group.__name__.removesuffix("Arguments").lower()


def _part(group: type[Any], options: Mapping[str, Any]) -> Any:
    return group(**{field.name: options[field.name] for field in dataclasses.fields(group)})


def _unaliased(flag: str) -> str:
    name, equals, value = flag.partition("=")
    alias = ALIASES.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
    return f"--{alias}{equals}{value}" if alias else flag


@_registry.primitive_rule
def _json_object(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    if info.type_origin is not dict:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: parse_json(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )
