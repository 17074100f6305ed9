"""L13: ranks that differ in options, data, tokenizer, weights or versions never train; the difference is named."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.fixtures.datasets import labelled_rows
from tests.fixtures.models import tiny_llama
from tests.fixtures.ranks.context import Ranks
from tests.fixtures.runs import build_arguments, build_store, random_token_samples
from tests.fixtures.tokenizers import build_tokenizer
from trainer import Trainer, TrainingArguments
from trainer.data.store import StoreWriter, TokenStore
from trainer.distributed.group import Group
from trainer.distributed.topology import Topology
from trainer.errors import UsageError
from trainer.training import agreement
from trainer.training.agreement import MAY_DIFFER, agree, data_facts, option_facts

SECONDS = 20.0  # in which a difference is found, on a busy machine; what it must not be is ddp_timeout
SAMPLES = random_token_samples([5, 6, 7, 8, 9])
BASE = {"use_cpu": True, "max_steps": 1}


def refused(act: Callable[[], Any]) -> str:
    """The message with which this rank refuses; that it comes soon."""
    started = time.monotonic()
    with pytest.raises(UsageError) as caught:
        act()
    assert time.monotonic() - started < SECONDS
    return str(caught.value)


def trainer_of(folder: Path, samples: Any = SAMPLES, evals: Any = None, model: Any = None, **options: Any) -> Trainer:
    tokenizer = options.pop("tokenizer", None)
    args = build_arguments(folder, **{**BASE, **options})
    held_out = build_store(evals) if evals else None
    return Trainer(
        model or tiny_llama(),
        args,
        train_dataset=build_store(samples),
        eval_dataset=held_out,
        processing_class=tokenizer,
    )


def another_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value of about the same kind: comparing does not ask what it means."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, {"name": "other"}] if field.name == "data_mixture" else [*value, "other"]
    if isinstance(value, dict):
        return {**value, "other": 1.0}
    return f"{value}_other"


@pytest.mark.world_size(2)
def test_every_option_is_compared_or_says_why_not(ranks: Ranks, tmp_path: Path) -> None:
    group = Group.join(TrainingArguments(use_cpu=True))
    fields = dataclasses.fields(TrainingArguments())
    assert MAY_DIFFER.keys() <= {field.name for field in fields}
    for field in fields:
        args = build_arguments(tmp_path, **BASE)
        if ranks.rank == 1:
            vars(args)[field.name] = another_value(field, vars(args)[field.name])
        if field.name in MAY_DIFFER:
            agree(group, lambda args=args: option_facts(args))
        else:
            said = refused(lambda args=args: agree(group, lambda: option_facts(args)))
            assert said.startswith(f"rank 1 differs from rank 0 in {field.name}: "), said
            assert said.endswith("; give all ranks the same options")


@pytest.mark.world_size(1, 2)
def test_replicas_of_which_ranks_cannot_make_equal_ones_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    said = refused(lambda: trainer_of(tmp_path, replicate=3))
    assert said.startswith(f"replicate = 3: {ranks.world_size} ranks cannot be divided into so many groups")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("is_assigned_later", [False, True])
def test_ranks_with_other_options_never_train(ranks: Ranks, tmp_path: Path, is_assigned_later: bool) -> None:
    others = {
        "learning_rate": (0.01, 0.02),
        "seed": (42, 43),
        "weight_decay": (0.0, 0.1),
        "lr_scheduler_type": ("linear", "cosine"),
        "batch_size": (4, 2),
        "max_steps": (1, 2),
        "optim": ("adamw_torch_fused", "sgd"),
        "gradient_checkpointing": (False, True),
        "replicate": (1, 2),
    }
    trainer = trainer_of(tmp_path) if is_assigned_later else None
    for name, values in others.items():
        if trainer is None:
            said = refused(lambda name=name, values=values: trainer_of(tmp_path, **{name: values[ranks.rank]}))
        else:
            setattr(trainer.args, name, values[ranks.rank])
            said = refused(trainer.train)
            setattr(trainer.args, name, values[0])
        assert f"rank 1 differs from rank 0 in {name}: {values[1]!r} instead of {values[0]!r}" in said
    assert not (tmp_path / "metrics.jsonl").exists()
    (trainer or trainer_of(tmp_path)).train()  # ranks that agree train, with folders of their own


@pytest.mark.world_size(4)
def test_the_ranks_that_are_fewer_are_named(ranks: Ranks, tmp_path: Path) -> None:
    def said_with(rates: list[float]) -> str:
        return refused(lambda: trainer_of(tmp_path, learning_rate=rates[ranks.rank]))

    end = "give all ranks the same options"
    assert said_with([2.0, 1.0, 1.0, 1.0]) == (
        f"rank 0 differs from 3 others in learning_rate: 2.0 instead of 1.0; {end}"
    )
    assert said_with([1.0, 2.0, 1.0, 2.0]) == (
        f"ranks 1, 3 differ from 2 others in learning_rate: 2.0 instead of 1.0; {end}"
    )
    assert said_with([1.0, 2.0, 1.0, 3.0]) == (
        "rank 1 differs from 2 others in learning_rate: 2.0 instead of 1.0; "
        f"rank 3 differs from 2 others in learning_rate: 3.0 instead of 1.0; {end}"
    )


def relabelled() -> list[Any]:
    ids, labels = SAMPLES[0]
    return [(ids, [-100 if label == -100 else label + 1 for label in labels]), *SAMPLES[1:]]


@pytest.mark.world_size(2)
def test_ranks_with_other_token_data_never_train(ranks: Ranks, tmp_path: Path) -> None:
    longer = [*SAMPLES, *random_token_samples([5], seed=1)]
    for samples in (longer, SAMPLES[::-1], SAMPLES[:-1], relabelled()):
        mine = samples if ranks.rank == 1 else SAMPLES
        said = refused(lambda mine=mine: trainer_of(tmp_path, mine).train())
        assert f"rank 1 differs from rank 0 in train_dataset: {len(samples)} samples, digest " in said
        assert "instead of 5 samples, digest" in said
        assert "look for an old copy on one of the nodes" in said
    many = random_token_samples([5] * 200)
    if ranks.rank == 1:
        ids, labels = many[1]
        many[1] = [ids[0] ^ 1, *ids[1:]], labels  # not one of those that are read for their labels
    group, store = Group.join(TrainingArguments(use_cpu=True)), build_store(many)
    assert "in train_dataset: 200 samples" in refused(lambda: agree(group, lambda: data_facts("train_dataset", store)))
    ids, labels = many[3]
    another = [*labels[:-1], labels[-1] + ranks.rank]  # one label alone, in memory or in a file
    with StoreWriter(tmp_path / "store") as writer:
        writer.append(ids, another)
    for other in (TokenStore.open(tmp_path / "store"), build_store([(ids, another)])):
        said = refused(lambda other=other: agree(group, lambda: data_facts("train_dataset", other)))
        assert "in train_dataset: 1 samples" in said
    said = refused(lambda: trainer_of(tmp_path, evals=SAMPLES[: 2 + ranks.rank]).train())
    assert "rank 1 differs from rank 0 in eval_dataset: 3 samples, digest" in said


@pytest.mark.world_size(2)
def test_ranks_with_another_tokenizer_template_or_model_never_train(ranks: Ranks, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    trainer_of(tmp_path / "same", tokenizer=tokenizer).train()
    if ranks.rank == 1:
        tokenizer.chat_template = (tokenizer.chat_template or "") + " "
    assert "rank 1 differs from rank 0 in the tokenizer: " in refused(
        lambda: trainer_of(tmp_path, tokenizer=tokenizer).train()
    )
    model = tiny_llama()
    if ranks.rank == 1:
        with torch.no_grad():
            next(model.parameters()).add_(1)
    said = refused(lambda: trainer_of(tmp_path, model=model))
    assert "rank 1 differs from rank 0 in the weights of the model that was given: " in said
    model = tiny_llama()
    model.config.rms_norm_eps = 1.0 + ranks.rank
    said = refused(lambda: trainer_of(tmp_path, model=model).train())
    assert "rank 1 differs from rank 0 in the model's config.rms_norm_eps: 2.0 instead of 1.0" in said


class OwnLoader(Trainer):
    """Reads the samples of this rank alone."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=self.data_collator)


