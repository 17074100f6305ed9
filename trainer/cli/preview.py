"""`trainer preview`: samples as text, with what of them is trained marked.

Owns how tokens and targets are shown to people. Must not know how a data set is prepared. Invariant: the text of a
sample is shown whole, every target in it marked, and nothing in it is read as markup or steers the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from trainer.cli.check import check_files
from trainer.cli.parse import parse
from trainer.config.fields import option
from trainer.config.groups import BatchArguments, DataArguments, ModelArguments
from trainer.errors import UsageError
from trainer.labels import IGNORE_INDEX

MARKS = "⟦⟧"
"""What trained text stands between where there is no colour."""


@dataclass
class PreviewArguments:
    """Which samples to show."""

    num_samples: int = option(3, "Samples to show; fewer where the data set ends.", minimum=1)
    start: int = option(0, "Number of the first among those that are chosen, counted from 0.", minimum=0)
    grep: str | None = option(None, "Only samples whose text matches this regular expression.")
    source: str | None = option(None, "Only samples of the source of this name.")
    longest: bool = option(False, "The longest samples first.")
    shortest: bool = option(False, "The shortest samples first.")
    broken: bool = option(False, "Show rows that cannot be used instead, and why.")


def run(words: Sequence[str]) -> int:
    """Prepare the data set and show the samples that the options name; return the exit code."""
    groups = (DataArguments, ModelArguments, BatchArguments)
    args, wanted = parse("preview", words, groups, PreviewArguments, "Show samples, and what of them is trained.")
    data = args.data_mixture or args.data_path
    if data is None:
        raise UsageError("data_path is missing: name the files to show, or a prepared folder")
    check_files(args)
    from trainer.cli.stores import load_tokenizer_if_named, open_store

    if wanted.longest and wanted.shortest:
        raise UsageError("longest and shortest exclude each other: give one")
    if wanted.broken:
        return show_broken(Console(), args, data, wanted.num_samples)
    store, tokenizer = open_store(data, args), load_tokenizer_if_named(args)
    name = store.metadata["source"]
    if tokenizer is not None and store.largest_id >= len(tokenizer):
        raise UsageError(f"{name} holds token id {store.largest_id}, the tokenizer only {len(tokenizer)} ids")
    decode = build_decoder(tokenizer)
    show_samples(Console(), store, choose_samples(store, wanted, decode), decode)
    return 0


def choose_samples(store: Any, wanted: PreviewArguments, decode: Callable[[list[int]], str]) -> list[int]:
    """Return the numbers of the samples to show.

    Raises:
        UsageError: there is no such source, the pattern is none, or fewer samples than `start` are chosen.
    """
    rows = np.arange(len(store))
    if wanted.source is not None:
        if wanted.source not in store.source_names:
            raise UsageError(f"source = {wanted.source!r}: the sources are {', '.join(store.source_names)}")
        rows = rows[store.sources == store.source_names.index(wanted.source)]
    if wanted.longest:
        rows = rows[np.argsort(-store.lengths[rows], kind="stable")]
    if wanted.shortest:
        rows = rows[np.argsort(store.lengths[rows], kind="stable")]
    end = wanted.start + wanted.num_samples
    chosen = rows[:end].tolist()
    if wanted.grep is not None:
        try:
            pattern = re.compile(wanted.grep)
        except re.error as error:
            raise UsageError(f"grep = {wanted.grep!r} is not a regular expression ({error})") from None
        matching = (int(i) for i in rows if pattern.search(decode(store.sample(int(i)).input_ids.tolist())))
        chosen = list(islice(matching, end))
    if wanted.start >= len(chosen):
        name = store.metadata["source"]
        if len(rows) == len(store) and wanted.grep is None:
            raise UsageError(f"start = {wanted.start}: {name} holds {len(store)} samples, 0 to {len(store) - 1}")
        raise UsageError(f"start = {wanted.start}: only {len(chosen)} samples of {name} are chosen")
    return chosen[wanted.start :]


def show_broken(console: Console, args: Any, data: Any, most: int) -> int:
    """Print rows that cannot be used, with the reason of each; give the exit code, 1 where there are some."""
    from trainer.cli.stores import load_tokenizer_if_named
    from trainer.data.prepare import find_broken
    from trainer.data.sources import raw_rows

    total = shown = 0
    for broken, source in find_broken(data, load_tokenizer_if_named(args), args, args.longest_sample):
        total += broken.total
        errors = broken.errors[: max(most - shown, 0)]
        rows = raw_rows(source, {error.line for error in errors if error.line is not None})
        for error in errors:
            console.print(Text(f"\n{error}", "bold"), soft_wrap=True)
            console.print(render([(rows.get(error.line or 0, ""), False)], has_colour=False), soft_wrap=True)
        shown += len(errors)
    console.print(f"\n{total:,} rows cannot be used, {shown:,} shown", soft_wrap=True)
    return 1 if total else 0


def build_decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Return what turns ids into text, special tokens too; without a tokenizer, into numbers."""
    if tokenizer is None:
        return lambda ids: "".join(f"{i} " for i in ids)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def show_samples(console: Console, store: Any, numbers: Sequence[int], decode: Callable[[list[int]], str]) -> None:
    """Print samples: trained text in colour, or between MARKS where the console has none."""
    has_colour = console.color_system is not None and not console.no_color
    num_samples = np.unique(store.documents, return_counts=True)[1]
    num_split = int((num_samples > 1).sum())
    split = f"{num_split:,} lines became {num_samples[num_samples > 1].sum():,} of them; " if num_split else ""
    legend = [(f"{len(store):,} samples; {split}", False), ("this", True), (" is trained", False)]
    console.print(render(legend, has_colour), soft_wrap=True)
    for i in numbers:
        sample = store.sample(i)
        tokens, is_target = shown_tokens(store, i)
        counts = f"{len(tokens):,} tokens, {store.num_loss_tokens[i]:,} trained"
        others = int((tokens != sample.input_ids).sum())
        differing = f" ({others:,} on another token than stands there: shown is the label)" if others else ""
        place = where(store, i) + which_of_line(store, i)
        console.print(Text(f"\nsample {i}, {place}: {counts}{differing}", "bold"), soft_wrap=True)
        console.print(render(cut(decode, tokens.tolist(), is_target), has_colour), soft_wrap=True)


