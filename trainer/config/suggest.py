"""What to say about a name that is not an option: the nearest one, the one it became, or what to use instead.

The one helper for Python, YAML and the command lines; the names themselves are listed in `foreign_names.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from trainer.config.foreign_names import FORMER_NAMES, NOT_HERE, SEQ2SEQ
from trainer.errors import UsageError


def unknown_option(name: str, allowed: Iterable[str]) -> UsageError:
    """Build the error for an option that does not exist, naming the nearest one that does."""
    near = difflib.get_close_matches(name.replace("-", "_"), list(allowed), n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else "`trainer train --help` lists them all"
    return UsageError(f"unknown option {name!r}: {advice}")


def check_foreign(name: str, value: object) -> bool:
    """Whether a name is one of transformers' that we lack, given the value that says what happens here anyway.

    Raises:
        UsageError: it is given another value, or is a name that transformers no longer has.
    """
    if name in FORMER_NAMES:
        raise UsageError(f"{name} is a former option of transformers; now {FORMER_NAMES[name]}")
    if name in SEQ2SEQ:
        raise UsageError(f"{name} is an option of Seq2SeqTrainingArguments: give those to Seq2SeqTrainer")
    if name in NOT_HERE and not NOT_HERE[name].grants(value):
        raise UsageError(f"{name}: this option of transformers is not supported; {NOT_HERE[name].instead}")
    return name in NOT_HERE


def foreign_value(name: str) -> Any:
    """Give the value that transformers' option of this name has where it is not here: scripts ask for it.

    Raises:
        AttributeError: there is no such option, or no value of it says what happens here.
    """
    if name in NOT_HERE and NOT_HERE[name].is_granted:
        return NOT_HERE[name].default
    raise AttributeError(f"TrainingArguments has no {name}")
