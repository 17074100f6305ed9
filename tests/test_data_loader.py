"""Data set, samplers, collator and loader: what a rank is given, from a line of JSONL to its micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from threading import Event, active_count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.fixtures import tolerances
from tests.fixtures.corpora import write_jsonl
from tests.fixtures.runs import numbered_store
from tests.fixtures.strategies import TokenSample, trained_batches
from trainer.data.length import Layout, forecast
from trainer.data.loader import (
    DUMMY_SAMPLE,
    JsonlDataset,
    MaxTokensPerRankCollator,
    MicroBatch,
    get_data_loader,
    prefetched,
)
from trainer.data.order import EpochSampler, InfiniteSampler, epoch_order
from trainer.data.packing import CostModel, plan_batch
from trainer.data.store import StoreWriter, TokenStore
from trainer.errors import DataError, UsageError

TIMEOUT_SECONDS = 60

LINES: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, -100, 4, 5], "len": 5, "num_loss_counted_tokens": 3},
    {"input_ids": [6, 7, 8, 9], "labels": [-100, -100, 8, 9], "len": 4},
    {"input_ids": [11, 12, 13], "labels": [11, 12, 13]},
]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", LINES)


def as_dict(sample: TokenSample) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(sample.input_ids), "labels": torch.tensor(sample.labels)}


def borders(micro_batch: MicroBatch) -> list[tuple[int, int]]:
    ends = micro_batch["cu_seq_lens"].tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def samples_in(micro_batches: list[MicroBatch]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each sample that is no placeholder."""
    return [
        (mb["input_ids"][0, a:b].tolist(), mb["labels"][0, a:b].tolist())
        for mb in micro_batches
        if mb["num_samples"]
        for a, b in borders(mb)
    ]


class TestJsonlDataset:
    def test_dataset_initialization(self, jsonl: Path) -> None:
        assert len(JsonlDataset(path=jsonl)) == 3
        assert len(JsonlDataset(str(jsonl))) == 3

    def test_dataset_getitem(self, jsonl: Path) -> None:
        item = JsonlDataset(jsonl)[0]
        assert item["input_ids"].tolist() == LINES[0]["input_ids"]
        assert item["labels"].tolist() == LINES[0]["labels"]
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["len"] == 5

    def test_loss_tokens_are_counted_after_the_shift(self, jsonl: Path) -> None:
        assert [item["num_loss_counted_tokens"] for item in JsonlDataset(jsonl)] == [3, 2, 2]

    def test_miscounted_loss_tokens_are_corrected_and_reported(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "d.jsonl", [{**LINES[0], "num_loss_counted_tokens": 4}, LINES[1]])
        dataset = JsonlDataset(path)
        assert dataset[0]["num_loss_counted_tokens"] == 3
        assert dataset.store.metadata["num_miscounted_loss_tokens"] == 1

    @pytest.mark.parametrize("index", [1, np.int64(1), torch.tensor(1), -2])
    def test_dataset_index_types(self, jsonl: Path, index: Any) -> None:
        assert JsonlDataset(jsonl)[index]["input_ids"].tolist() == [6, 7, 8, 9]

    @pytest.mark.parametrize("index", [3, -4])
    def test_index_out_of_range(self, jsonl: Path, index: int) -> None:
        with pytest.raises(IndexError, match="of 3"):
            JsonlDataset(jsonl)[index]

    def test_items_can_be_changed_without_changing_the_data(self, jsonl: Path) -> None:
        dataset = JsonlDataset(jsonl)
        dataset[0]["labels"].fill_(0)
        assert dataset[0]["labels"].tolist() == LINES[0]["labels"]

    def test_prepared_store_gives_the_same_items(self, jsonl: Path, tmp_path: Path) -> None:
        with StoreWriter(tmp_path / "store") as writer:
            for line in LINES:
                writer.append(line["input_ids"], line["labels"])
        for ours, theirs in zip(JsonlDataset(tmp_path / "store"), JsonlDataset(jsonl), strict=True):
            assert {name: np.asarray(value).tolist() for name, value in ours.items()} == {
                name: np.asarray(value).tolist() for name, value in theirs.items()
            }

    def test_text_must_be_tokenized_first(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"'text'.*trainer prepare"):
            JsonlDataset(write_jsonl(tmp_path / "text.jsonl", [{"text": "hello"}]))

    def test_bad_line_is_named(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "d.jsonl", [LINES[0], {"input_ids": [1, 2], "labels": [1]}])
        with pytest.raises(DataError, match=r"d\.jsonl:2"):
            JsonlDataset(path)

    def test_path_or_store(self, jsonl: Path) -> None:
        with pytest.raises(UsageError, match="path"):
            JsonlDataset()
        with pytest.raises(UsageError, match="path"):
            JsonlDataset(jsonl, store=numbered_store([1]))


