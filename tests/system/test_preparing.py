"""Preparing in real processes: a full disk, a kill, several at once; what is published is whole."""

from __future__ import annotations

import fcntl
import random
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.corpora import write_chats, write_tokens
from tests.fixtures.ranks.faults import disk_full, kill
from tests.fixtures.ranks.launch import Launch
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.groups import DataArguments
from trainer.data.prepare import prepare
from trainer.errors import DataError

AT_WRITING = [("write", 1, name) for name in ("tokens.arrow", "index.arrow", "metadata.json")]


@pytest.fixture
def options(tmp_path: Path) -> DataArguments:
    return DataArguments(data_cache_dir=str(tmp_path / "cache"))


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(
    tmp_path: Path, options: DataArguments
) -> None:
    home = tmp_path / "cache"
    for name in ("a" * 32, "b" * 32):
        (home / f"{name}.tmp-1").mkdir(parents=True)
    with (home / f"{'b' * 32}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(write_tokens(tmp_path / "t.jsonl", [5]), None, options)
        assert [path.name[0] for path in home.glob("*.tmp-*")] == ["b"]


@pytest.mark.parametrize("at", [*AT_WRITING, ("sync", 2), ("rename", 1)], ids=lambda at: "-".join(map(str, at)))
def test_a_full_disk_publishes_nothing_and_the_next_attempt_does(
    launch: Launch, tmp_path: Path, options: DataArguments, at: Any
) -> None:
    path = write_tokens(tmp_path / "t.jsonl", [5, 7])
    (full,) = launch(1, prepare, path, None, options, faults=[disk_full(0, at=at)], group=False)
    assert isinstance(full.error, DataError)
    assert "No space left on device" in str(full.error)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(prepare(path, None, options)) == 2


@pytest.mark.parametrize("at", [("write", 1, "index.arrow"), ("sync", 1), ("rename", 1)], ids=lambda at: at[0])
def test_a_killed_process_publishes_nothing_and_the_next_one_does(
    launch: Launch, tmp_path: Path, options: DataArguments, at: Any
) -> None:
    path = write_tokens(tmp_path / "t.jsonl", [5, 7])
    ended = launch(2, prepare, path, None, options, faults=[kill(0, at=at), kill(1, at=at)], group=False)
    assert ended.died == [0, 1]
    assert len(prepare(path, None, options)) == 2
    assert list((tmp_path / "cache").glob("*.tmp-*")) == []


def test_preparing_that_is_killed_again_and_again_ends_with_the_same_bytes(
    launch: Launch, tmp_path: Path, options: DataArguments
) -> None:
    """Killed at drawn moments; what was published stays, and the store that comes of it is that of one quiet run."""
    (tmp_path / "shards").mkdir()
    for name in "abc":
        write_tokens(tmp_path / "shards" / f"{name}.jsonl", [5, 7, 6], seed=ord(name))
    source = random.Random(7)
    num_kills = 0
    for _ in range(3):
        moment = (source.choice(["write", "sync", "rename"]), source.randint(1, 4))
        ended = launch(1, prepare, tmp_path / "shards", None, options, faults=[kill(0, at=moment)], group=False)
        num_kills += len(ended.died)
    assert num_kills > 0
    assert len(prepare(tmp_path / "shards", None, options)) == 9
    prepare(tmp_path / "shards", None, DataArguments(data_cache_dir=str(tmp_path / "quiet")))
    killed, quiet = (
        {str(file.relative_to(home)): file.read_bytes() for file in home.glob("*/*.arrow")}
        for home in (tmp_path / "cache", tmp_path / "quiet")
    )
    assert killed == quiet
    assert len(quiet) >= 6  # tokens and index of each file
    assert list((tmp_path / "cache").glob("*.tmp-*")) == []


def test_processes_that_prepare_the_same_at_once_prepare_once(
    launch: Launch, tmp_path: Path, options: DataArguments
) -> None:
    path = write_chats(tmp_path / "c.jsonl", 50)
    stores = launch(3, prepare, path, build_tokenizer(), options, group=False).values
    assert sorted(store.metadata["cached"] for store in stores) == [False, True, True]
