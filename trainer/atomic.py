"""Files and folders that appear whole or not at all: written under a hidden name, put on disk, renamed into sight.

Used by every room that writes what outlives the process; imports nothing but `errors`. Invariants: a hash is taken of
what was to be written, not of what lies on disk, so whatever spoils a file shows; nothing is removed in sight.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from trainer.errors import CheckpointError

logger = logging.getLogger(__name__)
LISTING = ".export.json"  # what an exported folder holds: only this may be removed for the next export
MAX_RECORD_BYTES = 2**28
_PAGE_SEAL = "written by trainer, sha256"
# What reading values of the wrong shape or type raises: a record may hold any JSON.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


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


def write_page(path: Path, text: str) -> None:
    """Write a page of HTML or Markdown where people may have written one, or changed ours.

    It ends in a comment with its own hash. A page without one that fits is set aside, which a warning says.

    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    if path.is_symlink() or (path.exists() and not _is_our_page(path)):
        logger.warning("%s is not as this trainer wrote it: set aside as %s", path, set_aside(path))
    text = text.rstrip("\n") + "\n"
    path.write_bytes((text + _seal_of(text)).encode())


def _seal_of(text: str) -> str:
    return f"<!-- {_PAGE_SEAL} {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _is_our_page(path: Path) -> bool:
    try:
        text, mark, _ = path.read_text(encoding="utf-8").rpartition(f"<!-- {_PAGE_SEAL} ")
        return bool(mark) and path.read_bytes() == (text + _seal_of(text)).encode()
    except (OSError, ValueError):
        return False


def set_aside(path: Path) -> Path | None:
    """Rename metrics.jsonl to metrics.1.jsonl, or to the first number that is free; None where there is nothing."""
    if not (path.exists() or path.is_symlink()):
        return None
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    target = next(name for name in names if not (name.exists() or name.is_symlink()))
    path.rename(target)
    return target


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read; a pipe or a device, which could be read without end, is refused.

    Raises:
        CheckpointError: it is absent, unreadable or something else than a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def check_name(name: str) -> None:
    """Raise CheckpointError where the name of a file leads out of the folder that lists it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise CheckpointError(f"{name!r} is no name of a file inside the folder")


def read_record(path: Path) -> bytes:
    """Read a small file whole.

    Raises:
        CheckpointError: it is not a regular file of at most `MAX_RECORD_BYTES`.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_RECORD_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_RECORD_BYTES} bytes: it is no record of a checkpoint")
        try:
            return file.read()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error


def read_json(path: Path) -> Any:
    """Read JSON back.

    Raises:
        CheckpointError: the file is absent or not JSON.
    """
    content = read_record(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
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
    content = read_record(path)
    try:
        sealed = json.loads(content)
        digest = hashlib.sha256(json.dumps(sealed["value"], sort_keys=True).encode()).hexdigest()
        if sealed["sha256"] != digest:
            raise ValueError("its checksum does not match")
    except MALFORMED as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    return sealed["value"], FileFact(len(content), hashlib.sha256(content).hexdigest())


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


def sync_size(path: Path) -> int | None:
    """Put a file on disk and return its size; None where there is none."""
    try:
        sync(path)
    except FileNotFoundError:
        return None
    return path.stat().st_size


def stage_folder(hidden: Path) -> Path:
    """Make a hidden folder in which another one is written; what an earlier attempt left there is removed."""
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    return hidden


def publish_folder(hidden: Path, target: Path) -> None:
    """Put the names in a staged folder on disk and rename it to `target`, which must not exist."""
    for folder, _, _ in os.walk(hidden):
        sync(Path(folder))
    hidden.rename(target)
    sync(target.parent)


def remove_listed(folder: Path, names: Iterable[str]) -> bool:
    """Remove these files of a folder, and the folder if it is then empty; return whether it is gone."""
    parents = {folder}
    for name in names:
        path = folder / name
        path.unlink(missing_ok=True)
        parents |= {parent for parent in path.parents if folder in parent.parents}
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        try:
            parent.rmdir()
        except OSError:  # something else lies in it
            continue
    return not folder.exists()


def write_listing(folder: Path) -> None:
    """Record in a folder that is all ours which files it holds, so that they can be told from what is added to it."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    write_json(folder / LISTING, {"files": files})


def read_listing(folder: Path) -> set[str]:
    """Return the files that `write_listing` recorded; none where there is no record."""
    try:
        return {LISTING, *map(str, read_json(folder / LISTING)["files"])}
    except (CheckpointError, *MALFORMED):
        return set()


def is_untouched(folder: Path) -> bool:
    """Return whether a folder has a listing and holds nothing else than what that names."""
    listed = read_listing(folder)
    if not listed or folder.is_symlink():
        return False
    for path in folder.rglob("*"):
        if path.is_symlink() or (not path.is_dir() and path.relative_to(folder).as_posix() not in listed):
            return False
    return True
