"""Files and folders that appear whole or not at all: written under a hidden name, put on disk, renamed into sight.

Used by every room that writes what outlives the process; imports nothing but `errors`. Invariants: a hash is taken of
what was to be written, not of what lies on disk, so whatever spoils a file shows; nothing is removed in sight.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError


@dataclass(frozen=True)
class FileFact:
    """Size and SHA-256 of a file as it was meant to be written."""

    num_bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[Any]) -> FileFact:
    """Write chunks of bytes, put them on disk, and return their size and hash.

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
    """Write an object as JSON, one line per field (Python's own indentation takes ten times as long)."""
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
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    write_json(path, {"sha256": digest, "value": value})


def read_sealed(path: Path) -> tuple[Any, FileFact]:
    """Read what `write_sealed` wrote; return it with the size and hash of its file.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    try:
        content = path.read_bytes()
        sealed = json.loads(content)
        digest = hashlib.sha256(json.dumps(sealed["value"], sort_keys=True).encode()).hexdigest()
        if sealed["sha256"] != digest:
            raise ValueError("its checksum does not match")
        return sealed["value"], FileFact(len(content), hashlib.sha256(content).hexdigest())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hidden_path(target: Path, purpose: str = "writing") -> Path:
    """Return the name under which a folder is written, or removed, out of sight."""
    return target.with_name(f".{target.name}.{purpose}")


def stage_folder(target: Path) -> Path:
    """Make the hidden folder in which `target` is written; what an earlier attempt left there is removed."""
    hidden = hidden_path(target)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    return hidden


def publish_folder(hidden: Path, target: Path) -> None:
    """Put the names in a staged folder on disk and rename it to `target`, which must not exist."""
    for folder, _, _ in os.walk(hidden):
        sync(Path(folder))
    hidden.rename(target)
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder: out of sight at once, its files after that."""
    hidden = hidden_path(folder, "removing")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
