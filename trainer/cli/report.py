"""`trainer report`: one HTML page about a run, or about several over each other.

In order: what runs have written, the figure, the page of tables and figure. Reads output folders and knows nothing of
training: a run may be going on, or have crashed. A resumed run cuts metrics.jsonl back to its checkpoint, so no step
stands there twice, and only what follows the last line break can be torn. All text is escaped, and the page loads
nothing from elsewhere.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from trainer.atomic import write_page
from trainer.checkpoint.manifest import PARAMETERS
from trainer.cli.parse import parse_alone, positional
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option
from trainer.errors import DataError, MissingPackageError, OutputError, UsageError
from trainer.training.run_dir import METRICS

WAITING = "waiting_share"  # computed here, for each step


@dataclass(frozen=True)
class WrittenRun:
    """What the files of a run hold."""

    name: str
    options: dict[str, Any]  # empty where training_params.json is missing
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def read_runs(folders: Sequence[Path]) -> list[WrittenRun]:
    """Read runs, each named by its folder as seen from what holds them all.

    Raises:
        UsageError: a folder is not that of a run that has taken a step.
        DataError: a file is damaged.
    """
    root = os.path.commonpath([folder.resolve().parent for folder in folders])
    return [_read_run(folder, str(folder.resolve().relative_to(root))) for folder in folders]


def is_number(value: Any) -> bool:
    """Return whether a value can be drawn; a metric may be anything."""
    return type(value) in (int, float) and math.isfinite(value)


def numbers(lines: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of the lines that hold a number of this name."""
    held = [(line["step"], line[name]) for line in lines if is_number(line.get(name))]
    return [step for step, _ in held], [value for _, value in held]


def waiting_share(steps: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the time of some steps that was spent waiting for their batches."""
    waited, busy = (sum(line[name] for line in steps) for name in ("data_seconds", "step_seconds"))
    return float(waited / (waited + busy))


def _read_run(folder: Path, name: str) -> WrittenRun:
    metrics, parameters = folder / METRICS, folder / PARAMETERS
    if not metrics.is_file():
        found = f"holds no {METRICS}" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {found}: name the output_dir of a run that has taken a step")
    whole = metrics.read_bytes().split(b"\n")[:-1]
    if not whole:
        raise UsageError(f"{metrics} holds no whole line yet: wait for the first step")
    lines = [_parse(text, metrics, number) for number, text in enumerate(whole, start=1)]
    return WrittenRun(
        name,
        _parse(parameters.read_bytes(), parameters) if parameters.exists() else {},
        [line | {WAITING: waiting_share([line])} for line in lines if "step_seconds" in line],
        [line for line in lines if "step_seconds" not in line],
    )


def _parse(text: bytes, path: Path, line: int | None = None) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise DataError(f"no JSON ({error})", "expected what a run writes there", path, line) from error
    return parsed


COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
MARKERS = "osD^vP*X"
COLUMNS, PANEL_INCHES = 2, (5.5, 2.4)
SETTINGS: Any = {
    "font.size": 8,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e5e5e5",
    "lines.linewidth": 0.8,
    "lines.markersize": 4,
    "lines.markeredgewidth": 0.5,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a name is a dollar
}
TITLES = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "samples_per_second": "samples per second",
    "mfu": "share of the GPU's nominal rate (MFU)",
    WAITING: "waiting for data, share of the step",
}
MAY_BE_LOGARITHMIC = {"loss", "grad_norm"}
WIDE = 10  # times the smallest value: from there on a logarithmic axis shows more
FEW, MANY = 50, 400  # steps: fewer are marked one by one; of more, means are drawn over them
CAPTION = f"Where there are more than {MANY} steps, each is drawn pale, and means of neighbours on top."
COUNTS = {
    *("step", "epoch", "num_samples", "num_micro_batches", "num_loss_tokens", "num_tokens"),
    *("data_seconds", "step_seconds", "peak_memory_bytes", "seconds_left", "tflops_per_rank"),
}
COUNTS_OF_EVALUATIONS = ("_num_samples", "_num_loss_tokens", "_runtime", "_per_second")


def draw_figure(runs: Sequence[WrittenRun]) -> str:
    """Draw all panels.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError.in_extra("trainer report needs the package matplotlib", "report") from error

    panels = plan_panels(runs)
    num_rows = -(-len(panels) // COLUMNS)
    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * num_rows), layout="constrained")
        places = list(figure.subplots(num_rows, COLUMNS, squeeze=False).flat)
        for axes, names in zip(places, panels, strict=False):
            _draw_steps(axes, names[0], runs)
            _draw_evaluations(axes, names, runs)
            _finish(axes, names)
        for axes in places[len(panels) :]:
            axes.remove()
        figure.savefig(file, format="svg")
    return file.getvalue()[file.getvalue().index("<svg") :]


