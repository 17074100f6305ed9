"""Gradients over ranks: summed where nobody did it yet, their global norm, and clipping by it.

A sharded gradient (DTensor) is summed over ranks by FSDP2 already; that of one held whole by every rank is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.distributed.group import Group
from trainer.optim.in_backward import used_norms


def sum_whole_gradients(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """Sum over ranks, in one collective, the gradients of parameters that are not sharded (scalars cannot be).

    A parameter without a gradient on any rank keeps none; every rank must come here.
    """
    whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if group.world_size == 1 or not whole:
        return
    has_gradient = torch.tensor([float(p.grad is not None) for p in whole], device=group.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
    flat = torch.cat([has_gradient, *(gradient.flatten() for gradient in gradients)])
    group.sum_tensor(flat)
    sums = flat[len(whole) :].split([p.numel() for p in whole])
    for parameter, gradient, count in zip(whole, sums, flat[: len(whole)].tolist(), strict=True):
        if count:
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)


def global_norm(parameters: Iterable[nn.Parameter], optimizer: Optimizer | None = None) -> Tensor:
    """Give the 2-norm of all gradients together, over all shards: a scalar tensor, the same on every rank.

    With an optimizer that steps during backward, the gradients that it used up count too.
    """
    gradients = [p.grad for p in parameters if p.grad is not None] + used_norms(optimizer)
    norms = [_norm(kind) for kind in _by_kind(gradients)]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients in place so that their global norm, given as `norm`, is at most `max_norm`; 0 never clips."""
    if max_norm > 0:
        for kind in _by_kind(list(parameters)):
            nn.utils.clip_grads_with_norm_(kind, max_norm, norm)


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Sharded ones and whole ones: torch takes no mixed list."""
    sharded: list[Tensor] = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    return [kind for kind in (sharded, whole) if kind]


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
