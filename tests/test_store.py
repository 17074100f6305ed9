"""The store gives back what was written, is whole or not there, and opens in proportion to its index."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import store as store_module
from trainer.data.store import Sample, StoreWriter, TokenBatch, TokenStore
from trainer.errors import DataError

TOKENS = st.integers(0, 2**31 - 1)
SAMPLES = st.lists(st.lists(st.tuples(TOKENS, st.one_of(st.just(-100), TOKENS)), max_size=6), max_size=12)

NUM_MANY_SAMPLES = 10_000_000
OPEN_SECONDS = 1.0


def write(directory: Path, samples: list[Sample]) -> TokenStore:
    with StoreWriter(directory, {"kind": "test"}) as writer:
        for sample in samples:
            writer.append(sample.input_ids, sample.labels)
    return TokenStore.open(directory)


def simple(num_samples: int = 5) -> list[Sample]:
    return [Sample(np.arange(i + 2, dtype=np.int32), np.arange(i + 2, dtype=np.int32)) for i in range(num_samples)]


def check_equal(store: TokenStore, samples: list[Sample]) -> None:
    assert len(store) == len(samples)
    for i, sample in enumerate(samples):
        assert store.sample(i).input_ids.tolist() == list(sample.input_ids)
        assert store.sample(i).labels.tolist() == list(sample.labels)
        assert store.lengths[i] == len(sample.input_ids)
        assert store.num_loss_tokens[i] == sum(label != -100 for label in list(sample.labels)[1:])


@given(pairs=SAMPLES, chunk_tokens=st.integers(1, 20))
@settings(deadline=None)
def test_samples_come_back_from_disk_and_memory(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[list[tuple[int, int]]], chunk_tokens: int
) -> None:
    samples = [
        Sample(*(np.array(column, np.int32) for column in (zip(*p, strict=True) if p else ([], [])))) for p in pairs
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "CHUNK_TOKENS", chunk_tokens)
        store = write(tmp_path_factory.mktemp("store") / "s", samples)
    check_equal(store, samples)
    check_equal(TokenStore.from_samples(samples), samples)
    check_equal(pickle.loads(pickle.dumps(store)), samples)
    assert store.lengths.dtype == store.num_loss_tokens.dtype == np.int32
    assert store.documents.tolist() == list(range(1, len(samples) + 1))


def test_selecting_composes(tmp_path: Path) -> None:
    samples = simple(6)
    store = write(tmp_path / "s", samples).select([5, 3, 3, 0]).select([0, 2])
    check_equal(store, [samples[5], samples[3]])
    assert store.documents.tolist() == [6, 4]
    for i in (-1, 2):
        with pytest.raises(IndexError, match=f"sample {i} of a store of 2"):
            store.sample(i)
        with pytest.raises(IndexError, match="of a store of 2"):
            store.select([i])


def test_metadata_is_kept_and_counted(tmp_path: Path) -> None:
    store = write(tmp_path / "s", simple(3))
    facts = {name: store.metadata[name] for name in ("kind", "num_samples", "num_tokens", "num_loss_tokens")}
    assert facts == {"kind": "test", "num_samples": 3, "num_tokens": 9, "num_loss_tokens": 6}


def test_a_store_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of one length"):
        write(tmp_path / "s", [*simple(2), Sample(np.zeros(2, np.int32), np.zeros(1, np.int32))])
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_not_written_over_another(tmp_path: Path) -> None:
    write(tmp_path / "s", simple(2))
    with pytest.raises(DataError, match="cannot be published"):
        write(tmp_path / "s", simple(3))
    check_equal(TokenStore.open(tmp_path / "s"), simple(2))
    assert len(list(tmp_path.iterdir())) == 1


def test_labels_need_the_shape_of_the_ids() -> None:
    with pytest.raises(DataError, match="of one length"):
        TokenStore.from_samples([([1, 2], [1])])


@pytest.mark.parametrize("name", ["metadata.json", "index.arrow", "tokens.arrow"])
def test_a_missing_or_cut_file_is_an_error(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s", simple())
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="prepare the data again"):
        TokenStore.open(tmp_path / "s")
    path.unlink()
    with pytest.raises(DataError, match="prepare the data again"):
        TokenStore.open(tmp_path / "s")


def test_any_changed_byte_of_metadata_or_index_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "s", simple(2))
    for name in ("metadata.json", "index.arrow"):
        path = tmp_path / "s" / name
        whole = path.read_bytes()
        for i in range(len(whole)):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x11]) + whole[i + 1 :])
            if not _is_white_space(name, whole, i):
                with pytest.raises(DataError):
                    TokenStore.open(tmp_path / "s")
        path.write_bytes(whole)


def test_a_changed_byte_of_the_tokens_gives_an_error_or_other_tokens_of_the_same_shape(tmp_path: Path) -> None:
    write(tmp_path / "s", simple(2))
    path = tmp_path / "s" / "tokens.arrow"
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        try:
            assert [len(TokenStore.open(tmp_path / "s").sample(k).labels) for k in (0, 1)] == [2, 3]
        except DataError:
            continue


@pytest.mark.timeout(300)
def test_ten_million_samples_open_within_a_second_and_read_no_tokens(tmp_path: Path) -> None:
    ones = np.ones(NUM_MANY_SAMPLES, np.int32)
    with StoreWriter(tmp_path / "s") as writer:
        batch = TokenBatch(np.repeat(ones, 2), np.repeat(ones, 2), 2 * ones, np.arange(NUM_MANY_SAMPLES))
        writer.append_batch(batch)
    del batch
    begin, memory = time.process_time(), _resident_bytes()
    store = TokenStore.open(tmp_path / "s")
    sample = store.sample(NUM_MANY_SAMPLES - 1)
    assert time.process_time() - begin < OPEN_SECONDS
    assert sample.input_ids.tolist() == [1, 1]
    index_bytes = (tmp_path / "s" / "index.arrow").stat().st_size
    assert _resident_bytes() - memory < 2 * index_bytes


def _is_white_space(name: str, content: bytes, i: int) -> bool:
    return name == "metadata.json" and content[i : i + 1].isspace()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
