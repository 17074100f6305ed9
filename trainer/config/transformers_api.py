"""What scripts written for transformers expect of its TrainingArguments beside the options themselves.

Their questions about the process (rank, device, who goes first), answered by `trainer.distributed` when they are asked;
`set_training` and its like; and a list of fields that HfArgumentParser can add to a script's own.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from trainer.config.foreign_names import LEFT_TO_SCRIPTS, NOT_HERE
from trainer.config.groups import DataArguments, LoaderArguments, LoraArguments, MachineArguments
from trainer.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers.training_args import ParallelMode

    from trainer.distributed.topology import Topology


class NotGiven:
    """Default of an option of transformers that is not here, where a parser lists it."""

    def __repr__(self) -> str:
        return "not supported"


NOT_GIVEN = NotGiven()


class NamesOfTransformers:
    """Types of the options of transformers that are not here, which HfArgumentParser looks up by name."""

    __annotations__ = dict.fromkeys(NOT_HERE, "str")  # noqa: RUF012


class FieldViews:
    """`__dataclass_fields__` of options: a reader of the class finds other fields than a reader of an instance.

    The class is read by HfArgumentParser, which makes an argument of each field that a constructor takes: options that
    scripts declare beside ours are hidden there (`init` is False), or their parsers would end with a conflict; names of
    transformers that are not here are listed, so that our advice is given. The class is read, too, by the decorator
    `dataclass` of a subclass. An instance has all options and nothing else, for `dataclasses.replace` and `asdict`.
    """

    def __init__(self, fields: Mapping[str, dataclasses.Field[Any]]) -> None:
        own = {name: field for name, field in fields.items() if field.default is not NOT_GIVEN}
        is_first = len(own) == len(fields)  # of TrainingArguments itself, where nothing is hidden yet
        self.of_instance = {name: _with_init(field, True) for name, field in own.items()}
        self.of_class = dict(own)
        of_scripts = (*dataclasses.fields(DataArguments), *dataclasses.fields(LoraArguments))
        for name in (*LEFT_TO_SCRIPTS, *(field.name for field in of_scripts)):
            if is_first:  # what scripts load by themselves, and declare beside ours
                self.of_class[name] = _with_init(own[name], False)
        for name, about in NOT_HERE.items():
            if name not in own:
                self.of_class[name] = _foreign_field(name, about.instead)

    def __get__(self, instance: object | None, owner: type) -> dict[str, dataclasses.Field[Any]]:
        return self.of_class if instance is None else self.of_instance


def views_of(options: type) -> FieldViews:
    """Return what a class of options, or the nearest base of it that is a dataclass, lists as its fields."""
    for kind in options.__mro__:
        if "__dataclass_fields__" in vars(kind):
            views: FieldViews = vars(kind)["__dataclass_fields__"]
            return views
    raise AssertionError(f"{options} has no options")


def option_fields(options: type) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of every option of a class of options."""
    return tuple(views_of(options).of_instance.values())


def _with_init(field: dataclasses.Field[Any], init: bool) -> dataclasses.Field[Any]:
    if field.init == init:
        return field
    field = copy.copy(field)
    field.init = init
    return field


def _foreign_field(name: str, instead: str) -> dataclasses.Field[Any]:
    metadata = {"help": f"Not supported: {instead}.".replace("%", "%%"), "nargs": "?", "const": "true"}
    default: Any = NOT_GIVEN
    field: dataclasses.Field[Any] = dataclasses.field(default=default, repr=False, compare=False, metadata=metadata)
    field.name, field.type = name, str
    field._field_type = dataclasses._FIELD  # type: ignore[attr-defined]
    field.kw_only = True
    return field


