"""When memory runs out: what that looks like, and the run begun again with smaller micro-batches.

The run that comes of it is the run with that batch size from its start: weights go back to what they were. Knows
nothing of batches.
"""

from __future__ import annotations

import gc
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import TrainerMemoryTracker

from trainer.errors import MissingPackageError, UsageError

SHRINKING = 0.9  # the next size to try, as part of the one that did not fit
_MESSAGES = ("out of memory", "CUDNN_STATUS_NOT_SUPPORTED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    is_named = isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    return isinstance(error, torch.OutOfMemoryError) or is_named


def next_batch_size(batch_size: int) -> int:
    """Return the batch size to try after this one.

    Raises:
        UsageError: there is none.
    """
    smaller = int(batch_size * SHRINKING)
    if smaller < 1:
        raise UsageError("auto_find_batch_size: not even one sample fits into memory")
    return smaller


def free_cached_memory() -> None:
    """Return the memory that torch's GPU allocator caches: blocks of the old batch size would only be in the way."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Snapshot:
    """A model's weights and buffers as they are now, kept in the memory of the host."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = {name: tensor.detach().cpu().clone() for name, tensor in self._tensors()}

    def restore(self) -> None:
        """Put them back, and drop the gradients."""
        with torch.no_grad():
            for name, tensor in self._tensors():
                tensor.copy_(self._kept[name])
        self._model.zero_grad()

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self._model.named_parameters(), *self._model.named_buffers()]


def memory_tracker(is_skipped: bool) -> Any:
    """Build what watches the memory of each stage.

    Raises:
        MissingPackageError: it should watch and cannot.
    """
    if not is_skipped and importlib.util.find_spec("psutil") is None:
        raise MissingPackageError("skip_memory_metrics=False needs the package psutil; pip install psutil")
    return TrainerMemoryTracker(is_skipped)
