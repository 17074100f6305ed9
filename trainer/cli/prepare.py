"""`trainer prepare`: tokenise a data set, and report what is in it and what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.arguments.groups import BatchArguments, DataArguments, ModelArguments
from trainer.arguments.training import TrainingArguments
from trainer.cli.parse import parse
from trainer.cli.preparing import PreparationDisplay
from trainer.data.prepare import prepare
from trainer.data.store import TokenStore
from trainer.errors import UsageError

console = Console()


@dataclass
class NoArguments:
    """Nothing but the options above."""


def run(words: Sequence[str]) -> int:
    """Prepare every data set that the options name; give the exit code."""
    groups = (DataArguments, ModelArguments, BatchArguments)
    args, _ = parse("prepare", words, groups, NoArguments, "Tokenise, check and count a data set.")
    paths = [path for path in (args.data_path, args.validation_data_path) if path is not None]
    if not paths:
        raise UsageError("data_path is missing: name the JSONL file to prepare")
    for path in paths:
        show_store(path, open_store(path, args))
    return 0


def open_store(path: str, args: TrainingArguments) -> TokenStore:
    """Prepare a file as training would, or open a prepared folder; a tokenised file needs no tokenizer."""
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
