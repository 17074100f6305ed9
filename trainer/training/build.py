"""From options to the things a run is made of: data, model, cost model. Each is built only where it was not given."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.arguments import TrainingArguments
from trainer.data.costs import CostModel, cost_model_from_config
from trainer.data.packing import TOKENS
from trainer.data.prepare import Progress, load_data
from trainer.data.store import TokenStore
from trainer.distributed.group import Group
from trainer.errors import DataError, UsageError
from trainer.model.build import Adapt, load_model, prepare_model
from trainer.model.isolation import check_positions
from trainer.model.prepared import Prepared
from trainer.optim.build import find_class
from trainer.optim.schedules import checked_settings
from trainer.training.scores import SCORERS, find_function

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
    with group.main_first():
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
    """Give a model that is ready to train on this rank: the one given, or the one that the options name.

    `adapt` changes its modules before it is sharded.
    """
    if model is None:
        return load_model(args, tokenizer, group.mesh, group.device, seed=args.seed, adapt=adapt)
    return prepare_model(model, args, group.mesh, group.device, is_packed=True, adapt=adapt)


def build_cost(args: TrainingArguments, model: PreTrainedModel) -> CostModel:
    """Give what packing balances over ranks."""
    return TOKENS if args.packing_cost == "tokens" else cost_model_from_config(model.config.get_text_config())
