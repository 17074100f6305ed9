"""Token data in the loop: its loader, its length, its loss, its evaluation. Micro-batches are packs.

Loss functions return sums; the one division by the loss tokens of the global batch, known from the plan, stands here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.arguments import TrainingArguments
from trainer.config.rules import check_data_kind
from trainer.data.length import RunLength, run_length
from trainer.data.loader import JsonlDataset, MicroBatch, TokenData, get_data_loader
from trainer.data.order import EpochSampler
from trainer.data.store import TokenStore
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.freezing import operations_per_input
from trainer.model.loss import token_loss_sum
from trainer.model.osft.layers import Osft
from trainer.model.tokenizer import load_tokenizer
from trainer.training.build import (
    build_cost,
    check_evaluations,
    check_fit,
    check_held_out,
    check_samples,
    load_datasets,
)
from trainer.training.evaluation import check_metric, evaluation_loss
from trainer.training.generation import Answer, Question, answer_questions, check_room, end_ids, questions_of
from trainer.training.metrics import batch_counts
from trainer.training.osft import build_split_model
from trainer.training.step import to_device


class TokenObjective:
    """Mean cross-entropy over the loss tokens of a global batch."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, group: Group) -> None:
        self.model, self.group = model, group
        self._operations_per_token = operations_per_input(model)
        self.label_smoothing, self.max_tokens_per_rank = args.label_smoothing_factor, args.max_tokens_per_rank

    def backward(self, batch: list[MicroBatch]) -> Iterator[Tensor]:
        """Add the gradient of each pack; gives its share of the mean loss."""
        num_loss_tokens = batch[0]["batch_num_loss_counted_tokens"]
        for micro_batch in batch:
            loss_sum = token_loss_sum(self.model, to_device(micro_batch, self.group.device), self.label_smoothing)
            loss = loss_sum / num_loss_tokens
            loss.backward()
            yield loss.detach()

    def counts(self, batch: list[MicroBatch]) -> dict[str, Any]:
        """Give the counts of the plan."""
        counts = batch_counts(batch, self.max_tokens_per_rank, self.group.world_size)
        return counts | {"num_operations": self._operations_per_token * counts["num_tokens"]}


class TokenBatches:
    """Global batches of packs, epoch by epoch."""

    def __init__(self, loader: DataLoader[list[MicroBatch]]) -> None:
        assert isinstance(loader.sampler, EpochSampler)
        self.loader, self.sampler = loader, loader.sampler
        self.num_samples: int | None = self.sampler.len_data
        self.samples_per_step: int = loader.batch_size or 0

    def epoch(self, epoch: int, start: int) -> Iterator[list[MicroBatch]]:
        """Give what is left of an epoch after `start` of its samples."""
        self.sampler.set_epoch(epoch, start)
        return iter(self.loader)

    def position(self) -> None:
        """Say nothing: epoch and samples say it all."""

    def move_to(self, position: None) -> None:
        """Do nothing: `epoch` moves."""