def where(store: Any, i: int) -> str:
    """Say which line, and of several files which file, a sample comes from."""
    file, row = store.place(i)
    return f"{file}:{row}" if len(store.metadata.get("files", ())) > 1 else f"line {row}"


def which_of_line(store: Any, i: int) -> str:
    """Say which of the samples of its line a sample is, and how much of the one before it begins with; '' if alone."""
    of_line = np.flatnonzero(store.documents == store.documents[i]).tolist()
    if len(of_line) == 1:
        return ""
    k = of_line.index(i)
    said = f" ({k + 1} of {len(of_line)} samples of it"
    if k > 0:
        ids, before = store.sample(i).input_ids, store.sample(of_line[k - 1]).input_ids
        length = min(len(ids), len(before))
        num_shared = int(np.logical_and.accumulate(ids[:length] == before[:length]).sum())
        said += f"; its first {num_shared:,} tokens are those of sample {of_line[k - 1]}" if num_shared > 1 else ""
    return f"{said})"


def shown_tokens(store: Any, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return the tokens of a sample as they are shown, the label where one is trained, and which are trained."""
    sample = store.sample(i)
    is_target = sample.labels != IGNORE_INDEX
    is_target[:1] = False  # nothing comes before the first token that could predict it
    return np.where(is_target, sample.labels, sample.input_ids), is_target


def cut(decode: Callable[[list[int]], str], tokens: list[int], is_target: NDArray[np.bool_]) -> list[tuple[str, bool]]:
    """Cut the text of tokens where what is trained begins and ends.

    Characters (of several tokens) that can only be told together are trained if any of their tokens is a target.
    """
    whole, is_trained = decode(tokens), is_target.copy()

    @cache
    def place(i: int) -> int | None:
        """Where in the text token i begins; None: inside a character."""
        before = decode(tokens[:i])
        return len(before) if whole.startswith(before) else None

    for border in _borders(is_target):
        first = last = border
        while place(first) is None:
            first -= 1
        while place(last) is None:
            last += 1
        is_trained[first:last] = True
    spans = pairwise([0, *_borders(is_trained), len(tokens)])
    return [(whole[place(a) : place(b)], bool(is_trained[a])) for a, b in spans]


def render(pieces: Sequence[tuple[str, bool]], has_colour: bool) -> Text:
    """Lay out pieces of text, those that are trained in colour or between MARKS."""
    text = Text()
    for piece, is_trained in pieces:
        visible = "".join(_visible(character, is_trained) for character in piece)
        if is_trained and not has_colour:
            visible = visible.join(MARKS)
        text.append(visible, "black on green" if is_trained and has_colour else None)
    return text


def _borders(flags: NDArray[np.bool_]) -> list[int]:
    return [int(i) + 1 for i in np.flatnonzero(flags[1:] != flags[:-1])]


def _visible(character: str, is_trained: bool) -> str:
    if character == "\n":
        return "↵\n" if is_trained else "\n"
    if character in MARKS:
        return f"\\u{ord(character):04x}"
    return character if character.isprintable() else repr(character)[1:-1]
