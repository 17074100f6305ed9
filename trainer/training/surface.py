"""What users of transformers' Trainer also ask of one: callbacks in and out, learning rates, result files.

Knows the callbacks, the model and the optimizer of its subclass, nothing of how a step is taken.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl

from trainer.arguments.training import TrainingArguments
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.training.callbacks import Events, RunState

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

    args: TrainingArguments
    model: Any
    group: Group
    events: Events
    callback_handler: CallbackHandler
    optimizer: Optimizer | None
    lr_scheduler: LRScheduler | None

    @property
    def state(self) -> RunState:
        """Where the run stands, and what was logged."""
        return self.events.state

    @state.setter
    def state(self, state: RunState) -> None:
        self.events.state = state

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
    def _train_batch_size(self) -> int:
        """Samples of one rank in one micro-batch, as found where auto_find_batch_size looked for it."""
        return self.state.train_batch_size

    def is_world_process_zero(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.group.is_lead

    def is_local_process_zero(self) -> bool:
        """Whether this rank is the first of its node."""
        return self.group.topology.is_local_lead

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
