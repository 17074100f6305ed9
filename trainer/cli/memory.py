"""The memory of a rank as tables, for `trainer plan --memory`, and as a line and a warning at the start of `train`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from trainer.cli.stores import load_tokenizer_if_named, read_config
from trainer.config.arguments import TrainingArguments
from trainer.data.planner import ModelShape
from trainer.distributed.topology import count_shards
from trainer.errors import UsageError

if TYPE_CHECKING:
    from trainer.training.memory import Load, MemoryEstimate

console = Console()
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
BYTES_PER_WEIGHT = 16  # weight, gradient and AdamW's two moments in float32
WORTH_A_LOOK = 0.3  # share of the memory from which on a rough count at the start is made an exact one


def parse_bytes(name: str, text: str) -> int:
    """Read a size such as 80GB, 79.2GiB or 85899345920.

    Raises:
        UsageError: it is none.
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if matched is None or matched[2] not in _UNITS or float(matched[1]) == 0:
        raise UsageError(f"{name} = {text!r}: give a size such as 80GB or 40GiB")
    return int(float(matched[1]) * _UNITS[matched[2]])


def show_memory(args: TrainingArguments, loads: Mapping[int, Load], longest: int, limit: int | None) -> None:
    """Print the memory of a rank for each number of ranks, by module, and the largest token budget within a limit.

    Args:
        args: the options of the run.
        loads: numbers of ranks, and the largest micro-batch of each.
        longest: tokens of the longest sample of the data.
        limit: bytes; None to leave out what fits.
    """
    estimate = estimator(args)
    estimates = {}
    for world_size, load in loads.items():
        estimates[world_size] = estimate(load, world_size)
    console.print(memory_table(estimates))
    console.print(module_table(next(iter(estimates.values()))))
    for note in next(iter(estimates.values())).notes:
        console.print(note, soft_wrap=True, markup=False)
    if limit is None:
        return
    from trainer.training.memory import largest_budget

    for world_size, load in loads.items():

        def peak(tokens: int, load: Load = load, world_size: int = world_size) -> int:
            return estimate(load.of_tokens(tokens), world_size).peak

        budget = largest_budget(peak, limit, args.max_tokens_per_rank)
        where = f"{world_size:,} ranks" if world_size > 1 else "1 rank"
        if budget is None or budget < longest:
            short = f"the longest sample has {longest:,} tokens, "
            most = "not even the weights and a few tokens fit" if budget is None else f"only {budget:,} tokens fit"
            console.print(
                f"{where} of {gib(limit)}: {short}{most}; see docs/memory.md for what saves memory", soft_wrap=True
            )
        else:
            console.print(f"{where} of {gib(limit)}: the largest max_tokens_per_rank is {budget:,}", soft_wrap=True)


def estimator(args: TrainingArguments) -> Callable[[Load, int], MemoryEstimate]:
    """Return what estimates a load on a number of ranks; one estimate serves all numbers from 2 on."""
    from trainer.model.build import read_config as read_model_config
    from trainer.training.memory import estimate_memory

    place = args.model_name_or_path or args.model_config
    if place is None:
        raise UsageError("model_name_or_path is missing: memory depends on the model; name one, or a model_config")
    config, tokenizer = read_model_config(args, Path(place)), load_tokenizer_if_named(args)

    @functools.cache
    def estimate(load: Load, is_sharded: bool) -> MemoryEstimate:
        return estimate_memory(args, config, load, is_sharded=is_sharded, on_gpu=not args.use_cpu, tokenizer=tokenizer)

    def on_ranks(load: Load, world_size: int) -> MemoryEstimate:
        found = estimate(load, world_size > 1)
        return found if world_size == 1 else found.on_ranks(world_size, count_shards(world_size, args.replicate))

    return on_ranks


def memory_table(estimates: Mapping[int, MemoryEstimate]) -> Table:
    """Lay out what the memory of a rank holds, in a column for each number of ranks."""
    table = Table(title="memory of a rank, in the largest micro-batch")
    table.add_column("ranks")
    for world_size in estimates:
        table.add_column(f"{world_size:,}", justify="right")
    found = list(estimates.values())
    table.add_row("tokens of the micro-batch", *(f"{each.load.num_tokens:,}" for each in found))
    for name in ("weights", "gradients", "optimizer_state", "activations", "loss", "peak"):
        title = {"loss": "logits and loss", "activations": "activations kept"}.get(name, name.replace("_", " "))
        table.add_row(title, *(gib(getattr(each, name)) for each in found))
    table.add_row("peak is in the", *(each.peak_phase for each in found))
    return table


def module_table(found: MemoryEstimate) -> Table:
    """Lay out what the parts of the model weigh, and what they keep for the backward pass."""
    table = Table(title="by module, blocks together")
    table.add_column("module", overflow="fold")
    for column in ("modules", "weights, all ranks", "kept for backward"):
        table.add_column(column, justify="right")
    for row in found.modules:
        table.add_row(row.name, f"{row.count:,}", gib(row.weights), gib(row.kept))
    return table


def foretell_memory(args: TrainingArguments, world_size: int, limit: int) -> None:
    """Print, before anything is loaded, what a full micro-batch takes of a rank's memory; warn where it is too much.

    A rough count by the model's shape says whether it is worth the seconds of an exact one.
    """
    rough = rough_bytes(args, world_size)
    if rough is not None and rough < WORTH_A_LOOK * limit:
        console.print(f"memory of a rank: roughly {gib(rough)} of {gib(limit)}", soft_wrap=True)
        return
    from trainer.training.memory import Load

    console.print("estimating the memory of a rank", soft_wrap=True)
    tokens = args.max_tokens_per_rank
    load = Load(tokens, args.longest_sample or tokens, tokens - 1)
    try:
        found = estimator(args)(load, world_size)
    except Exception as error:  # noqa: BLE001  what only informs does not end a run
        console.print(f"memory could not be estimated: {type(error).__name__}: {error}", soft_wrap=True, markup=False)
        return
    console.print(
        f"memory of a rank: {gib(found.peak)} of {gib(limit)} in a full micro-batch of {tokens:,} tokens, of which "
        f"weights, gradients and optimizer {gib(found.weights + found.gradients + found.optimizer_state)}",
        soft_wrap=True,
    )
    if found.peak > limit:
        console.print(
            f"warning: this is more than there is; `trainer plan --memory --memory-limit {limit // 10**6}MB` with the "
            "same options shows what takes it and which max_tokens_per_rank fits (docs/memory.md)",
            soft_wrap=True,
        )


def rough_bytes(args: TrainingArguments, world_size: int) -> int | None:
    """Count by the shape of the model alone, too much rather than too little; None where that is not known here."""
    config = read_config(args)
    if config is None:
        return None
    try:
        shape = ModelShape(config)
    except UsageError:
        return None
    states = BYTES_PER_WEIGHT * shape.num_weights * args.replicate // world_size
    states += 8 * shape.num_weights * (world_size > 1)
    per_token = 4 * shape.num_layers * (12 * shape.hidden + 6 * shape.query_width + 6 * shape.inner)
    return states + args.max_tokens_per_rank * per_token + 8 * shape.hidden * shape.vocabulary


def gib(num_bytes: int) -> str:
    """Write bytes as GiB, or as MiB where they are few."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
