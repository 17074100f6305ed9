"""The output folder of a run: what it holds, and that two runs never mix in it."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.atomic import remove_folder
from trainer.checkpoint import manifest
from trainer.config.arguments import TrainingArguments
from trainer.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from trainer.distributed.group import Group  # loads torch

PARAMETERS, METRICS, WEIGHTS = "training_params.json", "metrics.jsonl", "hf_format"
SECONDS_FOR_OTHERS = 5.0

logger = logging.getLogger(__name__)


@contextmanager
def sole_run(args: TrainingArguments, group: Group) -> Iterator[None]:
    """Keep other runs out of output_dir inside; all ranks enter together.

    Raises:
        UsageError: another run is in it, and still is after `SECONDS_FOR_OTHERS`, which what was killed may take.
    """
    lock, problem = (None, None)
    if group.is_lead:
        lock, problem = _lock(Path(args.output_dir))
    try:
        if group.any(problem is not None):
            raise UsageError(problem or "the lead rank could not lock output_dir")
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> tuple[int | None, str | None]:
    """Lock the folder, which the end of this process undoes in any case; gives the lock, or what is wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        return None, f"output_dir = {str(folder)!r} cannot be written: {error}"
    until = time.monotonic() + SECONDS_FOR_OTHERS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(lock)
                return None, f"output_dir = {str(folder)!r} is in use by a run that is going on: choose another"
            time.sleep(SECONDS_FOR_OTHERS / 50)
        except OSError:  # a file system without locks
            return lock, None
        else:
            return lock, None


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
            remove_folder(later)
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
