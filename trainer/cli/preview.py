"""`trainer preview`: samples as text, with what of them is trained marked.

Owns how tokens and targets are shown to people. Must not know how a data set is prepared. Invariant: the text of a
sample is shown whole, every target in it marked, and nothing in it is read as markup or steers the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
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
    start: int = option(0, "Number of the first, counted from 0.", minimum=0)


def run(words: Sequence[str]) -> int:
    """Prepare the data set and show the samples that the options name; give the exit code."""
    groups = (DataArguments, ModelArguments, BatchArguments)
    args, wanted = parse("preview", words, groups, PreviewArguments, "Show samples, and what of them is trained.")
    data = args.data_mixture or args.data_path
    if data is None:
        raise UsageError("data_path is missing: name the files to show, or a prepared folder")
    check_files(args)
    from trainer.cli.stores import load_tokenizer_if_named, open_store

    store, tokenizer = open_store(data, args), load_tokenizer_if_named(args)
    name = store.metadata["source"]
    if wanted.start >= len(store):
        raise UsageError(f"start = {wanted.start}: {name} holds {len(store)} samples, 0 to {len(store) - 1}")
    if tokenizer is not None and store.largest_id >= len(tokenizer):
        raise UsageError(f"{name} holds token id {store.largest_id}, the tokenizer only {len(tokenizer)} ids")
    shown = range(len(store))[wanted.start : wanted.start + wanted.num_samples]
    show_samples(Console(), store, shown, build_decoder(tokenizer))
    return 0


def build_decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Give what turns ids into text, special tokens too; without a tokenizer, into numbers."""
    if tokenizer is None:
        return lambda ids: "".join(f"{i} " for i in ids)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def show_samples(console: Console, store: Any, numbers: Sequence[int], decode: Callable[[list[int]], str]) -> None:
    """Print samples: trained text in colour, or between MARKS where the console has none."""
    has_colour = console.color_system is not None and not console.no_color
    legend = [(f"{len(store):,} samples; ", False), ("this", True), (" is trained", False)]
    console.print(render(legend, has_colour), soft_wrap=True)
    for i in numbers:
        sample = store.sample(i)
        is_target = sample.labels != IGNORE_INDEX
        is_target[:1] = False  # nothing comes before the first token that could foretell it
        tokens = np.where(is_target, sample.labels, sample.input_ids)
        counts = f"{len(tokens):,} tokens, {store.num_loss_tokens[i]:,} trained"
        others = int((tokens != sample.input_ids).sum())
        differing = f" ({others:,} on another token than stands there: shown is the label)" if others else ""
        console.print(Text(f"\nsample {i}, line {store.documents[i]}: {counts}{differing}", "bold"), soft_wrap=True)
        console.print(render(cut(decode, tokens.tolist(), is_target), has_colour), soft_wrap=True)


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
