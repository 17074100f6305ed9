"""The manifest of a checkpoint: what it holds, what wrote it, where it lies, and which ones are kept.

Owns names of folders and files, and retention; loads no torch. Invariants: a folder without a valid manifest is no
checkpoint; only checkpoints of the run itself are removed, and of them only the files that their manifest lists.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

from trainer.atomic import MALFORMED, FileFact, check_name, read_sealed, remove_listed
from trainer.config.fields import check_options
from trainer.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 1: without run_id
MANIFEST, STATE, OPTIMIZER_STATE, INDEX = "manifest.json", "state.json", "optimizer.json", "tensors.json"
PARAMETERS = "training_params.json"
MODEL_FILES = "model"  # folder of config and tokenizer
FOLDER, DISCARDED = "checkpoints", "checkpoints.discarded"  # in a run's output_dir
PREFIX = "step_"
_LEFTOVER = re.compile(rf"\.{PREFIX}\d+\.(?:writing|removing)(?:-(\w+))?")


@dataclass(frozen=True)
class Manifest:
    """Every file of a checkpoint (names relative to its folder), and what made it."""

    step: int
    world_size: int
    is_resumable: bool  # False for weights alone
    files: dict[str, FileFact]
    versions: dict[str, str] = field(default_factory=dict)
    run_id: str | None = None
    format_version: int = FORMAT_VERSION


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint; fields that this version does not know are ignored.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer version of the trainer wrote it.
    """
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST}")
    body, _ = read_sealed(folder / MANIFEST)
    try:
        version = body["format_version"]
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(f"format {version!r}, this trainer reads 1 to {FORMAT_VERSION}; a newer one may read it")
        files = {}
        for name, fact in body["files"].items():
            check_name(name)
            files[name] = FileFact(fact["num_bytes"], fact["sha256"])
            check_options(files[name])
        known = {each.name: body[each.name] for each in fields(Manifest) if each.name in body}
        manifest = Manifest(**{**known, "files": files})
        check_options(manifest)
        if manifest.step < 0 or manifest.world_size < 1:
            raise ValueError(f"step {manifest.step} of {manifest.world_size} ranks")
        return manifest
    except (*MALFORMED, UsageError, CheckpointError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error})") from error


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint after a step lies."""
    return checkpoints / f"{PREFIX}{step}"


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was written, by the name of its folder; -1 for other folders."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdecimal() else -1


def rank_file(rank: int) -> str:
    """Return the name of the record of one rank."""
    return f"rank_{rank}.json"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the folders that bear a checkpoint's name, newest first, valid or not."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted((path for path in found if step_of(path) >= 0 and path.is_dir()), key=step_of, reverse=True)


def find_unlisted(folder: Path) -> list[str]:
    """Return the files of a checkpoint that its manifest does not list: what others put there."""
    listed = {MANIFEST, *read_manifest(folder).files}
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in listed and (path.is_symlink() or not path.is_dir()):
            found.append(name)
    return sorted(found)


def retire(checkpoints: Path, limit: int, best: int | None, run_id: str | None) -> list[Path]:
    """Remove all but the newest `limit` checkpoints of a run; the best one stays, and the newest always does.

    Checkpoints that another run wrote, or that cannot be read, are neither counted nor touched.

    Returns:
        The folders removed.
    """
    folders = []
    for folder in list_checkpoints(checkpoints):
        if not folder.is_symlink() and is_of_run(folder, run_id):
            folders.append(folder)
    kept = folders[:1] + [folder for folder in folders[1:] if step_of(folder) == best]
    kept += [folder for folder in folders if folder not in kept][: max(limit - len(kept), 0)]
    removed = [folder for folder in folders if folder not in kept]
    for folder in removed:
        remove(folder)
    return removed


def is_of_run(folder: Path, run_id: str | None) -> bool:
    """Return whether a run wrote a checkpoint; False where that cannot be read."""
    try:
        return read_manifest(folder).run_id == run_id
    except CheckpointError:
        return False


def remove(folder: Path) -> None:
    """Remove a checkpoint: out of sight at once, its files after that; what its manifest does not list is kept.

    Raises:
        CheckpointError: it has no valid manifest; nothing was removed.
    """
    about = read_manifest(folder)
    listed = [*about.files, MANIFEST]
    hidden = hidden_name(folder, "removing", about.run_id)
    if hidden.exists():
        raise CheckpointError(f"{hidden} is in the way: look at it and remove it")
    folder.rename(hidden)
    if not remove_listed(hidden, listed):
        logger.warning("%s holds files that the trainer did not write: they are in %s", folder, discard(hidden, folder))


def discard(folder: Path, shown_as: Path | None = None) -> Path:
    """Move a checkpoint aside, to checkpoints.discarded/step_N or the first number after it that is free."""
    shown_as = shown_as or folder
    aside = shown_as.parent.with_name(f"{shown_as.parent.name}.discarded")
    aside.mkdir(exist_ok=True)
    target, number = aside / shown_as.name, 0
    while target.exists():
        number += 1
        target = aside / f"{shown_as.name}.{number}"
    folder.rename(target)
    return target


def hidden_name(folder: Path, purpose: str, run_id: str | None) -> Path:
    """Return the name under which a run writes or removes a checkpoint out of sight."""
    return folder.with_name(f".{folder.name}.{purpose}" + ("" if run_id is None else f"-{run_id}"))


def remove_leftovers(checkpoints: Path, run_ids: set[str | None]) -> None:
    """Remove what these runs, killed meanwhile, left half written or half removed."""
    for folder in sorted(checkpoints.glob(f".{PREFIX}*")):
        if is_leftover(folder, run_ids):
            shutil.rmtree(folder, ignore_errors=True)


def is_leftover(folder: Path, run_ids: set[str | None]) -> bool:
    """Return whether a folder is one in which one of these runs wrote or removed a checkpoint."""
    matched = _LEFTOVER.fullmatch(folder.name)
    return matched is not None and matched[1] in run_ids and folder.is_dir() and not folder.is_symlink()
