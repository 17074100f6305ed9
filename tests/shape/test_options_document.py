"""docs/options.md lists every option as it is declared.

`python -m tests.shape.test_options_document` writes the document anew.
"""

import dataclasses
from typing import Any, Literal, get_args, get_origin

from tests.shape.source import ROOT
from trainer.cli.parse import USUAL
from trainer.config.fields import default_of, is_free_at_resume, is_union, types_of
from trainer.config.foreign_names import ALIASES
from trainer.config.groups import IN_ORDER_OF_USE, GenerationArguments
from trainer.config.rules import NO_EFFECT_ON

DOCUMENT = ROOT / "docs" / "options.md"
HEAD = """# Options

Every option of a run, by group, in the order of use; those in bold are shown by `trainer train --help`. They are the
same from Python (`TrainingArguments(learning_rate=1e-5)`), in YAML (`learning_rate: 1e-5`) and on the command line
(`--learning-rate 1e-5`; `--bf16` and `--no-bf16` for what is on or off). `python -m tests.shape.test_options_document`
generates this page from `trainer/config/groups.py`.

An option with ↻ may change when a run is resumed; any other must be named in `allow_change`. An option without effect
beside the others, or on the kind of data that is trained on, is an error: **token data** is a file or folder named by
`data_path`, or a data set of `input_ids` and `labels`, and is packed; a **custom data set** is anything else that
`Trainer` is given.

"""


def of_type(hint: Any) -> str:
    """Return the type of an option in a word or a list of choices."""
    if is_union(hint):
        parts = [of_type(part) for part in get_args(hint) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{str(choice).lower() if choice is False else choice}`" for choice in get_args(hint))
    if get_origin(hint) is list:
        return "list"
    if get_origin(hint) is dict:
        return "JSON object"
    return {int: "whole number", float: "number", bool: "on or off", str: "text"}.get(hint, "object")


def of_default(field: dataclasses.Field[Any]) -> str:
    """Return the default of an option; nothing where it is unset."""
    default = default_of(field)
    if default is None or default in ([], {}):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{default}`"


def of_option(name: str, field: dataclasses.Field[Any], hint: Any) -> str:
    """Return the row of an option."""
    others = [f"`{alias}`" for alias, meant in ALIASES.items() if meant == name]
    also = f" Also {', '.join(others)}." if others else ""
    shown = f"**`{name}`**" if name in USUAL else f"`{name}`"
    resume = "↻" if is_free_at_resume(field) else ""
    without = [kind for kind, options in NO_EFFECT_ON.items() if name in options]
    effect = f" Not for {without[0].replace('custom data set', 'custom data sets')}." if without else ""
    help = str(field.metadata["help"]).replace("|", "\\|")
    return f"| {shown} | {of_type(hint)} | {of_default(field)} | {resume} | {help}{effect}{also} |"


def document() -> str:
    """Return what the document should hold."""
    text = HEAD
    for group in (*IN_ORDER_OF_USE, GenerationArguments):
        only = " (`Seq2SeqTrainingArguments`)" if group is GenerationArguments else ""
        text += (
            f"## {str(group.__doc__).rstrip('.')}{only}\n\n| option | type | default | ↻ | |\n|---|---|---|---|---|\n"
        )
        for field in dataclasses.fields(group):
            text += of_option(field.name, field, types_of(group)[field.name]) + "\n"
        text += "\n"
    return text.rstrip() + "\n"


def test_the_document_lists_every_option_as_it_is_declared() -> None:
    advice = f"`python -m {__name__}` writes {DOCUMENT.name} anew"
    assert DOCUMENT.read_text(encoding="utf-8") == document(), advice


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
