"""TRL's masks (`assistant_only_loss`) beside the trainer's, for each template that TRL ships with one for training.

TRL takes the marks of its training template; the trainer is given the original. What they train otherwise is told apart
by its cause.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from tests.template_masks import Case, files_of
from tests.template_oracle import CONTROL, END, as_written, shapes, words_of
from trainer.data.chat import TemplateError

CAUSES = {
    "equal": "the same text is trained",
    "space": "TRL also trains the newline behind the end of a turn, which is never generated",
    "header": "TRL also trains what the generation prompt gives, such as an opened or empty reasoning",
    "history": "TRL trains an earlier turn as a chat that goes on shows it; here it is trained as it is generated",
    "other text": "TRL's template for training writes the turn otherwise than the original (parts and JSON as code)",
    "no end": "TRL trains no token that ends a turn",
    "words lost": "TRL trains a turn without words that the template drops; refused here",
    "only TRL": "the original refuses the chat or drops words of it, TRL's for training does not; refused here",
    "only here": "TRL's template for training refuses the chat",
    "neither": "both refuse the chat",
    "refused here": "the original shows all words and the end of each turn, TRL trains them, and they are refused here",
    "unexplained": "anything else",
}
"""Outcomes and what they mean; the last two must not occur."""


def training_templates(folder: Path) -> dict[str, tuple[str, str]]:
    """Return by name each template of TRL's package that has one for training, with that."""
    texts = {}
    for path in sorted(folder.glob("trl-*.whl")):
        texts |= {Path(name).stem: raw.decode() for name, raw in files_of(path) if name.endswith(".jinja")}
    pairs = {name: (text, texts.get(f"{name}_training", "")) for name, text in texts.items()}
    return {name: pair for name, pair in sorted(pairs.items()) if pair[1]}


def compare(case: Case, training: str, chat: dict[str, Any]) -> tuple[str, str]:
    """Say how a chat is trained here and by TRL: a cause, and an example."""
    messages, tools = chat["messages"], chat.get("tools")
    words = [word for message in messages if message["role"] == "assistant" for word in words_of(message)]
    text, theirs = _marked(training, case.oracle.special, chat)
    trained = "".join(theirs)
    try:
        samples = case.finder.samples(messages, tools)
    except TemplateError as error:
        if text is None:
            return "neither", str(error)
        if not all(as_written(word, trained) for word in words):
            return "words lost", str(error)
        return ("refused here" if case.oracle.can_mask(messages, tools) else "only TRL"), str(error)
    if text is None:
        return "only here", ""
    ours = [sample.text[start:stop] for sample in samples for start, stop in sample.spans]
    found = f"{trained!r} beside {ours!r}"
    ended = "".join(span.rstrip() for span in theirs)
    if trained == "".join(ours):
        return "equal", found
    if ended == "".join(ours):
        return "space", found
    if not all(as_written(word, ended) for word in words):
        return "words lost", found
    if sum(sample.num_closed_turns for sample in samples):
        return "no end", found
    rest, is_more = ended, False
    for span in ours:
        before, is_held, rest = rest.partition(span)
        is_more = is_more or not is_held or bool(re.search(r"\w\W*\s\W*\w", CONTROL.sub("", before)))
    if not is_more:
        return "header", found
    as_code = any(code in trained for code in ("'type': 'text'", '"type": "text"', '\\"'))
    if as_code or text != case.oracle.render(messages, tools):
        return "other text", found
    if not all(span in text for span in ours):
        return "history", found
    return ("no end" if END.sub("", ended) == END.sub("", "".join(ours)) else "unexplained"), found


def _marked(training: str, special: dict[str, str], chat: dict[str, Any]) -> tuple[str | None, list[str]]:
    """Return the chat as TRL's template writes it, None if that refuses it, and what is marked of it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"tools": chat.get("tools"), "return_assistant_tokens_mask": True, **special}
    try:
        texts, marks = render_jinja_template([chat["messages"]], chat_template=training, **options)
    except Exception:  # noqa: BLE001  a template may raise anything
        return None, []
    return texts[0], [texts[0][start:stop] for start, stop in marks[0]]


def compare_all(folder: Path) -> tuple[str, int]:
    """Return the comparison as a table by template, and the number of cases that must not be."""
    causes = list(CAUSES)
    lines = [f"| template of TRL | {' | '.join(causes)} |", "| --- |" + " ---: |" * len(causes)]
    totals: Counter[str] = Counter()
    for name, (original, training) in training_templates(folder).items():
        case = Case(original, "byte-level")
        counts: Counter[str] = Counter()
        for shape, chat in shapes().items():
            cause, found = compare(case, training, chat)
            counts[cause] += 1
            if cause in ("refused here", "unexplained"):
                print(f"{cause}: {name} · {shape}: {found[:400]}", flush=True)
        totals += counts
        lines.append(f"| {name} | {' | '.join(str(counts[cause] or '') for cause in causes)} |")
    lines.append(f"| all | {' | '.join(str(totals[cause] or '') for cause in causes)} |")
    return "\n".join(lines), totals["refused here"] + totals["unexplained"]