@pytest.mark.world_size(2)
def test_ranks_with_other_rows_or_loaders_never_train(ranks: Ranks, tmp_path: Path) -> None:
    def rows_of(kind: type[Trainer], rows: Any, **options: Any) -> Trainer:
        given = {"output_dir": str(tmp_path), "save_strategy": "no", "use_cpu": True, "num_train_epochs": 1, **options}
        args = TrainingArguments(export_final=False, per_device_train_batch_size=1, disable_tqdm=True, **given)
        return kind(tiny_llama(), args, train_dataset=rows)

    rows = labelled_rows(4)
    for other, found in ((labelled_rows(6), "6 samples, digest"), (rows[::-1], "4 samples, digest")):
        mine = other if ranks.rank == 1 else rows
        said = refused(lambda mine=mine: rows_of(Trainer, mine, max_steps=1).train())
        assert f"rank 1 differs from rank 0 in train_dataset: {found}" in said
    said = refused(lambda: rows_of(OwnLoader, rows[: 4 - ranks.rank]).train())
    assert "rank 1 differs from rank 0 in steps of the run: 3 instead of 4" in said
    assert "in steps of an epoch: 3 instead of 4" in said
    own = rows if ranks.rank == 0 else rows[::-1]  # a rank may read samples of its own, if equally many
    assert rows_of(OwnLoader, own).train().global_step == 4


