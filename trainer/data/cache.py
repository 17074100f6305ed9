"""Prepared stores on disk, by content.

Owns where they lie, their names, and that one process builds while the others wait. Must not know how a store is built.
Invariant: what lies under a name is a whole store of that content, or is replaced by one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from trainer.data.store import FORMAT_VERSION, TokenStore
from trainer.errors import DataError, UsageError

_HOME = "~/.cache/trainer/prepared"


def cache_home(data_cache_dir: str | None) -> Path:
    """Where prepared data is kept: the folder asked for, or one in the user's home."""
    return Path(data_cache_dir or _HOME).expanduser()


def fingerprint(digest: str, recipe: str, validation_split: float | None) -> str:
    """Name of a store: a hash of all that decides its content, the versions of the libraries included."""
    versions = [FORMAT_VERSION, version("tokenizers"), version("transformers")]
    return hashlib.sha256(json.dumps([versions, digest, recipe, validation_split]).encode()).hexdigest()[:32]


def open_or_build(data_cache_dir: str | None, key: str, build: Callable[[Path], None]) -> tuple[TokenStore, bool]:
    """Open the store of this name, or build it; say whether it was there. A torn or damaged one is built again."""
    directory = cache_home(data_cache_dir) / key
    store = _open_if_whole(directory)
    if store is not None:
        return store, True
    with _lock(directory):
        store = _open_if_whole(directory)
        if store is not None:
            return store, True
        shutil.rmtree(directory, ignore_errors=True)
        _remove_abandoned(directory.parent, key)
        _build(build, directory)
    return TokenStore.open(directory), False


def _open_if_whole(directory: Path) -> TokenStore | None:
    try:
        return TokenStore.open(directory)
    except DataError:
        return None


def _build(build: Callable[[Path], None], directory: Path) -> None:
    try:
        build(directory)
    except OSError as error:
        remedy = "free some space there, or give another folder with data_cache_dir"
        raise DataError(f"cannot be written ({error})", remedy, directory) from error


def _remove_abandoned(home: Path, own: str) -> None:
    """Remove what processes that were killed have left of any store: nobody holds its lock."""
    for remains in home.glob("*.tmp-*"):
        key = remains.name.partition(".tmp-")[0]
        with (home / f"{key}.lock").open("w") as file, contextlib.suppress(BlockingIOError):
            if key != own:  # whose lock is ours
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(remains, ignore_errors=True)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Let one process build this store at a time."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = directory.with_name(f"{directory.name}.lock").open("w")
    except OSError as error:
        found = f"prepared data cannot be kept in {directory.parent} ({error.strerror})"
        raise UsageError(f"{found}: give a folder that can be written with data_cache_dir") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
