"""Pictures of comparisons: `python benchmarks/plot_peers.py STEP.json LOADER.json ... --plot docs/images/peers.png`.

Each file, written by a comparison's `--output`, gets a panel: how many times the first contender is ahead of each, as
a bar for the median and a dot for every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from compare import times_ahead

COLUMNS, PANEL_INCHES = 2, (5.5, 2.2)
LEFT_OF_ONE = 0.9  # where axes begin at the latest: a bar is read from 1
TICKS = (0.2, 0.5, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100)


def draw(axes: Any, comparison: dict[str, Any]) -> None:
    """One comparison, the first contender on top."""
    results = comparison["results"]
    first, *others = results
    for place, name in enumerate(others):
        ahead = times_ahead(results[first], results[name], comparison["measure"], is_cost=comparison["is_cost"])
        axes.barh(place, statistics.median(ahead) - 1, left=1, color="tab:blue", alpha=0.6)
        axes.plot(ahead, [place] * len(ahead), "k.", markersize=3)
        # In a column beside the frame, where no dot is.
        axes.text(1.01, place, f"{statistics.median(ahead):.1f}", va="center", transform=axes.get_yaxis_transform())
    axes.set(title=comparison["title"], xscale="log", xlabel=f"times that {first} is ahead")
    axes.set_yticks(range(len(others)), others)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.1)
    least, most = axes.get_xlim()
    axes.set_xlim(min(least, LEFT_OF_ONE), max(most, 1 / LEFT_OF_ONE))
    least, most = axes.get_xlim()
    axes.set_xticks([tick for tick in TICKS if least <= tick <= most], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def main() -> None:
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, required=True)
    options = parser.parse_args()
    rows = -(-len(options.files) // COLUMNS)
    size = (PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes, file in zip(panels.flat, options.files, strict=False):
        draw(axes, json.loads(file.read_text()))
    for axes in panels.flat[len(options.files) :]:
        axes.remove()
    figure.savefig(options.plot)


if __name__ == "__main__":
    main()
