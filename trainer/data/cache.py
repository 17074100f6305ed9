"""Prepared stores on disk, by content.

Owns where they lie, their names, and that one process builds one while others build other ones or wait. Invariant: what
lies under a name is a whole store of that content, or is replaced by one; nothing is removed but what this module made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from trainer.data.store import FORMAT_VERSION, TokenStore
from trainer.errors import DataError, UsageError

_HOME = "~/.cache/trainer/prepared"
_TEMPORARY = re.compile(r"([0-9a-f]{32})\.tmp-[0-9a-f]+")
_STORE_FILES = {"tokens.arrow", "index.arrow", "metadata.json"}

_log = logging.getLogger(__name__)


def cache_home(data_cache_dir: str | None) -> Path:
    """Where prepared data is kept: the folder asked for, or one in the user's home."""
    return Path(data_cache_dir or _HOME).expanduser()


def fingerprint(digest: str, *facts: object) -> str:
    """Name of a store: a hash of all that decides its content, the versions of the libraries included."""
    versions = [FORMAT_VERSION, version("tokenizers"), version("transformers")]
    return hashlib.sha256(json.dumps([versions, digest, *facts]).encode()).hexdigest()[:32]


def open_or_build(
    data_cache_dir: str | None, key: str, build: Callable[[Path], None], wait: bool = True
) -> tuple[TokenStore, bool] | None:
    """Open the store of this name, or build it; say whether it was there. A torn or damaged one is built again.

    None where another process builds it now and `wait` is False.
    """
    directory = cache_home(data_cache_dir) / key
    store = _open_if_whole(directory)
    if store is not None:
        return store, True
    with _lock(directory, wait) as is_held:
        if not is_held:
            return None
        store = _open_if_whole(directory)
        if store is not None:
            return store, True
        if directory.exists():
            _log.warning("%s was changed or is damaged: its data is prepared anew", directory)
            _remove_store(directory)
        _remove_abandoned(directory.parent, key)
        try:
            build(directory)
        except OSError as error:
            remedy = "free some space there, or give another folder with data_cache_dir"
            raise DataError(f"cannot be written ({error})", remedy, directory) from error
    return TokenStore.open(directory), False


def _open_if_whole(directory: Path) -> TokenStore | None:
    try:
        store = TokenStore.open(directory)
        store.check_unchanged()
    except (DataError, OSError):
        return None
    return store


def _remove_store(directory: Path) -> None:
    """Remove a store that is not whole, after looking at all of it: it must hold the files of a store and no other."""
    if directory.is_symlink() or not directory.is_dir() or {path.name for path in directory.iterdir()} - _STORE_FILES:
        raise DataError(
            "is in the way and holds more than prepared data",
            "move it away, or give another data_cache_dir",
            directory,
        )
    shutil.rmtree(directory)


def _remove_abandoned(home: Path, own: str) -> None:
    """Remove what processes that were killed have left of any store: nobody holds its lock."""
    for remains in home.glob("*.tmp-*"):
        match = _TEMPORARY.fullmatch(remains.name)
        if match is None or remains.is_symlink() or not remains.is_dir():
            continue
        with (home / f"{match[1]}.lock").open("w") as file, contextlib.suppress(BlockingIOError):
            if match[1] != own:  # whose lock is ours
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not {path.name for path in remains.iterdir()} - _STORE_FILES:
                shutil.rmtree(remains, ignore_errors=True)


@contextmanager
def _lock(directory: Path, wait: bool) -> Iterator[bool]:
    """Lock the store, which one process builds at a time; yield whether this process holds the lock."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = directory.with_name(f"{directory.name}.lock").open("w")
    except OSError as error:
        found = f"prepared data cannot be kept in {directory.parent} ({error.strerror})"
        raise UsageError(f"{found}: give a folder that can be written with data_cache_dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
