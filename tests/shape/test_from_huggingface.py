"""docs/from-huggingface.md, our tables of fields, and the installed transformers say the same of every field.

`python -m tests.shape.test_from_huggingface` writes the table of the document anew.
"""

import dataclasses
import enum
import re
from typing import Any

import pytest
import transformers
from packaging.version import Version

from tests.shape.source import ROOT, of_each
from trainer.config.arguments import Seq2SeqTrainingArguments, TrainingArguments
from trainer.config.foreign_names import ALIASES, DIFFERENT, FORMER_NAMES, NOT_HERE
from trainer.errors import UsageError

DOCUMENT = ROOT / "docs" / "from-huggingface.md"
DOCUMENTED_VERSION = Version("5.23")  # its fields and defaults; an older one has fewer
IS_DOCUMENTED = Version(transformers.__version__) >= DOCUMENTED_VERSION
OF_DOCUMENTED = pytest.mark.skipif(not IS_DOCUMENTED, reason="defaults are those of a newer transformers")


def fields_of(arguments: Any) -> dict[str, Any]:
    """Names of the options of a dataclass and their defaults, as plain values."""
    return {
        field.name: plain(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
        for field in dataclasses.fields(arguments)
        if field.init
    }


def plain(value: Any) -> Any:
    """A default as a plain value; nothing is None, however it is written."""
    value = value.value if isinstance(value, enum.Enum) else value
    return None if value in (False, "", [], {}) and not isinstance(value, int | float) or value is False else value


THEIRS = fields_of(transformers.Seq2SeqTrainingArguments)
OURS = fields_of(Seq2SeqTrainingArguments())
OURS |= {alias: OURS[name] for alias, name in ALIASES.items()}


def rows() -> dict[str, str]:
    """Rows of the document by field."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return {line.split("`")[1]: line for line in text.splitlines() if re.match(r"\| `\w+` \| \w+", line)}


def write_rows() -> None:
    """Put the rows that the document should have where its rows are."""
    text = DOCUMENT.read_text(encoding="utf-8")
    old = "\n".join(rows().values())
    DOCUMENT.write_text(text.replace(old, "\n".join(row(name) for name in sorted(THEIRS))), encoding="utf-8")


def row(name: str) -> str:
    """What the document has to say about a field."""
    if name in NOT_HERE:
        return f"| `{name}` | not supported | {NOT_HERE[name].instead} |"
    return f"| `{name}` | different | {DIFFERENT[name]} |" if name in DIFFERENT else f"| `{name}` | same | |"


@of_each(sorted(THEIRS))
def test_a_field_is_either_an_option_or_refused(name: str) -> None:
    assert (name in OURS) != (name in NOT_HERE), (
        f"{name}: say in NOT_HERE (trainer/config/foreign_names.py) what to use instead; options are not in it"
    )


@of_each(sorted(THEIRS))
def test_the_document_has_a_row_for_the_field(name: str) -> None:
    advice = f"`python -m {__name__}` writes it into {DOCUMENT.name}"
    assert rows().get(name) == row(name), advice


def test_the_tables_name_only_fields_of_transformers() -> None:
    known = set(THEIRS) if IS_DOCUMENTED else set(rows())
    assert {*NOT_HERE, *DIFFERENT, *rows()} <= known
    assert not set(DIFFERENT) & set(NOT_HERE)
    assert not set(FORMER_NAMES) & {*OURS, *THEIRS}


IDIOMS = re.findall(
    r"^\|.*\| (?:works|differs|refused)\b.*\| `(\S+)` \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
)


@of_each(sorted(set(IDIOMS)))
def test_an_idiom_is_held_by_the_test_that_it_names(place: str) -> None:
    file, _, name = place.partition("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"there is no test {place}"


def test_every_idiom_names_a_test() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.partition("## Idioms")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith(("| **", "|---"))]
    assert len(IDIOMS) == len(lines) - 1  # its header


@OF_DOCUMENTED
@of_each(sorted(set(THEIRS) & set(OURS)))
def test_another_default_is_a_difference(name: str) -> None:
    assert name in DIFFERENT or OURS[name] == THEIRS[name], f"say in DIFFERENT that {name} is {OURS[name]!r} here"


@OF_DOCUMENTED
@of_each(sorted(NOT_HERE))
def test_what_transformers_has_by_default_may_be_said(name: str) -> None:
    assert plain(NOT_HERE[name].default) == THEIRS[name]
    assert TrainingArguments(**{name: NOT_HERE[name].default}) == TrainingArguments()


@of_each(sorted(NOT_HERE))
def test_what_is_not_supported_is_refused_with_what_to_use(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: this option of transformers is not supported; ") as raised:
        TrainingArguments(**{name: "something else"})
    assert NOT_HERE[name].instead in str(raised.value)


@of_each(sorted(FORMER_NAMES))
def test_a_former_name_leads_to_the_one_of_today(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is a former option of transformers; now {FORMER_NAMES[name]}"):
        TrainingArguments(**{name: 1})


if __name__ == "__main__":
    write_rows()
