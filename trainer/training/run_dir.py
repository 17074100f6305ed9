"""The output folder of a run: what it holds, that two runs never mix in it, and that nothing foreign in it is removed.

Invariants: a run has an id, in `run.json` and in the manifest of every checkpoint; what does not carry the id of the
run, or was changed by others, is set aside under a free name and never removed; whatever is removed was checked as a
whole before.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.atomic import is_untouched, read_json, read_listing, remove_listed, set_aside, write_file, write_json
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import PARAMETERS
from trainer.config.arguments import TrainingArguments
from trainer.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from trainer.checkpoint.run_state import RunRecord  # loads torch
    from trainer.distributed.group import Group

METRICS, WEIGHTS, RUN = "metrics.jsonl", "hf_format", "run.json"
ANSWERS, ENVIRONMENT = "answers.jsonl", "environment.json"
SECONDS_FOR_OTHERS = 5.0
BYTES_COMPARED = 2**16  # at the end of metrics.jsonl

logger = logging.getLogger(__name__)


@contextmanager
def sole_run(args: TrainingArguments, group: Group) -> Iterator[None]:
    """Keep other runs out of output_dir inside, and see that it is one folder for all ranks; they enter together.

    Raises:
        UsageError: another run is in it, and still is after `SECONDS_FOR_OTHERS`, which what was killed may take; or
            it cannot be written, or a rank sees another folder.
    """
    lock, problem = (None, None)
    if group.is_main:
        lock, problem = _lock(Path(args.output_dir))
    try:
        with group.naming_faults(lambda: "before the first step"):
            if group.any(problem is not None):
                raise UsageError(problem or "the main rank could not lock output_dir")
            if args.save_strategy != "no":  # all else is written by the main rank alone
                _probe(Path(args.output_dir), group)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> tuple[int | None, str | None]:
    """Lock the folder, which the end of this process undoes in any case; return the lock, or what is wrong."""
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


def _probe(folder: Path, group: Group) -> None:
    """See that what the main rank writes into the folder can be read by every rank."""
    number = secrets.randbits(48)
    path = folder / f".probe.{group.from_main([number])[0]:012x}"  # a new name: no file system has cached it as absent

    def write() -> None:
        try:
            write_file(path, [path.name.encode()])
        except OSError as error:
            raise UsageError(f"output_dir = {str(folder)!r} cannot be written: {error}") from error

    _on_main(group, write)
    until = time.monotonic() + SECONDS_FOR_OTHERS
    while not (is_there := path.is_file() and path.read_bytes() == path.name.encode()) and time.monotonic() < until:
        time.sleep(SECONDS_FOR_OTHERS / 50)
    problem = None
    if not is_there:
        problem = UsageError(
            f"output_dir = {str(folder)!r} is not the folder that rank 0 writes to: checkpoints need one that "
            "all ranks share; put it on a file system that is mounted on every node"
        )
    said = group.first_error(problem)
    if group.is_main:
        path.unlink(missing_ok=True)
    if said is not None:
        raise UsageError(said.replace("UsageError: ", ""))


def _on_main(group: Group, act: Callable[[], object]) -> None:
    """Run something on the main rank; the UsageError or CheckpointError that it raises is raised on every rank."""
    _, error = group.try_on_main(act, UsageError, CheckpointError)
    if (said := group.first_error(error)) is not None:
        kind, _, text = said.removeprefix("rank 0: ").partition(": ")
        raise (CheckpointError if kind == "CheckpointError" else UsageError)(text) from error


def read_run_id(folder: Path) -> str | None:
    """Return the id of the run that an output folder holds; None where nothing says it."""
    try:
        run_id = read_json(folder / RUN)["run_id"]
    except (CheckpointError, LookupError, TypeError):
        return None
    return run_id if isinstance(run_id, str) and run_id.isalnum() else None


def open_output_dir(args: TrainingArguments, group: Group, *, keeps_older: bool = False) -> None:
    """Make the folder and begin a run in it, on the main rank; the others wait.

    Args:
        args: which folder, and what is written.
        group: all ranks; they call together.
        keeps_older: set a run that is there already aside, under a number, instead of refusing.

    Raises:
        UsageError: it cannot be written, or holds a run already and `overwrite_output_dir` is not set.
    """
    _on_main(group, lambda: _open(Path(args.output_dir), args, keeps_older))


def continue_output_dir(args: TrainingArguments, group: Group, source: Path, record: RunRecord, step: int) -> None:
    """Open the folder for a run that resumes after a step: what it wrote after that step is cut off or set aside.

    Args:
        args: which folder, and what is written.
        group: all ranks; they call together.
        source: the checkpoint, in this folder or another one.
        record: what it says of the run.
        step: the step after which it was written.

    Raises:
        UsageError: the folder holds another run, or cannot be written.
        CheckpointError: metrics.jsonl is shorter than it was, or that of another run.
    """
    _on_main(group, lambda: _continue(Path(args.output_dir), args, source, record, step))


def end_of_file(path: Path, num_bytes: int) -> str:
    """Return the hash of the last bytes before a place in a file: no other run writes the same there."""
    with path.open("rb") as file:
        start = max(num_bytes - BYTES_COMPARED, 0)
        file.seek(start)
        return hashlib.sha256(file.read(num_bytes - start)).hexdigest()


def _open(folder: Path, args: TrainingArguments, keeps_older: bool) -> None:
    checkpoints, here = folder / manifest.FOLDER, read_run_id(folder)
    try:
        if (folder / METRICS).exists() or manifest.list_checkpoints(checkpoints):
            if args.overwrite_output_dir:
                _remove_run(folder, here)
            elif keeps_older:
                aside = set_aside(folder / manifest.FOLDER)
                set_aside(folder / METRICS)
                if aside is not None:
                    logger.warning(
                        "a new run begins in %s; the checkpoints of the one before are set aside as %s (to continue "
                        "it instead: resume_from_checkpoint=True)",
                        folder,
                        aside.name,
                    )
            else:
                raise UsageError(
                    f"output_dir = {args.output_dir!r} holds a run already: choose another, resume it with "
                    "resume_from_checkpoint=auto, or set overwrite_output_dir"
                )
        folder.mkdir(parents=True, exist_ok=True)
        for twin in folder.glob("checkpoint-*"):
            remove_twin(twin)
        manifest.remove_leftovers(checkpoints, {here})
        _write_records(folder, args, secrets.token_hex(6))
    except OSError as error:
        raise UsageError(f"output_dir = {args.output_dir!r} cannot be written: {error}") from error


def _continue(folder: Path, args: TrainingArguments, source: Path, record: RunRecord, step: int) -> None:
    """Check everything first, then change."""
    checkpoints, metrics, num_bytes = folder / manifest.FOLDER, folder / METRICS, record.metrics_bytes or 0
    run_id, here = manifest.read_manifest(source).run_id, read_run_id(folder)
    for path in manifest.list_checkpoints(checkpoints):
        try:
            here = manifest.read_manifest(path).run_id or here
        except CheckpointError:  # whose it is cannot be said: it may be set aside, not removed
            continue
    if run_id is not None and here not in (run_id, None):
        raise UsageError(
            f"output_dir = {args.output_dir!r} holds another run than the one that wrote {source}: choose another "
            "output_dir to resume it in"
        )
    try:
        if metrics.exists():
            _check_metrics(metrics, num_bytes, record.metrics_sha256)
        folder.mkdir(parents=True, exist_ok=True)
        later = [path for path in manifest.list_checkpoints(checkpoints) if manifest.step_of(path) > step]
        for path in later:
            aside = manifest.discard(path)
            remove_twin(twin_of(path))
            logger.warning(
                "set aside %s as %s: the run goes on from step %d; move it back to have it", path.name, aside, step
            )
        manifest.remove_leftovers(checkpoints, {here, run_id})
        if metrics.exists() and num_bytes:
            os.truncate(metrics, num_bytes)
        elif metrics.exists():
            set_aside(metrics)
        _write_records(folder, args, run_id or here or secrets.token_hex(6))
    except OSError as error:
        raise CheckpointError(f"output_dir = {args.output_dir!r} cannot be resumed in: {error}") from error


def _check_metrics(path: Path, num_bytes: int, sha256: str | None) -> None:
    """Raise CheckpointError where metrics.jsonl does not begin with what it held when the checkpoint was written."""
    size = path.stat().st_size
    if size < num_bytes:
        raise CheckpointError(
            f"{path} has {size} bytes, {num_bytes} when the checkpoint was written: bring it back, or move it away to "
            "begin a new one"
        )
    if num_bytes and sha256 is not None and end_of_file(path, num_bytes) != sha256:
        raise CheckpointError(
            f"{path} is not the one of the run that wrote the checkpoint: move it away to begin a new one, or choose "
            "another output_dir"
        )
    with path.open("rb") as file:
        file.seek(max(num_bytes - 1, 0))
        if num_bytes and file.read(1) != b"\n":
            raise CheckpointError(f"{path} is cut within a line after {num_bytes} bytes: move it away to begin anew")


def _write_records(folder: Path, args: TrainingArguments, run_id: str) -> None:
    write_json(folder / RUN, {"run_id": run_id})
    (folder / PARAMETERS).write_text(args.to_json_string(), encoding="utf-8")


def _remove_run(folder: Path, run_id: str | None) -> None:
    """Remove a run that is to be overwritten; what is not all of that run is set aside."""
    checks: dict[str, Callable[[Path], bool]] = {
        METRICS: lambda path: run_id is not None and path.is_file(),
        manifest.FOLDER: lambda path: all(_is_checkpoint_of(child, run_id) for child in path.iterdir()),
        WEIGHTS: lambda path: all(is_untouched(child) for child in path.iterdir()),
    }
    verdicts = {}
    for name, is_ours in checks.items():
        path = folder / name
        if path.exists() or path.is_symlink():
            verdicts[path] = not path.is_symlink() and is_ours(path)
    for path, may_go in verdicts.items():
        if not may_go:
            logger.warning("%s holds more than this trainer wrote for one run: set aside as %s", path, set_aside(path))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_checkpoint_of(folder: Path, run_id: str | None) -> bool:
    """Return whether a folder is a checkpoint of a run, and holds nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if manifest.is_leftover(folder, {run_id}):
        return True
    return run_id is not None and manifest.is_of_run(folder, run_id) and not manifest.find_unlisted(folder)


def twin_of(checkpoint: Path) -> Path:
    """Return the name under which transformers' users look for a checkpoint: checkpoint-N in the output folder."""
    return checkpoint.parents[1] / f"checkpoint-{manifest.step_of(checkpoint)}"


def remove_twin(twin: Path) -> None:
    """Remove what the trainer wrote into checkpoint-N; what callbacks added stays."""
    if not twin.is_symlink():
        remove_listed(twin, read_listing(twin))
