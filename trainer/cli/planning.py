"""The plan of a run as a table: its length, and its first epoch on each number of ranks. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.cli.stores import open_store
from trainer.config.arguments import TrainingArguments
from trainer.data.costs import CostModel, cost_model_from_config
from trainer.data.length import EpochForecast, Layout, forecast, run_length
from trainer.data.mixture import split_validation
from trainer.data.packing import TOKENS
from trainer.data.store import TokenStore

console = Console()


def show_plan(args: TrainingArguments, path: str, world_sizes: list[int]) -> None:
    """Plan the data set at `path` and print the run's length and a line for each number of ranks."""
    store = open_store(path, args)
    if args.validation_split:
        store, _ = split_validation(store, args.validation_split, args.seed)
    length = run_length(store.num_loss_tokens, args.batch_size, args.order_seed, args)
    steps = "without end" if length.num_steps is None else f"{length.num_steps:,} steps"
    per_epoch = f"batch_size {args.batch_size}: {length.steps_per_epoch:,} steps an epoch"
    console.print(f"{len(store):,} samples, {per_epoch}, {steps}", soft_wrap=True)
    cost = planned_cost(args)
    console.print(epoch_table(args, {ranks: first_epoch(args, store, ranks, cost) for ranks in world_sizes}))


def first_epoch(args: TrainingArguments, store: TokenStore, world_size: int, cost: CostModel) -> EpochForecast:
    """Plan the first epoch on so many ranks."""
    layout = Layout(args.batch_size, args.max_tokens_per_rank, world_size, cost)
    return forecast(store.lengths, store.num_loss_tokens, layout, args.order_seed).epochs[0]


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


def epoch_table(args: TrainingArguments, epochs: dict[int, EpochForecast]) -> Table:
    """Lay out one epoch on each number of ranks."""
    table = Table(title=f"first epoch, {args.max_tokens_per_rank:,} tokens per rank")
    for column in ("ranks", "steps", "micro-batches", "empty packs", "packing", "balance", "tokens", "loss tokens"):
        table.add_column(column, justify="right")
    for world_size, epoch in epochs.items():
        counts = (world_size, epoch.num_steps, epoch.num_micro_batches, epoch.num_placeholders)
        shares = (f"{epoch.packing_efficiency:.1%}", f"{epoch.balance:.1%}")
        tokens = (f"{epoch.num_tokens:,}", f"{epoch.num_loss_tokens:,}")
        table.add_row(*(f"{count:,}" for count in counts), *shares, *tokens)
    return table
