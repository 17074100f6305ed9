"""`trainer report`: one HTML page about a run, or about several over each other.

In order: the command, what runs have written, the page. Reads output folders and knows nothing of training: a run may
be going on, or have crashed. A resumed run cuts metrics.jsonl back to its checkpoint, so no step stands there twice,
and only what follows the last line break can be torn. All text is escaped, and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from trainer.atomic import write_page
from trainer.checkpoint.manifest import PARAMETERS
from trainer.cli.figures import CAPTION, COLOURS, PLACE, WAITING, draw_panels, numbers
from trainer.cli.parse import parse_alone, positional
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option
from trainer.errors import DataError, OutputError, UsageError
from trainer.training.run_dir import ANSWERS, ENVIRONMENT, METRICS

SECONDS_BETWEEN_LOOKS = 2.0
X_AXES: dict[str, tuple[tuple[str, ...], float, str]] = {  # what lines add, in what unit, what stands under the axis
    "steps": ((), 1, "step"),
    "tokens": (("num_tokens",), 1, "tokens"),
    "samples": (("num_samples",), 1, "samples"),
    "time": (("data_seconds", "step_seconds"), 60, "minutes of training"),
}
MOST_ANSWERS = 20  # of a run on the page


@dataclass
class ReportOptions:
    """Draw one run, or several over each other, as an HTML page."""

    folders: list[Path] = positional("The output_dir of each run.")
    output: Path | None = option(None, "The file to write; report.html in the first folder if unset.")
    x: Literal["steps", "tokens", "samples", "time"] = option("steps", "What curves are drawn over.")
    watch: bool = option(False, "Write the page anew as runs go on, until Ctrl-C; an open page loads itself again.")


def run(words: Sequence[str]) -> int:
    """Read, draw, write, say where; return the exit code."""
    options = parse_alone("trainer report", words, ReportOptions)
    if not 1 <= len(options.folders) <= len(COLOURS):
        raise UsageError(
            f"{len(options.folders)} folders given: name the output_dir of 1 to {len(COLOURS)} runs, as many as there "
            "are colours to tell apart"
        )
    for folder in options.folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder: name the output_dir of a run that has taken a step")
    path = options.output or options.folders[0] / "report.html"
    if options.watch:
        _watch(options, path)
    else:
        _write(options, path)
        print(path)
    return 0


def _write(options: ReportOptions, path: Path) -> None:
    """Read the runs and write their page."""
    page = render_page(read_runs(options.folders, options.x), X_AXES[options.x][2], is_watched=options.watch)
    try:
        write_page(path, page)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def _watch(options: ReportOptions, path: Path) -> None:
    """Write the page whenever a run has written more, until someone interrupts."""
    seen: list[int] | None = None  # whole lines of each run's metrics
    try:
        while True:
            files = [folder / METRICS for folder in options.folders]
            counts = [file.read_bytes().count(b"\n") if file.is_file() else 0 for file in files]
            if counts != seen and 0 not in counts:
                _write(options, path)
                if seen is None or 0 in seen:
                    print(f"{path}\nwritten anew as the runs go on; Ctrl-C ends this", flush=True)
            elif counts != seen:
                print("waits for the first step", flush=True)
            seen = counts
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        return


@dataclass(frozen=True)
class WrittenRun:
    """What the files of a run hold."""

    name: str
    options: dict[str, Any]  # empty where training_params.json is missing
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    answers: list[dict[str, Any]]  # of all evaluations in order
    environment: dict[str, Any]  # where it ran; empty where nothing says so


def read_runs(folders: Sequence[Path], x: str = "steps") -> list[WrittenRun]:
    """Read runs, each named by its folder as seen from what holds them all.

    Args:
        folders: the output_dir of each.
        x: which of `X_AXES` the lines are placed by.

    Raises:
        UsageError: a folder is not that of a run that has taken a step, or its lines do not count what `x` needs.
        DataError: a file is damaged.
    """
    root = os.path.commonpath([folder.resolve().parent for folder in folders])
    return [_read_run(folder, str(folder.resolve().relative_to(root)), x) for folder in folders]


def waiting_share(steps: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the time of some steps that was spent waiting for their batches."""
    waited, busy = (sum(line[name] for line in steps) for name in ("data_seconds", "step_seconds"))
    return float(waited / (waited + busy))


