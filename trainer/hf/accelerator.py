"""`trainer.accelerator`, for code written for transformers' Trainer: the few names of it that overrides use.

There is no accelerate behind it; each does what the Trainer does itself. Any other name is an error that says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.training.evaluate import gather_rows

if TYPE_CHECKING:
    from trainer.hf.trainer import Trainer

INSTEAD = {
    "prepare": "leave it out; on several ranks give a loader of your own a DistributedSampler",
    "gather_for_metrics": "evaluate and predict gather by themselves; for a tensor of your own, trainer.group.gather",
}


class AcceleratorShim:
    """What an overridden `training_step` or `compute_loss` may ask of `self.accelerator`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._group = trainer, trainer.group

    def backward(self, loss: Tensor, **_: Any) -> None:
        """Add the gradient of a loss that is a mean over this rank's samples; over ranks they are averaged."""
        self._trainer._model_task.share.is_averaged = True
        self._trainer.backward(loss / self._group.world_size)

    def gather(self, tensor: Any) -> Any:
        """Return the rows of all ranks, in the order of ranks; nested tensors likewise."""
        return gather_rows(tensor, self._group)

    def unwrap_model(self, model: nn.Module, **_: Any) -> nn.Module:
        """Return the model: it is never wrapped."""
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
        """Return whether this rank writes and prints for all."""
        return self._group.is_main

    @property
    def is_local_main_process(self) -> bool:
        """Return whether this rank is the first of its node."""
        return self._group.topology.is_local_main

    def __getattr__(self, name: str) -> Any:
        words = ", ".join(word for word in dir(type(self)) if not word.startswith("_"))
        advice = INSTEAD.get(name, f"it has {words}")
        raise AttributeError(f"accelerator.{name}: this Trainer works without accelerate; {advice}")
