"""The curves of `trainer report`: one SVG for each panel, which scales with the page and tells in words what it shows.

matplotlib is imported only where something is drawn. Text stays text, and no picture loads anything from elsewhere.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from trainer.errors import MissingPackageError

if TYPE_CHECKING:
    from trainer.cli.report import WrittenRun

PLACE = "place"  # of a line of metrics on the horizontal axis
WAITING = "waiting_share"  # of the time of a step; computed when a run is read
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
DASHES, MARKERS = ("-", "--", ":", "-."), "osD^vP*X"
PANEL_INCHES = (5.5, 2.6)
SETTINGS: Any = {
    "font.size": 9,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e5e5e5",
    "lines.linewidth": 1.0,
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
LOSS, LOSS_BY_SOURCE = "loss", "loss by source"
MAY_BE_LOGARITHMIC = {LOSS, LOSS_BY_SOURCE, TITLES["grad_norm"]}
WIDE = 10  # times the smallest value: from there on a logarithmic axis shows more
FEW, MANY = 50, 400  # steps: fewer are marked one by one; of more, means are drawn over them
CAPTION = f"Where there are more than {MANY} steps, each is drawn pale, and means of neighbours on top."
COUNTS = {
    *("step", PLACE, "epoch", "num_samples", "num_micro_batches", "num_loss_tokens", "num_tokens"),
    *("data_seconds", "step_seconds", "peak_memory_bytes", "seconds_left", "tflops_per_rank"),
}
COUNTS_OF_EVALUATIONS = ("_num_samples", "_num_loss_tokens", "_runtime", "_per_second")
NUMBERED = re.compile(r' id="[A-Za-z.0-9]+_\d+"')  # ids of matplotlib's parts, which nothing refers to


@dataclass(frozen=True)
class Panel:
    """Values that are drawn over each other: those of steps as lines, those of evaluations as points."""

    title: str
    names: list[str]


def is_number(value: Any) -> bool:
    """Return whether a value can be drawn; a metric may be anything."""
    return type(value) in (int, float) and math.isfinite(value)


def numbers(lines: Iterable[Mapping[str, Any]], name: str, at: str = PLACE) -> tuple[list[float], list[float]]:
    """Return (where, values) of the lines that hold a number of this name."""
    held = [(line[at], line[name]) for line in lines if is_number(line.get(name))]
    return [place for place, _ in held], [value for _, value in held]


def plan_panels(runs: Sequence[WrittenRun]) -> list[Panel]:
    """Choose the panels: all losses in the first, those of sources in the second, every other value in its own."""
    of_steps = _names(line for run in runs for line in run.steps)
    of_evaluations = _names(line for run in runs for line in run.evaluations)
    both = dict.fromkeys([*of_steps, *of_evaluations])
    losses = [LOSS, *(name for name in of_evaluations if name.endswith("_loss"))]
    by_source = [name for name in both if "loss/" in name]
    drawn = {*losses, *by_source, *COUNTS, *(name for name in of_evaluations if name.endswith(COUNTS_OF_EVALUATIONS))}
    if "tokens_per_second" in of_steps:
        drawn.add("samples_per_second")
    others = dict.fromkeys([*(name for name in TITLES if name in of_steps), *both])
    panels = [Panel(LOSS, losses)]
    if by_source:
        panels.append(Panel(LOSS_BY_SOURCE, by_source))
    return panels + [Panel(TITLES.get(name, name), [name]) for name in others if name not in drawn]


def _names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name, value in line.items() if is_number(value)))


def draw_panels(runs: Sequence[WrittenRun], x_label: str) -> list[str]:
    """Draw every panel as an SVG.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError.in_extra("trainer report needs the package matplotlib", "report") from error
    with matplotlib.rc_context(SETTINGS):
        return [_draw(panel, runs, x_label) for panel in plan_panels(runs)]


def _draw(panel: Panel, runs: Sequence[WrittenRun], x_label: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(PANEL_INCHES, layout="constrained")
    axes = figure.subplots()
    said = []
    for name_number, (name, marker) in enumerate(zip(panel.names, itertools.cycle(MARKERS))):
        for number, run in enumerate(runs):
            # One run has a colour for each value; several have one each, and dashes and markers tell values apart.
            label = "training" if name == LOSS else name
            colour, dashes = COLOURS[name_number % len(COLOURS)], DASHES[0]
            if len(runs) > 1:
                colour, dashes = COLOURS[number], DASHES[name_number % len(DASHES)]
                label = f"{run.name}: {label}" if len(panel.names) > 1 else run.name
            where, values = numbers(run.steps, name)
            if values:
                _draw_line(axes, where, values, colour, dashes, label)
                said.append(f"{label}, {len(values):,} steps from {values[0]:.4g} to {values[-1]:.4g}")
            where, values = numbers(run.evaluations, name)
            if values:
                axes.plot(where, values, marker, color=colour, markeredgecolor="black", label=label)
                said.append(f"{label}, {len(values):,} evaluations from {values[0]:.4g} to {values[-1]:.4g}")
    _finish(axes, panel, x_label)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    head, body = drawn[drawn.index("<svg ") + len("<svg ") :].split(">", 1)
    title = f"<title>{escape(panel.title)}</title><desc>{escape('; '.join(said))}</desc>"
    return f'<svg role="img" aria-label="{escape(panel.title)}" {head}>{title}{NUMBERED.sub("", body)}'


def _draw_line(
    axes: Any, where: Sequence[float], values: Sequence[float], colour: str, dashes: str, label: str
) -> None:
    if len(values) > MANY:
        axes.plot(where, values, color=colour, alpha=0.25)
    style = "." + dashes if len(values) < FEW else dashes
    axes.plot(_means(where), _means(values), style, color=colour, alpha=0.8, label=label)


def _means(values: Sequence[float]) -> list[float]:
    """Return the means of at most MANY stretches of equal length."""
    length = len(values) // (MANY + 1) + 1
    return [statistics.fmean(values[start : start + length]) for start in range(0, len(values), length)]


def _finish(axes: Any, panel: Panel, x_label: str) -> None:
    """Choose scale and ticks, and say what is what."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    drawn = [value for line in axes.lines for value in line.get_ydata()]
    if panel.title in MAY_BE_LOGARITHMIC and min(drawn, default=0) > 0 and max(drawn) > WIDE * min(drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "step"))
    if x_label != "step":
        axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlim(left=0)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(x_label, loc="right")
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if len(panel.names) > 1 or (panel.title == LOSS and len(by_label) > 1):
        axes.legend(by_label.values(), by_label.keys())
