"""From the name of an optimizer to the optimizer, with its parameter groups."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import torch
from torch import nn

from trainer.arguments.groups import OptimizerArguments
from trainer.errors import UsageError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split what is trained into matrices, which decay, and norms and biases (below 2 dimensions), which do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups: Iterable[dict[str, object]] = (
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, args: OptimizerArguments) -> torch.optim.Optimizer:
    """Build the optimizer that `args.optim` names, over the trainable parameters of the model.

    Raises:
        UsageError: no optimizer has that name, or nothing is trained.
    """
    if args.optim not in OPTIMIZERS:
        near = difflib.get_close_matches(args.optim, OPTIMIZERS, n=1, cutoff=0.4)
        raise UsageError(
            f"optim = {args.optim!r}: one of {', '.join(OPTIMIZERS)}" + "".join(f"; nearest: {n}" for n in near)
        )
    groups = parameter_groups(model, args.weight_decay)
    if not groups:
        raise UsageError("every parameter is frozen: loosen freeze_patterns")
    return OPTIMIZERS[args.optim](groups, args)


def _adamw(fused: bool) -> Callable[[list[dict[str, object]], OptimizerArguments], torch.optim.Optimizer]:
    def build(groups: list[dict[str, object]], args: OptimizerArguments) -> torch.optim.Optimizer:
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=fused)

    return build


OPTIMIZERS = {"adamw_torch": _adamw(fused=False), "adamw_torch_fused": _adamw(fused=True)}
