"""`trainer prepare`: tokenize a data set, and report what is in it and what was refused.

With --report, as one HTML page in the style of `trainer report`: sources, counts, lengths, trained shares, packing at
several token budgets, and samples with what is trained marked. All text is escaped, and the page loads nothing from
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.atomic import write_page
from trainer.cli.check import check_files
from trainer.cli.parse import parse
from trainer.cli.preview import cut, shown_tokens
from trainer.cli.report import STYLE
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option
from trainer.config.groups import BatchArguments, DataArguments, ModelArguments
from trainer.data.length import Layout, forecast
from trainer.data.store import TokenStore
from trainer.errors import OutputError, UsageError


@dataclass
class PrepareArguments:
    """What to write about the data."""

    report: str | None = option(None, "Write one HTML page about the data to this file.")


def run(words: Sequence[str]) -> int:
    """Prepare every data set that the options name; return the exit code."""
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
        from trainer.cli.preview import build_decoder

        page = render_data(stores, args, build_decoder(load_tokenizer_if_named(args)))
        try:
            write_page(Path(wanted.report), page)
        except OSError as error:
            raise OutputError(f"report = {wanted.report!r} cannot be written ({error.strerror})") from error
        print(f"written: {wanted.report}")
    return 0


NUM_SAMPLES = 6
MOST_CHARACTERS = 4000  # of one sample on the page
MOST_PLANNED = 200_000  # samples of which packing is planned
_STYLE = (
    "mark{background:#b7e4c7}pre{white-space:pre-wrap;background:#f7f7f7;padding:8px}"
    ".bar{background:#4878cf;height:10px}"
)


def render_data(stores: Sequence[TokenStore], args: TrainingArguments, decode: Callable[[list[int]], str]) -> str:
    """Return the page about these data sets."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>data</title>'
        f"<style>{STYLE}{_STYLE}</style></head><body>"
    ]
    for store in stores:
        parts += _data_set(store, args, decode)
    return "\n".join([*parts, "</body></html>\n"])


def _data_set(store: TokenStore, args: TrainingArguments, decode: Callable[[list[int]], str]) -> list[str]:
    shares = store.num_loss_tokens / np.maximum(store.lengths - 1, 1)
    low, high = int(np.log2(max(store.lengths.min(), 1))), int(np.log2(max(store.lengths.max(), 1)))
    counts = [(name.replace("_", " "), _written(value)) for name, value in store.metadata["report"].items() if value]
    return [
        f"<h1>{escape(str(store.metadata.get('source', 'data')))}</h1>",
        "<h2>sources</h2>",
        table(("source", "samples", "tokens", "loss tokens", "longest"), _source_rows(store)),
        "<h2>counts: what was read, changed and refused</h2>",
        table(("what", "how many"), counts),
        "<h2>tokens of a sample</h2>",
        _bars(store.lengths, 2 ** np.arange(low, high + 2), "{:,}"),
        "<h2>trained share of a sample</h2>",
        _bars(shares, np.linspace(0, 1, 11), "{:.0%}"),
        f"<h2>packing of an epoch on one rank, {args.batch_size:,} samples a step</h2>",
        table(("max_tokens_per_rank", "steps", "micro-batches", "packing efficiency"), _packing_rows(store, args)),
        "<h2>samples: <mark>this</mark> is trained</h2>",
        *_samples(store, decode),
    ]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows of text."""
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} ({_written(count)})" for name, count in value.items())
    return f"{value:,}"


def _source_rows(store: TokenStore) -> list[list[str]]:
    rows = []
    for number, name in enumerate(store.source_names):
        mine = store.sources == number
        sums = (mine.sum(), store.lengths[mine].sum(), store.num_loss_tokens[mine].sum())
        rows.append([name or "data", *(f"{int(n):,}" for n in (*sums, store.lengths[mine].max(initial=0)))])
    return rows


def _bars(values: NDArray[Any], bounds: NDArray[Any], form: str) -> str:
    counts, _ = np.histogram(values, bounds)
    rows = []
    for count, low, high in zip(counts.tolist(), bounds, bounds[1:], strict=False):
        width = 400 * count // max(int(counts.max()), 1)
        bar = f'<div class="bar" style="width:{width}px"></div>'
        rows.append(f"<tr><td>{form.format(low)} to {form.format(high)}</td><td>{count:,}</td><td>{bar}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _packing_rows(store: TokenStore, args: TrainingArguments) -> list[list[str]]:
    lengths = store.lengths[:MOST_PLANNED]
    longest = int(lengths.max())
    budgets = sorted({args.max_tokens_per_rank, *(2**k for k in range(10, 18))})
    rows = []
    for budget in [budget for budget in budgets if budget >= longest][:6]:
        epoch = forecast(lengths, store.num_loss_tokens[:MOST_PLANNED], Layout(args.batch_size, budget)).epochs[0]
        counts = (budget, epoch.num_steps, epoch.num_micro_batches)
        rows.append([*(f"{count:,}" for count in counts), f"{epoch.packing_efficiency:.1%}"])
    return rows


def _samples(store: TokenStore, decode: Callable[[list[int]], str]) -> list[str]:
    """Show samples spread over the data, and the longest one."""
    spread = np.linspace(0, len(store) - 1, NUM_SAMPLES - 1).astype(int).tolist()
    shown = []
    for i in dict.fromkeys([*spread, int(store.lengths.argmax())]):
        tokens, is_target = shown_tokens(store, i)
        left = MOST_CHARACTERS
        text = ""
        for piece, is_trained in cut(decode, tokens.tolist(), is_target):
            visible = escape(piece[:left])
            text += f"<mark>{visible}</mark>" if is_trained else visible
            left -= len(piece[:left])
        file, row = store.place(i)
        end = " ..." if left <= 0 else ""
        counts = f"{store.lengths[i]:,} tokens, {store.num_loss_tokens[i]:,} trained"
        shown.append(f"<p>sample {i}, {escape(file)}:{row}: {counts}</p><pre>{text}{end}</pre>")
    return shown
