"""Contenders side by side: each in a process of its own, in turn, several rounds; medians, and ratios to the first.

Owns how things are compared, not what: a contender is a command that prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Measured = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[1]


def compare(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Measured]]:
    """Run every contender once in each round; one that fails is reported and left out from then on."""
    results: dict[str, list[Measured]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in [name for name, runs in results.items() if len(runs) == number]:
            measured = run(name, commands[name])
            if measured is not None:
                results[name].append(measured)
    return {name: runs for name, runs in results.items() if len(runs) == rounds}


def run(name: str, command: Sequence[str]) -> Measured | None:
    """Run one contender; gives what it measured, or None if it failed."""
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=1800
    )
    if done.returncode != 0:
        print(f"{name} failed:\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    print(name, measured, file=sys.stderr)
    return measured


def table(results: Mapping[str, list[Measured]], rate: str, others: Sequence[str] = ()) -> str:
    """A Markdown table: medians of `rate` (more is better) and `others`, and how many times the first is ahead."""
    first = next(iter(results))
    ahead = {name: paired_ratio(results[first], runs, rate) for name, runs in results.items()}
    lines = [f"| contender | {rate} | {first} is ahead | {' | '.join(others)} |", "|---" * (3 + len(others)) + "|"]
    for name, runs in results.items():
        cells = [f"{statistics.median(run[key] for run in runs):,.0f}" for key in (rate, *others)]
        lines.append(f"| {name} | {cells[0]} | {ahead[name]:.2f} times | {' | '.join(cells[1:])} |")
    return "\n".join(lines)


def paired_ratio(first: Sequence[Measured], second: Sequence[Measured], rate: str) -> float:
    """The median over rounds of first / second: what slows the machine in a round slows both."""
    return statistics.median(a[rate] / b[rate] for a, b in zip(first, second, strict=True))


def versions(*packages: str) -> str:
    """Name the machine and the packages compared."""
    names = ("torch", "transformers", *packages)
    found = [f"{name} {metadata.version(name)}" for name in names if _is_installed(name)]
    return f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, {', '.join(found)}"


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
