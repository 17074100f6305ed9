"""What a checkpoint folder holds, byte for byte: written hidden, sealed by a manifest, renamed into sight, checked.

Owns files, hashes, names of folders and retention; knows nothing of tensors and ranks. Invariants: a hash is taken of
what was to be written, not of what lies on disk, so whatever spoils a file shows; a folder without a valid manifest
does not exist; a folder is removed only after it was renamed out of sight.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.store import synchronise
from trainer.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FOLDER = "checkpoints"  # in a run's output_dir
CHUNK_BYTES = 2**24
PREFIX = "step_"


@dataclass(frozen=True)
class FileFact:
    """Size and SHA-256 of a file as it was meant to be written."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Every file of a checkpoint (names relative to its folder), and what made it."""

    step: int
    world_size: int
    is_resumable: bool  # False for weights alone
    files: dict[str, FileFact]
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def write_file(path: Path, chunks: Iterable[Any]) -> FileFact:
    """Write chunks of bytes, put them on disk, and give their hash.

    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    digest, num_bytes = hashlib.sha256(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileFact(num_bytes, digest.hexdigest())


def write_json(path: Path, value: Mapping[str, Any]) -> FileFact:
    """Write an object as JSON, a line for each of its fields (Python's own indenting takes ten times as long)."""
    lines = [f"{json.dumps(name)}: {json.dumps(field)}" for name, field in value.items()]
    return write_file(path, [("{\n" + ",\n".join(lines) + "\n}\n").encode()])


def read_json(path: Path) -> Any:
    """Read JSON back.

    Raises:
        CheckpointError: the file is absent or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint") from error


def write_sealed(path: Path, value: Any) -> None:
    """Write a value as JSON together with its own hash."""
    write_json(path, {"sha256": _digest(value), "value": value})


def read_sealed(path: Path) -> tuple[Any, FileFact]:
    """Read what `write_sealed` wrote, and the fact of its file.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    try:
        content = path.read_bytes()
        sealed = json.loads(content)
        if sealed["sha256"] != _digest(sealed["value"]):
            raise ValueError("its checksum does not match")
        return sealed["value"], FileFact(len(content), hashlib.sha256(content).hexdigest())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def stage(target: Path) -> Path:
    """Make the hidden folder in which a checkpoint grows; what an earlier attempt left there is removed."""
    hidden = target.with_name(f".{target.name}.writing")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    return hidden


def publish(hidden: Path, target: Path, manifest: Manifest) -> None:
    """Seal a staged folder with its manifest and rename it to `target`, which must not exist."""
    body = {**vars(manifest), "files": {name: vars(fact) for name, fact in sorted(manifest.files.items())}}
    write_sealed(hidden / MANIFEST, body)
    for folder in {hidden, *((hidden / name).parent for name in manifest.files)}:
        synchronise(folder)
    hidden.rename(target)
    synchronise(target.parent)


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


def find_damage(folder: Path, files: Mapping[str, FileFact]) -> list[str]:
    """Read files of a checkpoint and say what is wrong with each that is not as it was written."""
    return [f"{name} {wrong}" for name, fact in files.items() if (wrong := _damage(folder / name, fact))]


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
        remove(folder)
    return removed


def remove(folder: Path) -> None:
    """Remove a checkpoint: out of sight at once, its files after that."""
    hidden = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for folder in checkpoints.glob(f".{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
