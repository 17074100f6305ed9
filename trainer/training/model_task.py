"""Any module on any data set: loader, length, and whatever the model, or a loss function, calls its loss.

A loss is either divided by the labels of the whole global batch already (`num_items_in_batch`); then micro-batches only
add up. Or it is a mean over its micro-batch, which then weighs as many labels as it has, or samples if there are none.
So the step does not depend on how samples were split into micro-batches and ranks (law L2).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.trainer_utils import EvalLoopOutput

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
from trainer.model.build import prepare_model
from trainer.model.freezing import operations_per_input
from trainer.model.loss import router_loss
from trainer.model.osft.layers import Osft
from trainer.model.traits import (
    LossFunction,
    LossRule,
    check_module,
    count_inputs,
    count_labels,
    count_tokens,
    find_loss,
)
from trainer.training.batches import GlobalModelBatch, InputCounts, ModelBatches
from trainer.training.generate import Answer
from trainer.training.metrics import BatchCounts
from trainer.training.task import check_evaluations

logger = logging.getLogger(__name__)


class ModelMethods(Protocol):
    """The override points that the task calls: methods of transformers' Trainer, which users override."""

    compute_metrics: Any

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Add the gradient of a micro-batch; return its loss."""

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model over all batches of a loader, on all ranks."""


@dataclass
class MicroBatchShare:
    """What part of its global batch the micro-batch at hand is.

    `training_step` cannot be handed it: its signature is transformers'. So the task holds it while it is called.
    """

    labels: float  # share of the global batch's labels, or of its samples if there are no labels
    inputs: float  # share of the global batch's inputs, padding aside where a mask says so
    has_samples: bool  # False: a placeholder of a rank without work
    is_averaged: bool = False  # went through accelerator.backward, which takes it for a mean over this rank alone


WHOLE = MicroBatchShare(1.0, 1.0, True)


