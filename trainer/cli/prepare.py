"""`trainer prepare`: tokenize a data set, and report what is in it and what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.cli.check import check_files
from trainer.cli.parse import parse
from trainer.config.fields import option
from trainer.config.groups import BatchArguments, DataArguments, ModelArguments
from trainer.errors import OutputError, UsageError


@dataclass
class PrepareArguments:
    """What to write about the data."""

    report: str | None = option(None, "Write one HTML page about the data to this file.")


def run(words: Sequence[str]) -> int:
    """Prepare every data set that the options name; give the exit code."""
    groups = (DataArguments, ModelArguments, BatchArguments)
    args, wanted = parse("prepare", words, groups, PrepareArguments, "Tokenize, check and count a data set.")
    data = [given for given in (args.data_mixture or args.data_path, args.validation_data_path) if given is not None]
    if not data:
        raise UsageError("data_path is missing: name the files to prepare")
    check_files(args)
    from trainer.cli.stores import load_tokenizer_if_named, longer_than_positions, open_store, show_store

    stores = []
    for given in data:
        store = open_store(given, args)
        show_store(str(store.metadata.get("source", given)), store)
        if warning := longer_than_positions(args, store):
            print(warning)
        stores.append(store)
    if wanted.report is not None:
        from trainer.cli.data_report import render_data
        from trainer.cli.preview import build_decoder

        page = render_data(stores, args, build_decoder(load_tokenizer_if_named(args)))
        try:
            Path(wanted.report).write_text(page, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"report = {wanted.report!r} cannot be written ({error.strerror})") from error
        print(f"written: {wanted.report}")
    return 0
