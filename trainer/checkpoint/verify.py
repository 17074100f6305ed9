"""Checks that checkpoints are whole, and finds the newest that is. All ranks share the reading and agree on the answer.

Invariant: a checkpoint that is returned was read and hashed to the last byte, and every record in it has the right
form; what was passed over is named, with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.atomic import MALFORMED, FileFact, open_regular, read_json, read_sealed
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import INDEX, OPTIMIZER_STATE, PARAMETERS, STATE, Manifest, rank_file, read_manifest
from trainer.checkpoint.optimizer_state import check_form
from trainer.checkpoint.run_state import RunRecord, check_random_state, read_options
from trainer.checkpoint.tensors import StoredTensors
from trainer.distributed.group import Group
from trainer.errors import CheckpointError

CHUNK_BYTES = 2**24
NUM_FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, if there is one, and what is newer but not whole."""

    folder: Path | None
    passed_over: dict[str, str] = field(default_factory=dict)  # name of the folder -> what is wrong with it


def find_damage(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Say what is wrong with a checkpoint, one line for each damaged file; each rank reads a share of the files."""
    try:
        about = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    faults: dict[str, list[str]] = {}
    if manifest.step_of(folder) not in (-1, about.step):
        faults[manifest.MANIFEST] = [f"is of step {about.step}: the folder was renamed"]
    for name in sorted(about.files)[rank::world_size]:
        if (fault := _damage(folder / name, about.files[name])) is not None:
            faults[name] = [fault]
    if rank == 0:
        for name, found in _faults_of_records(folder, about).items():
            faults.setdefault(name, found)  # that its content is not what was written says more
    lines = []
    for name, found in faults.items():
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        lines.append(f"{name} {found[0]}{more}")
    return lines


def _damage(path: Path, fact: FileFact) -> str | None:
    """Hash a file; say in which way it is not as it was written."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            if size != fact.num_bytes:
                return f"has {size} bytes instead of {fact.num_bytes}"
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path} ")
    except OSError as error:
        return f"cannot be read ({error})"
    return None if digest.hexdigest() == fact.sha256 else "does not have the content that was written"


def _faults_of_records(folder: Path, about: Manifest) -> dict[str, list[str]]:
    """Say which records are missing or of the wrong form; a valid hash does not mean that the trainer wrote them."""
    ranks = range(min(about.world_size, len(about.files)))  # a manifest may claim any number
    checks: dict[str, Callable[[Path], Any]] = {rank_file(rank): read_sealed for rank in ranks}
    if about.is_resumable:
        checks = {rank_file(rank): lambda path: check_random_state(read_sealed(path)[0]["random"]) for rank in ranks}
        checks[STATE] = lambda path: RunRecord.from_dict(read_json(path), str(path))
        checks[PARAMETERS] = lambda path: read_options(path.parent)
        checks[OPTIMIZER_STATE] = lambda path: check_form(read_json(path))
    checks[INDEX] = lambda path: StoredTensors(path.parent)
    faults: dict[str, list[str]] = {}
    if len(ranks) < about.world_size:
        faults[manifest.MANIFEST] = [f"lists {len(about.files)} files of {about.world_size} ranks"]
    for name, check_record in checks.items():
        try:
            if name not in about.files:
                raise CheckpointError("is missing: the manifest does not list it")
            check_record(folder / name)
        except CheckpointError as error:
            faults[name] = [str(error).removeprefix(f"{folder / name} ")]
        except MALFORMED as error:
            faults[name] = [f"is not of the form that a checkpoint needs ({error!r})"]
    if INDEX not in faults:
        for name, found in StoredTensors(folder).find_damage().items():
            faults.setdefault(name, found)
    return faults


def check(folder: Path, group: Group) -> None:
    """Raise CheckpointError, on all ranks, where a checkpoint is not whole."""
    with group.unhurried():
        faults = find_damage(folder, group.rank, group.world_size)
    more = f" and {len(faults) - NUM_FAULTS_SHOWN} more" if len(faults) > NUM_FAULTS_SHOWN else ""
    said = group.first_error(CheckpointError("; ".join(faults[:NUM_FAULTS_SHOWN]) + more) if faults else None)
    if said is not None:
        raise CheckpointError(f"Can't find a valid checkpoint at {folder}: {said.partition('CheckpointError: ')[2]}")


def newest_whole(checkpoints: Path, group: Group) -> Found:
    """Find the newest whole checkpoint that a run can resume from (all ranks call)."""
    passed_over: dict[str, str] = {}
    steps = [manifest.step_of(folder) for folder in manifest.list_checkpoints(checkpoints)]
    for step in group.from_main(steps):
        folder = manifest.folder_of(checkpoints, step)
        try:
            check(folder, group)
        except CheckpointError as error:
            passed_over[folder.name] = str(error).removeprefix(f"Can't find a valid checkpoint at {folder}: ")
            continue
        if read_manifest(folder).is_resumable:
            return Found(folder, passed_over)
        passed_over[folder.name] = "it holds weights alone (save_only_model)"
    return Found(None, passed_over)
