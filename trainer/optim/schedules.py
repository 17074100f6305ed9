"""Learning rate as a function of the step, through transformers' schedules."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer.arguments.groups import ScheduleArguments
from trainer.errors import UsageError

_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")  # need no number of steps


def num_warmup_steps(args: ScheduleArguments, num_steps: int | None) -> int:
    """Give warm-up in steps; a share below 1 is taken of all steps and rounded up."""
    if args.warmup_steps >= 1 or args.warmup_steps == 0:
        return int(args.warmup_steps)
    if num_steps is None:
        raise UsageError(f"warmup_steps = {args.warmup_steps} is a share of all steps, but training never ends")
    return math.ceil(args.warmup_steps * num_steps)


def build_schedule(optimizer: Optimizer, args: ScheduleArguments, num_steps: int | None) -> LRScheduler:
    """Build the schedule that `args.lr_scheduler_type` names; `num_steps` is None when training never ends.

    Raises:
        UsageError: the name or a setting is unknown, or the schedule needs an end and there is none.
    """
    from transformers import SchedulerType, get_scheduler

    allowed = [kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
    if args.lr_scheduler_type not in allowed:
        raise UsageError(f"lr_scheduler_type = {args.lr_scheduler_type!r}: one of {', '.join(allowed)}")
    if num_steps is None and args.lr_scheduler_type not in _ENDLESS:
        raise UsageError(f"lr_scheduler_type = {args.lr_scheduler_type!r} needs an end: one of {', '.join(_ENDLESS)}")
    warmup = num_warmup_steps(args, num_steps)
    try:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"lr_scheduler_kwargs = {args.lr_scheduler_kwargs}: {error}") from error