class TestEpochOrder:
    def test_order_is_what_it_was_when_first_published(self) -> None:
        assert epoch_order(10, 42, 0).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
        assert epoch_order(10, 42, 1).tolist() == [4, 9, 5, 3, 0, 2, 7, 1, 6, 8]

    @given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
    def test_an_epoch_order_is_a_permutation(self, n: int, seed: int, epoch: int) -> None:
        assert sorted(epoch_order(n, seed, epoch).tolist()) == list(range(n))

    def test_every_order_is_equally_likely(self) -> None:
        orders, counts = np.unique([epoch_order(4, seed, 0) for seed in range(4800)], axis=0, return_counts=True)
        assert len(orders) == 24
        chi_squared = ((counts - 200.0) ** 2 / 200.0).sum()
        assert chi_squared < tolerances.CHI_SQUARED_23_DEGREES

    @pytest.mark.parametrize(("n", "seed", "epoch"), [(0, 0, 0), (-1, 0, 0), (3, -1, 0), (3, 2**64, 0), (3, 0, -1)])
    def test_epoch_order_refuses_arguments_out_of_range(self, n: int, seed: int, epoch: int) -> None:
        with pytest.raises(UsageError, match=r"samples|seed|epoch"):
            epoch_order(n, seed, epoch)


class TestEpochSampler:
    def test_a_sampler_gives_the_epoch_in_order(self) -> None:
        sampler = EpochSampler(100, seed=3)
        assert list(sampler) == epoch_order(100, 3, 0).tolist()
        assert {type(i) for i in sampler} == {int}

    def test_iterating_does_not_move_it(self) -> None:
        sampler = EpochSampler(10, seed=3)
        assert list(sampler) == list(sampler)
        assert sampler.epoch == 0

    @given(n=st.integers(1, 200), epoch=st.integers(0, 9), data=st.data())
    def test_start_resumes_where_it_stopped(self, n: int, epoch: int, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, n))
        sampler = EpochSampler(n, seed=1)
        sampler.set_epoch(epoch)
        whole = list(sampler)
        sampler.set_epoch(epoch, start=start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == n - start

    @pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 11)])
    def test_positions_out_of_range(self, epoch: int, start: int) -> None:
        with pytest.raises(UsageError, match=r"epoch|start"):
            EpochSampler(10).set_epoch(epoch, start)


class TestInfiniteSampler:
    @given(n=st.integers(1, 50), seed=st.integers(0, 5))
    def test_each_epoch_is_complete_before_the_next(self, n: int, seed: int) -> None:
        stream = list(islice(InfiniteSampler(n, seed), 4 * n))
        for epoch in range(4):
            assert stream[epoch * n : (epoch + 1) * n] == epoch_order(n, seed, epoch).tolist()

    def test_epochs_are_shuffled_anew(self) -> None:
        stream = list(islice(InfiniteSampler(100, seed=0), 200))
        assert stream[:100] != stream[100:]
        assert stream[:100] != list(range(100))

    def test_an_infinite_sampler_resumes_in_the_middle_of_an_epoch(self) -> None:
        sampler = InfiniteSampler(7, seed=0)
        stream = list(islice(sampler, 40))
        sampler.set_epoch(2, start=3)
        assert list(islice(sampler, 20)) == stream[17:37]

    def test_an_infinite_sampler_has_no_length(self) -> None:
        with pytest.raises(TypeError, match="len"):
            len(InfiniteSampler(7, seed=0))  # type: ignore[arg-type]


