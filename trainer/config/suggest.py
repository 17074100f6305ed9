"""What to say about a name that is not an option: the nearest one, what it is called here, or what to use instead.

The one helper of Python, YAML and the command lines; the names themselves are listed in `foreign_names.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from trainer.config.foreign_names import FORMER_NAMES, NOT_HERE, OTHER_TOOLS, RENAMED, SEQ2SEQ, VALUES
from trainer.errors import UsageError

SHORTEST_PREFIX = 3  # characters; fewer begin too many names


def nearest(name: str, allowed: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return which of the allowed names is meant: by another name of it, by its beginning, else by its spelling."""
    names = list(allowed)
    word = name.lower().replace("-", "_")
    if VALUES.get(word) in names:
        return VALUES[word]
    longer = [known for known in names if known.startswith(word)]
    if longer and len(word) >= SHORTEST_PREFIX:
        return min(longer, key=lambda known: (len(known), known))
    return next(iter(difflib.get_close_matches(word, names, n=1, cutoff=cutoff)), None)


def one_of(option: str, given: str, allowed: Iterable[str], otherwise: str = "") -> str:
    """Return the message for a value that is none of those allowed, the nearest first."""
    names = list(allowed)
    near = nearest(given, names, cutoff=0.4)
    advice = f"did you mean {near!r}? " if near else ""
    return f"{option} = {given!r}: {advice}expected one of {', '.join(names)}{otherwise}"


def unknown_option(
    name: str, allowed: Iterable[str], write: Callable[[str], str] = repr, everything: str = ""
) -> UsageError:
    """Build the error for an option that does not exist.

    Args:
        name: as it was given, without dashes in front.
        allowed: names of the options that exist where it was given.
        write: spells a name as the user would, say as a flag.
        everything: where all options are listed.
    """
    names, word = list(allowed), name.replace("-", "_")
    shown = name if write is repr else write(name)
    if word in FORMER_NAMES:
        return UsageError(f"{shown} is a former option of transformers; now {FORMER_NAMES[word]}")
    if word in SEQ2SEQ:
        return UsageError(f"{shown} is an option of Seq2SeqTrainingArguments: give those to Seq2SeqTrainer")
    if word in NOT_HERE:
        return UsageError(f"{shown}: this option of transformers is not supported; {NOT_HERE[word].instead}")
    if word in RENAMED:
        return UsageError(f"{shown} is a former option; now {write(RENAMED[word])}")
    advice = OTHER_TOOLS.get(word, "")
    near = nearest(word, names)
    if advice in names:
        text = f"here it is {write(advice)}"
    elif advice and not advice.isidentifier():
        text = advice
    elif near is not None:
        text = f"did you mean {write(near)}?"
    else:
        text = everything or "`trainer train --help-all` lists them all"
    return UsageError(f"unknown option {write(name)}: {text}")


def granted(name: str, value: object) -> tuple[bool, Any]:
    """Return whether a name is one of transformers' that we lack, given a value that says what happens here anyway.

    The second is that value, read if it was text.
    """
    return NOT_HERE[name].granted(value) if name in NOT_HERE else (False, value)


def foreign_value(name: str) -> Any:
    """Return the value that transformers' option of this name has where it is not here: scripts ask for it.

    Raises:
        AttributeError: there is no such option.
    """
    if name not in NOT_HERE:
        raise AttributeError(f"TrainingArguments has no {name}")
    about = NOT_HERE[name]
    return about.default if about.reads is None else about.reads
