"""The output folder of a run: what it holds, and that two runs never mix in it."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from pathlib import Path

from trainer.arguments.training import TrainingArguments
from trainer.checkpoint import manifest
from trainer.distributed.group import Group
from trainer.errors import CheckpointError, UsageError

PARAMETERS, METRICS, WEIGHTS = "training_params.json", "metrics.jsonl", "hf_format"


logger = logging.getLogger(__name__)


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


def continue_output_dir(args: TrainingArguments, group: Group, metrics_bytes: int | None, step: int) -> None:
    """Open the folder for a run that goes on after a step: what it wrote after that step is cut off and removed.

    Args:
        args: which folder, and what is written.
        group: all ranks; they call together.
        metrics_bytes: of metrics.jsonl when the checkpoint was written.
        step: the step after which that was.

    Raises:
        CheckpointError: the lead rank could not, or metrics.jsonl is shorter than it was.
    """
    _, error = group.try_on_lead(
        lambda: _continue(Path(args.output_dir), args, metrics_bytes or 0, step), OSError, CheckpointError
    )
    if (said := group.first_error(error)) is not None:
        raise CheckpointError(f"output_dir = {args.output_dir!r} cannot be gone on with: {said}") from error


def _continue(folder: Path, args: TrainingArguments, metrics_bytes: int, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / manifest.FOLDER
    for later in manifest.list_checkpoints(checkpoints):
        if manifest.step_of(later) > step:
            logger.warning("removed %s: the run goes on from step %d", later.name, step)
            manifest.remove(later)
    manifest.remove_leftovers(checkpoints)
    metrics = folder / METRICS
    if metrics.exists():
        if metrics.stat().st_size < metrics_bytes:
            raise CheckpointError(
                f"{METRICS} has {metrics.stat().st_size} bytes, {metrics_bytes} when the checkpoint was written: bring "
                "it back, or move it away to begin a new one"
            )
        os.truncate(metrics, metrics_bytes)
    (folder / PARAMETERS).write_text(args.to_json_string(), encoding="utf-8")


def _open(folder: Path, args: TrainingArguments, keeps_older: bool) -> str | None:
    """Open the folder; gives what is wrong with it, so that all ranks can stop together."""
    try:
        if (folder / METRICS).exists() or manifest.list_checkpoints(folder / manifest.FOLDER):
            if keeps_older and not args.overwrite_output_dir:
                _set_aside(folder / METRICS)
                _set_aside(folder / manifest.FOLDER)
            elif not args.overwrite_output_dir:
                return (
                    f"output_dir = {args.output_dir!r} holds a run already: choose another, or set overwrite_output_dir"
                )
            else:
                _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        manifest.remove_leftovers(folder / manifest.FOLDER)
        (folder / PARAMETERS).write_text(args.to_json_string(), encoding="utf-8")
    except OSError as error:
        return f"output_dir = {args.output_dir!r} cannot be written: {error}"
    return None


def _set_aside(path: Path) -> None:
    """metrics.jsonl -> metrics.1.jsonl, or the first number that is free."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def _remove_run(folder: Path) -> None:
    for name in (METRICS, PARAMETERS):
        (folder / name).unlink(missing_ok=True)
    for name in (WEIGHTS, manifest.FOLDER):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
