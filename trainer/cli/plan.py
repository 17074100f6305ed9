"""`trainer plan`: what a run will do, on any number of ranks, before a tensor exists. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.arguments.groups import BatchArguments, DataArguments, MachineArguments, ModelArguments, ScheduleArguments
from trainer.arguments.options import option
from trainer.arguments.training import TrainingArguments
from trainer.cli.parse import parse
from trainer.cli.prepare import open_store
from trainer.data.costs import CostModel, cost_model_from_config
from trainer.data.forecast import EpochForecast, Layout, forecast
from trainer.data.length import RunLength, run_length
from trainer.data.packing import TOKENS
from trainer.data.prepare import split_validation
from trainer.data.store import TokenStore
from trainer.errors import UsageError

console = Console()


@dataclass
class PlanArguments:
    """What to foretell."""

    world_size: list[int] = option([1], "Numbers of ranks to plan for.")


def run(words: Sequence[str]) -> int:
    """Print the plan; give the exit code."""
    groups = (DataArguments, ModelArguments, BatchArguments, ScheduleArguments, MachineArguments)
    args, wanted = parse("plan", words, groups, PlanArguments, "Foretell steps, micro-batches and packing.")
    if args.data_path is None:
        raise UsageError("data_path is missing: name a JSONL file or a prepared folder")
    if min(wanted.world_size, default=0) < 1:
        raise UsageError(f"world_size = {wanted.world_size}: give numbers of ranks, at least 1")
    store = open_store(args.data_path, args)
    if args.validation_split:
        store, _ = split_validation(store, args.validation_split, args.seed)
    length = run_length(store.num_loss_tokens, args.batch_size, args.seed, args)
    show_plan(args, store, length, [first_epoch(args, store, ranks) for ranks in wanted.world_size], wanted.world_size)
    return 0


def first_epoch(args: TrainingArguments, store: TokenStore, world_size: int) -> EpochForecast:
    """Plan the first epoch on so many ranks."""
    layout = Layout(args.batch_size, args.max_tokens_per_rank, world_size, planned_cost(args))
    return forecast(store.lengths, store.num_loss_tokens, layout, args.seed).epochs[0]


def planned_cost(args: TrainingArguments) -> CostModel:
    """Give what packing will balance: by the model's shape where its config lies on this machine, else tokens alone."""
    if args.packing_cost == "tokens":
        return TOKENS
    place = Path(args.model_config or args.model_name_or_path or "")
    file = place if place.suffix == ".json" else place / "config.json"
    if not file.is_file():
        console.print("no config.json on this machine: packing is planned by tokens alone", soft_wrap=True)
        return TOKENS
    return cost_model_from_config(json.loads(file.read_text(encoding="utf-8")))


def show_plan(
    args: TrainingArguments, store: TokenStore, length: RunLength, epochs: list[EpochForecast], ranks: list[int]
) -> None:
    """Print the run's length, and a line for each number of ranks."""
    steps = "without end" if length.num_steps is None else f"{length.num_steps:,} steps"
    console.print(
        f"{len(store):,} samples, batch_size {args.batch_size}: {length.steps_per_epoch:,} steps an epoch, {steps}"
    )
    table = Table(title=f"first epoch, {args.max_tokens_per_rank:,} tokens per rank")
    for column in ("ranks", "steps", "micro-batches", "empty packs", "packing", "balance", "tokens", "loss tokens"):
        table.add_column(column, justify="right")
    for world_size, epoch in zip(ranks, epochs, strict=True):
        counts = (world_size, epoch.num_steps, epoch.num_micro_batches, epoch.num_placeholders)
        shares = (f"{epoch.packing_efficiency:.1%}", f"{epoch.balance:.1%}")
        tokens = (f"{epoch.num_tokens:,}", f"{epoch.num_loss_tokens:,}")
        table.add_row(*(f"{count:,}" for count in counts), *shares, *tokens)
    console.print(table)
