"""The figure of `trainer report`: panels over steps, one colour a run, as one SVG element.

Knows which values of a step have a panel of their own; whatever else a run measured gets one too, under its name.
Steps are lines, evaluations are points.
"""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.cli.report_runs import WAITING, WrittenRun, is_number, numbers
from trainer.errors import MissingPackageError

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
    WAITING: "waiting for data, share of the step",
}
MAY_BE_LOGARITHMIC = {"loss", "grad_norm"}
WIDE = 10  # times the smallest value: from there on a logarithmic axis shows more
FEW, MANY = 50, 400  # steps: fewer are marked one by one; of more, means are drawn over them
CAPTION = f"Where there are more than {MANY} steps, each is drawn pale, and means of neighbours on top."
COUNTS = {
    *("step", "epoch", "num_samples", "num_micro_batches", "num_loss_tokens", "num_tokens"),
    *("data_seconds", "step_seconds", "peak_memory_bytes"),
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
        axes.plot(_means(steps), _means(values), style, color=colour, alpha=0.8, label="training")


def _means(values: Sequence[float]) -> list[float]:
    """Give the means of at most MANY stretches of equal length."""
    length = len(values) // (MANY + 1) + 1
    return [statistics.fmean(values[start : start + length]) for start in range(0, len(values), length)]


def _draw_evaluations(axes: Any, names: Sequence[str], runs: Sequence[WrittenRun]) -> None:
    """Draw points, each name with its own marker."""
    for name, marker in zip(names, itertools.cycle(MARKERS)):
        for run, colour in zip(runs, COLOURS, strict=False):
            steps, values = numbers(run.evaluations, name)
            if steps:
                axes.plot(steps, values, marker, color=colour, markeredgecolor="black", label=name)


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
    if len(names) > 1:
        handles, labels = axes.get_legend_handles_labels()
        by_label = dict(zip(labels, handles, strict=True))
        axes.legend(by_label.values(), by_label.keys())
