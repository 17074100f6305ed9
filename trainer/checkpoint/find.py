"""Checks checkpoints, and finds the newest that is whole. All ranks share the reading, and agree on the answer.

Invariant: a checkpoint that is given was read and hashed to the last byte; what was passed over is named, with why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint import manifest
from trainer.checkpoint.storage import StoredTensors
from trainer.distributed.group import Group
from trainer.errors import CheckpointError

NUM_FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, if there is one, and what is newer but not whole."""

    folder: Path | None
    passed_over: dict[str, str] = field(default_factory=dict)  # name of the folder -> what is wrong with it


def find_damage(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Say what is wrong with a checkpoint: every file hashed, every tensor found; each rank reads a share."""
    try:
        files = manifest.read_manifest(folder).files
        mine = {name: files[name] for name in sorted(files)[rank::world_size]}
        return manifest.find_damage(folder, mine) + (StoredTensors(folder).find_damage() if rank == 0 else [])
    except CheckpointError as error:
        return [str(error)]


def check(folder: Path, group: Group) -> None:
    """Raise CheckpointError, on all ranks, where a checkpoint is not whole."""
    faults = find_damage(folder, group.rank, group.world_size)
    more = f" and {len(faults) - NUM_FAULTS_SHOWN} more" if len(faults) > NUM_FAULTS_SHOWN else ""
    said = group.first_error(CheckpointError("; ".join(faults[:NUM_FAULTS_SHOWN]) + more) if faults else None)
    if said is not None:
        raise CheckpointError(f"Can't find a valid checkpoint at {folder}: {said.partition('CheckpointError: ')[2]}")


def newest_whole(checkpoints: Path, group: Group) -> Found:
    """Find the newest whole checkpoint that a run can go on from (all ranks call)."""
    passed_over: dict[str, str] = {}
    steps = [manifest.step_of(folder) for folder in manifest.list_checkpoints(checkpoints)]
    for step in group.from_lead(steps):
        folder = manifest.folder_of(checkpoints, step)
        try:
            check(folder, group)
        except CheckpointError as error:
            passed_over[folder.name] = str(error)
            continue
        if manifest.read_manifest(folder).is_resumable:
            return Found(folder, passed_over)
        passed_over[folder.name] = "it holds weights alone (save_only_model)"
    return Found(None, passed_over)
