"""Contenders side by side: each in a process of its own, in turn, several rounds; medians, and ratios to the first.

Owns how things are compared, not what: a contender is a command that prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Measured = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[1]


def command_line(about: str | None, contenders: Collection[str]) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[*contenders], default=[*contenders])
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON of every round, for plot_peers.py")
    return parser


def compare(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Measured]]:
    """Run every contender once in each round; one that fails is reported and left out from then on."""
    results: dict[str, list[Measured]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in [name for name, runs in results.items() if len(runs) == number]:
            measured = run(name, commands[name])
            if "failed" not in measured:
                results[name].append(measured)
    return {name: runs for name, runs in results.items() if len(runs) == rounds}


def run(name: str, command: Sequence[str], limit_seconds: float = 1800) -> Measured:
    """Run one contender; gives what it measured, or why it `failed`."""
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_seconds,
        )
    except subprocess.TimeoutExpired:
        measured: Measured = {"failed": f"not done within {limit_seconds:.0f} s"}
    else:
        measured = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else _failure(done.stderr)
    print(name, measured, file=sys.stderr)
    return measured


def _failure(said: str) -> Measured:
    """Why a contender failed, from what it said."""
    if "OutOfMemoryError" in said or "not enough memory" in said:
        return {"failed": "out of memory"}
    return {"failed": said[-1500:]}


def report(
    options: argparse.Namespace,
    title: str,
    results: Mapping[str, list[Measured]],
    measure: str,
    others: Sequence[str] = (),
    *,
    is_cost: bool = False,
) -> None:
    """Print the table, and write all that was measured where `--output` says."""
    print(f"{title}, {options.rounds} rounds; {versions('tokenizers', 'trl', 'rhai-innovation-mini-trainer')}\n")
    print(table(results, measure, others, is_cost=is_cost))
    if options.output is not None:
        whole = {"title": title, "measure": measure, "is_cost": is_cost, "results": results}
        options.output.write_text(json.dumps(whole, indent=1) + "\n")


def table(
    results: Mapping[str, list[Measured]], measure: str, others: Sequence[str] = (), *, is_cost: bool = False
) -> str:
    """A Markdown table: medians of `measure` and `others`, and how many times the first is ahead.

    More is better, unless the measure is a cost.
    """
    first = next(iter(results))
    lines = [f"| contender | {measure} | {first} is ahead | {' | '.join(others)} |", "|---" * (3 + len(others)) + "|"]
    for name, runs in results.items():
        cells = [f"{statistics.median(run[key] for run in runs):,.1f}" for key in (measure, *others)]
        ahead = statistics.median(times_ahead(results[first], runs, measure, is_cost=is_cost))
        lines.append(f"| {name} | {cells[0]} | {ahead:.2f} times | {' | '.join(cells[1:])} |")
    return "\n".join(lines)


def times_ahead(
    first: Sequence[Measured], second: Sequence[Measured], measure: str, *, is_cost: bool = False
) -> list[float]:
    """How many times the first is ahead of the second, in each round: what slows the machine in one slows both."""
    ratios = (a[measure] / b[measure] for a, b in zip(first, second, strict=True))
    return [1 / ratio if is_cost else ratio for ratio in ratios]


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
