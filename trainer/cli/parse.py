"""From words to options: an optional YAML file first, then flags that override it; and the help that lists them.

Options, types, help and defaults come from the declarations in `trainer.config.groups` and in each command; nothing is
declared twice. What is wrong ends as one UsageError, with the advice that Python and YAML give too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal, TypeVar, get_args, get_origin

from trainer.cli.logs import asks_for_help
from trainer.config.arguments import TrainingArguments, read_as_options, read_yaml
from trainer.config.fields import Scalar, as_option, check_options, default_of, is_union, option, types_of
from trainer.config.foreign_names import ALIASES
from trainer.config.groups import IN_ORDER_OF_USE
from trainer.config.rules import CombinationError, Rule, check_rules
from trainer.config.suggest import granted, unknown_option
from trainer.distributed.topology import Topology
from trainer.errors import TrainerError, UsageError

Extra = TypeVar("Extra")
Kind = TypeVar("Kind")
Fields = dict[str, tuple[dataclasses.Field[Any], Any]]  # of options by name, each with its type

USUAL = (  # what most people set; `--help` shows these alone
    *("model_name_or_path", "data_path", "output_dir", "num_train_epochs", "max_steps", "learning_rate"),
    *("batch_size", "max_tokens_per_rank", "bf16", "gradient_checkpointing", "validation_split", "eval_strategy"),
    *("save_steps", "resume_from_checkpoint", "block_size"),
)
HELP_WIDTH = 100


@dataclasses.dataclass
class GeneralArguments:
    """What every command takes."""

    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "How much is logged to stderr; debug is for maintainers."
    )


def positional(help: str) -> Any:
    """Declare a word that a command takes by its place; of a list, all further ones."""
    return dataclasses.field(metadata={"help": help, "is_positional": True})


def parse(
    command: str,
    words: Sequence[str],
    groups: Sequence[type[Any]],
    extra: type[Extra],
    description: str,
    rules: Sequence[Rule] = (),
) -> tuple[TrainingArguments, Extra]:
    """Parse the words of one command that takes options of a run.

    A YAML file may hold options of other commands too; flags are those of `groups` and `extra`.

    Args:
        command: its name, for the help.
        words: what the user typed behind it; the first may name a YAML file.
        groups: the option groups that the command takes.
        extra: a dataclass of options that only this command has.
        description: one sentence for `--help`.
        rules: about combinations, which the command has beside those of all options.

    Raises:
        UsageError: an option is unknown or wrong.
    """
    ordered = [group for group in IN_ORDER_OF_USE if group in groups]
    fields = _fields_of(*ordered)
    fields_of_command = _fields_of(extra, GeneralArguments)
    if asks_for_help(words):
        usage = f"trainer {command} [CONFIG.yaml] [--option value ...]"
        if "--help-all" in words:
            show_help(usage, description, [*ordered, extra, GeneralArguments])
        else:
            usual = {name: fields[name] for name in USUAL if name in fields}
            _show_usual(command, usage, description, {**usual, **fields_of_command}, len(fields) - len(usual))
    config, flags = split_config(words)
    given = read_flags(f"trainer {command}", flags, {**fields, **fields_of_command})
    own = {name: given.pop(name) for name in [*given] if name in fields_of_command and name not in fields}
    _check_general(own)
    file = _options_of_file(config)
    launches = own.get("nproc_per_node", 1) not in (1, "auto") and Topology.from_environment().world_size == 1
    args = _combine(file, given, str(config), rules, is_quiet=launches)  # the ranks that it starts tell
    wanted = extra(**own)
    check_options(wanted)
    return args, wanted


def parse_alone(command: str, words: Sequence[str], kind: type[Kind]) -> Kind:
    """Parse the words of a command that has options of its own alone; their docstring says what it does.

    Raises:
        UsageError: an option is unknown or wrong, or a word is missing.
    """
    fields = _fields_of(kind, GeneralArguments)
    places = [name.upper() for name, (field, _) in fields.items() if field.metadata.get("is_positional")]
    if asks_for_help(words):
        show_help(" ".join([command, *places, "[--option value ...]"]), "", [kind, GeneralArguments])
    given = read_flags(command, words, fields)
    _check_general(given)
    missing = [
        name
        for name, (field, _) in fields.items()
        if name not in given and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        flags = [_flag(name) if name.upper() not in places else name.upper() for name in missing]
        verb = "is" if len(flags) == 1 else "are"
        raise UsageError(f"{', '.join(flags)} {verb} missing: `{command} --help` describes each")
    options = kind(**given)
    check_options(options)
    return options


def _check_general(given: dict[str, Any]) -> None:
    """Take out what `GeneralArguments` declares, which `cli.logs` has read already, and check it."""
    names = [field.name for field in dataclasses.fields(GeneralArguments) if field.name in given]
    check_options(GeneralArguments(**{name: given.pop(name) for name in names}))


def split_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take a leading word that is no option as the YAML file."""
    if words and not words[0].startswith("-"):
        return words[0], list(words[1:])
    return None, list(words)


