"""Token data and custom data sets are one run: the same samples give the same numbers, whichever task holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.fixtures.datasets import RegressionDataset, labelled_rows
from tests.fixtures.models import build_model, tiny_llama
from tests.fixtures.ranks.context import Ranks
from tests.fixtures.regression import RegressionModel
from tests.fixtures.runs import build_store, random_token_samples
from tests.fixtures.tolerances import SAME_LOSS
from trainer import EpochSampler, Trainer, TrainingArguments, get_data_loader
from trainer.errors import UsageError

QUIET = {"use_cpu": True, "save_strategy": "no", "export_final": False, "disable_tqdm": True, "max_steps": 1}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), learning_rate=0.0, **QUIET, **options)


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.2])
def test_rows_and_token_data_have_one_loss(tmp_path: Path, label_smoothing_factor: float) -> None:
    rows = labelled_rows(8)
    store = build_store([(row["input_ids"], row["labels"]) for row in rows])
    smoothing = {"label_smoothing_factor": label_smoothing_factor}
    packed = Trainer(
        tiny_llama(),
        arguments(tmp_path / "packed", batch_size=8, max_tokens_per_rank=128, **smoothing),
        train_dataset=store,
        eval_dataset=store,
    )
    custom = Trainer(
        tiny_llama(),
        arguments(tmp_path / "rows", per_device_train_batch_size=8, **smoothing),
        train_dataset=rows,
        eval_dataset=rows,
    )
    assert packed.evaluate()["eval_loss"] == pytest.approx(custom.evaluate()["eval_loss"], rel=SAME_LOSS)
    assert packed.train().training_loss == pytest.approx(custom.train().training_loss, rel=SAME_LOSS)


def mixture_of_experts() -> Any:
    torch.manual_seed(0)
    model = build_model("mixtral")
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.1
    return model


@pytest.mark.world_size(1, 2)
def test_the_router_loss_of_rows_does_not_depend_on_layout(ranks: Ranks, tmp_path: Path) -> None:
    rows = labelled_rows(1) * 8
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("input_ids", "labels")}
    expected = mixture_of_experts()(**batch).loss.item()
    for per_device in (8 // ranks.world_size, 2, 1):
        args = arguments(
            tmp_path / str(per_device),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=8 // ranks.world_size // per_device,
        )
        trained = Trainer(mixture_of_experts(), args, train_dataset=rows).train().training_loss
        assert trained == pytest.approx(expected, rel=SAME_LOSS), per_device


SAMPLES = random_token_samples([5, 6, 7, 8] * 3)


class OwnPackedLoader(Trainer):
    """Builds the loader of token data itself."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        return get_data_loader(
            store=self.train_dataset,
            batch_size=4,
            max_tokens_per_rank=64,
            sampler=EpochSampler(len(self.train_dataset), self.args.order_seed),
        )


class InfiniteLoader(Trainer):
    def get_train_dataloader(self) -> DataLoader[Any]:
        return get_data_loader(store=self.train_dataset, batch_size=4, max_tokens_per_rank=64)


class OtherBatches(Trainer):
    def get_train_dataloader(self) -> DataLoader[Any]:
        sampler = EpochSampler(len(self.train_dataset), 0)
        return get_data_loader(store=self.train_dataset, batch_size=6, max_tokens_per_rank=64, sampler=sampler)


class PlainLoader(Trainer):
    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([1, 2, 3])  # type: ignore[arg-type]


def packed_arguments(folder: Path) -> TrainingArguments:
    return arguments(folder, batch_size=4, max_tokens_per_rank=64)


def test_an_own_loader_of_token_data_is_used(tmp_path: Path) -> None:
    own = OwnPackedLoader(tiny_llama(), packed_arguments(tmp_path / "own"), train_dataset=build_store(SAMPLES))
    ours = Trainer(tiny_llama(), packed_arguments(tmp_path / "ours"), train_dataset=build_store(SAMPLES))
    assert own.train().training_loss == ours.train().training_loss


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (InfiniteLoader, "sampler is a InfiniteSampler: token data needs an EpochSampler"),
        (PlainLoader, "sampler is a SequentialSampler: token data needs an EpochSampler"),
        (OtherBatches, "12 samples in batches of 6, the run is planned for 12 samples in batches of 4"),
    ],
)
def test_another_loader_of_token_data_is_refused_with_the_reason(
    tmp_path: Path, kind: type[Trainer], message: str
) -> None:
    trainer = kind(tiny_llama(), packed_arguments(tmp_path), train_dataset=build_store(SAMPLES))
    with pytest.raises(UsageError, match=message):
        trainer.train()


def regression_trainer(kind: type[Trainer], folder: Path) -> Trainer:
    return kind(RegressionModel(), arguments(folder), train_dataset=RegressionDataset())


def test_custom_data_has_no_answers(tmp_path: Path) -> None:
    assert regression_trainer(Trainer, tmp_path).answers == {}


def never_called(*_: Any) -> None:
    raise AssertionError("called")


class Mixin:
    _get_train_sampler = never_called


def test_an_override_of_a_mixin_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Mixin\._get_train_sampler would never be called"):
        type("Own", (Mixin, Trainer), {})


def test_an_override_assigned_to_the_class_is_refused(tmp_path: Path) -> None:
    kind = type("Assigned", (Trainer,), {})
    kind._save_checkpoint = never_called
    with pytest.raises(UsageError, match=r"Assigned\._save_checkpoint would never be called"):
        regression_trainer(kind, tmp_path)


def test_an_override_assigned_to_the_object_is_refused(tmp_path: Path) -> None:
    trainer = regression_trainer(Trainer, tmp_path)
    trainer._save_checkpoint = never_called
    with pytest.raises(UsageError, match="Trainer object's _save_checkpoint would never be called"):
        trainer.train()


def test_an_attribute_error_inside_a_property_is_that_of_the_property(tmp_path: Path) -> None:
    class Own(Trainer):
        @property
        def wrong(self) -> Any:
            return self.args.not_there

    with pytest.raises(AttributeError, match="not_there"):
        regression_trainer(Own, tmp_path).wrong  # noqa: B018
