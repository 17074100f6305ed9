"""Scores of answers: the built-in scorers, and functions of a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs import chat_job, read_metrics
from trainer import Trainer, TrainingArguments
from trainer.errors import UsageError
from trainer.training.generate import Answer, write_answers
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
        ("numeric", "7", "none", 0),
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
    totals = score(ANSWERS, ["exact_match", "contains", mean_length])
    assert totals == {"exact_match": 1 / 3, "contains": 2 / 3, "mean_length": 3.0}
    assert [answer.scores for answer in ANSWERS] == [
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


def test_scores_of_a_run_are_logged_and_its_answers_written(tmp_path: Path) -> None:
    args = TrainingArguments(
        **chat_job(tmp_path),
        output_dir=str(tmp_path / "out"),
        validation_split=0.25,
        max_steps=2,
        eval_on_start=True,
        eval_at_end=True,
        score_answers=["contains", "numeric"],
        generation_max_new_tokens=4,
        metric_for_best_model="contains",
    )
    trainer = Trainer(args=args, score_answers=mean_length)
    trainer.train()
    evaluations = [line for line in read_metrics(Path(args.output_dir)) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert all({"eval_contains", "eval_numeric", "eval_mean_length"} <= line.keys() for line in evaluations)
    lines = [json.loads(line) for line in Path(args.output_dir, "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * (len(lines) // 2) + [2] * (len(lines) // 2)
    last = [line for line in lines if line["step"] == 2]
    assert sum(line["contains"] for line in last) / len(last) == evaluations[-1]["eval_contains"]
    assert {"question", "reference", "answer", "sample"} <= last[0].keys()


def test_answers_of_later_steps_are_replaced_when_a_run_goes_back(tmp_path: Path) -> None:
    for step in (1, 2, 3, 2):
        write_answers(tmp_path, step, ANSWERS[:1])
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
