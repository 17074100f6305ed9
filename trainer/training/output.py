"""The output folder of a run: what it holds, and that two runs never mix in it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from trainer.arguments.training import TrainingArguments
from trainer.distributed.group import Group
from trainer.errors import UsageError

PARAMETERS, METRICS, WEIGHTS = "training_params.json", "metrics.jsonl", "hf_format"


def open_output_dir(args: TrainingArguments, group: Group, *, keeps_older: bool = False) -> None:
    """Make the folder and write the configuration into it, on the lead rank; the others wait.

    Args:
        args: which folder, and what is written.
        group: all ranks; they call together.
        keeps_older: put the metrics of a run that is there already aside, under a number, instead of refusing.

    Raises:
        UsageError: it cannot be written, or holds a run already and `overwrite_output_dir` is not set.
    """
    problem = _open(Path(args.output_dir), args, keeps_older) if group.is_lead else None
    if group.any(problem is not None):
        raise UsageError(problem or "the lead rank could not open output_dir")


def _open(folder: Path, args: TrainingArguments, keeps_older: bool) -> str | None:
    """Open the folder; gives what is wrong with it, so that all ranks can stop together."""
    try:
        if (folder / METRICS).exists():
            if keeps_older and not args.overwrite_output_dir:
                _set_aside(folder / METRICS)
            elif not args.overwrite_output_dir:
                return (
                    f"output_dir = {args.output_dir!r} holds a run already: choose another, or set overwrite_output_dir"
                )
            else:
                _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PARAMETERS).write_text(args.to_json(), encoding="utf-8")
    except OSError as error:
        return f"output_dir = {args.output_dir!r} cannot be written: {error}"
    return None


def _set_aside(metrics: Path) -> None:
    """metrics.jsonl -> metrics.1.jsonl, or the first number that is free."""
    number = next(n for n in itertools.count(1) if not metrics.with_suffix(f".{n}.jsonl").exists())
    metrics.rename(metrics.with_suffix(f".{number}.jsonl"))


def _remove_run(folder: Path) -> None:
    for name in (METRICS, PARAMETERS):
        (folder / name).unlink(missing_ok=True)
    if (folder / WEIGHTS).exists():
        shutil.rmtree(folder / WEIGHTS)
