"""What users of transformers' Trainer also ask of one: callbacks in and out, learning rates, result files.

Knows the callbacks, the model and the optimizer of its subclass, nothing of how a step is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl

from trainer.config.arguments import TrainingArguments
from trainer.data.batched import has_length
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.freezing import operations_per_input
from trainer.model.precision import compute_context
from trainer.optim.groups import MATRIX_DIMENSIONS
from trainer.optim.optimizers import optimizer_class
from trainer.training.callbacks import Events, RunState
from trainer.training.left_out import LEFT_OUT, check_overrides

Callback: TypeAlias = TrainerCallback | type[TrainerCallback]


class TrainerSurface:
    """Methods around training that need no training."""

    from transformers.trainer_pt_utils import (
        get_num_trainable_parameters,
        log_metrics,
        metrics_format,
        save_metrics,
        save_state,
    )

    is_deepspeed_enabled = is_fsdp_enabled = False  # by accelerate, which scripts ask for
    place_model_on_device = True

    args: TrainingArguments
    model: Any
    road: Any
    group: Group
    events: Events
    callback_handler: CallbackHandler
    optimizer: Optimizer | None
    lr_scheduler: LRScheduler | None

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a subclass whose overrides nothing would call."""
        super().__init_subclass__(**options)
        check_overrides(cls)

    def __getattr__(self, name: str) -> Any:
        """Say what to use instead of what transformers' Trainer has and this one has not."""
        advice = f"this Trainer has none: {LEFT_OUT[name]}" if name in LEFT_OUT else "there is no such attribute"
        raise AttributeError(f"{type(self).__name__}.{name}: {advice}")

    @property
    def state(self) -> RunState:
        """Where the run stands, and what was logged."""
        return self.events.state

    @state.setter
    def state(self, state: RunState) -> None:
        self.events.state = state

    @property
    def data_collator(self) -> Any:
        """What makes a batch of samples, and may be set at any time; None where samples are packed."""
        return self.road.collate

    @data_collator.setter
    def data_collator(self, collate: Any) -> None:
        self.road.use_collator(collate)

    @property
    def control(self) -> TrainerControl:
        """What the callbacks ask for."""
        return self.events.control

    @control.setter
    def control(self, control: TrainerControl) -> None:
        self.events.control = control

    def add_callback(self, callback: Callback) -> None:
        """Add a callback, given as object or class."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Callback) -> TrainerCallback | None:
        """Take a callback out, the first of its class where a class is given; gives it, or None where there is none."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Callback) -> None:
        """Take a callback out, the first of its class where a class is given."""
        self.callback_handler.remove_callback(callback)

    @property
    def model_wrapped(self) -> Any:
        """The model: nothing wraps it."""
        return self.model

    @property
    def _train_batch_size(self) -> int:
        """Samples of one rank in one micro-batch, as found where auto_find_batch_size looked for it."""
        return self.state.train_batch_size

    def is_world_process_zero(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.group.is_lead

    def is_local_process_zero(self) -> bool:
        """Whether this rank is the first of its node."""
        return self.group.topology.is_local_lead

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Count the samples of an ordinary data set in one step over all ranks."""
        return self._train_batch_size * args.gradient_accumulation_steps * self.group.world_size

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Count a loader's samples, as well as its data set and its length tell."""
        dataset: Any = getattr(dataloader, "dataset", None)
        return len(dataset) if has_length(dataset) else len(dataloader) * self.args.per_device_train_batch_size

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Estimate the operations that training on a batch takes; `state.total_flos` counts them."""
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if main is None else int(operations_per_input(self.model) * main.numel())

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Give the context in which losses are computed, in the format of the options."""
        return compute_context(self.model)

    def end(self) -> None:
        """Leave the process group; no other method that ranks call together works afterwards."""
        self.group.close()

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Give class and settings of the optimizer that options name; some need the model to know them."""
        return optimizer_class(nn.Linear(1, 1) if model is None else model, args)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight_decay makes smaller: matrices, not norms and biases."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= MATRIX_DIMENSIONS]

    def get_learning_rates(self) -> list[float]:
        """Give the learning rate of each parameter group of the optimizer."""
        return [group["lr"] for group in self._optimizer_or_error().param_groups]

    def get_optimizer_group(self, param: nn.Parameter | None = None) -> Any:
        """Give the optimizer's group that holds a parameter, or without one the parameters of every group."""
        groups = self._optimizer_or_error().param_groups
        if param is None:
            return [group["params"] for group in groups]
        return next((group for group in groups if any(held is param for held in group["params"])), None)

    def _optimizer_or_error(self) -> Optimizer:
        if self.optimizer is None:
            raise UsageError("there is no optimizer yet: call create_optimizer() or train() first")
        return self.optimizer
