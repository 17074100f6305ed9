"""Prepared data as the commands need it: opened, or prepared with a bar of progress, and shown in a table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trainer.config.arguments import TrainingArguments
from trainer.data.prepare import load_data, prepare
from trainer.data.store import TokenStore

SECONDS_BEFORE_SHOWING = 2.0
SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal for a bar


class PreparationDisplay:
    """Called with bytes done and bytes in all; a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._next_line = time.monotonic() + SECONDS_BEFORE_SHOWING
        columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("preparing")

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are prepared."""
        self._bar.update(self._task, completed=done, total=total)
        if time.monotonic() < self._next_line:
            return
        if self._console.is_terminal:
            self._bar.start()
        else:
            self._console.print(f"preparing: {done / total:.0%} of {total / 1e6:,.1f} MB", soft_wrap=True)
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


console = Console()


def open_store(path: Any, args: TrainingArguments) -> TokenStore:
    """Prepare data as training would, or open a prepared folder; tokenized data needs no tokenizer."""
    with PreparationDisplay(console) as progress:
        return prepare(path, load_tokenizer_if_named(args), args, args.longest_sample, progress)


def load_tokenizer_if_named(args: TrainingArguments) -> Any:
    """Load the tokenizer that the options name, if they name one."""
    if args.tokenizer_name_or_path is None and args.model_name_or_path is None:
        return None
    from trainer.model.tokenizer import load_tokenizer

    return load_tokenizer(args)


def open_training_data(args: TrainingArguments) -> tuple[TokenStore, TokenStore | None]:
    """Prepare what a run would train on, mixed, and what it would hold out; print what a user should know of it."""
    with PreparationDisplay(console) as progress:
        train, held_out, notes = load_data(
            args, load_tokenizer_if_named(args), args.seed, args.longest_sample, progress
        )
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)
    return train, held_out


def show_store(path: str, store: TokenStore) -> None:
    """Print the counts of a prepared data set."""
    console.print(f"{path}: {'found prepared' if store.metadata.get('cached') else 'prepared'}", soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("kind", str(store.metadata.get("kind")))
    for name, count in store.metadata.get("report", {}).items():
        if name == "roles":
            for role, counts in count.items():
                numbers = ", ".join(f"{number:,} {what.replace('_', ' ')}" for what, number in counts.items())
                table.add_row(f"role {role}", numbers)
            continue
        table.add_row(name.replace("_", " "), f"{count:,}" if isinstance(count, int) else _listed(count))
    table.add_row("longest sample, in tokens", f"{store.lengths.max():,}")
    if len(store.source_names) > 1:
        counts = np.bincount(store.sources, minlength=len(store.source_names))
        named = zip(store.source_names, counts.tolist(), strict=True)
        table.add_row("samples by source", _listed(dict(named)))
    console.print(table)
    low, high = int(np.log2(max(store.lengths.min(), 1))), int(np.log2(max(store.lengths.max(), 1)))
    powers_of_two = 2 ** np.arange(low, high + 2)
    console.print(histogram("tokens of a sample", store.lengths, powers_of_two, "{:,}"))
    shares = store.num_loss_tokens / np.maximum(store.lengths - 1, 1)
    console.print(histogram("trained share of a sample", shares, np.linspace(0, 1, 11), "{:.0%}"))


def longer_than_positions(args: TrainingArguments, store: TokenStore) -> str:
    """Say how many samples are longer than the model's positions, where its config lies on this machine."""
    config = read_config(args)
    positions = None if config is None else config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return ""
    count = int((store.lengths > positions).sum())
    if not count:
        return ""
    return (
        f"{count:,} of {len(store):,} samples are longer than the model's {positions:,} positions "
        "(max_position_embeddings): give max_length and overlong, or a model with more"
    )


def read_config(args: TrainingArguments) -> dict[str, Any] | None:
    """Read the model's config.json if it lies on this machine."""
    place = Path(args.model_config or args.model_name_or_path or "")
    file = place if place.suffix == ".json" else place / "config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def histogram(title: str, values: NDArray[Any], bounds: NDArray[Any], form: str) -> Table:
    """Lay out how many values lie between bounds, the last bound included, with bars."""
    counts, _ = np.histogram(values, bounds)
    table = Table(title=title, show_header=False)
    for count, low, high in zip(counts.tolist(), bounds, bounds[1:], strict=False):
        bar = "#" * -(-40 * count // max(counts.max(), 1))
        table.add_row(f"{form.format(low)} to {form.format(high)}", f"{count:,}", bar)
    return table


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "none"
