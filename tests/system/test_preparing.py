"""Preparing in real processes: a full disk, a kill, several at once; what is published is whole."""

from __future__ import annotations

import fcntl
import random
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch.distributed as dist

from tests.fixtures.corpora import write_chats, write_tokens
from tests.fixtures.ranks.faults import disk_full, kill
from tests.fixtures.ranks.launch import Launch
from tests.fixtures.tokenizers import build_tokenizer
from trainer.config.arguments import TrainingArguments
from trainer.config.groups import DataArguments
from trainer.data.prepare import prepare
from trainer.distributed.group import Group
from trainer.errors import DataError
from trainer.training.task import load_datasets

T = TypeVar("T")
NUM_FILES = 6
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


def of_all(value: T) -> list[T]:
    """What every rank has, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@pytest.mark.world_size(4)
@pytest.mark.nodes(2)
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared disk", "local disks"])
def test_nodes_share_the_work_where_they_share_the_cache(
    ranks: Any, caplog: pytest.LogCaptureFixture, is_shared: bool
) -> None:
    data = ranks.tmp_path / "data"
    if ranks.is_main:
        data.mkdir()
        for i in range(NUM_FILES):
            write_chats(data / f"{i}.jsonl", 3, seed=i)
    ranks.barrier()
    cache = (ranks.tmp_path if is_shared else ranks.node_tmp_path) / "cache"
    args = TrainingArguments(
        model_name_or_path="unused", data_path=[str(data)], data_cache_dir=str(cache), dataset_num_proc=1, use_cpu=True
    )
    with caplog.at_level("DEBUG", "trainer.data.prepare"):
        store, _ = load_datasets(args, build_tokenizer(), Group.join(args))
    own = [record.message for record in caplog.records if record.message.startswith("prepared ")]
    prepared = [message for rank in of_all(own) for message in rank]
    assert len(prepared) == NUM_FILES * (1 if is_shared else ranks.num_nodes)
    assert len(set(prepared)) == NUM_FILES
    if ranks.local_rank > 0:
        assert own == []
    tokens = store.read(np.arange(len(store)))
    first, *others = of_all((tokens.input_ids.tobytes(), tokens.labels.tobytes(), store.metadata["fingerprint"]))
    assert len(store) == 3 * NUM_FILES
    assert all(other == first for other in others)
