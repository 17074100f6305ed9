"""Ordinary data on its way into a step: who gets which samples, in which order, and what the model sees of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, default_collate

from tests.fixtures.models import tiny_llama
from tests.fixtures.oracles import gradients, relative_difference
from tests.fixtures.runs import build_trainer, gradients_of, random_token_samples, step_lines
from tests.fixtures.tolerances import LAYOUT_FLOAT64, REGRESSION_FP32
from tests.trainer.trainer_test_utils import (
    DynamicShapesDataset,
    RegressionDataset,
    RegressionModel,
    RegressionModelConfig,
    RegressionPreTrainedModel,
    SampleIterableDataset,
    get_regression_trainer,
    labelled_rows,
)
from trainer.config.arguments import TrainingArguments
from trainer.config.groups import LoaderArguments
from trainer.data.batched import (
    BatchedLoader,
    Dealing,
    RankBatches,
    StreamShare,
    build_loader,
    keep_columns,
    sample_lengths,
)
from trainer.data.order import EpochSampler, LengthGroupedSampler, OrderedSampler
from trainer.errors import UsageError
from trainer.hf.trainer import Trainer
from trainer.training.step import accumulate_gradients

PLAIN = {
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}),
}
dealings = st.builds(
    Dealing,
    per_device=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    rank=st.just(0),
    world_size=st.integers(1, 4),
    drop_last=st.booleans(),
)


def of_all_ranks(dealing: Dealing) -> list[Dealing]:
    return [
        Dealing(dealing.per_device, dealing.accumulation, rank, dealing.world_size, dealing.drop_last)
        for rank in range(dealing.world_size)
    ]


def line_of(trainer: Trainer) -> tuple[float, float]:
    return trainer.model.a.item(), trainer.model.b.item()


class SizedStream(SampleIterableDataset):
    """A stream that knows its length."""

    def __len__(self) -> int:
        return len(self.dataset)


class OnceOnly(SampleIterableDataset):
    """A stream that gives each sample once in its life."""

    def __init__(self, length: int) -> None:
        super().__init__(length=length)
        self.rest = iter([self.dataset[i] for i in range(length)])

    def __iter__(self) -> Iterator[Any]:
        return self.rest


class TestDealing:
    @given(num_samples=st.integers(1, 60), dealing=dealings, start=st.integers(0, 3))
    def test_every_sample_goes_to_one_rank(self, num_samples: int, dealing: Dealing, start: int) -> None:
        num_trained = num_samples
        if dealing.drop_last:
            num_trained -= num_samples % (dealing.per_device * dealing.world_size)
        start = min(start * dealing.per_step, num_trained)
        given = []
        for one in of_all_ranks(dealing):
            sampler = OrderedSampler(num_samples)
            sampler.set_epoch(0, start)
            given += [i for batch in RankBatches(sampler, one) for i in batch]
        assert sorted(given) == list(range(start, num_trained)), "samples dropped, or given twice"

    @given(num_samples=st.integers(1, 60), dealing=dealings)
    def test_the_sizes_foretold_are_those_dealt(self, num_samples: int, dealing: Dealing) -> None:
        for one in of_all_ranks(dealing):
            batches = RankBatches(OrderedSampler(num_samples), one)
            left, sizes = one.num_trained(num_samples), []
            while left > 0:
                sizes += [size for size in one.own_sizes(left) if size]
                left -= one.per_step
            assert [len(batch) for batch in batches] == sizes
            assert len(batches) == len(sizes)

    @given(num_samples=st.integers(1, 40), dealing=dealings)
    def test_a_stream_is_dealt_as_a_map(self, num_samples: int, dealing: Dealing) -> None:
        for one in of_all_ranks(dealing):
            by_map = [i for batch in RankBatches(OrderedSampler(num_samples), one) for i in batch]
            assert list(StreamShare(range(num_samples), one)) == by_map

    def test_an_epoch_goes_on_where_it_is_told(self) -> None:
        dealing = Dealing(per_device=2, accumulation=1, rank=0, world_size=1, drop_last=False)
        loader = build_loader(list(range(7)), list, LoaderArguments(), dealing, EpochSampler(7, seed=1), seed=1)
        first, second, third = list(loader), list(loader), list(loader)
        assert first != second != third
        loader.move_to(1, 2)
        assert list(loader) == second[1:]
        assert list(loader) == third


class TestOrders:
    @given(
        lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80),
        batch_size=st.integers(1, 9),
        epoch=st.integers(0, 3),
    )
    def test_grouping_by_length_is_a_permutation_that_starts_with_the_longest(
        self, lengths: list[int], batch_size: int, epoch: int
    ) -> None:
        sampler = LengthGroupedSampler(lengths, batch_size, seed=3)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(len(lengths)))
        assert lengths[order[0]] == max(lengths)
        sampler.set_epoch(epoch, start=len(lengths) // 2)
        assert list(sampler) == order[len(lengths) // 2 :]

    def test_a_seed_of_its_own_leaves_the_rest_alone(self, tmp_path: Path) -> None:
        def order(**options: int) -> list[float]:
            trainer = get_regression_trainer(output_dir=tmp_path, **options)
            return [x for batch in trainer.get_train_dataloader() for x in batch["input_x"].tolist()]

        assert order(seed=1, data_seed=7) == order(seed=2, data_seed=7) == order(seed=7)
        assert order(seed=7, data_seed=1) == order(seed=1) != order(seed=7)

    def test_grouping_by_length_saves_padding(self) -> None:
        lengths = [1 + (37 * i) % 64 for i in range(512)]

        def padding(order: list[int]) -> int:
            batches = [[lengths[i] for i in order[start : start + 8]] for start in range(0, 512, 8)]
            return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

        assert padding(list(LengthGroupedSampler(lengths, 8))) < padding(list(EpochSampler(512))) / 4

    def test_lengths_come_from_their_column_or_are_measured(self) -> None:
        rows = [{"input_ids": [1] * n} for n in (3, 1, 2)]
        assert sample_lengths(rows, "length", "input_ids") == [3, 1, 2]
        with pytest.raises(UsageError, match="neither a column 'length'"):
            sample_lengths(RegressionDataset(), "length", "input_ids")

    @pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
    def test_the_strategy_is_used(self, tmp_path: Path, strategy: str) -> None:
        rows = [{"input_ids": list(range(n))} for n in (2, 5, 3, 4)]
        args = TrainingArguments(str(tmp_path), train_sampling_strategy=strategy, per_device_train_batch_size=1)
        loader = Trainer(tiny_llama(), args, train_dataset=rows).get_train_dataloader()
        lengths = [batch["input_ids"].shape[1] for batch in loader]
        assert lengths == [2, 5, 3, 4] if strategy == "sequential" else lengths[0] == 5


class TestLoaders:
    def test_loaders_have_as_many_micro_batches_as_counted(self, tmp_path: Path) -> None:
        sizes = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32}
        for drop_last, lengths in ((False, (5, 3)), (True, (4, 3))):  # evaluation leaves nobody out
            options = {"train_len": 66, "eval_len": 74, "dataloader_drop_last": drop_last, **sizes}
            trainer = get_regression_trainer(output_dir=tmp_path, **options)
            loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
            assert tuple(len(loader) for loader in loaders) == lengths
            assert [loader.total_batch_size for loader in loaders] == [16, 32]
            assert (trainer.args.train_batch_size, trainer.args.eval_batch_size) == (16, 32)

    def test_loaders_may_be_of_any_kind(self, tmp_path: Path) -> None:
        class Twice:
            def __init__(self, loader: Any) -> None:
                self.loader = loader

            def __len__(self) -> int:
                return 2 * len(self.loader)

            def __iter__(self) -> Iterator[Any]:
                yield from self.loader
                yield from self.loader

        class TwiceTrainer(Trainer):
            def get_train_dataloader(self) -> Any:
                return Twice(super().get_train_dataloader())

        trainer = get_regression_trainer(output_dir=tmp_path, trainer_class=TwiceTrainer, num_train_epochs=1)
        trainer.train()
        assert trainer.state.global_step == 16
        assert (trainer.state.num_samples_seen, trainer.state.epoch) == (128, 1.0)

    @pytest.mark.world_size(2)
    @pytest.mark.parametrize("is_dealt", [True, False])
    def test_a_loader_of_the_users_is_told_its_epoch_and_must_be_dealt(
        self, ranks, caplog: pytest.LogCaptureFixture, is_dealt: bool
    ) -> None:
        seen = []

        class GivenLoader(Trainer):
            def get_train_dataloader(self) -> Any:
                sampler = DistributedSampler(self.train_dataset) if is_dealt else None
                return DataLoader(self.train_dataset, batch_size=4, sampler=sampler, collate_fn=self.data_collator)

            def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
                seen.extend(inputs["input_x"].tolist())
                return super().training_step(model, inputs, *more)

        trainer = get_regression_trainer(
            output_dir=ranks.tmp_path, trainer_class=GivenLoader, train_len=16, num_train_epochs=2
        )
        trainer.train()
        everyone = torch.cat(trainer.group.gather(torch.tensor(seen, device=trainer.group.device)))
        assert Counter(everyone.tolist()) == {x: 2 if is_dealt else 4 for x in trainer.train_dataset.x.tolist()}
        half = len(seen) // 2
        assert (set(seen[:half]) == set(seen[half:])) == (not is_dealt)
        assert ("each of 2 ranks reads all of its loader" in caplog.text) == (ranks.rank == 0 and not is_dealt)

    @pytest.mark.world_size(2)
    def test_a_loader_of_the_users_must_be_dealt_for_evaluation_too(
        self, ranks, caplog: pytest.LogCaptureFixture
    ) -> None:
        class GivenLoader(Trainer):
            def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
                return DataLoader(self.eval_dataset, batch_size=4, collate_fn=self.data_collator)

        get_regression_trainer(output_dir=ranks.tmp_path, trainer_class=GivenLoader, eval_len=8).evaluate()
        assert ("each of 2 ranks reads all of its loader" in caplog.text) == (ranks.rank == 0)

    @pytest.mark.parametrize("persistent", [False, True])
    def test_loaders_may_read_in_other_processes(self, tmp_path: Path, persistent: bool) -> None:
        options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent, "num_train_epochs": 2}
        lines = []
        for name, more in (("here", {"num_train_epochs": 2}), ("there", options)):
            trainer = get_regression_trainer(output_dir=tmp_path / name, train_len=20, **more, **PLAIN)
            trainer.train()
            lines.append(line_of(trainer))
        assert lines[0] == lines[1]

    def test_processes_that_stay_serve_every_evaluation(self, tmp_path: Path) -> None:
        stay = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        for options, is_same in ((stay, True), ({}, False)):
            data = {name: RegressionDataset(length=4) for name in ("one", "other")}
            trainer = get_regression_trainer(output_dir=tmp_path, eval_dataset=data, **options)
            loader, other = trainer.get_eval_dataloader("one"), trainer.get_eval_dataloader("other")
            assert (loader.dataset, other.dataset) == (data["one"], data["other"])
            assert (trainer.get_eval_dataloader(data["one"]) is loader) == is_same

    def test_an_own_collator_is_used(self, tmp_path: Path) -> None:
        def halved(samples: list[Any]) -> dict[str, torch.Tensor]:
            return {name: torch.tensor([float(s[name]) / 2 for s in samples]) for name in ("input_x", "labels")}

        trainer = get_regression_trainer(output_dir=tmp_path, data_collator=halved, max_steps=1)
        batch = next(iter(trainer.get_train_dataloader()))
        dataset = trainer.train_dataset
        first = list(EpochSampler(64, 42))[0]
        assert batch["input_x"][0].item() == dataset.x[first] / 2
        trainer.train()

    def test_a_collator_may_be_set_later(self, tmp_path: Path) -> None:
        def ninefold(samples: list[Any]) -> dict[str, torch.Tensor]:
            return {name: torch.full((len(samples),), 9.0) for name in ("input_x", "labels")}

        trainer = get_regression_trainer(output_dir=tmp_path)
        trainer.data_collator = ninefold
        assert trainer.evaluate()["eval_loss"] == 9.0**2  # the model gives 0
        assert next(iter(trainer.get_train_dataloader()))["labels"][0] == 9.0

    def test_packs_take_no_collator(self, tmp_path: Path) -> None:
        trainer = build_trainer(tmp_path, random_token_samples([5, 6]))
        assert trainer.data_collator is None
        with pytest.raises(UsageError, match="data_collator has no effect on token data"):
            trainer.data_collator = len

    def test_batches_need_not_be_mappings_for_an_own_loss(self, tmp_path: Path) -> None:
        class OfPairs(Trainer):
            def compute_loss(self, model: Any, inputs: Any, **_: Any) -> torch.Tensor:
                return model(*inputs)[0]

        args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True)
        pairs = TensorDataset(torch.ones(16), torch.ones(16))
        assert OfPairs(RegressionModel(), args, default_collate, pairs).train().global_step == 2

    @pytest.mark.world_size(1, 2)
    def test_shapes_may_change_from_batch_to_batch(self, ranks) -> None:
        options = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, "num_train_epochs": 1}
        trainer = get_regression_trainer(
            output_dir=ranks.tmp_path / "run", train_dataset=DynamicShapesDataset(length=22, batch_size=8), **options
        )
        trainer.train()
        assert trainer.state.num_samples_seen == 22


class TestColumns:
    def test_columns_that_the_model_does_not_take_are_left_out_with_a_note(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict({"input_x": [1.0, 2.0], "labels": [3.0, 4.0], "text": ["a", "b"]})
        rows = [dict(row) for row in table]
        for name, dataset in (("table", table), ("rows", rows)):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                model = Strict()
                trainer = get_regression_trainer(
                    output_dir=tmp_path / name, train_dataset=dataset, model=model, max_steps=1
                )
                trainer.train()
            assert "left out: text" in caplog.text

    def test_columns_may_all_be_kept(self, tmp_path: Path) -> None:
        def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
            return {"input_x": torch.tensor([float(s["raw"]) for s in samples]), "labels": torch.zeros(len(samples))}

        options = {"train_dataset": [{"raw": "1.5"}] * 4, "data_collator": collate, "max_steps": 1}
        get_regression_trainer(
            output_dir=tmp_path / "kept", remove_unused_columns=False, model=Strict(), **options
        ).train()
        with pytest.raises(UsageError, match="the model takes none of the columns raw, only input_x, labels"):
            get_regression_trainer(output_dir=tmp_path / "dropped", model=Strict(), **options).train()

    def test_a_table_keeps_what_is_asked_for(self) -> None:
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict({"a": [1], "b": [2]})
        kept, collate = keep_columns(table, list, ["b", "c"])
        assert (kept.column_names, collate) == (["b"], list)
        with pytest.raises(UsageError, match="none of the columns a, b"):
            keep_columns(table, list, ["c"])


class Strict(RegressionModel):
    """Takes two columns and no other."""

    def forward(self, input_x: Any, labels: Any = None) -> Any:
        return super().forward(input_x, labels)


class TestStreams:
    @pytest.mark.world_size(1, 2)
    @pytest.mark.parametrize(
        ("kind", "length"), [(SampleIterableDataset, 21), (SizedStream, 21), (SizedStream, 1)], ids=str
    )
    def test_a_run_on_a_stream_is_the_run_on_its_samples(self, ranks, kind: Any, length: int) -> None:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 15, **PLAIN}
        lines = []
        for name, data in (("stream", kind(length=length)), ("map", RegressionDataset(length=length))):
            order = {"train_sampling_strategy": "sequential"} if name == "map" else {}
            trainer = get_regression_trainer(output_dir=ranks.tmp_path / name, train_dataset=data, **order, **options)
            trainer.train()
            lines.append((line_of(trainer), trainer.state.num_samples_seen, trainer.state.epoch))
        assert lines[0][0] == pytest.approx(lines[1][0], rel=REGRESSION_FP32)
        assert lines[0][1] == lines[1][1]
        assert lines[0][2] == lines[1][2]

    def test_epochs_of_a_stream_are_counted_once_its_length_is_seen(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(
            output_dir=tmp_path,
            train_dataset=SampleIterableDataset(length=20),
            max_steps=7,
            per_device_train_batch_size=8,
        )
        trainer.train()
        assert [line["epoch"] for line in step_lines(tmp_path)] == [0, 0, 0, 1.4, 1.8, 2.0, 2.4]

    def test_a_stream_without_a_length_needs_max_steps(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, train_dataset=SampleIterableDataset())
        with pytest.raises(ValueError, match="max_steps must be given: train_dataset has no length"):
            trainer.train()

    def test_a_stream_with_a_length_needs_no_max_steps(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, train_dataset=SizedStream(length=20), num_train_epochs=2)
        trainer.train()
        assert (trainer.state.global_step, trainer.state.epoch) == (6, 2.0)

    def test_a_stream_that_runs_dry_ends_the_run(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        trainer = get_regression_trainer(
            output_dir=tmp_path, train_dataset=OnceOnly(10), max_steps=11, per_device_train_batch_size=1
        )
        trainer.train()
        assert trainer.state.global_step == 10
        assert "no more samples: training stops at step 10" in caplog.text

    def test_the_loader_of_a_stream_has_no_order_of_its_own(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, train_dataset=SampleIterableDataset(), max_steps=1)
        loader = trainer.get_train_dataloader()
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.dataset, IterableDataset)
        assert next(iter(loader))["input_x"].tolist() == trainer.train_dataset.dataset.x[:8].tolist()

    def test_a_stream_is_told_its_epoch(self, tmp_path: Path) -> None:
        class Told(SizedStream):
            epochs: list[int] = []

            def set_epoch(self, epoch: int) -> None:
                self.epochs.append(epoch)

        data = Told(length=8)
        get_regression_trainer(output_dir=tmp_path, train_dataset=data, num_train_epochs=3).train()
        assert data.epochs == [0, 1, 2]


class TestLabels:
    @pytest.mark.world_size(1, 2)
    def test_smoothing_leaves_ignored_labels_out(self, ranks) -> None:
        rows = labelled_rows(5)
        args = TrainingArguments(
            str(ranks.tmp_path / "run"),
            label_smoothing_factor=0.1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            train_sampling_strategy="sequential",
            max_samples=5,
        )
        trainer = Trainer(tiny_llama().double(), args, train_dataset=rows)
        run = trainer._build_run()
        batch = next(run.batches.epoch(0, 0))
        accumulate_gradients(run.engine, batch)
        seen = rows[: batch.batch_num_samples]
        samples = [(row["input_ids"], row["labels"]) for row in seen]
        expected = gradients(tiny_llama().double(), samples, 0.1)
        assert relative_difference(gradients_of(trainer.model), expected) < LAYOUT_FLOAT64

    def test_smoothing_is_refused_where_a_row_has_several_labels(self, tmp_path: Path) -> None:
        model = RegressionPreTrainedModel(RegressionModelConfig(problem_type="multi_label_classification"))
        with pytest.raises(UsageError, match="a multi-label model has many"):
            get_regression_trainer(output_dir=tmp_path, model=model, label_smoothing_factor=0.1)

    def test_label_columns_may_be_named(self, tmp_path: Path) -> None:
        trainer = get_regression_trainer(output_dir=tmp_path, label_names=["labels", "labels_2"], max_steps=1)
        assert trainer.label_names == ["labels", "labels_2"]
        assert {"labels", "labels_2"} <= next(iter(trainer.get_train_dataloader())).keys()
        assert get_regression_trainer(output_dir=tmp_path).label_names == ["labels"]

    def test_the_loader_is_ours(self, tmp_path: Path) -> None:
        assert isinstance(get_regression_trainer(output_dir=tmp_path).get_train_dataloader(), BatchedLoader)


def test_samples_of_a_loader_of_ones_own_are_counted_as_they_come(tmp_path: Path) -> None:
    """It deals other sizes than the options say."""

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=3)

    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, export_final=False)
    Own(RegressionModel(), args, train_dataset=RegressionDataset(length=8)).train()
    assert [line["num_samples"] for line in step_lines(tmp_path)] == [3, 3, 2]


def test_samples_that_a_collator_makes_one_row_of_are_counted_as_they_were_dealt(tmp_path: Path) -> None:
    def one_row(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([[float(row[name]) for row in rows]]) for name in ("input_x", "labels")}

    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=3, num_train_epochs=1, export_final=False)
    Trainer(RegressionModel(), args, one_row, train_dataset=RegressionDataset(length=8)).train()
    assert [line["num_samples"] for line in step_lines(tmp_path)] == [3, 3, 2]
