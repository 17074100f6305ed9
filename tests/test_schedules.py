"""Learning rates: those of transformers' formulas at every step, or by the evaluation metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LRScheduler

from tests.fixtures.models import tiny_llama
from tests.fixtures.optimizers import Regression, build_for
from tests.fixtures.oracles import learning_rate
from tests.fixtures.runs import build_trainer, random_token_samples, step_lines
from tests.fixtures.tolerances import CLOSED_FORM_FLOAT64
from trainer.config.arguments import TrainingArguments
from trainer.config.groups import ScheduleArguments
from trainer.errors import UsageError
from trainer.optim.registry import OPTIMIZERS, is_installed
from trainer.optim.schedules import build_schedule, feed_metric, step_schedule

BY_STEP: dict[str, dict[str, float]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 0.002},
    "cosine_warmup_with_min_lr": {"min_lr": 0.002},
    "warmup_stable_decay": {"num_decay_steps": 3},
}
SAMPLES = random_token_samples([9, 14, 5, 20, 11, 7, 16, 8, 13, 6, 10, 12])


def sgd(lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def arguments(name: str, warmup: float = 0, **settings: Any) -> ScheduleArguments:
    warmup = 0 if name == "constant" else warmup
    return ScheduleArguments(lr_scheduler_type=name, warmup_steps=warmup, lr_scheduler_kwargs=settings)


def rates(schedule: LRScheduler, num_steps: int) -> list[float]:
    found = []
    for _ in range(num_steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        step_schedule(schedule)
    return found


def test_every_schedule_of_transformers_is_there() -> None:
    from transformers import SchedulerType

    assert {kind.value for kind in SchedulerType} <= {*BY_STEP, "reduce_lr_on_plateau", "greedy"}


@pytest.mark.parametrize("name", BY_STEP)
@given(num_steps=st.integers(4, 40), share=st.floats(0, 0.9))
def test_rates_are_the_closed_form(name: str, num_steps: int, share: float) -> None:
    warmup = 0 if name == "constant" else int(share * (num_steps - 3))
    schedule = build_schedule(sgd(), arguments(name, warmup, **BY_STEP[name]), num_steps)
    expected = [learning_rate(name, step, 0.1, warmup, num_steps, **BY_STEP[name]) for step in range(1, num_steps + 1)]
    assert rates(schedule, num_steps) == pytest.approx(expected, rel=CLOSED_FORM_FLOAT64, abs=0)


@pytest.mark.parametrize("name", BY_STEP)
def test_a_schedule_built_again_goes_on_where_its_state_was(name: str) -> None:
    whole = rates(build_schedule(sgd(), arguments(name, 2, **BY_STEP[name]), 12), 12)
    first = build_schedule(sgd(), arguments(name, 2, **BY_STEP[name]), 12)
    begun = rates(first, 5)
    optimizer = sgd()
    again = build_schedule(optimizer, arguments(name, 2, **BY_STEP[name]), 12)
    again.load_state_dict(first.state_dict())
    optimizer.load_state_dict(first.optimizer.state_dict())
    assert begun + rates(again, 7) == whole


@pytest.mark.parametrize("name", BY_STEP)
@pytest.mark.world_size(1, 2)
def test_what_a_run_logs_is_the_closed_form(name: str, ranks: Any) -> None:
    """At any number of micro-batches and ranks."""
    warmup = 0 if name == "constant" else 2
    tokens = 24 if BY_STEP[name] else 64  # several micro-batches, or one
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": BY_STEP[name], "warmup_steps": warmup}
    folder = ranks.tmp_path / "run"
    model = tiny_llama(num_hidden_layers=1)
    build_trainer(folder, SAMPLES, model, max_tokens_per_rank=tokens, num_train_epochs=2, **options).train()
    if ranks.is_main:
        found = [line["learning_rate"] for line in step_lines(folder)]
        expected = [learning_rate(name, step, 1e-2, warmup, 6, **BY_STEP[name]) for step in range(1, 7)]
        assert found == pytest.approx(expected, rel=CLOSED_FORM_FLOAT64, abs=0)


def test_a_share_of_warm_up_is_rounded_up() -> None:
    assert rates(build_schedule(sgd(), arguments("linear", 0.21), 10), 10) == rates(
        build_schedule(sgd(), arguments("linear", 3), 10), 10
    )


class TestByMetric:
    def feed(self, schedule: LRScheduler, values: list[float]) -> list[float]:
        found = []
        for value in values:
            step_schedule(schedule)  # changes nothing
            feed_metric(schedule, value)
            found.append(schedule.get_last_lr()[0])
        return found

    def test_a_plateau_lowers_the_rate(self) -> None:
        schedule = build_schedule(sgd(), arguments("reduce_lr_on_plateau", patience=1, factor=0.5), None)
        assert self.feed(schedule, [3.0, 2.0, 2.0, 2.0, 1.0]) == [0.1, 0.1, 0.1, 0.05, 0.05]

    def test_a_schedule_by_metric_may_take_more_for_better(self) -> None:
        args = arguments("reduce_lr_on_plateau", patience=0, factor=0.5)
        schedule = build_schedule(sgd(), args, None, is_more_better=True)
        assert self.feed(schedule, [1.0, 2.0, 3.0, 3.0]) == [0.1, 0.1, 0.1, 0.05]

    def test_greedy_raises_and_lowers(self) -> None:
        args = arguments("greedy", patience=0, factor=0.5, min_lr=0.01, max_lr=1.0)
        assert self.feed(build_schedule(sgd(), args, None), [3.0, 2.0, 4.0]) == [0.2, 0.4, 0.2]

    def test_a_rate_outside_greedys_range_is_refused(self) -> None:
        with pytest.raises(UsageError, match="from 0.001 to 1.0, and 5e-05 lies outside: set min_lr and max_lr"):
            build_schedule(sgd(5e-5), arguments("greedy"), None)

    def test_a_metric_that_was_not_measured_is_an_error(self) -> None:
        with pytest.raises(UsageError, match="did not measure"):
            feed_metric(build_schedule(sgd(), arguments("reduce_lr_on_plateau"), None), None)

    def test_other_schedules_do_not_listen(self) -> None:
        schedule = build_schedule(sgd(), arguments("constant"), None)
        feed_metric(schedule, 3.0)
        assert schedule.get_last_lr() == [0.1]

    def test_a_run_feeds_it_the_metric_of_its_evaluations(self, tmp_path: Path) -> None:
        options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
        settings = {"patience": 0, "factor": 0.5, "threshold": 1e6, "threshold_mode": "abs"}  # nothing is enough
        trainer = build_trainer(
            tmp_path / "run", SAMPLES, eval_samples=SAMPLES[:2], lr_scheduler_kwargs=settings, **options
        )
        trainer.train()
        assert [line["learning_rate"] for line in step_lines(tmp_path / "run")] == [1e-2, 1e-2, 5e-3]

    @pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
    def test_a_schedule_by_metric_needs_evaluations(self, name: str) -> None:
        with pytest.raises(UsageError, match="goes by metric_for_best_model: set eval_strategy"):
            TrainingArguments(lr_scheduler_type=name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cosine_with_min_lr", {"min_rl": 0.1}, "has no setting 'min_rl'; did you mean 'min_lr'"),
        ("constant", {"min_lr": 0.1}, "has no setting 'min_lr'; it takes none"),
        ("linear", {"num_training_steps": 3}, "has no setting 'num_training_steps'"),
        ("greedy", {"patients": 3}, "did you mean 'patience'"),
        ("reduce_lr_on_plateau", {"mode": "max"}, "has no setting 'mode'"),
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("no_such", {}, "expected one of linear, cosine"),
    ],
)
def test_what_a_schedule_does_not_know_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_schedule(sgd(), arguments(name, **settings), 10)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "warmup_stable_decay"])
def test_a_run_without_end_is_refused_what_needs_one(name: str) -> None:
    with pytest.raises(UsageError, match="needs an end: one of constant"):
        build_schedule(sgd(), arguments(name), None)


@pytest.mark.skipif(not is_installed(OPTIMIZERS["schedule_free_adamw"]), reason="pip install schedulefree")
def test_a_schedule_free_optimizer_has_a_flat_one() -> None:
    optimizer = build_for(Regression(), "schedule_free_adamw")
    with pytest.raises(UsageError, match="takes one of constant, constant_with_warmup"):
        build_schedule(optimizer, arguments("linear"), 10)
    assert build_schedule(optimizer, arguments("constant_with_warmup", 2), None)
