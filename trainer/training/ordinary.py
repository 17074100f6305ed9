"""Ordinary data and models in the loop: loader, length, and whatever the model calls its loss.

A loss is either divided by the labels of the whole global batch already (`num_items_in_batch`), then the micro-batches
only add up; or it is a mean over its micro-batch, which then weighs as many labels as it has, or samples if there are
none. So the step does not depend on how samples were dealt to micro-batches and ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from trainer.config.arguments import TrainingArguments
from trainer.config.rules import check_data_kind
from trainer.data.batched import (
    BatchedLoader,
    Collate,
    Dealing,
    Inputs,
    build_loader,
    is_stream,
    keep_columns,
    sample_lengths,
)
from trainer.data.length import RunLength, custom_length
from trainer.data.loader import is_token_data
from trainer.data.order import EpochSampler, LengthGroupedSampler, OrderedSampler
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.freezing import operations_per_input
from trainer.model.traits import (
    check_module,
    count_inputs,
    count_labels,
    count_tokens,
    prepare_ordinary_model,
    read_traits,
)
from trainer.training.batches import InputCounts, OrdinaryBatch, OrdinaryBatches
from trainer.training.build import check_evaluations

_log = logging.getLogger(__name__)

TrainingStep = Callable[[nn.Module, Inputs, Tensor | None], Tensor]


class ModelObjective:
    """Whatever the model, or a loss function, calls its loss, through the Trainer's `training_step`."""

    def __init__(self, model: nn.Module, training_step: TrainingStep, group: Group, *, average_items: bool) -> None:
        self.model, self.training_step, self.group, self.average_items = model, training_step, group, average_items
        self._share, self._has_work = 1.0, True
        self._operations_per_input = operations_per_input(model)

    def backward(self, batch: OrdinaryBatch) -> Iterator[Tensor]:
        """Have `training_step` add the gradient of each micro-batch; gives its share of the loss."""
        items = batch.batch_num_items if self.average_items else batch.own_num_items
        num_items = None if batch.batch_num_items is None else torch.tensor(items, device=self.group.device)
        for micro_batch, share, size in zip(batch.micro_batches, batch.shares, batch.num_samples, strict=True):
            self._share, self._has_work = share, size > 0
            yield self.training_step(self.model, micro_batch, num_items)
        self._share, self._has_work = 1.0, True

    def weigh(self, loss: Tensor, *, is_divided: bool) -> Tensor:
        """Give a micro-batch's share of the loss of the global batch.

        Args:
            loss: what `compute_loss` gave for the micro-batch that is being run.
            is_divided: whether it is a sum that was divided by the labels of the global batch.
        """
        if not is_divided:
            return loss * self._share
        ranks = 1 if self.average_items else self.group.world_size
        return loss * (float(self._has_work) / ranks)

    def counts(self, batch: OrdinaryBatch) -> dict[str, Any]:
        """Give what is known of a global batch."""
        tokens = {"num_tokens": batch.batch_num_tokens} if batch.batch_num_tokens else {}
        return {
            "num_samples": batch.batch_num_samples,
            "num_micro_batches": len(batch.micro_batches),
            "num_operations": self._operations_per_input * batch.batch_num_inputs,
            **tokens,
        }


