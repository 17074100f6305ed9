"""Optimizer steps taken during the backward pass, so that gradients of the whole model never exist together.

Accumulation: gradients add up through all micro-batches of a step but the last; in its backward pass each parameter
moves, and its gradient is freed, as soon as that is complete. So the step is the ordinary one at any number of
micro-batches, and light in memory with one. Nothing can look at all gradients before the first of them is used: they
cannot be clipped by their global norm, and a non-finite one is found after the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.distributed.topology import current_topology


class InBackward(Optimizer):
    """Mixin: steps on each parameter as its gradient becomes complete, inside `last_backward`.

    A parameter that every rank holds whole (a scalar) waits for `step`: its gradient is summed over ranks before that.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_last_backward = False
        self._norms: list[Tensor] = []  # of gradients that are gone
        itself = weakref.ref(self)

        def step_on(parameter: Tensor) -> None:
            optimizer = itself()
            if optimizer is not None and optimizer._is_last_backward:
                optimizer._step_on(parameter)

        is_alone = current_topology().world_size == 1
        self._group_of: dict[Tensor, int] = {}
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if is_alone or isinstance(parameter, DTensor):
                    self._group_of[parameter] = index
                    parameter.register_post_accumulate_grad_hook(step_on)

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Step during the backward pass inside."""
        self._is_last_backward, self._norms = True, []
        try:
            yield
        finally:
            self._is_last_backward = False

    @property
    def used_norms(self) -> list[Tensor]:
        """Norms of the gradients that the last backward pass used up, one for each parameter."""
        return self._norms

    def _step_on(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms.append(torch.linalg.vector_norm(parameter.grad.detach()))
        with only(self, self.param_groups[self._group_of[parameter]], parameter):
            self.step()
        parameter.grad = None


@contextmanager
def only(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Iterator[None]:
    """Let the optimizer see one of its parameters alone inside, under the settings of its group."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def last_backward(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Wrap the backward pass that completes the gradients of a step; changes nothing for other optimizers."""
    return optimizer.last_backward() if isinstance(optimizer, InBackward) else nullcontext()


def steps_in_backward(optimizer: Optimizer) -> bool:
    """Whether an optimizer has stepped by the time when all gradients are known."""
    return isinstance(optimizer, InBackward)


def used_norms(optimizer: Optimizer | None) -> list[Tensor]:
    """Norms of gradients that were used and freed in backward; the norm of these is part of the norm of all."""
    return optimizer.used_norms if isinstance(optimizer, InBackward) else []