def plan_panels(runs: Sequence[WrittenRun]) -> list[list[str]]:
    """Choose the panels, each as the names of its values: all losses in the first, every other value in its own."""
    of_steps = _names(line for run in runs for line in run.steps)
    of_evaluations = _names(line for run in runs for line in run.evaluations)
    losses = [name for name in of_evaluations if name.endswith("_loss")]
    drawn = {"loss", *losses, *COUNTS, *(name for name in of_evaluations if name.endswith(COUNTS_OF_EVALUATIONS))}
    if "tokens_per_second" in of_steps:
        drawn.add("samples_per_second")
    known = [name for name in TITLES if name in of_steps]
    names = dict.fromkeys([*known, *of_steps, *of_evaluations])
    return [["loss", *losses], *([name] for name in names if name not in drawn)]


def _names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name, value in line.items() if is_number(value)))


def _draw_steps(axes: Any, name: str, runs: Sequence[WrittenRun]) -> None:
    for run, colour in zip(runs, COLOURS, strict=False):
        steps, values = numbers(run.steps, name)
        if len(steps) > MANY:
            axes.plot(steps, values, color=colour, alpha=0.25)
        style = ".-" if len(steps) < FEW else "-"
        label = run.name if len(runs) > 1 else "training"
        axes.plot(_means(steps), _means(values), style, color=colour, alpha=0.8, label=label)


def _means(values: Sequence[float]) -> list[float]:
    """Return the means of at most MANY stretches of equal length."""
    length = len(values) // (MANY + 1) + 1
    return [statistics.fmean(values[start : start + length]) for start in range(0, len(values), length)]


def _draw_evaluations(axes: Any, names: Sequence[str], runs: Sequence[WrittenRun]) -> None:
    """Draw points, each name with its own marker."""
    for name, marker in zip(names, itertools.cycle(MARKERS)):
        for run, colour in zip(runs, COLOURS, strict=False):
            steps, values = numbers(run.evaluations, name)
            if steps:
                label = f"{run.name}: {name}" if len(runs) > 1 else name
                axes.plot(steps, values, marker, color=colour, markeredgecolor="black", label=label)


def _finish(axes: Any, names: Sequence[str]) -> None:
    """Choose scale and ticks, and say what is what."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    drawn = [value for line in axes.lines for value in line.get_ydata()]
    if names[0] in MAY_BE_LOGARITHMIC and min(drawn, default=0) > 0 and max(drawn) > WIDE * min(drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(TITLES.get(names[0], names[0]), loc="left")
    axes.set_xlabel("step", loc="right")
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if len(names) > 1 or (names[0] == "loss" and len(by_label) > 1):
        axes.legend(by_label.values(), by_label.keys())


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
    """Read, draw, write, say where; return the exit code."""
    options = parse_alone("trainer report", words, ReportOptions, "Draw runs.")
    if not 1 <= len(options.folders) <= len(COLOURS):
        raise UsageError(
            f"{len(options.folders)} folders given: name the output_dir of 1 to {len(COLOURS)} runs, as many as there "
            "are colours to tell apart"
        )
    page = render_page(read_runs(options.folders))
    path = options.output or options.folders[0] / "report.html"
    try:
        write_page(path, page)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    print(path)
    return 0


def render_page(runs: Sequence[WrittenRun]) -> str:
    """Return the page as HTML."""
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