class OrdinaryRoad:
    """What a Trainer does with data sets and models of the user's own."""

    osft = None  # no matrices of theirs are split
    saves_beside = False  # callbacks expect that on_save comes in the step that is saved

    def __init__(
        self,
        args: TrainingArguments,
        group: Group,
        collate: Collate | None,
        processing_class: Any,
        datasets: tuple[Any, Any],
    ) -> None:
        self.args, self.group, self.processing_class = args, group, processing_class
        self.collate = collate or default_collator(processing_class)
        self.per_device_train_batch_size = args.per_device_train_batch_size
        self.train_dataset, self.eval_dataset = datasets
        self._eval_loaders: dict[int, tuple[Any, BatchedLoader]] = {}  # those whose processes stay
        if is_token_data(self.eval_dataset):
            raise UsageError("eval_dataset is token data and train_dataset is not: give two of one kind")
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            _check_dataset(dataset, name)
        check_data_kind(args, "custom data set")
        if group.world_size > 1 and (args.bf16_full_eval or args.fp16_full_eval):
            raise UsageError(
                "bf16_full_eval and fp16_full_eval cast whole weights, several ranks hold shards: say bf16"
            )
        check_evaluations(args, self.eval_dataset)

    def use_collator(self, collate: Collate) -> None:
        """Make the batches of all loaders built from now on by this."""
        self.collate = collate
        self._eval_loaders.clear()

    def use_model(self, model: nn.Module, training_step: TrainingStep) -> None:
        """Make a model ready to train, and read what it takes.

        Raises:
            ModelError: it cannot be trained as asked.
        """
        check_module(model)
        config = getattr(model, "config", None)
        if self.args.label_smoothing_factor and getattr(config, "problem_type", None) == "multi_label_classification":
            raise UsageError(
                "label_smoothing_factor spreads one target over classes, and a multi-label model has many: leave it out"
            )
        self.traits = read_traits(model, self.args.label_names)
        prepare_ordinary_model(model, self.args, self.group.mesh, self.group.device)
        average = self.args.average_tokens_across_devices
        self.objective = ModelObjective(model, training_step, self.group, average_items=average)

    def train_loader(self, dataset: Any) -> BatchedLoader:
        """Build the loader of this rank's micro-batches of an epoch, in an order of its own each epoch."""
        return self._loader(dataset, None if is_stream(dataset) else self._sampler(dataset), self.dealing)

    def eval_loader(self, dataset: Any) -> BatchedLoader:
        """Build the loader of this rank's evaluation batches, in the order of the data set."""
        kept, loader = self._eval_loaders.get(id(dataset), (None, None))
        if loader is None or kept is not dataset:
            sampler = None if is_stream(dataset) else OrderedSampler(len(dataset))
            loader = self._loader(dataset, sampler, self.eval_dealing)
        if self.args.dataloader_persistent_workers:
            self._eval_loaders[id(dataset)] = dataset, loader
        return loader

    @property
    def dealing(self) -> Dealing:
        """How training samples are dealt."""
        args = self.args
        return self._dealing(
            self.per_device_train_batch_size, args.gradient_accumulation_steps, args.dataloader_drop_last
        )

    @property
    def eval_dealing(self) -> Dealing:
        """How held-out samples are dealt: all of them."""
        return self._dealing(self.args.per_device_eval_batch_size, 1, False)

    def batches(self, loader: DataLoader[Inputs]) -> OrdinaryBatches:
        """Gather the micro-batches of a loader, ours or any other, into global batches."""
        return self._batches(loader, self.dealing)

    def eval_batches(self, loader: DataLoader[Inputs]) -> Iterator[OrdinaryBatch]:
        """Give the evaluation batches of a loader, one micro-batch each, in order; ranks get equally many."""
        return self._batches(loader, self.eval_dealing).epoch(0, 0)

    def num_eval_batches(self, num_samples: int) -> int:
        """Evaluation batches that so many samples make."""
        return -(-num_samples // self.eval_dealing.per_step)

    def length(self, batches: OrdinaryBatches) -> RunLength:
        """Plan the number of steps.

        Raises:
            UsageError: nothing says when to stop, or there is nothing to train on.
        """
        if batches.steps_per_epoch == 0:
            raise UsageError(
                f"train_dataset gives no batch: with dataloader_drop_last it needs {self.dealing.per_micro_batch} "
                "samples at least"
            )
        return custom_length(batches.num_samples, batches.steps_per_epoch, self.dealing.per_step, self.args)

    def _batches(self, loader: DataLoader[Inputs], dealing: Dealing) -> OrdinaryBatches:
        is_whole = type(getattr(loader, "sampler", None)) in (RandomSampler, SequentialSampler)
        if is_whole and self.group.world_size > 1 and self.group.is_lead and not isinstance(loader, BatchedLoader):
            _log.warning(
                "each of %d ranks reads all of its loader, and a sample may count as often: give a loader of your own "
                "torch's DistributedSampler",
                self.group.world_size,
            )
        return OrdinaryBatches(loader, dealing, self.group, self._count)

    def _sampler(self, dataset: Any) -> EpochSampler:
        strategy, seed = self.args.train_sampling_strategy, self.args.order_seed
        if strategy == "group_by_length":
            input_name = getattr(self.processing_class, "model_input_names", ["input_ids"])[0]
            lengths = sample_lengths(dataset, self.args.length_column_name, input_name)
            return LengthGroupedSampler(lengths, self.dealing.per_step, seed)
        return EpochSampler(len(dataset), seed) if strategy == "random" else OrderedSampler(len(dataset), seed)

    def _count(self, inputs: Inputs) -> InputCounts:
        if not isinstance(inputs, Mapping):  # an overridden compute_loss knows what it is
            return InputCounts(None)
        kind = self.args.include_num_input_tokens_seen
        num_tokens = 0 if kind == "no" else count_tokens(inputs, self.traits, self._padding_id, kind)
        return InputCounts(count_labels(inputs, self.traits), num_tokens, count_inputs(inputs, self.traits))

    @property
    def _padding_id(self) -> int | None:
        return getattr(self.processing_class, "pad_token_id", None)

    def _dealing(self, per_device: int, accumulation: int, drop_last: bool) -> Dealing:
        return Dealing(per_device, accumulation, self.group.rank, self.group.world_size, drop_last)

    def _loader(self, dataset: Any, sampler: EpochSampler | None, dealing: Dealing) -> BatchedLoader:
        collate = self.collate
        if self.args.remove_unused_columns:
            dataset, collate = keep_columns(dataset, collate, self.traits.columns)
        return build_loader(dataset, collate, self.args, dealing, sampler, self.args.seed)


def default_collator(processing_class: Any) -> Collate:
    """Give the collator that stacks samples, and pads them where there is a tokenizer."""
    if isinstance(processing_class, PreTrainedTokenizerBase | SequenceFeatureExtractor):
        collate: Collate = DataCollatorWithPadding(processing_class)
        return collate
    return default_data_collator


def _check_dataset(dataset: Any, name: str) -> None:
    has_samples = hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")
    if dataset is not None and (isinstance(dataset, str | bytes) or not has_samples):
        raise UsageError(
            f"{name} is a {type(dataset).__module__}.{type(dataset).__qualname__}: give something with samples, or "
            "JsonlDataset(path), or name a file with data_path"
        )