class TokenRoad:
    """What a Trainer does with token data. Whatever is None is built from the options."""

    saves_beside = True
    collate = None

    def __init__(
        self,
        args: TrainingArguments,
        group: Group,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        datasets: tuple[Any, Any],
    ) -> None:
        check_data_kind(args, "token data")
        self.args, self.group, self.tokenizer = args, group, tokenizer
        if tokenizer is None and (model is None or datasets[0] is None):
            self.tokenizer = load_tokenizer(args)
        self.train_dataset, self.eval_dataset = self._stores(*datasets)
        check_samples(self.train_dataset, "train_dataset")
        check_evaluations(args, self.eval_dataset)
        if args.does_evaluate:
            check_metric(args)
        self.model = build_split_model(model, args, self.tokenizer, group, self.train_dataset)
        osft = Osft(self.model, args)
        self.osft = osft if osft.layers else None
        check_fit(self.model, self.train_dataset, "train_dataset")
        if self.eval_dataset is not None:
            check_fit(self.model, self.eval_dataset, "eval_dataset")
        self.objective = TokenObjective(self.model, args, group)
        self.answers: dict[int, list[Answer]] = {}  # step -> answers of the evaluation after it
        self._asked: tuple[TokenStore, list[Question]] | None = None  # what a data set asks, read once

    def use_collator(self, collate: Any) -> None:
        """Refuse it.

        Raises:
            UsageError: samples are packed.
        """
        raise UsageError("data_collator has no effect on token data: leave it out, or give another data set")

    def train_loader(self, dataset: TokenData) -> DataLoader[list[MicroBatch]]:
        """Build the loader of this rank's share of every global batch; its sampler is an EpochSampler."""
        return self._loader(dataset, self.args.order_seed)

    def eval_loader(self, dataset: TokenData) -> DataLoader[list[MicroBatch]]:
        """Build the loader of this rank's share of held-out samples."""
        return self._loader(dataset, 0)

    def batches(self, loader: DataLoader[list[MicroBatch]]) -> TokenBatches:
        """Give the global batches of a loader."""
        return TokenBatches(loader)

    def length(self, batches: TokenBatches) -> RunLength:
        """Plan the number of steps; whatever is wrong with held-out chats shows here, before the first step."""
        if self.args.does_evaluate and self.eval_dataset is not None:
            self._questions(self.eval_dataset)
        store = self.train_dataset
        return run_length(store.num_loss_tokens, self.args.batch_size, self.args.order_seed, self.args)

    def evaluate(self, dataset: TokenData, loader: Any, step: int) -> dict[str, float]:
        """Measure the loss, and exact answers where asked for, on held-out samples."""
        store = token_store(dataset)
        check_samples(store, "eval_dataset")
        check_fit(self.model, store, "eval_dataset")
        return evaluation_loss(self.model, loader, self.group) | self._answer(store, step)

    def num_eval_batches(self, num_samples: int) -> int:
        """Global batches that so many held-out samples make."""
        return -(-num_samples // self.args.batch_size)

    def _stores(self, train_dataset: Any, eval_dataset: Any) -> tuple[TokenStore, TokenStore | None]:
        """Give training and held-out samples, those that are not given from the options."""
        check_held_out(self.args, train_dataset, eval_dataset)
        if train_dataset is None:
            assert self.tokenizer is not None
            train_dataset, held_out = load_datasets(self.args, self.tokenizer, self.group)
            eval_dataset = held_out if eval_dataset is None else eval_dataset
        return token_store(train_dataset), None if eval_dataset is None else token_store(eval_dataset)

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

    def _questions(self, store: TokenStore) -> list[Question]:
        """Read the held-out chats to answer, if answers are asked for; the file may change or go while training."""
        count = None if self.args.eval_exact_match else self.args.num_generation_samples
        if count == 0:
            return []
        if self.tokenizer is None:
            raise UsageError("eval_exact_match and num_generation_samples need a tokenizer: give processing_class")
        if self._asked is None or self._asked[0] is not store:
            questions = questions_of(store, self.tokenizer, count, self.args.chat_template)
            check_room(self.model, questions, self.args.generation_max_new_tokens)
            self._asked = store, questions
        return self._asked[1]

    def _answer(self, store: TokenStore, step: int) -> dict[str, float]:
        """Answer held-out chats where asked for; gives `exact_match` if all of them were answered."""
        questions = self._questions(store)
        if not questions:
            return {}
        assert self.tokenizer is not None
        ends = end_ids(self.model, self.tokenizer, self.args.chat_template)
        answers = answer_questions(
            self.model, self.tokenizer, questions, self.group, self.args.generation_max_new_tokens, ends
        )
        self.answers[step] = answers
        if not self.args.eval_exact_match:
            return {}
        return {"exact_match": sum(answer.is_exact for answer in answers) / len(answers)}


def token_store(dataset: Any) -> TokenStore:
    """Give the store behind token data.

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
