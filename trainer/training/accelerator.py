"""`trainer.accelerator`, for code written for transformers' Trainer: the few words of it that overrides use.

There is no accelerate behind it; each word does what the Trainer does itself. Any other is an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.distributed.group import Group

INSTEAD = {
    "prepare": "leave it out; on several ranks give a loader of your own a DistributedSampler",
    "gather_for_metrics": "evaluate and predict gather by themselves; for a tensor of your own, trainer.group.gather",
}


class AcceleratorWords:
    """What an overridden `training_step` or `compute_loss` may ask of `self.accelerator`."""

    def __init__(self, group: Group, backward: Callable[[Tensor], None]) -> None:
        self._group, self._backward = group, backward
        self.has_averaged = False  # since it was last set: the Trainer asks, to know what a loss is a mean over

    def backward(self, loss: Tensor, **_: Any) -> None:
        """Add the gradient of a loss that is a mean over this rank's samples; over ranks they are averaged."""
        self.has_averaged = True
        self._backward(loss / self._group.world_size)

    def unwrap_model(self, model: nn.Module, **_: Any) -> nn.Module:
        """Give the model: it is never wrapped."""
        return model

    def wait_for_everyone(self) -> None:
        """Wait until every rank has come here."""
        self._group.barrier()

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._group.device

    @property
    def num_processes(self) -> int:
        """Number of ranks."""
        return self._group.world_size

    @property
    def process_index(self) -> int:
        """This rank."""
        return self._group.rank

    @property
    def is_main_process(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self._group.is_lead

    def __getattr__(self, name: str) -> Any:
        words = ", ".join(word for word in dir(type(self)) if not word.startswith("_"))
        advice = INSTEAD.get(name, f"it understands {words}")
        raise AttributeError(f"accelerator.{name}: this Trainer works without accelerate; {advice}")
