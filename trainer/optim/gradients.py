"""Global gradient norm, and clipping by it. Gradients are summed over ranks already and may be sharded (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def global_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Give the 2-norm of all gradients together, over all shards: a scalar tensor, the same on every rank."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip(parameters: Iterable[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale the gradients in place so that their global norm, given as `norm`, is at most `max_norm`; 0 never clips."""
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
