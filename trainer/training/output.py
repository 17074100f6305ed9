"""The output folder of a run: what it holds, and that two runs never mix in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.arguments.training import TrainingArguments
from trainer.distributed.group import Group
from trainer.errors import UsageError

PARAMETERS, METRICS, WEIGHTS = "training_params.json", "metrics.jsonl", "hf_format"


def open_output_dir(args: TrainingArguments, group: Group) -> None:
    """Make the folder and write the configuration into it, on the lead rank; the others wait.

    Raises:
        UsageError: it cannot be written, or holds a run already and `overwrite_output_dir` is not set.
    """
    problem = _open(Path(args.output_dir), args) if group.is_lead else None
    if group.any(problem is not None):
        raise UsageError(problem or "the lead rank could not open output_dir")


def _open(folder: Path, args: TrainingArguments) -> str | None:
    """Open the folder; gives what is wrong with it, so that all ranks can stop together."""
    try:
        if (folder / METRICS).exists():
            if not args.overwrite_output_dir:
                return (
                    f"output_dir = {args.output_dir!r} holds a run already: choose another, or set overwrite_output_dir"
                )
            _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PARAMETERS).write_text(args.to_json(), encoding="utf-8")
    except OSError as error:
        return f"output_dir = {args.output_dir!r} cannot be written: {error}"
    return None


def _remove_run(folder: Path) -> None:
    for name in (METRICS, PARAMETERS):
        (folder / name).unlink(missing_ok=True)
    if (folder / WEIGHTS).exists():
        shutil.rmtree(folder / WEIGHTS)
