"""Learning rate as a function of the step, or of the evaluation metric, through transformers' schedules.

Knows nothing of when steps and evaluations happen: `step_schedule` and `feed_metric` are called after each of either.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer.config.groups import SCHEDULES_BY_METRIC, ScheduleArguments
from trainer.config.suggest import nearest, one_of
from trainer.errors import UsageError
from trainer.optim.adapters import is_averaging

ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")  # need no number of steps

FLAT = ("constant", "constant_with_warmup")
_GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "mode", "verbose"}


def advance(schedule: LRScheduler, to_step: int | None = None) -> None:
    """Move a schedule past a step, or to after `to_step` of them, though the optimizer took none; torch would warn."""
    if to_step is not None:
        schedule.last_epoch = to_step - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step", category=UserWarning)
        step_schedule(schedule)


def build_schedule(
    optimizer: Optimizer, args: ScheduleArguments, num_steps: int | None, is_more_better: bool = False
) -> LRScheduler:
    """Build the schedule that `args.lr_scheduler_type` names.

    Args:
        optimizer: whose learning rates it sets.
        args: name and settings.
        num_steps: of the whole run; None when training never ends.
        is_more_better: for schedules by metric, whether more of it is.

    Raises:
        UsageError: the name or a setting is unknown, the schedule needs an end and there is none, or the optimizer
            needs a constant learning rate.
    """
    from transformers import get_scheduler

    name = args.lr_scheduler_type
    settings = checked_settings(args)
    without_end = (*ENDLESS, *SCHEDULES_BY_METRIC)
    if num_steps is None and name not in without_end and "num_stable_steps" not in settings:
        raise UsageError(f"lr_scheduler_type = {name!r} needs an end: one of {', '.join(without_end)}")
    if is_averaging(optimizer) and name not in FLAT:
        raise UsageError(f"lr_scheduler_type = {name!r}: a schedule-free optimizer takes one of {', '.join(FLAT)}")
    warmup = args.get_warmup_steps(num_steps)
    if name in SCHEDULES_BY_METRIC:
        settings["mode"] = "max" if is_more_better else "min"
    try:
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=settings,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"lr_scheduler_kwargs = {args.lr_scheduler_kwargs}: {error}") from error
    if name == "greedy":
        _check_greedy_range(optimizer, schedule)
    return schedule


def step_schedule(schedule: LRScheduler) -> None:
    """Move on by one optimizer step; a schedule by metric stays."""
    if not _goes_by_metric(schedule):
        schedule.step()


def feed_metric(schedule: LRScheduler, value: float | None) -> None:
    """Move a schedule by metric on by what the evaluation measured (None: nothing); leave other schedules alone.

    Raises:
        UsageError: a schedule by metric got no value.
    """
    if _goes_by_metric(schedule):
        if value is None:
            raise UsageError("the learning rate goes by metric_for_best_model, which the evaluation did not measure")
        schedule.step(value)  # type: ignore[arg-type]


def _goes_by_metric(schedule: LRScheduler) -> bool:
    return next(iter(inspect.signature(schedule.step).parameters), None) == "metrics"


def checked_settings(args: ScheduleArguments) -> dict[str, Any]:
    """Return the settings of the schedule that the options name, each known to it.

    Raises:
        UsageError: the name or a setting is unknown.
    """
    from transformers import SchedulerType, optimization

    name, given = args.lr_scheduler_type, args.lr_scheduler_kwargs
    names = [kind.value for kind in SchedulerType]
    if name not in names:
        raise UsageError(one_of("lr_scheduler_type", name, names))
    maker: Any = optimization.TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    if name in SCHEDULES_BY_METRIC:  # whose functions take anything and hand it on
        maker = ReduceLROnPlateau if name == "reduce_lr_on_plateau" else optimization.GreedyLR
    allowed = inspect.signature(maker).parameters.keys() - _GIVEN
    for setting in given.keys() - allowed:
        near = nearest(setting, allowed)
        advice = f"did you mean {near!r}?" if near else f"it takes {', '.join(sorted(allowed)) or 'none'}"
        raise UsageError(f"lr_scheduler_kwargs: {name} has no setting {setting!r}; {advice}")
    return dict(given)


def _check_greedy_range(optimizer: Optimizer, schedule: Any) -> None:
    """Refuse a range that would move the learning rate by its first adjustment: greedy's own starts at 1e-3."""
    lows, highs = schedule.min_lrs, schedule.max_lrs
    for group, low, high in zip(optimizer.param_groups, lows, highs, strict=True):
        if not low <= group["lr"] <= high:
            raise UsageError(
                f"lr_scheduler_type = 'greedy' keeps learning rates from {low} to {high}, and {float(group['lr'])} "
                "lies outside: set min_lr and max_lr in lr_scheduler_kwargs"
            )
