"""What is trained, as the step, the loop and the trainer know it; they never ask which kind it is.

`PackedTask` (packed_task.py) is token data. `ModelTask` (model_task.py) is any module on any data set. Below the
protocol stands what both make of the options: data, model, cost model, each only where it was not given.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.arguments import TrainingArguments
from trainer.data.length import RunLength
from trainer.data.packing import TOKENS
from trainer.data.planner import CostModel, cost_model_from_config
from trainer.data.prepare import Progress, load_data
from trainer.data.store import TokenStore
from trainer.distributed.group import Group
from trainer.errors import DataError, UsageError
from trainer.model.build import Adapt, load_model, prepare_model
from trainer.model.isolation import check_positions
from trainer.model.lora import add_lora
from trainer.model.osft.layers import Osft
from trainer.model.prepared import Prepared
from trainer.optim.build import find_class
from trainer.optim.schedules import checked_settings
from trainer.training.generate import Answer
from trainer.training.metrics import BatchCounts
from trainer.training.scores import SCORERS, find_function

GlobalBatch = Any  # this rank's share of one, as its task knows it


class Batches(Protocol):
    """Where global batches come from."""

    num_samples: int | None  # of an epoch, over all ranks; None: not known before one has ended
    samples_per_step: int

    def epoch(self, epoch: int, start: int) -> Iterator[GlobalBatch]:
        """Return what is left of an epoch after `start` of its samples."""

    def position(self) -> Any:
        """Return where a stream stands, as plain values, if it says so; None: epoch and samples say it all."""

    def move_to(self, position: Any) -> None:
        """Continue the next epoch from what `position` returned."""


class Task(Protocol):
    """What is trained."""

    model: Any
    prepared: Prepared
    osft: Osft | None
    train_dataset: Any
    eval_dataset: Any
    train_batch_size: int  # as TrainerState.train_batch_size tells it
    processing_class: Any  # the tokenizer, or what else turns raw data into inputs
    collate: Any  # makes a micro-batch of samples; None where samples are packed
    answers: dict[int, list[Answer]]  # step -> answers of the evaluation after it
    saves_asynchronously: bool  # by default
    keeps_older_runs: bool  # puts an older run in output_dir aside, as transformers does, instead of refusing
    more_metrics: Collection[str]  # names of what `backward` measures besides `loss`

    def train_loader(self, dataset: Any) -> DataLoader[Any]:
        """Build the loader of this rank's share of the training data."""

    def eval_loader(self, dataset: Any) -> DataLoader[Any]:
        """Build the loader of this rank's share of held-out data."""

    def train_batches(self, loader: DataLoader[Any]) -> Batches:
        """Return the global batches of a loader, ours or a user's."""

    def length(self, batches: Any) -> RunLength:
        """Plan the number of steps."""

    def counts(self, batch: GlobalBatch) -> BatchCounts:
        """Count what a batch holds over all ranks."""

    def backward(self, batch: GlobalBatch, i: int) -> dict[str, Tensor]:
        """Add the gradient of micro-batch i of this rank.

        Every rank has equally many.

        Returns:
            `loss`, this rank's share of the mean loss: the shares of all micro-batches and ranks sum to it. The same
            for each of `more_metrics`.
        """

    def evaluate(
        self, dataset: Any, loader: DataLoader[Any], step: int, prefix: str, ignore_keys: list[str] | None
    ) -> tuple[dict[str, float], int]:
        """Measure a held-out data set; return metrics named with the prefix, and the number of its samples."""

    def num_eval_batches(self, num_samples: int) -> int:
        """Count the global batches that so many held-out samples make."""

    def describe(self) -> list[str]:
        """Return lines about data and model for the log of the start."""