class TestMaxTokensPerRankCollator:
    def test_collator_initialization(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        collator = MaxTokensPerRankCollator(max_tokens_per_rank=1000)
        assert (collator.max_tokens_per_rank, collator.global_rank, collator.world_size) == (1000, 1, 2)
        assert collator.dummy_sample is DUMMY_SAMPLE

    def test_one_process_by_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        collator = MaxTokensPerRankCollator(10)
        assert (collator.global_rank, collator.world_size) == (0, 1)

    def test_layout_by_hand(self) -> None:
        samples = [
            {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])},
            {"input_ids": torch.tensor([4, 5, 6, 7]), "labels": torch.tensor([4, -100, 6, 7])},
        ]
        (mb,) = MaxTokensPerRankCollator(10, rank=0, world_size=1)(samples)
        assert mb["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
        assert mb["labels"].tolist() == [[-100, 2, 3, -100, -100, 6, 7]]
        assert mb["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
        assert mb["cu_seq_lens"].tolist() == [0, 3, 7]
        assert mb["cu_seq_lens"].dtype == torch.int32
        assert {mb[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}
        assert mb["max_length"] == 4
        assert (mb["num_samples"], mb["num_tokens"], mb["num_loss_counted_tokens"]) == (2, 7, 4)
        assert {type(mb[name]) for name in mb if name.startswith(("num", "batch", "max"))} == {int}

    def test_a_rank_without_work_gets_a_placeholder(self) -> None:
        samples = [as_dict(TokenSample([5, 6, 7], [5, 6, 7]))]
        (mb,) = MaxTokensPerRankCollator(10, rank=1, world_size=2)(samples)
        assert (mb["num_samples"], mb["num_tokens"], mb["num_loss_counted_tokens"]) == (0, 0, 0)
        assert (mb["batch_num_samples"], mb["batch_num_tokens"], mb["batch_num_loss_counted_tokens"]) == (1, 3, 2)
        assert mb["input_ids"].shape == mb["labels"].shape == mb["position_ids"].shape == (1, 2)
        assert (mb["labels"] == -100).all()

    def test_dummy_sample_of_ones_own(self) -> None:
        dummy = {"input_ids": torch.tensor([9, 9, 9]), "labels": torch.tensor([-100] * 3)}
        collator = MaxTokensPerRankCollator(10, rank=1, world_size=2, dummy_sample=dummy)
        (mb,) = collator([as_dict(TokenSample([5, 6], [5, 6]))])
        assert collator.dummy_sample is dummy
        assert mb["input_ids"].tolist() == [[9, 9, 9]]

    def test_samples_without_tokens_count_but_take_no_room(self) -> None:
        samples = [as_dict(TokenSample([], [])), as_dict(TokenSample([5, 6], [5, 6]))]
        (mb,) = MaxTokensPerRankCollator(10, rank=0, world_size=1)(samples)
        assert (mb["num_samples"], mb["num_tokens"], mb["cu_seq_lens"].tolist()) == (2, 2, [0, 2])

    def test_overlong_sample_is_an_error(self) -> None:
        samples = [as_dict(TokenSample([1] * n, [1] * n)) for n in (3, 11, 12)]
        with pytest.raises(DataError, match=r"sample 1 has 11 tokens \(2 of 3.*max_tokens_per_rank=10"):
            MaxTokensPerRankCollator(10, rank=0, world_size=1)(samples)

    def test_batch_that_trains_nothing_is_an_error(self) -> None:
        with pytest.raises(DataError, match="none of the 1 samples"):
            MaxTokensPerRankCollator(10, rank=0, world_size=1)([as_dict(TokenSample([1, 2], [1, -100]))])

    def test_labels_must_match_tokens(self) -> None:
        with pytest.raises(DataError, match="1 labels for 2 tokens"):
            MaxTokensPerRankCollator(10, rank=0, world_size=1)([as_dict(TokenSample([1, 2], [1]))])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 2, "world_size": 2}, "rank 2 of world_size 2"),
            ({"rank": 0, "world_size": 1, "max_tokens_per_rank": 0}, "max_tokens_per_rank=0"),
            ({"rank": 0, "world_size": 1, "dummy_sample": {"input_ids": [1, 2], "labels": [1, 2]}}, "dummy_sample"),
            ({"rank": 0, "world_size": 1, "dummy_sample": {"input_ids": [], "labels": []}}, "dummy_sample"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            MaxTokensPerRankCollator(**{"max_tokens_per_rank": 10, **arguments})

    @given(batch=trained_batches(), world_size=st.integers(1, 4), budget=st.integers(12, 60))
    def test_ranks_together_hold_the_batch(self, batch: list[TokenSample], world_size: int, budget: int) -> None:
        samples = [as_dict(sample) for sample in batch]
        shares = [MaxTokensPerRankCollator(budget, rank, world_size)(samples) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        found = sorted(pair for share in shares for pair in samples_in(share))
        assert found == sorted((ids, [-100, *labels[1:]]) for ids, labels in batch)

    @given(batch=trained_batches(), world_size=st.integers(1, 4), budget=st.integers(12, 60))
    def test_the_counts_of_a_batch_equal_what_the_tensors_hold(
        self, batch: list[TokenSample], world_size: int, budget: int
    ) -> None:
        samples = [as_dict(sample) for sample in batch]
        shares = [MaxTokensPerRankCollator(budget, rank, world_size)(samples) for rank in range(world_size)]
        micro_batches = [mb for share in shares for mb in share]
        for mb in micro_batches:
            check_micro_batch(mb, budget)
        for name in ("num_samples", "num_tokens", "num_loss_counted_tokens"):
            total = sum(mb[name] for mb in micro_batches)  # type: ignore[literal-required]
            assert {mb[f"batch_{name}"] for mb in micro_batches} == {total}  # type: ignore[literal-required]


def check_micro_batch(mb: MicroBatch, budget: int) -> None:
    num_tokens = mb["input_ids"].shape[1]
    assert mb["num_tokens"] == (num_tokens if mb["num_samples"] else 0)
    assert num_tokens <= budget
    assert mb["num_loss_counted_tokens"] == int((mb["labels"][0, 1:] != -100).sum())
    assert mb["position_ids"][0].tolist() == [i for a, b in borders(mb) for i in range(b - a)]
    assert all(mb["labels"][0, a] == -100 for a, _ in borders(mb))
    assert mb["max_length"] == max(b - a for a, b in borders(mb))
    assert borders(mb)[-1][1] == num_tokens


class TestGetDataLoader:
    LENGTHS = [100] * 10

    def loader(self, lengths: list[int] | None = None, **options: Any) -> DataLoader[list[MicroBatch]]:
        defaults: dict[str, Any] = {"batch_size": 4, "max_tokens_per_gpu": 500, "seed": 42, "rank": 0, "world_size": 1}
        return get_data_loader(store=numbered_store(lengths or self.LENGTHS), **{**defaults, **options})

    def test_get_data_loader_basic(self, jsonl: Path) -> None:
        loader = get_data_loader(data_path=jsonl, batch_size=2, max_tokens_per_gpu=20, seed=0, rank=0, world_size=1)
        assert isinstance(loader, DataLoader)
        assert loader.batch_size == 2
        assert isinstance(loader.sampler, InfiniteSampler)
        (micro_batch,) = next(iter(loader))
        assert micro_batch["num_samples"] == 2

    def test_get_data_loader_with_custom_params(self) -> None:
        dummy = {"input_ids": torch.tensor([0, 0]), "labels": torch.tensor([-100, -100])}
        loader = self.loader(rank=1, world_size=4, dummy_sample=dummy, batch_size=8)
        assert (loader.collate_fn.global_rank, loader.collate_fn.world_size) == (1, 4)  # type: ignore[attr-defined]
        assert loader.collate_fn.dummy_sample is dummy  # type: ignore[attr-defined]

    def test_default_never_ends_and_has_no_length(self) -> None:
        loader = self.loader()
        assert sum(1 for _ in islice(loader, 20)) == 20
        with pytest.raises(TypeError, match="len"):
            len(loader)

    def test_epoch_ends_with_a_smaller_batch(self) -> None:
        loader = self.loader(sampler=EpochSampler(10, seed=42))
        assert [batch[0]["batch_num_samples"] for batch in loader] == [4, 4, 2]
        assert len(loader) == 3

    def test_a_loader_follows_its_sampler(self) -> None:
        loader = self.loader(sampler=EpochSampler(10, seed=42))
        loader.sampler.set_epoch(3, start=4)  # type: ignore[attr-defined]
        seen = [{ids[0] for ids, _ in samples_in(batch)} for batch in loader]
        order = epoch_order(10, 42, 3).tolist()
        assert seen == [set(order[4:8]), set(order[8:])]

    def test_finished_sampler_gives_nothing(self) -> None:
        sampler = EpochSampler(10)
        sampler.set_epoch(0, start=10)
        assert list(self.loader(sampler=sampler)) == []

    def test_a_rank_reads_only_its_own_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loader = self.loader(sampler=EpochSampler(10), rank=1, world_size=2, batch_size=5)
        read: list[int] = []
        plain = TokenStore.read
        monkeypatch.setattr(TokenStore, "read", lambda store, rows: (read.extend(rows), plain(store, rows))[1])
        held = [ids[0] for batch in loader for ids, _ in samples_in(batch)]
        assert sorted(read) == sorted(held)
        assert 0 < len(held) < 10

    def test_a_loader_that_starts_late_in_an_epoch_reads_nothing_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sampler = EpochSampler(1000)
        sampler.set_epoch(3, start=990)
        read: list[int] = []
        plain = TokenStore.read
        monkeypatch.setattr(TokenStore, "read", lambda store, rows: (read.extend(rows), plain(store, rows))[1])
        assert len(list(self.loader([5] * 1000, sampler=sampler, batch_size=5))) == 2
        assert sorted(read) == sorted(epoch_order(1000, 0, 3)[990:])

    def test_batches_of_more_ranks_than_samples(self) -> None:
        loader = self.loader(sampler=EpochSampler(10), rank=7, world_size=8, batch_size=4)
        assert [[mb["num_samples"] for mb in batch] for batch in loader] == [[0], [0], [0]]

    def test_costs_reach_the_plan(self) -> None:
        lengths = [400, 200, 100, 100, 90, 110, 300, 10]
        cost = CostModel(0, 1)
        loader = self.loader(lengths, sampler=EpochSampler(8, seed=1), batch_size=8, world_size=2, cost=cost)
        order = epoch_order(8, 1, 0)
        plan = plan_batch(np.array(lengths)[order], 500, 2, cost)
        held = [sorted(ids[0] for ids, _ in samples_in([mb])) for mb in next(iter(loader))]
        assert held == [sorted(order[list(pack)].tolist()) for pack in plan.of_rank(0)]

    def test_iterating_leaves_global_random_state_alone(self) -> None:
        before = torch.random.get_rng_state()
        next(iter(self.loader()))
        assert torch.equal(before, torch.random.get_rng_state())

    def test_items_of_a_batch_can_be_read_by_others(self, jsonl: Path) -> None:
        plain = DataLoader(JsonlDataset(jsonl), batch_size=3, collate_fn=list)
        (items,) = plain
        assert [item["len"] for item in items] == [5, 4, 3]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size=0"),
            ({"max_tokens_per_gpu": None}, "one setting under two names"),
            ({"max_tokens_per_rank": 400}, "one setting under two names"),
            ({"sampler": EpochSampler(9)}, "orders 9 samples, the data has 10"),
            ({"data_path": "x.jsonl"}, "either"),
        ],
    )
    def test_contradictions_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            self.loader(**options)

    def test_budget_under_either_name(self) -> None:
        for options in ({"max_tokens_per_gpu": None, "max_tokens_per_rank": 500}, {"max_tokens_per_rank": 500}):
            assert self.loader(**options).collate_fn.max_tokens_per_rank == 500  # type: ignore[attr-defined]

    def test_overlong_sample_is_found_before_the_first_batch(self) -> None:
        with pytest.raises(DataError, match="sample 1 has 501 tokens"):
            self.loader([100, 501])


class TestForecast:
    @pytest.mark.parametrize("world_size", [1, 2, 5])
    @pytest.mark.parametrize("cost", [CostModel(1, 0), CostModel(100, 1)], ids=["tokens", "squares"])
    def test_a_forecast_is_what_the_loader_does(self, world_size: int, cost: CostModel) -> None:
        lengths = np.random.default_rng(0).integers(2, 200, 101).tolist()
        store = numbered_store(lengths)
        told = forecast(store.lengths, store.num_loss_tokens, Layout(16, 256, world_size, cost), seed=7, epochs=2)
        for epoch in told.epochs:
            whole_numbers = dataclasses.astuple(epoch)[1:6]
            assert self.run(store, world_size, cost, epoch.epoch) == whole_numbers

    def run(self, store: TokenStore, world_size: int, cost: CostModel, epoch: int) -> tuple[int, ...]:
        shares = []
        for rank in range(world_size):
            sampler = EpochSampler(len(store), seed=7)
            sampler.set_epoch(epoch)
            loader = get_data_loader(
                store=store, batch_size=16, max_tokens_per_gpu=256, rank=rank, world_size=world_size,
                sampler=sampler, cost=cost,
            )  # fmt: skip
            shares.append(list(loader))
        packs = [mb for share in shares for batch in share for mb in batch]
        return (
            len(shares[0]),
            sum(len(batch) for batch in shares[0]),
            sum(mb["num_samples"] == 0 for mb in packs),
            sum(mb["num_tokens"] for mb in packs),
            sum(mb["num_loss_counted_tokens"] for mb in packs),
        )

    def test_totals_efficiency_and_balance_by_hand(self) -> None:
        told = forecast(np.array([4, 4, 2]), np.array([3, 3, 1]), Layout(3, 6), epochs=2)
        assert (told.num_steps, told.num_micro_batches, told.num_tokens, told.num_loss_tokens) == (2, 4, 20, 14)
        assert told.epochs[1].packing_efficiency == 10 / 12
        told = forecast(np.array([4, 2]), np.array([3, 1]), Layout(2, 6, world_size=2))
        assert told.epochs[0].balance == 6 / 8

    def test_balance_is_that_of_the_plan(self) -> None:
        lengths, cost = np.random.default_rng(0).integers(1, 200, 60), CostModel(1, 3)
        told = forecast(lengths, lengths - 1, Layout(60, 256, 4, cost)).epochs[0]
        in_order = lengths[epoch_order(60, 0, 0)]
        plan = plan_batch(in_order, 256, 4, cost)
        dearest = sum(max(sum(cost.of(in_order[i]) for i in pack) for pack in packs) for packs in plan.packs)
        assert plan.num_micro_batches > 1
        assert told.balance == cost.of(lengths).sum() / (4 * dearest)

    def test_a_forecast_for_1024_ranks_has_no_placeholder(self) -> None:
        told = forecast(np.full(2048, 10), np.full(2048, 9), Layout(2048, 100, world_size=1024))
        assert (told.num_micro_batches, told.epochs[0].num_placeholders) == (1, 0)

    def test_bad_arguments(self) -> None:
        with pytest.raises(UsageError, match="batch_size=0"):
            Layout(0, 10)
        with pytest.raises(UsageError, match="epochs=0"):
            forecast(np.array([1]), np.array([1]), Layout(1, 1), epochs=0)


class TestPrefetch:
    """What is drawn ahead is what would have been drawn."""

    @given(items=st.lists(st.integers()), taken=st.integers(0, 5))
    def test_same_items_in_the_same_order(self, items: list[int], taken: int) -> None:
        assert list(prefetched(items)) == items
        assert list(islice(prefetched(items), taken)) == items[:taken]

    def test_prefetching_draws_one_item_ahead_and_no_more(self) -> None:
        drawn: list[int] = []
        items = prefetched(map(lambda i: (drawn.append(i), i)[1], range(9)))  # type: ignore[func-returns-value]
        assert (next(items), next(items)) == (0, 1)
        items.close()  # type: ignore[attr-defined]
        assert drawn == [0, 1, 2]

    def test_prefetching_works_while_the_consumer_does(self) -> None:
        made, used = Event(), Event()

        def items() -> Iterator[int]:
            yield 0
            made.set()
            assert used.wait(TIMEOUT_SECONDS)  # set while this runs: the consumer does not wait for it
            yield 1

        for item in prefetched(items()):
            assert item == 1 or made.wait(TIMEOUT_SECONDS)
            used.set()

    def test_an_error_comes_at_its_place(self) -> None:
        def items() -> Iterator[int]:
            yield 0
            raise DataError("line 7 is torn", "whole lines")

        seen: list[int] = []
        with pytest.raises(DataError, match="line 7"):
            seen.extend(prefetched(items()))
        assert seen == [0]

    def test_prefetching_leaves_no_thread(self) -> None:
        before = active_count()
        items = prefetched(range(5))
        next(items)
        items.close()  # type: ignore[attr-defined]
        assert active_count() == before