@pytest.mark.world_size(2)
def test_ranks_resume_from_one_checkpoint_or_not_at_all(ranks: Ranks, tmp_path: Path) -> None:
    asked = [None, str(tmp_path / "checkpoints" / "step_1")][ranks.rank]
    said = refused(lambda: trainer_of(tmp_path).train(resume_from_checkpoint=asked))
    assert "rank 1 differs from rank 0 in resume_from_checkpoint: 'step_1' instead of False" in said


@pytest.mark.world_size(2)
def test_ranks_with_other_versions_never_train(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ranks.rank == 1:
        monkeypatch.setattr(torch, "__version__", "1.0")
    said = refused(lambda: trainer_of(tmp_path))
    assert said.startswith("rank 1 differs from rank 0 in the version of torch: '1.0' instead of ")
    assert said.endswith("install the same versions on all nodes")


@pytest.mark.world_size(4)
@pytest.mark.parametrize(
    ("places", "is_whole"),
    [
        ([(0, 4), (1, 4), (2, 4), (3, 4)], True),
        ([(0, 3), (1, 3), (2, 3), (0, 1)], True),
        ([(0, 2), (0, 2), (1, 2), (1, 2)], True),
        ([(0, 4), (1, 4), (0, 2), (1, 2)], False),
        ([(0, 2), (1, 2), (1, 2), (1, 2)], False),
    ],
)
def test_ranks_make_whole_nodes(ranks: Ranks, places: list[tuple[int, int]], is_whole: bool) -> None:
    local_rank, size = places[ranks.rank]
    group = Group(Topology(ranks.rank, 4, local_rank, size), ranks.device)
    if is_whole:
        agree(group, dict)
    else:
        assert "share a node (LOCAL_RANK of LOCAL_WORLD_SIZE" in refused(lambda: agree(group, dict))


def test_one_rank_compares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(agreement, "_number", calls.append)
    for name in ("option_facts", "model_facts", "data_facts"):
        monkeypatch.setattr(f"trainer.training.trainer.{name}", calls.append)
    trainer_of(tmp_path).train()
    assert calls == []
