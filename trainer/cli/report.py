"""`trainer report`: one HTML page about a run, or about several over each other.

Owns the page: a table of numbers, one of options, the figure. What a run has not written gets no row. All text is
escaped, and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from trainer.cli.parse import parse_alone, positional
from trainer.cli.report_figure import CAPTION, COLOURS, draw_figure
from trainer.cli.report_runs import WrittenRun, numbers, read_runs, waiting_share
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option
from trainer.errors import OutputError, UsageError

Column = tuple[str, Mapping[str, Any]]  # its heading as HTML, and its cells by the name of their row
NUMBERS: tuple[tuple[str, str, Callable[[list[float]], float], str], ...] = (  # row, value, which of all, how written
    ("last step", "step", max, "{:,}"),
    ("epochs", "epoch", max, "{:.4g}"),
    ("samples", "num_samples", sum, "{:,}"),
    ("loss tokens", "num_loss_tokens", sum, "{:,}"),
    ("last loss", "loss", lambda values: values[-1], "{:.5g}"),
    ("lowest loss", "loss", min, "{:.5g}"),
    ("median tokens per second", "tokens_per_second", statistics.median, "{:,.0f}"),
    ("median samples per second", "samples_per_second", statistics.median, "{:,.1f}"),
    ("peak memory", "peak_memory_bytes", lambda values: max(values) / 2**30, "{:.2f} GiB"),
)
STYLE = (
    "body{font:14px sans-serif;margin:2em;color:#222}table{border-collapse:collapse;margin:1em 0}"
    "th,td{padding:2px 12px;border-bottom:1px solid #ddd;text-align:right;max-width:30em;overflow-wrap:anywhere}"
    "th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}"
)


@dataclass
class ReportOptions:
    """Draw runs."""

    folders: list[Path] = positional("The output_dir of each run.")
    output: Path | None = option(None, "The file to write; report.html in the first folder if unset.")


def run(words: Sequence[str]) -> int:
    """Read, draw, write, say where; give the exit code."""
    options = parse_alone("trainer report", words, ReportOptions, "Draw runs.")
    if not 1 <= len(options.folders) <= len(COLOURS):
        raise UsageError(
            f"{len(options.folders)} folders given: name the output_dir of 1 to {len(COLOURS)} runs, as many as there "
            "are colours to tell apart"
        )
    page = render_page(read_runs(options.folders))
    path = options.output or options.folders[0] / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    print(path)
    return 0


def render_page(runs: Sequence[WrittenRun]) -> str:
    """Give the page as HTML."""
    title = escape(", ".join(run.name for run in runs))
    headings = [
        f'<span style="color:{colour}">&#9632;</span> {escape(run.name)}'
        for run, colour in zip(runs, COLOURS, strict=False)
    ]
    summaries = [(heading, summarise(run)) for heading, run in zip(headings, runs, strict=True)]
    options = [(heading, run.options) for heading, run in zip(headings, runs, strict=True) if run.options]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{_table(summaries)}\n{draw_figure(runs)}\n"
        f"<p>{CAPTION}</p>\n{_table(_differing(options))}\n</body></html>\n"
    )


def summarise(run: WrittenRun) -> dict[str, str]:
    """Give the numbers of a run, over the steps in its file."""
    held = {row: (numbers(run.steps, name)[1], choose, form) for row, name, choose, form in NUMBERS}
    rows = {row: form.format(choose(values)) for row, (values, choose, form) in held.items() if values}
    if run.steps:
        rows["waiting for data"] = f"{waiting_share(run.steps):.1%} of the time"
    if num_skipped := sum("is_skipped" in line for line in run.steps):
        rows["skipped steps"] = f"{num_skipped:,}"
    return rows | _best_evaluation(run)


def _best_evaluation(run: WrittenRun) -> dict[str, str]:
    """Give the best value of the metric that the run chooses by."""
    name = "eval_" + run.options.get("metric_for_best_model", "loss").removeprefix("eval_")
    steps, values = numbers(run.evaluations, name)
    if not values:
        return {}
    best = (max if run.options.get("greater_is_better") else min)(values)
    return {f"best {name}": f"{best:.5g} (step {steps[values.index(best)]:,})"}


def _differing(columns: Sequence[Column]) -> list[Column]:
    """Keep the options that several runs do not share, or that one run has not left at their defaults."""
    if len(columns) == 1:
        columns = [*columns, ("default", TrainingArguments().to_dict())]
    written = [(heading, {name: json.dumps(value) for name, value in cells.items()}) for heading, cells in columns]
    names = sorted({name for _, cells in written for name in cells} - {"output_dir"})
    differ = [name for name in names if len({cells.get(name) for _, cells in written}) > 1]
    return [(heading, {name: cells[name] for name in differ if name in cells}) for heading, cells in written]


def _table(columns: Sequence[Column]) -> str:
    """Write a table; nothing where it would have no rows."""
    names = dict.fromkeys(name for _, cells in columns for name in cells)
    rows = [
        "".join(f"<td>{escape(text)}</td>" for text in (name, *(cells.get(name, "") for _, cells in columns)))
        for name in names
    ]
    head = "".join(f"<th>{heading}</th>" for heading in ("", *(heading for heading, _ in columns)))
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in (head, *rows)) + "\n</table>" if rows else ""