def _read_run(folder: Path, name: str, x: str) -> WrittenRun:
    metrics = folder / METRICS
    if not metrics.is_file():
        raise UsageError(f"{folder} holds no {METRICS}: name the output_dir of a run that has taken a step")
    lines = _read_lines(metrics)
    if not lines:
        raise UsageError(f"{metrics} holds no whole line yet: wait for the first step")
    added, per_unit, _ = X_AXES[x]
    total = 0.0
    for line in lines:
        total += sum(line.get(each, 0) for each in added)
        line[PLACE] = line.get("step", 0) if x == "steps" else total / per_unit
        if "step_seconds" in line:
            line[WAITING] = waiting_share([line])
    if added and total == 0:
        raise UsageError(f"x = {x!r}: the lines of {metrics} hold no {' and '.join(added)}; draw over steps")
    return WrittenRun(
        name,
        _read_object(folder / PARAMETERS),
        [line for line in lines if "step_seconds" in line],
        [line for line in lines if "step_seconds" not in line],
        _read_lines(folder / ANSWERS),
        _read_object(folder / ENVIRONMENT),
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file; none where there is no file."""
    whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [_parse(text, path, number) for number, text in enumerate(whole, start=1)]


def _read_object(path: Path) -> dict[str, Any]:
    return _parse(path.read_bytes(), path) if path.is_file() else {}


def _parse(text: bytes, path: Path, line: int | None = None) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise DataError(f"no JSON ({error})", "expected what a run writes there", path, line) from error
    return parsed


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
    ("median TFLOP/s of a rank", "tflops_per_rank", statistics.median, "{:.3g}"),
    ("median MFU", "mfu", statistics.median, "{:.1%}"),
    ("peak memory", "peak_memory_bytes", lambda values: max(values) / 2**30, "{:.2f} GiB"),
)
STYLE = (
    "body{font:14px sans-serif;margin:2em;color:#222;overflow-wrap:anywhere}"
    "table{border-collapse:collapse;margin:1em 0}"
    "th,td{padding:2px 12px;border-bottom:1px solid #ddd;text-align:right;max-width:30em;overflow-wrap:anywhere}"
    "th{overflow-wrap:normal}th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}"
    ".wide{overflow-x:auto}.panels{display:grid;gap:1em;grid-template-columns:repeat(auto-fit,minmax(min(100%,27em),1fr))}"
    ".panels svg{width:100%}.differs td{font-weight:bold}.answers td{text-align:left;vertical-align:top;"
    "white-space:pre-wrap}summary{cursor:pointer;font-weight:bold}@media(max-width:600px){body{margin:1em}"
    "th,td{padding:2px 6px}}"
)
REFRESH = '<meta http-equiv="refresh" content="5">'


def render_page(runs: Sequence[WrittenRun], x_label: str = "step", *, is_watched: bool = False) -> str:
    """Return the page as HTML."""
    title = escape(", ".join(run.name for run in runs))
    headings = [
        f'<span style="color:{colour}">&#9632;</span> {escape(run.name)}'
        for run, colour in zip(runs, COLOURS, strict=False)
    ]
    if len(runs) == 1:
        headings = [title]
    summaries = [(heading, summarise(run)) for heading, run in zip(headings, runs, strict=True)]
    options = [(heading, run.options) for heading, run in zip(headings, runs, strict=True) if run.options]
    environments = [(heading, _flat(run.environment)) for heading, run in zip(headings, runs, strict=True)]
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"{REFRESH * is_watched}<style>{STYLE}</style></head>\n<body><h1>{title}</h1>",
        _table(summaries),
        '<div class="panels">',
        *draw_panels(runs, x_label),
        f"</div>\n<p>{CAPTION}</p>",
        _table(_differing(options)),
        *(_answers(run) for run in runs),
    ]
    if table := _table(environments, marks=True):
        parts.append(f"<details><summary>Where it ran</summary>\n{table}</details>")
    return "\n".join([*(part for part in parts if part), "</body></html>\n"])


def summarise(run: WrittenRun) -> dict[str, str]:
    """Return the numbers of a run, over the steps in its file."""
    held = {row: (numbers(run.steps, name)[1], choose, form) for row, name, choose, form in NUMBERS}
    rows = {row: form.format(choose(values)) for row, (values, choose, form) in held.items() if values}
    if run.steps:
        rows["waiting for data"] = f"{waiting_share(run.steps):.1%} of the time"
    if num_skipped := sum("is_skipped" in line for line in run.steps):
        rows["skipped steps"] = f"{num_skipped:,}"
    return rows | _best_evaluation(run)


def _best_evaluation(run: WrittenRun) -> dict[str, str]:
    """Return the best value of the metric that the run chooses by."""
    name = "eval_" + run.options.get("metric_for_best_model", "loss").removeprefix("eval_")
    steps, values = numbers(run.evaluations, name, at="step")
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


def _answers(run: WrittenRun) -> str:
    """Write the answers of the last evaluation beside those of the one before."""
    steps = sorted({line["step"] for line in run.answers})
    if not steps:
        return ""
    last, former = steps[-1], steps[-2] if len(steps) > 1 else None
    before = {line["sample"]: line["answer"] for line in run.answers if line["step"] == former}
    rows = [line for line in run.answers if line["step"] == last]
    scores = [name for name in rows[0] if name not in ("step", "sample", "question", "reference", "answer")]
    heads = ["sample", "question", "reference", f"answer at step {last:,}", *scores]
    if former is not None:
        heads.insert(3, f"answer at step {former:,}")
    cells = []
    for line in rows[:MOST_ANSWERS]:
        row = [line["sample"], line["question"], line["reference"], line["answer"], *map(line.get, scores)]
        if former is not None:
            row.insert(3, before.get(line["sample"], ""))
        cells.append("".join(f"<td>{escape(str(cell))}</td>" for cell in row))
    left_out = f" (the first {MOST_ANSWERS} of {len(rows):,})" if len(rows) > MOST_ANSWERS else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in (head, *cells))
    return (
        f'<h2>Answers of {escape(run.name)}{left_out}</h2>\n<div class="wide answers"><table>\n{body}\n</table></div>'
    )


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values by names such as packages.torch, as text."""
    found: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return found


def _table(columns: Sequence[Column], *, marks: bool = False) -> str:
    """Write a table; nothing where it would have no rows. `marks` sets off the rows in which columns differ."""
    names = dict.fromkeys(name for _, cells in columns for name in cells)
    rows = []
    for name in names:
        row = [cells.get(name, "") for _, cells in columns]
        mark = ' class="differs"' if marks and len(set(row)) > 1 else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(text)}</td>" for text in (name, *row)) + "</tr>")
    head = "".join(f"<th>{heading}</th>" for heading in ("", *(heading for heading, _ in columns)))
    body = "\n".join([f"<tr>{head}</tr>", *rows])
    return f'<div class="wide"><table>\n{body}\n</table></div>' if rows else ""