class ProcessProperties(MachineArguments, LoaderArguments):
    """This process among all, under transformers' names."""

    place_model_on_device = True

    @property
    def _topology(self) -> Topology:
        from trainer.distributed.topology import current_topology

        return current_topology()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._topology.world_size

    @property
    def process_index(self) -> int:
        """This process among all, from 0."""
        return self._topology.rank

    @property
    def local_process_index(self) -> int:
        """This process among those of its node, from 0."""
        return self._topology.local_rank

    @property
    def should_log(self) -> bool:
        """Return whether this process reports for all."""
        return self._topology.is_main

    @property
    def should_save(self) -> bool:
        """Return whether this process writes for all; of sharded weights each writes its part."""
        return self._topology.is_main

    @property
    def device(self) -> torch.device:
        """This process's device."""
        from trainer.distributed.group import choose_device

        return choose_device(self, self._topology)

    @property
    def n_gpu(self) -> int:
        """Devices that this process drives: one GPU, or none."""
        return int(self.device.type == "cuda")

    @property
    def parallel_mode(self) -> ParallelMode:
        """Return whether there are several processes, as transformers says it."""
        from transformers.training_args import ParallelMode

        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """How long a rank waits for the others."""
        return timedelta(seconds=self.ddp_timeout)

    @property
    def train_batch_size(self) -> int:
        """Samples of one rank in one micro-batch of a custom data set; one process drives one device."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Samples of one rank in one evaluation batch of a custom data set."""
        return self.per_device_eval_batch_size

    def get_process_log_level(self) -> int:
        """Return the level of transformers' messages: warnings on all ranks but the main one."""
        from transformers.utils.logging import get_verbosity

        return get_verbosity() if self.should_log else logging.WARNING

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Run the body on the first rank (of each node; with local=False of all), then on the others.

        Raises:
            PeerError: it failed there; `desc` says what was done.
        """
        from trainer.distributed.group import Group

        with Group.join(self).main_first(local=local, what=desc):
            yield


def _setter(subject: str, always: Mapping[str, Any] | None = None, **short_names: str) -> Callable[..., Any]:
    """Make a method that takes these short names, the first of them by place too, and changes what is given."""
    first = next(iter(short_names))

    def set_options(self: Any, *given: Any, **settings: Any) -> Any:
        if len(given) > 1 or (given and first in settings):
            raise UsageError(f"options of {subject}: give them by name ({', '.join(short_names)})")
        settings |= dict(zip([first], given, strict=False))
        if unknown := settings.keys() - short_names.keys():
            raise UsageError(f"options of {subject} are {', '.join(short_names)}: found {', '.join(sorted(unknown))}")
        return self.with_options({short_names[name]: value for name, value in settings.items()} | dict(always or {}))

    set_options.__doc__ = f"Change options of {subject}: {', '.join(short_names)}; what is not given stays."
    return set_options


class OptionSetters:
    """Methods that change options and give the changed object."""

    as_given: Callable[[], dict[str, Any]]

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Change options in place, unless they contradict others: then an error, and nothing changes."""
        self.__dict__.update(type(self)(**{**vars(self).get("_foreign", {}), **self.as_given(), **options}).__dict__)
        return self

    set_training = _setter(
        "training",
        {"do_train": True},
        learning_rate="learning_rate",
        batch_size="per_device_train_batch_size",
        weight_decay="weight_decay",
        num_epochs="num_train_epochs",
        max_steps="max_steps",
        gradient_accumulation_steps="gradient_accumulation_steps",
        seed="seed",
        gradient_checkpointing="gradient_checkpointing",
        activation_checkpointing="gradient_checkpointing",
    )
    set_evaluate = _setter(
        "evaluation",
        strategy="eval_strategy",
        steps="eval_steps",
        batch_size="per_device_eval_batch_size",
        accumulation_steps="eval_accumulation_steps",
        delay="eval_delay",
        loss_only="prediction_loss_only",
    )
    set_testing = _setter(
        "prediction", {"do_predict": True}, batch_size="per_device_eval_batch_size", loss_only="prediction_loss_only"
    )
    set_save = _setter("checkpoints", strategy="save_strategy", steps="save_steps", total_limit="save_total_limit")
    set_logging = _setter(
        "logging",
        strategy="logging_strategy",
        steps="logging_steps",
        report_to="report_to",
        first_step="logging_first_step",
        nan_inf_filter="logging_nan_inf_filter",
    )
    set_push_to_hub = _setter(
        "the hub",
        {"push_to_hub": True},
        model_id="hub_model_id",
        strategy="hub_strategy",
        token="hub_token",
        private_repo="hub_private_repo",
        always_push="hub_always_push",
        revision="hub_revision",
    )
    set_optimizer = _setter(
        "the optimizer",
        name="optim",
        learning_rate="learning_rate",
        weight_decay="weight_decay",
        beta1="adam_beta1",
        beta2="adam_beta2",
        epsilon="adam_epsilon",
        args="optim_args",
    )
    set_lr_scheduler = _setter(
        "the schedule",
        name="lr_scheduler_type",
        num_epochs="num_train_epochs",
        max_steps="max_steps",
        warmup_steps="warmup_steps",
    )
    set_dataloader = _setter(
        "loaders",
        train_batch_size="per_device_train_batch_size",
        eval_batch_size="per_device_eval_batch_size",
        drop_last="dataloader_drop_last",
        num_workers="dataloader_num_workers",
        pin_memory="dataloader_pin_memory",
        persistent_workers="dataloader_persistent_workers",
        prefetch_factor="dataloader_prefetch_factor",
        auto_find_batch_size="auto_find_batch_size",
        sampler_seed="data_seed",
    )