@contextmanager
def said_once() -> Iterator[None]:
    """Report an error that all ranks find by themselves on one rank of each node; the others end in silence."""
    try:
        yield
    except TrainerError as error:
        if Topology.from_environment().local_rank > 0:
            raise SystemExit(2 if isinstance(error, UsageError) else 1) from error
        raise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message.removeprefix("argument "))


def read_flags(command: str, words: Sequence[str], fields: Fields) -> dict[str, Any]:
    """Read flags as the types of their options; what is not given is not in the result.

    Raises:
        UsageError: a flag is unknown, or its value is missing or none of those it may have.
    """
    parser = _Parser(prog=command, add_help=False, allow_abbrev=False)
    for name, (field, hint) in fields.items():
        _add_argument(parser, name, field, hint)
    known = [_spelled(word, fields, command) for word in words]
    _check_switches(known, fields)
    namespace, rest = parser.parse_known_args([word for word in known if word is not None])
    if rest:
        raise UsageError(f"{rest[0]!r} belongs to no option: `{command} --help` lists them")
    given: dict[str, Any] = {}
    for name, value in vars(namespace).items():
        _, hint = fields[name]
        if value == argparse.SUPPRESS or (value == [] and fields[name][0].metadata.get("is_positional")):
            continue
        if isinstance(value, list) and len(value) == 1 and is_union(hint) and str in get_args(hint):
            value = value[0]  # of report_to and its like, which take one name or several
        is_path = "Path" in str(hint)
        given[name] = _paths(value, hint) if is_path else as_option(value, hint)
    return given


def _add_argument(parser: argparse.ArgumentParser, name: str, field: dataclasses.Field[Any], hint: Any) -> None:
    parts = get_args(hint) if is_union(hint) else (hint,)
    takes_several = any(get_origin(part) is list for part in parts)
    if field.metadata.get("is_positional"):
        parser.add_argument(name, type=Scalar, nargs="*" if takes_several else "?", default=argparse.SUPPRESS)
    elif hint is bool:
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
    elif bool in parts:  # true, false or unset
        parser.add_argument(
            _flag(name), type=Scalar, nargs="?", const=Scalar("true"), dest=name, default=argparse.SUPPRESS
        )
        parser.add_argument(
            f"--no-{_flag(name)[2:]}", action="store_const", const=False, dest=name, default=argparse.SUPPRESS
        )
    else:
        parser.add_argument(_flag(name), type=Scalar, nargs="*" if takes_several else None, default=argparse.SUPPRESS)


def _spelled(word: str, fields: Fields, command: str) -> str | None:
    """Return a flag with the dashes and the name of its option, None where it asks for nothing."""
    if not word.startswith("--") or word == "--":
        return word
    given, equals, value = word.partition("=")
    name = given[2:].replace("-", "_")
    opposite = name.removeprefix("no_")
    name = name if name in fields else ALIASES.get(name, name)
    opposite = opposite if opposite in fields else ALIASES.get(opposite, opposite)
    if name in fields and not fields[name][0].metadata.get("is_positional"):
        return f"{_flag(name)}{equals}{value}"
    if name.startswith("no_") and opposite in fields and bool in (fields[opposite][1], *get_args(fields[opposite][1])):
        return f"--no-{_flag(opposite)[2:]}{equals}{value}"
    if equals and granted(name, value)[0]:
        return None
    raise unknown_option(given[2:], fields, write=_flag, everything=f"`{command} --help-all` lists them all")


def _check_switches(words: Sequence[str | None], fields: Fields) -> None:
    """Raise UsageError where an option that is on or off is given a value, as `--bf16 True` does."""
    for word, after in zip_longest(words, words[1:]):
        if word is None or not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].removeprefix("no-").replace("-", "_")
        if name not in fields or fields[name][1] is not bool:
            continue
        if equals or (after or "").lower() in ("true", "false", "yes", "no", "on", "off", "0", "1"):
            given = value if equals else after
            raise UsageError(f"{flag} takes no value, found {given!r}: write {_flag(name)}, or --no-{_flag(name)[2:]}")


