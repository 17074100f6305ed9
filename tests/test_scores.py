"""Scores of answers: the built-in scorers, and functions of a user's own."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.errors import UsageError
from trainer.training.generate import Answer
from trainer.training.scores import SCORERS, find_function, measured_names, score


@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"),
    [
        ("exact_match", " yes\n", "yes", 1),
        ("exact_match", "Yes", "yes", 0),
        ("contains", "The answer is Paris.", "paris", 1),
        ("contains", "London", "paris", 0),
        ("regex", "call 555-1234 now", r"\d{3}-\d{4}", 1),
        ("regex", "no number", r"\d", 0),
        ("numeric", "so 3 + 4 = 7", "7.0", 1),
        ("numeric", "about 1,000", "1000", 1),
        ("numeric", "from 7 to 8", "7", 0),
        ("numeric", "none", "7", 0),
        ("numeric", "-3", "3", 0),
        ("json_equal", '{"b": 1, "a": [2]}', '{"a":[2],"b":1}', 1),
        ("json_equal", '{"a": 1', '{"a": 1}', 0),
        ("json_equal", "[1, 2]", "[2, 1]", 0),
    ],
)
def test_a_scorer_gives_the_score_by_hand(name: str, answer: str, reference: str, expected: float) -> None:
    assert SCORERS[name](answer, reference) == expected


def test_a_reference_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(UsageError, match="is not a regular expression"):
        SCORERS["regex"]("a", "(")


ANSWERS = [Answer("1+1?", "2", "2"), Answer("2+2?", "4", "it is 4"), Answer("3+3?", "6", "7")]


def mean_length(answers: list[Answer]) -> dict[str, float]:
    return {"mean_length": sum(len(answer.answer) for answer in answers) / len(answers)}


def test_scores_are_means_over_all_answers() -> None:
    totals, of_each = score(ANSWERS, ["exact_match", "contains", mean_length])
    assert totals == {"exact_match": 1 / 3, "contains": 2 / 3, "mean_length": 3.0}
    assert of_each == [
        {"exact_match": 1.0, "contains": 1.0},
        {"exact_match": 0.0, "contains": 1.0},
        {"exact_match": 0.0, "contains": 0.0},
    ]


def test_a_function_is_found_by_module_and_name() -> None:
    assert find_function(f"{__name__}:mean_length") is mean_length
    assert measured_names(["contains"]) == ["contains"]
    assert measured_names(["contains", f"{__name__}:mean_length"]) is None


@pytest.mark.parametrize("name", ["no.such.module:f", f"{__name__}:missing", f"{__name__}:ANSWERS", "exact"])
def test_what_is_no_function_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(UsageError, match="score_answers = "):
        find_function(name)


@pytest.mark.parametrize("given", [0.5, {"a": "high"}, {"a": True}, None])
def test_what_is_no_dict_of_numbers_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="return numbers by name"):
        score(ANSWERS, [lambda answers: given])
