"""`trainer plan`: the length of a run, and its first epoch on each number of ranks, as tables.

Loads torch for the memory of a rank alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer.cli.check import check_before_start
from trainer.cli.memory import parse_bytes, show_memory
from trainer.cli.parse import parse
from trainer.cli.stores import open_training_data, read_config
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option
from trainer.config.groups import GROUPS
from trainer.config.rules import COMMAND_RULES
from trainer.data.length import EpochForecast, Layout, forecast, run_length
from trainer.data.mixture import temperature_weights
from trainer.data.packing import TOKENS
from trainer.data.planner import CostModel, cost_model_from_config
from trainer.data.store import TokenStore
from trainer.distributed.topology import count_shards
from trainer.errors import UsageError


@dataclass
class PlanArguments:
    """What to predict."""

    world_size: list[int] = option([1], "Numbers of ranks to plan for.")
    temperature: float | None = option(
        None, "Print weights in proportion to size ** (1 / temperature), for a data_mixture.", above=0
    )
    memory: bool = option(False, "Show what the memory of a rank will hold; of a GPU, unless use_cpu is set.")
    memory_limit: str | None = option(
        None, "Memory of a rank, such as 80GB: with --memory, the largest max_tokens_per_rank that fits is shown."
    )


def run(words: Sequence[str]) -> int:
    """Print the plan; return the exit code."""
    args, wanted = parse(
        "plan", words, GROUPS, PlanArguments, "Predict steps, micro-batches and packing.", COMMAND_RULES
    )
    check_before_start(args, needs_model=False)
    if min(wanted.world_size, default=0) < 1:
        raise UsageError(f"world_size = {wanted.world_size}: give numbers of ranks, at least 1")
    for world_size in wanted.world_size:
        count_shards(world_size, args.replicate)
    limit = None
    if wanted.memory_limit is not None:
        if not wanted.memory:
            raise UsageError(f"memory_limit = {wanted.memory_limit!r} has no effect without memory: add --memory")
        limit = parse_bytes("memory_limit", wanted.memory_limit)
    store, epochs = show_plan(args, wanted.world_size, wanted.temperature)
    if wanted.memory:
        show_memory_of(args, store, epochs, limit)
    return 0


console = Console()


def show_plan(
    args: TrainingArguments, world_sizes: list[int], temperature: float | None
) -> tuple[TokenStore, dict[int, EpochForecast]]:
    """Plan the training data and print the run's length, its sources, and a line for each number of ranks."""
    store, _ = open_training_data(args)
    length = run_length(store.num_loss_tokens, args.batch_size, args.order_seed, args)
    steps = "without end" if length.num_steps is None else f"{length.num_steps:,} steps"
    per_epoch = f"batch_size {args.batch_size}: {length.steps_per_epoch:,} steps an epoch"
    console.print(f"{len(store):,} samples, {per_epoch}, {steps}", soft_wrap=True)
    if len(store.source_names) > 1:
        console.print(source_table(store, length.num_steps))
    if temperature is not None:
        sizes = store.metadata["samples_of_sources"]
        weights = temperature_weights(sizes, temperature)
        named = zip(store.source_names, weights, strict=True)
        words = ", ".join(f"{name}: {weight:.4f}" for name, weight in named)
        console.print(f"weights at temperature {temperature:g}: {words}", soft_wrap=True, markup=False)
    cost = planned_cost(args)
    epochs = {ranks: first_epoch(args, store, ranks, cost) for ranks in world_sizes}
    console.print(epoch_table(args, epochs))
    return store, epochs


def show_memory_of(
    args: TrainingArguments, store: TokenStore, epochs: dict[int, EpochForecast], limit: int | None
) -> None:
    """Print the memory of a rank with the largest micro-batch of the first epoch, for each number of ranks."""
    from trainer.training.memory import Load  # loads torch

    longest = int(store.lengths.max())
    trained_share = float(store.num_loss_tokens.sum()) / max(int(store.lengths.sum()), 1)
    largest = max(epoch.largest_pack for epoch in epochs.values())
    loads = {}
    for world_size, epoch in epochs.items():
        accumulates = epoch.num_micro_batches > epoch.num_steps
        num_loss_tokens = max(1, round(largest * trained_share))
        loads[world_size] = Load(largest, longest, num_loss_tokens, accumulates)
    show_memory(args, loads, longest, limit)


def source_table(store: TokenStore, num_steps: int | None) -> Table:
    """Lay out what of an epoch each source gives; a step has this share of each, on average."""
    table = Table(title="sources, in an epoch")
    table.add_column("source", overflow="fold")
    for column in ("samples", "tokens", "loss tokens", "share of samples", "share of tokens", "times", "steps"):
        table.add_column(column, justify="right")
    sources, num_sources = store.sources, len(store.source_names)
    samples = np.bincount(sources, minlength=num_sources)
    tokens = np.bincount(sources, store.lengths, num_sources)
    loss_tokens = np.bincount(sources, store.num_loss_tokens, num_sources)
    whole = store.metadata["samples_of_sources"]
    for i, name in enumerate(store.source_names):
        share = samples[i] / len(store)
        steps = "without end" if num_steps is None else f"{num_steps * share:,.1f}"
        counts = (f"{samples[i]:,}", f"{int(tokens[i]):,}", f"{int(loss_tokens[i]):,}")
        shares = (f"{share:.1%}", f"{tokens[i] / tokens.sum():.1%}", f"{samples[i] / max(whole[i], 1):.2f}")
        table.add_row(name, *counts, *shares, steps)
    return table


def first_epoch(args: TrainingArguments, store: TokenStore, world_size: int, cost: CostModel) -> EpochForecast:
    """Plan the first epoch on so many ranks."""
    layout = Layout(args.batch_size, args.max_tokens_per_rank, world_size, cost)
    return forecast(store.lengths, store.num_loss_tokens, layout, args.order_seed).epochs[0]


def planned_cost(args: TrainingArguments) -> CostModel:
    """Return what packing will balance: by the model's shape where its config is on this machine, else tokens."""
    if args.packing_cost == "tokens":
        return TOKENS
    config = read_config(args)
    if config is None:
        console.print("no config.json on this machine: packing is planned by tokens alone", soft_wrap=True)
        return TOKENS
    return cost_model_from_config(config)


def epoch_table(args: TrainingArguments, epochs: dict[int, EpochForecast]) -> Table:
    """Lay out one epoch on each number of ranks."""
    table = Table(title=f"first epoch, {args.max_tokens_per_rank:,} tokens per rank")
    for column in ("ranks", "steps", "micro-\nbatches", "empty packs", "packing", "balance", "tokens", "loss tokens"):
        table.add_column(column, justify="right")
    for world_size, epoch in epochs.items():
        counts = (world_size, epoch.num_steps, epoch.num_micro_batches, epoch.num_placeholders)
        shares = (f"{epoch.packing_efficiency:.1%}", f"{epoch.balance:.1%}")
        tokens = (f"{epoch.num_tokens:,}", f"{epoch.num_loss_tokens:,}")
        table.add_row(*(f"{count:,}" for count in counts), *shares, *tokens)
    return table