def _options_of_file(config: str | None) -> dict[str, Any]:
    """Read the options of a YAML file under their own names, checked by themselves.

    Raises:
        UsageError: the file is none, or its options are wrong.
    """
    if config is None:
        return {}
    TrainingArguments.from_yaml(config)
    options = read_as_options(TrainingArguments, read_yaml(config))
    return {ALIASES.get(name, name): value for name, value in options.items()}


def _combine(
    file: Mapping[str, Any], flags: Mapping[str, Any], config: str, rules: Sequence[Rule], *, is_quiet: bool
) -> TrainingArguments:
    """Build the options of a file and of flags, which come first.

    Options of the file that the flags leave without effect are left out, with a note.

    Raises:
        UsageError: the options are wrong, by themselves or beside each other.
    """
    options = {**file, **flags}
    while True:
        try:
            args = TrainingArguments(**options)
            check_rules(args, rules)
            return args
        except CombinationError as error:
            left_out = [name for name in error.idle if name in options and name not in flags]
            if not error.idle or left_out != list(error.idle) or not _follows(file, rules):
                raise
            if not is_quiet and Topology.from_environment().is_main:
                named = ", ".join(left_out)
                print(f"trainer: note: flags leave {named} of {config} without effect: {error}", file=sys.stderr)
            for name in left_out:
                del options[name]


def _follows(file: Mapping[str, Any], rules: Sequence[Rule]) -> bool:
    """Return whether a file by itself follows the rules of a command, so that flags are what leaves options idle."""
    try:
        check_rules(TrainingArguments(**file), rules)
    except CombinationError:
        return False
    return True


def _fields_of(*kinds: Any) -> Fields:
    return {field.name: (field, types_of(kind)[field.name]) for kind in kinds for field in dataclasses.fields(kind)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _paths(value: Any, hint: Any) -> Any:
    from pathlib import Path

    return [Path(str(word)) for word in value] if get_origin(hint) is list else Path(str(value))


def _show_usual(command: str, usage: str, description: str, fields: Fields, num_others: int) -> None:
    print(f"usage: {usage}\n\n{description}\n")
    for name, (field, hint) in fields.items():
        print(_help_line(name, field, hint, fits_one_line=True))
    if num_others:
        print(f"\n`trainer {command} --help-all` lists {num_others} more. In YAML: `learning_rate: 1e-5`.")
    raise SystemExit(0)


def show_help(usage: str, description: str, groups: Sequence[type[Any]]) -> None:
    """Print every option by group, in the order of use, and end."""
    print(f"usage: {usage}")
    if description:
        print(f"\n{description}")
    for group in groups:
        fields = _fields_of(group)
        if fields:
            print(f"\n{(group.__doc__ or '').strip()}")
        for name, (field, hint) in fields.items():
            print(_help_line(name, field, hint))
    raise SystemExit(0)


def _help_line(name: str, field: dataclasses.Field[Any], hint: Any, fits_one_line: bool = False) -> str:
    is_positional = field.metadata.get("is_positional")
    head = name.upper() if is_positional else f"{_flag(name)} {metavar(hint)}".rstrip()
    text = str(field.metadata.get("help", "")) + describe_default(field)
    if fits_one_line:
        text = textwrap.shorten(text, HELP_WIDTH - 32, placeholder=" ...")
    lines = textwrap.wrap(text, HELP_WIDTH - 6) if not fits_one_line else [text]
    if fits_one_line and len(head) < 28:
        return f"  {head:<28}{text}"
    return f"  {head}\n" + "\n".join(f"      {line}" for line in lines)


def metavar(hint: Any) -> str:
    """Return what stands for the value of an option in the help."""
    if hint is bool:
        return ""
    parts = [part for part in (get_args(hint) if is_union(hint) else (hint,)) if part is not type(None)]
    for part in parts:
        if get_origin(part) is list:
            return f"{metavar(get_args(part)[0])} ..."
        if get_origin(part) is dict:
            return "JSON"
    if get_origin(parts[0]) is Literal:
        return "|".join(str(choice) for choice in get_args(parts[0]))
    return {int: "N", float: "X", bool: "[true|false]"}.get(parts[0], "TEXT")


def describe_default(field: dataclasses.Field[Any]) -> str:
    """Return the default of an option in brackets; nothing where there is none, or where the help says it."""
    if field.default is field.default_factory is dataclasses.MISSING:
        return ""
    default = default_of(field)
    if default is None or default in ([], {}):
        return ""
    if isinstance(default, bool):
        return f" (default: {'on' if default else 'off'})"
    return f" (default: {default})"
