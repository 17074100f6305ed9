"""The manifest of a checkpoint: which files it holds, whether they are whole, and which checkpoint is the newest.

Owns names of folders, verification and retention. Invariants: a folder without a valid manifest is no checkpoint; a
checkpoint that a run resumes from was read and hashed to the last byte; all ranks share the reading and agree on the
answer.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.atomic import FileFact, publish_folder, read_sealed, remove_folder, write_sealed
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from trainer.distributed.group import Group  # loads torch

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FOLDER = "checkpoints"  # in a run's output_dir
CHUNK_BYTES = 2**24
PREFIX = "step_"
NUM_FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Manifest:
    """Every file of a checkpoint (names relative to its folder), and what made it."""

    step: int
    world_size: int
    is_resumable: bool  # False for weights alone
    files: dict[str, FileFact]
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def publish(hidden: Path, target: Path, manifest: Manifest) -> None:
    """Seal a staged folder with its manifest and rename it to `target`, which must not exist."""
    body = {**vars(manifest), "files": {name: vars(fact) for name, fact in sorted(manifest.files.items())}}
    write_sealed(hidden / MANIFEST, body)
    publish_folder(hidden, target)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of the trainer wrote it.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST}")
    body, _ = read_sealed(folder / MANIFEST)
    try:
        if body["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {body['format_version']}, this trainer reads {FORMAT_VERSION}")
        files = {name: FileFact(**fact) for name, fact in body["files"].items()}
        return Manifest(**{**body, "files": files})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error})") from error


def _damage(path: Path, fact: FileFact) -> str | None:
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        if size != fact.num_bytes:
            return f"has {size} bytes instead of {fact.num_bytes}"
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    return None if digest.hexdigest() == fact.sha256 else "does not have the content that was written"


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return checkpoints / f"{PREFIX}{step}"


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written, by the name of its folder; -1 for other folders."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdecimal() else -1


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, newest first, valid or not."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted((path for path in found if step_of(path) >= 0 and path.is_dir()), key=step_of, reverse=True)


def retire(checkpoints: Path, limit: int, best: int | None) -> list[Path]:
    """Remove all but the newest `limit` checkpoints; the best one stays, and the newest always does.

    Returns:
        The folders removed.
    """
    folders = list_checkpoints(checkpoints)
    kept = folders[:1] + [folder for folder in folders[1:] if step_of(folder) == best]
    kept += [folder for folder in folders if folder not in kept][: max(limit - len(kept), 0)]
    removed = [folder for folder in folders if folder not in kept]
    for folder in removed:
        remove_folder(folder)
    return removed


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for folder in checkpoints.glob(f".{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, if there is one, and what is newer but not whole."""

    folder: Path | None
    passed_over: dict[str, str] = field(default_factory=dict)  # name of the folder -> what is wrong with it


def find_damage(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Say what is wrong with a checkpoint: every file hashed, every tensor found; each rank reads a share."""
    try:
        from trainer.checkpoint.tensors import StoredTensors  # loads torch

        files = read_manifest(folder).files
        faults = []
        for name in sorted(files)[rank::world_size]:
            if (wrong := _damage(folder / name, files[name])) is not None:
                faults.append(f"{name} {wrong}")
        return faults + (StoredTensors(folder).find_damage() if rank == 0 else [])
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
    steps = [step_of(folder) for folder in list_checkpoints(checkpoints)]
    for step in group.from_lead(steps):
        folder = folder_of(checkpoints, step)
        try:
            check(folder, group)
        except CheckpointError as error:
            passed_over[folder.name] = str(error)
            continue
        if read_manifest(folder).is_resumable:
            return Found(folder, passed_over)
        passed_over[folder.name] = "it holds weights alone (save_only_model)"
    return Found(None, passed_over)
