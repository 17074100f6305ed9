"""Token data: packs of samples, trained by their cross-entropy over the loss tokens of the global batch.

Loss functions return sums; the one division by the loss tokens of the global batch, known from the plan, stands in
`pack_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.arguments import TrainingArguments
from trainer.config.rules import check_data_kind
from trainer.data.length import RunLength, run_length
from trainer.data.loader import JsonlDataset, MicroBatch, TokenData, get_data_loader, to_device
from trainer.data.order import EpochSampler
from trainer.data.prepare import roles_line
from trainer.data.store import TokenStore
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.cross_entropy import linear_cross_entropy_sum
from trainer.model.freezing import operations_per_input
from trainer.model.loss import token_loss_sum
from trainer.model.prepared import Prepared
from trainer.model.tokenizer import load_tokenizer
from trainer.training.evaluate import check_metric, evaluation_loss, prefixed
from trainer.training.generate import Answer, Question, answer_questions, check_room, end_ids, questions_of
from trainer.training.metrics import BatchCounts
from trainer.training.osft import build_split_model
from trainer.training.scores import ScoreAnswers, measured_names, score
from trainer.training.task import (
    build_cost,
    check_evaluations,
    check_fit,
    check_held_out,
    check_samples,
    load_datasets,
)


class PackedBatches:
    """Global batches of packs, epoch by epoch."""

    def __init__(self, loader: DataLoader[list[MicroBatch]]) -> None:
        if not isinstance(loader.sampler, EpochSampler):
            raise UsageError(
                f"get_train_dataloader returned a loader whose sampler is a {type(loader.sampler).__name__}: token "
                "data needs an EpochSampler, which can move to a position; return get_data_loader(store=..., "
                "sampler=EpochSampler(len(store), seed)), or give train_dataset and leave get_train_dataloader alone"
            )
        self.loader, self.sampler = loader, loader.sampler
        self.num_samples: int | None = self.sampler.len_data
        self.samples_per_step: int = loader.batch_size or 0

    def epoch(self, epoch: int, start: int) -> Iterator[list[MicroBatch]]:
        """Return what is left of an epoch after `start` of its samples."""
        self.sampler.set_epoch(epoch, start)
        return iter(self.loader)

    def position(self) -> None:
        """Return None: epoch and samples say it all."""

    def move_to(self, position: None) -> None:
        """Do nothing: `epoch` moves."""


Measure = Callable[["PackedTask", TokenStore, DataLoader[list[MicroBatch]]], dict[str, float]]


class PackedTask:
    """Token data: packs of samples, and their mean cross-entropy over the loss tokens of the global batch.

    Whatever is None is built from the options; `measure` returns what else evaluations measure, by name.
    """

    saves_asynchronously = True
    keeps_older_runs = False
    collate = None
    more_metrics: Collection[str] = ()

    def __init__(
        self,
        args: TrainingArguments,
        group: Group,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        score_answers: ScoreAnswers | None = None,
        prepared: Prepared | None = None,
        measure: Measure | None = None,
    ) -> None:
        check_data_kind(args, "token data")
        self.measure = measure
        self.args, self.group, self.processing_class = args, group, tokenizer
        self.scorers: list[str | ScoreAnswers] = [*args.score_answers]
        if score_answers is not None:
            self.scorers.append(score_answers)
        if tokenizer is None and (model is None or train_dataset is None):
            self.processing_class = load_tokenizer(args)
        self._load(train_dataset, eval_dataset)
        if prepared is None:
            prepared = build_split_model(model, args, self.processing_class, group, self.train_dataset)
        self.prepared = prepared
        self.model: PreTrainedModel = self.prepared.outer
        self.osft = self.prepared.osft
        check_fit(self.model, self.train_dataset, "train_dataset")
        for name, store in self._held_out.items():
            check_fit(self.model, store, name)
        self.train_batch_size = args.batch_size
        self._source_names = measured_sources(self.prepared, self.train_dataset)
        self.more_metrics = [f"loss/{name}" for name in self._source_names]
        self.answers: dict[int, list[Answer]] = {}
        self._operations_per_token = operations_per_input(self.model)
        self._questions_of: list[tuple[TokenStore, list[Question]]] = []  # of each data set, read once

    def _load(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Take the data sets that are given, and build the others from the options."""
        check_held_out(self.args, train_dataset, eval_dataset)
        if train_dataset is None:
            assert self.processing_class is not None
            train_dataset, held_out = load_datasets(self.args, self.processing_class, self.group)
            eval_dataset = held_out if eval_dataset is None else eval_dataset
        self.train_dataset = token_store(train_dataset)
        self.eval_dataset: TokenStore | dict[str, TokenStore] | None = None
        self._held_out: dict[str, TokenStore] = {}  # by the name that errors give it
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {name: token_store(each) for name, each in eval_dataset.items()}
            self._held_out = {f"eval_dataset[{name!r}]": store for name, store in self.eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = token_store(eval_dataset)
            self._held_out = {"eval_dataset": self.eval_dataset}
        check_samples(self.train_dataset, "train_dataset")
        check_evaluations(self.args, self.eval_dataset)
        if self.args.does_evaluate and not isinstance(self.eval_dataset, dict):
            check_metric(self.args, measured_names(self.scorers) if self.measure is None else None)

    def train_loader(self, dataset: TokenData) -> DataLoader[list[MicroBatch]]:
        """Build the loader of this rank's share of every global batch; its sampler is an EpochSampler."""
        return self._loader(dataset, self.args.order_seed)

    def eval_loader(self, dataset: TokenData) -> DataLoader[list[MicroBatch]]:
        """Build the loader of this rank's share of held-out samples."""
        return self._loader(dataset, 0)

    def _loader(self, dataset: TokenData, seed: int) -> DataLoader[list[MicroBatch]]:
        store = token_store(dataset)
        return get_data_loader(
            store=store,
            batch_size=self.args.batch_size,
            max_tokens_per_rank=self.args.max_tokens_per_rank,
            rank=self.group.rank,
            world_size=self.group.world_size,
            sampler=EpochSampler(len(store), seed),
            cost=build_cost(self.args, self.model),
            pin_memory=self.group.device.type == "cuda",
        )

    def train_batches(self, loader: DataLoader[list[MicroBatch]]) -> PackedBatches:
        """Return the global batches of a loader.

        Raises:
            UsageError: `get_train_dataloader` was overridden with a loader that deals batches otherwise than planned.
        """
        batches = PackedBatches(loader)
        if batches.samples_per_step != self.args.batch_size or batches.num_samples != len(self.train_dataset):
            raise UsageError(
                f"get_train_dataloader returned a loader of {batches.num_samples} samples in batches of "
                f"{batches.samples_per_step}, the run is planned for {len(self.train_dataset)} samples in batches of "
                f"{self.args.batch_size}: give train_dataset and batch_size accordingly"
            )
        return batches

    def length(self, batches: PackedBatches) -> RunLength:
        """Plan the number of steps; whatever is wrong with held-out chats shows here, before the first step."""
        if self.args.does_evaluate:
            for store in self._held_out.values():
                self._questions(store)
        return run_length(self.train_dataset.num_loss_tokens, self.args.batch_size, self.args.order_seed, self.args)

    def counts(self, batch: list[MicroBatch]) -> BatchCounts:
        """Return the counts of the plan."""
        num_tokens = batch[0]["batch_num_tokens"]
        capacity = len(batch) * self.group.world_size * self.args.max_tokens_per_rank
        return BatchCounts(
            num_samples=batch[0]["batch_num_samples"],
            num_micro_batches=len(batch),
            num_operations=self._operations_per_token * num_tokens,
            num_loss_tokens=batch[0]["batch_num_loss_counted_tokens"],
            num_tokens=num_tokens,
            packing_efficiency=num_tokens / capacity,
        )

    def backward(self, batch: list[MicroBatch], i: int) -> dict[str, Tensor]:
        """Add the gradient of a pack; return its share of the mean loss."""
        micro_batch = to_device(batch[i], self.group.device)
        sums = torch.zeros(len(self._source_names), dtype=torch.float64, device=self.group.device)
        loss = pack_loss(
            self.prepared, micro_batch, self.args.label_smoothing_factor, sums if self._source_names else None
        )
        loss.backward()
        measured = {"loss": loss.detach()}
        if self._source_names:
            # A source without a loss token in this global batch has no loss; every rank knows which from the plan.
            named = zip(self._source_names, batch[i]["batch_source_loss_tokens"], sums, strict=True)
            measured |= {f"loss/{name}": total / count for name, count, total in named if count}
        return measured

    def evaluate(
        self, dataset: TokenData, loader: Any, step: int, prefix: str, ignore_keys: list[str] | None
    ) -> tuple[dict[str, float], int]:
        """Measure the loss, and exact answers where asked for, on held-out samples."""
        store = token_store(dataset)
        check_samples(store, "eval_dataset")
        check_fit(self.model, store, "eval_dataset")
        measured = {} if self.measure is None else self.measure(self, store, loader)
        names = measured_sources(self.prepared, store)
        metrics = evaluation_loss(self.prepared, loader, self.group, self.args.label_smoothing_factor, names)
        metrics |= measured | self._answer(store, step)
        return prefixed(metrics, prefix), int(metrics["num_samples"])

    def num_eval_batches(self, num_samples: int) -> int:
        """Count the global batches that so many held-out samples make."""
        return -(-num_samples // self.args.batch_size)

    def describe(self) -> list[str]:
        """Return lines about the data for the log of the start."""
        store = self.train_dataset
        num_tokens, num_loss_tokens = int(store.lengths.sum()), int(store.num_loss_tokens.sum())
        lines = [
            f"data: {len(store):,} samples, {num_tokens:,} tokens, {num_loss_tokens / max(num_tokens, 1):.0%} of them "
            f"trained, longest sample {int(store.lengths.max()):,}"
        ]
        if roles := roles_line(store):
            lines.append(f"roles: {roles}")
        for name, store in self._held_out.items():
            lines.append(f"{name.replace('eval_dataset', 'held-out data')}: {len(store):,} samples")
        lines.append(
            f"batches: {self.args.batch_size:,} samples a step, packed into at most {self.args.max_tokens_per_rank:,} "
            "tokens a rank"
        )
        return lines

    def _questions(self, store: TokenStore) -> list[Question]:
        """Read the held-out chats to answer, if answers are asked for; the file may change or go while training."""
        count = None if self.args.eval_exact_match or self.scorers else self.args.num_generation_samples
        if count == 0:
            return []
        if self.processing_class is None:
            raise UsageError(
                "eval_exact_match, score_answers and num_generation_samples need a tokenizer: give processing_class"
            )
        for known, questions in self._questions_of:
            if known is store:
                return questions
        questions = questions_of(
            store, self.processing_class, count, self.args.chat_template, self.args.chat_template_kwargs
        )
        check_room(self.model, questions, self.args.generation_max_new_tokens)
        self._questions_of.append((store, questions))
        return questions

    def _answer(self, store: TokenStore, step: int) -> dict[str, float]:
        """Answer held-out chats where asked for; return their scores if all of them were answered."""
        questions = self._questions(store)
        if not questions:
            return {}
        assert self.processing_class is not None
        ends = end_ids(self.model, self.processing_class, self.args.chat_template, self.args.chat_template_kwargs)
        answers = answer_questions(
            self.prepared, self.processing_class, questions, self.group, self.args.generation_max_new_tokens, ends
        )
        self.answers[step] = answers
        scores = score(answers, self.scorers)
        if self.args.eval_exact_match:
            scores["exact_match"] = sum(answer.is_exact for answer in answers) / len(answers)
        return scores


def pack_loss(
    prepared: Prepared, micro_batch: MicroBatch, label_smoothing: float, source_sums: Tensor | None = None
) -> Tensor:
    """Compute a pack's share of the mean loss over the loss tokens of its global batch, a float32 scalar."""
    total = token_loss_sum(prepared, micro_batch, label_smoothing, source_sums)
    return total / micro_batch["batch_num_loss_counted_tokens"]


def measured_sources(prepared: Prepared, store: TokenStore) -> list[str]:
    """Return the names of the sources whose losses are measured: of data of several, and not by Liger's kernel."""
    several = len(store.source_names) > 1 and prepared.linear_cross_entropy is linear_cross_entropy_sum
    return store.source_names if several else []


def token_store(dataset: Any) -> TokenStore:
    """Return the store behind token data.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(dataset, TokenStore):
        return dataset
    if isinstance(dataset, JsonlDataset):
        return dataset.store
    raise UsageError(
        f"a data set is a {type(dataset).__module__}.{type(dataset).__qualname__}: give JsonlDataset(path), "
        "TokenStore.from_samples([(ids, labels)]), or name a file with data_path"
    )
