"""`trainer plan`: what a run will do, on any number of ranks, before a tensor exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.cli.check import check_before_start
from trainer.cli.parse import parse
from trainer.config.fields import option
from trainer.config.groups import GROUPS
from trainer.config.rules import COMMAND_RULES
from trainer.errors import UsageError


@dataclass
class PlanArguments:
    """What to foretell."""

    world_size: list[int] = option([1], "Numbers of ranks to plan for.")
    temperature: float | None = option(
        None, "Print weights in proportion to size ** (1 / temperature), for a data_mixture.", above=0
    )


def run(words: Sequence[str]) -> int:
    """Print the plan; give the exit code."""
    args, wanted = parse(
        "plan", words, GROUPS, PlanArguments, "Predict steps, micro-batches and packing.", COMMAND_RULES
    )
    check_before_start(args, needs_model=False)
    if min(wanted.world_size, default=0) < 1:
        raise UsageError(f"world_size = {wanted.world_size}: give numbers of ranks, at least 1")
    from trainer.cli.planning import show_plan

    show_plan(args, wanted.world_size, wanted.temperature)
    return 0
