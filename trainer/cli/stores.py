"""Prepared data as the commands need it: opened or prepared with progress, and shown in a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.cli.preparing import PreparationDisplay
from trainer.config.arguments import TrainingArguments
from trainer.data.prepare import prepare
from trainer.data.store import TokenStore

console = Console()


def open_store(path: str, args: TrainingArguments) -> TokenStore:
    """Prepare a file as training would, or open a prepared folder; a tokenized file needs no tokenizer."""
    with PreparationDisplay(console) as progress:
        return prepare(path, load_tokenizer_if_named(args), args, args.longest_sample, progress)


def load_tokenizer_if_named(args: TrainingArguments) -> Any:
    """Load the tokenizer that the options name, if they name one."""
    if args.tokenizer_name_or_path is None and args.model_name_or_path is None:
        return None
    from trainer.model.tokenizer import load_tokenizer

    return load_tokenizer(args)


def show_store(path: str, store: TokenStore) -> None:
    """Print the counts of a prepared data set."""
    console.print(f"{path}: {'found prepared' if store.metadata.get('cached') else 'prepared'}", soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("kind", str(store.metadata.get("kind")))
    for name, count in store.metadata.get("report", {}).items():
        table.add_row(name.replace("_", " "), f"{count:,}" if isinstance(count, int) else _listed(count))
    table.add_row("longest sample, in tokens", f"{store.lengths.max():,}")
    console.print(table)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "none"