def describe_model(model: nn.Module) -> str:
    """Return a line about a model's parameters for the log of the start."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = num_trained / max(num_parameters, 1)
    return f"model: {type(model).__name__}, {num_parameters:,} parameters, {share:.1%} of them trained"


_log = logging.getLogger(__name__)


def check_names(args: TrainingArguments) -> None:
    """Raise where the options name an optimizer, schedule or scorer that is not there: long before it is used."""
    find_class(args)
    checked_settings(args)
    for name in args.score_answers:
        if name not in SCORERS:
            find_function(name)


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise UsageError where an optimizer moves parameters that are not the model's."""
    known = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            "the optimizer holds parameters that are not the model's: on several ranks sharding replaces them; "
            "override create_optimizer, or give optimizer_cls_and_kwargs"
        )


def load_datasets(
    args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, group: Group, progress: Progress | None = None
) -> tuple[TokenStore, TokenStore | None]:
    """Prepare (or find prepared) the training samples and the held-out ones.

    The first rank of each node prepares; the others wait, and open what it wrote.

    Raises:
        UsageError: there is no data_path.
        DataError: a line cannot be trained on.
    """
    if args.data_path is None and not args.data_mixture:
        raise UsageError("data_path is missing: name the files to train on, or give Trainer a train_dataset")
    with group.naming_faults(lambda: "preparing the data"), group.main_first():
        train, held_out, notes = load_data(args, tokenizer, args.seed, args.longest_sample, progress)
    if group.is_main:
        for note in notes:
            _log.warning("%s", note)
    return train, held_out


def check_held_out(args: TrainingArguments, train_dataset: Any, eval_dataset: Any) -> None:
    """Raise UsageError where the options name held-out data that would not be used."""
    if not args.validation_split and args.validation_data_path is None:
        return
    if train_dataset is None and eval_dataset is not None:
        raise UsageError("validation_split, validation_data_path and eval_dataset exclude each other: give one")
    if train_dataset is not None and eval_dataset is None:
        raise UsageError(
            "validation_split and validation_data_path have no effect beside train_dataset: give eval_dataset"
        )


def check_evaluations(args: TrainingArguments, eval_dataset: Any) -> None:
    """Raise UsageError where evaluations are asked for and there is nothing to evaluate on."""
    if args.does_evaluate and eval_dataset is None:
        raise UsageError("evaluation needs held-out data: give validation_split, validation_data_path, or eval_dataset")


def check_samples(store: TokenStore, name: str) -> None:
    """Raise DataError where a data set is empty or holds a sample without a trained token."""
    if len(store) == 0:
        raise DataError(f"{name} holds no samples", "give at least one")
    untrainable = (store.num_loss_tokens == 0).nonzero()[0]
    if len(untrainable):
        raise DataError(
            f"{name}: {len(untrainable)} of {len(store)} samples have no trained token, first number {untrainable[0]}",
            "every sample needs a label other than -100 behind its first; `trainer prepare` can drop those that do not",
        )


def check_fit(model: PreTrainedModel, store: TokenStore, name: str) -> None:
    """Raise where the model has no position or no embedding for some token of a data set."""
    check_positions(model, int(store.lengths.max()))
    vocabulary_size = model.config.get_text_config().vocab_size
    if store.largest_id >= vocabulary_size:
        raise DataError(
            f"{name} holds token id {store.largest_id}",
            f"the model's ids are 0 to {vocabulary_size - 1}; prepare the data with the model's own tokenizer",
        )


def build_model(
    model: PreTrainedModel | None,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    group: Group,
    adapt: Adapt | None = None,
) -> Prepared:
    """Return a model that is ready to train on this rank: the one given, or the one that the options name.

    `adapt` changes its modules before it is sharded.
    """
    is_lora = args.lora_rank is not None
    if model is None:
        lora = args if is_lora else None
        return load_model(args, tokenizer, group.mesh, group.device, seed=args.seed, adapt=adapt, lora=lora)
    if is_lora:
        model = add_lora(model, args, args.seed)
    return prepare_model(model, args, group.mesh, group.device, is_packed=True, adapt=adapt)


def build_cost(args: TrainingArguments, model: PreTrainedModel) -> CostModel:
    """Return what packing balances over ranks."""
    return TOKENS if args.packing_cost == "tokens" else cost_model_from_config(model.config.get_text_config())
