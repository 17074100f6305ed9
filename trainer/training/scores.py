"""Scores of generated answers: the built-in ones by name, or a user's function.

A built-in scorer gives each answer a number from 0 to 1; what is logged is the mean over all answers. A user's function
gets all answers at once and returns the numbers to log.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from trainer.errors import MissingPackageError, UsageError
from trainer.training.generate import Answer

Scorer = Callable[[str, str], float]  # (answer, reference) -> 0 to 1
ScoreAnswers = Callable[[list[Answer]], dict[str, float]]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where the answer is the reference, white space at the ends aside."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """Return 1 where the reference occurs in the answer, upper and lower case alike."""
    return float(reference.strip().lower() in answer.lower())


def regex(answer: str, reference: str) -> float:
    """Return 1 where the reference, a regular expression, matches somewhere in the answer."""
    try:
        return float(re.search(reference.strip(), answer) is not None)
    except re.error as error:
        raise UsageError(
            f"score_answers regex: the reference {reference!r} is not a regular expression ({error}); escape special "
            "characters with a backslash, or choose another scorer"
        ) from error


def numeric(answer: str, reference: str) -> float:
    """Return 1 where the last number of the answer equals the last number of the reference; 1,000 is 1000."""
    found, expected = _NUMBER.findall(answer), _NUMBER.findall(reference)
    if not found or not expected:
        return 0.0
    return float(float(found[-1].replace(",", "")) == float(expected[-1].replace(",", "")))


def json_equal(answer: str, reference: str) -> float:
    """Return 1 where both are JSON of the same value; the order of keys and white space do not count."""
    try:
        return float(json.loads(answer) == json.loads(reference))
    except json.JSONDecodeError:
        return 0.0


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L's F1, the longest common subsequence of words (package rouge-score)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingPackageError.in_extra("score_answers rouge_l needs rouge-score", "rouge") from error
    return float(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)


SCORERS: dict[str, Scorer] = {
    "exact_match": exact_match,
    "contains": contains,
    "regex": regex,
    "numeric": numeric,
    "json_equal": json_equal,
    "rouge_l": rouge_l,
}


def find_function(name: str) -> ScoreAnswers:
    """Import `module:function`; the current folder is searched too.

    Raises:
        UsageError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"score_answers = {name!r}: {error}; give one of {', '.join(SCORERS)}, or module:function of a module that "
            "can be imported from here"
        ) from error
    if not callable(function):
        raise UsageError(f"score_answers = {name!r}: {function_name} is a {type(function).__name__}, not a function")
    scored: ScoreAnswers = function
    return scored


def measured_names(scorers: Sequence[str | ScoreAnswers]) -> list[str] | None:
    """Return the names of the metrics that these give; None where a user's function decides them."""
    if not all(isinstance(each, str) and each in SCORERS for each in scorers):
        return None
    return [str(each) for each in scorers]


def score(answers: list[Answer], scorers: Sequence[str | ScoreAnswers]) -> dict[str, float]:
    """Score answers, and keep the scores of the built-in scorers with each of them.

    Args:
        answers: all of them.
        scorers: names of SCORERS, `module:function`, or functions from all answers to numbers by name.

    Returns:
        The numbers to log.

    Raises:
        UsageError: a user's function returned something else than numbers by name.
    """
    totals: dict[str, float] = {}
    for scorer in scorers:
        if isinstance(scorer, str) and scorer in SCORERS:
            for answer in answers:
                answer.scores[scorer] = SCORERS[scorer](answer.answer, answer.reference)
            totals[scorer] = sum(answer.scores[scorer] for answer in answers) / len(answers)
        else:
            totals |= _call(find_function(scorer) if isinstance(scorer, str) else scorer, answers)
    return totals


def _call(function: ScoreAnswers, answers: list[Answer]) -> dict[str, float]:
    given: Any = function(answers)
    name = getattr(function, "__qualname__", str(function))
    if not isinstance(given, dict):
        raise UsageError(f"score_answers: {name} returned a {type(given).__name__}: return numbers by name, a dict")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"score_answers: {name} returned {value!r} for {key!r}: return numbers by name")
    return {str(key): float(value) for key, value in given.items()}