class ModelTask:
    """A custom data set and a model that calls something its loss.

    Args:
        args: every option.
        group: all ranks.
        methods: `training_step` and `evaluation_loop`.
        collate: makes a micro-batch of samples; by default it stacks, and pads where there is a tokenizer.
        processing_class: the tokenizer, or what else turns raw data into inputs.
        train_dataset, eval_dataset: map-style, a stream, a datasets.Dataset.
        loss_function: from (outputs, labels, num_items_in_batch=) to the loss.
    """

    osft: Osft | None = None  # no matrices are split
    saves_asynchronously = False  # callbacks expect on_save in the step that is saved
    keeps_older_runs = True
    more_metrics: Collection[str] = ()

    def __init__(
        self,
        args: TrainingArguments,
        group: Group,
        methods: ModelMethods,
        collate: Collate | None,
        processing_class: Any,
        train_dataset: Any,
        eval_dataset: Any,
        loss_function: LossFunction | None = None,
    ) -> None:
        self.args, self.group, self.methods, self.processing_class = args, group, methods, processing_class
        self.collate = collate or default_collator(processing_class)
        self.train_batch_size = args.per_device_train_batch_size
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.loss_function = loss_function
        self.answers: dict[int, list[Answer]] = {}
        self.share = WHOLE  # of the micro-batch at hand
        self._eval_loaders: dict[int, tuple[Any, BatchedLoader]] = {}  # those whose worker processes persist
        if is_token_data(eval_dataset):
            raise UsageError("eval_dataset is token data and train_dataset is not: give two of one kind")
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            _check_dataset(dataset, name)
        check_data_kind(args, "custom data set")
        if group.world_size > 1 and (args.bf16_full_eval or args.fp16_full_eval):
            raise UsageError(
                "bf16_full_eval and fp16_full_eval cast whole weights, several ranks hold shards: say bf16"
            )
        check_evaluations(args, eval_dataset)

    def use_model(self, model: nn.Module) -> None:
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
        self.prepared = prepare_model(
            model,
            self.args,
            self.group.mesh,
            self.group.device,
            is_packed=False,
            label_names=self.args.label_names,
        )
        self.model, self.traits = model, self.prepared.traits
        self.accepts_loss_kwargs = self.traits.accepts_loss_kwargs
        self._operations_per_input = operations_per_input(model)

    def use_collator(self, collate: Collate) -> None:
        """Make the batches of all loaders built from now on with this collator."""
        self.collate = collate
        self._eval_loaders.clear()

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

    def _loader(self, dataset: Any, sampler: EpochSampler | None, dealing: Dealing) -> BatchedLoader:
        collate = self.collate
        if self.args.remove_unused_columns:
            dataset, collate = keep_columns(dataset, collate, self.traits.columns)
        device_type = self.group.device.type
        return build_loader(dataset, collate, self.args, dealing, sampler, self.args.seed, device_type)

    def _sampler(self, dataset: Any) -> EpochSampler:
        strategy, seed = self.args.train_sampling_strategy, self.args.order_seed
        if strategy == "group_by_length":
            input_name = getattr(self.processing_class, "model_input_names", ["input_ids"])[0]
            lengths = sample_lengths(dataset, self.args.length_column_name, input_name)
            return LengthGroupedSampler(lengths, self.dealing.per_step, seed)
        return EpochSampler(len(dataset), seed) if strategy == "random" else OrderedSampler(len(dataset), seed)

    @property
    def dealing(self) -> Dealing:
        """How training samples are split over micro-batches and ranks."""
        return Dealing(
            self.train_batch_size,
            self.args.gradient_accumulation_steps,
            self.group.rank,
            self.group.world_size,
            self.args.dataloader_drop_last,
        )

    @property
    def eval_dealing(self) -> Dealing:
        """How held-out samples are split: all of them are used."""
        return Dealing(self.args.per_device_eval_batch_size, 1, self.group.rank, self.group.world_size, False)

    def train_batches(self, loader: DataLoader[Inputs]) -> ModelBatches:
        """Gather the micro-batches of a loader, ours or any other, into global batches."""
        return self._batches(loader, self.dealing)

    def eval_batches(self, loader: DataLoader[Inputs]) -> Iterator[GlobalModelBatch]:
        """Return the evaluation batches of a loader, one micro-batch each, in order; ranks get equally many."""
        return self._batches(loader, self.eval_dealing).epoch(0, 0)

    def _batches(self, loader: DataLoader[Inputs], dealing: Dealing) -> ModelBatches:
        is_whole = type(getattr(loader, "sampler", None)) in (RandomSampler, SequentialSampler)
        if is_whole and self.group.world_size > 1 and self.group.is_main and not isinstance(loader, BatchedLoader):
            logger.warning(
                "each of %d ranks reads all of its loader, and a sample may count as often: give a loader of your own "
                "torch's DistributedSampler",
                self.group.world_size,
            )
        return ModelBatches(loader, dealing, self.group, self._count)

    def _count(self, inputs: Inputs) -> InputCounts:
        if not isinstance(inputs, Mapping):  # an overridden compute_loss knows what it is
            return InputCounts(None)
        kind = self.args.include_num_input_tokens_seen
        padding_id = getattr(self.processing_class, "pad_token_id", None)
        num_tokens = 0 if kind == "no" else count_tokens(inputs, self.traits, padding_id, kind)
        num_inputs = count_inputs(inputs, self.traits)
        mask = inputs.get("attention_mask")
        num_attended = int(mask.sum()) if isinstance(mask, Tensor) else num_inputs
        return InputCounts(count_labels(inputs, self.traits), num_tokens, num_inputs, num_attended)

    def length(self, batches: ModelBatches) -> RunLength:
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

    def counts(self, batch: GlobalModelBatch) -> BatchCounts:
        """Return what is known of a global batch."""
        return BatchCounts(
            num_samples=batch.batch_num_samples,
            num_micro_batches=len(batch.micro_batches),
            num_operations=self._operations_per_input * batch.batch_num_inputs,
            num_tokens=batch.batch_num_tokens or None,
        )

    def backward(self, batch: GlobalModelBatch, i: int) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch by `training_step`; return its share of the loss."""
        num_items = batch.batch_num_items
        if num_items is not None and not self.args.average_tokens_across_devices:
            num_items = batch.own_num_items
        divisor = None if num_items is None else torch.tensor(num_items, device=self.group.device)
        self.share = MicroBatchShare(batch.shares[i], batch.input_shares[i], batch.num_samples[i] > 0)
        loss = self.methods.training_step(self.model, batch.micro_batches[i], divisor)
        if self.share.is_averaged:
            loss = loss / self.group.world_size
        self.share = WHOLE
        return {"loss": loss}

    def weigh(self, loss: Tensor, *, is_divided: bool) -> Tensor:
        """Return the share of the global batch's loss that the micro-batch at hand has.

        Args:
            loss: what `compute_loss` returned for it.
            is_divided: whether it is a sum that was divided by the labels of the global batch.
        """
        if not is_divided:
            if self.share.labels == 0:
                loss = loss.nan_to_num(nan=0.0)  # the mean over no labels is 0 / 0
            return loss * self.share.labels
        if not self.share.has_samples:
            return loss * 0.0
        # Divided by the labels of this rank alone, it is a mean over this rank, of which each rank has one.
        return loss if self.args.average_tokens_across_devices else loss * (1.0 / self.group.world_size)

    def compute_loss(self, model: nn.Module, inputs: Any, num_items: Tensor | None) -> tuple[Tensor, Any]:
        """Run the model; return its loss, that of the loss function, or the smoothed one, and its outputs."""
        smoothing = self.args.label_smoothing_factor
        rule = LossRule(self.traits, self.accepts_loss_kwargs, self.loss_function, smoothing)
        loss, outputs = find_loss(model, inputs, num_items, rule)
        is_from_model = self.loss_function is None and (smoothing == 0 or "labels" not in inputs)
        if is_from_model and num_items is not None:
            # transformers adds a router loss whole, and it would count once for each micro-batch and rank.
            ranks = 1 if self.args.average_tokens_across_devices else self.group.world_size
            loss = loss - router_loss(self.prepared, outputs, 1 - self.share.inputs * ranks)
        return loss, outputs

    def evaluate(
        self, dataset: Any, loader: DataLoader[Any], step: int, prefix: str, ignore_keys: list[str] | None
    ) -> tuple[dict[str, float], int]:
        """Run `evaluation_loop` over a held-out data set."""
        loss_only = True if self.methods.compute_metrics is None else None
        output = self.methods.evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, prefix)
        return output.metrics, output.num_samples

    def num_eval_batches(self, num_samples: int) -> int:
        """Count the evaluation batches that so many samples make."""
        return -(-num_samples // self.eval_dealing.per_step)

    def describe(self) -> list[str]:
        """Return lines about the data for the log of the start."""
        lines = []
        for name, dataset in (("data", self.train_dataset), ("held-out data", self.eval_dataset)):
            if dataset is not None:
                count = f"{len(dataset):,} samples" if hasattr(dataset, "__len__") else "a stream without a length"
                lines.append(f"{name}: {count} ({type(dataset).__name__})")
        dealing = self.dealing
        lines.append(
            f"batches: {dealing.per_step:,} samples a step, {dealing.per_device} a rank in each of "
            f"{dealing.accumulation} micro-batches"
        )
        return lines


def default_collator(processing_class: Any) -> Collate:
    """Return the collator that stacks samples, and pads them where there is a tokenizer."""
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
