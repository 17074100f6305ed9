"""`trainer prepare`: tokenize a data set, and report what is in it and what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.cli.check import check_files
from trainer.cli.parse import parse
from trainer.config.groups import BatchArguments, DataArguments, ModelArguments
from trainer.errors import UsageError


@dataclass
class NoArguments:
    """Nothing but the options above."""


def run(words: Sequence[str]) -> int:
    """Prepare every data set that the options name; give the exit code."""
    groups = (DataArguments, ModelArguments, BatchArguments)
    args, _ = parse("prepare", words, groups, NoArguments, "Tokenize, check and count a data set.")
    paths = [path for path in (args.data_mixture or args.data_path, args.validation_data_path) if path is not None]
    if not paths:
        raise UsageError("data_path is missing: name the files to prepare")
    check_files(args)
    from trainer.cli.stores import open_store, show_store

    for path in paths:
        store = open_store(path, args)
        show_store(str(store.metadata.get("source", path)), store)
    return 0
