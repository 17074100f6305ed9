"""What runs have written so far, for `trainer report`: options, steps, evaluations.

Reads output folders and knows nothing of training: a run may be going on, or have crashed. No step stands in
metrics.jsonl twice, for a resumed run cuts the file back to its checkpoint; only what follows the last line break can
be torn.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import PARAMETERS
from trainer.errors import DataError, UsageError
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
    """Whether a value can be drawn; a metric may be anything."""
    return type(value) in (int, float) and math.isfinite(value)


def numbers(lines: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Give (steps, values) of the lines that hold a number of this name."""
    held = [(line["step"], line[name]) for line in lines if is_number(line.get(name))]
    return [step for step, _ in held], [value for _, value in held]


def waiting_share(steps: Sequence[Mapping[str, Any]]) -> float:
    """Give the share of the time of some steps that went by before their batches had come."""
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
