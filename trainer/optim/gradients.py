"""From the backward pass to the update: gradients over ranks, norm, clipping, float16's loss scale, steps in backward.

A sharded gradient (DTensor) is summed over ranks by FSDP2 already; that of one held whole by every rank is not.

The scale of the loss keeps small gradients in float16 from being 0. A step whose gradients overflow is taken again at
half the scale, so that no sample is lost; every rank sees the same norm and so has the same scale.

With `InBackward`, gradients of the whole model never exist together. They add up through all micro-batches of a step
but the last; in its backward pass each parameter moves, and its gradient is freed, as soon as that is complete. So the
step is the ordinary one at any number of micro-batches, and light in memory with one. Nothing can look at all gradients
before the first of them is used: they cannot be clipped by their global norm, and a non-finite one is found after the
step.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.optim import Optimizer

from trainer.distributed.group import Group
from trainer.distributed.topology import current_topology


class InBackward(Optimizer):
    """Mixin: steps on each parameter as its gradient becomes complete, inside `last_backward`.

    A parameter that every rank holds whole (a scalar) waits for `step`: its gradient is summed over ranks before that.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_last_backward = False
        self.used_norms: list[Tensor] = []  # of the gradients that the last backward pass used up, each parameter's
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
        self._is_last_backward, self.used_norms = True, []
        try:
            yield
        finally:
            self._is_last_backward = False

    def _step_on(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.used_norms.append(torch.linalg.vector_norm(parameter.grad.detach()))
        with only(self, self.param_groups[self._group_of[parameter]], parameter):
            self.step()
        parameter.grad = None


@contextmanager
def only(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Iterator[None]:
    """Show the optimizer a single one of its parameters inside, under the settings of its group."""
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
    """Return whether an optimizer has stepped by the time when all gradients are known."""
    return isinstance(optimizer, InBackward)


CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


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


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter], optimizer: Optimizer | None = None) -> Tensor:
    """Return the 2-norm of all gradients together, over all shards: a scalar tensor, the same on every rank.

    With an optimizer that steps during backward, the gradients that it used up count too.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if isinstance(optimizer, InBackward):
        gradients += optimizer.used_norms
    alike: dict[object, list[Tensor]] = defaultdict(list)  # whole ones, and those that the same ranks share alike
    for gradient in gradients:
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        alike[layout].append(gradient)
    norms = []
    for members in alike.values():
        # Of the local parts: for plain tensors torch has one way, for DTensors several.
        norm = nn.utils.get_total_norm([_local(gradient) for gradient in members])
        if isinstance(first := members[0], DTensor):
            placements = [placement if placement.is_replicate() else Partial() for placement in first.placements]
            partial = DTensor.from_local(norm.square(), first.device_mesh, placements, run_check=False)
            norm = partial.full_tensor().sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients in place so that their global norm, given as `norm`, is at most `max_norm`; 0 never clips."""
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    if gradients and max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


LARGEST_SCALE = 2.0**24
FIRST_SCALE = 2.0**16
STEPS_BETWEEN_GROWTHS = 2000


class ScaleState(Protocol):
    """Where the scale is kept, so that it is saved with the run."""

    loss_scale: float
    num_steps_at_scale: int


class LossScale:
    """The factor of the loss; 1 and constant where nothing is scaled."""

    def __init__(self, state: ScaleState, *, is_on: bool) -> None:
        self._state, self.is_on = state, is_on
        if is_on and state.loss_scale == 1:
            state.loss_scale = FIRST_SCALE

    @property
    def value(self) -> float:
        """The factor."""
        return self._state.loss_scale if self.is_on else 1.0

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by it, in place."""
        if self.is_on:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.value)

    def must_shrink(self, grad_norm: float) -> bool:
        """Return whether the gradients overflowed at this scale and may not at a smaller one, which then holds."""
        if not self.is_on or math.isfinite(grad_norm) or self.value <= 1:
            return False
        self._state.loss_scale, self._state.num_steps_at_scale = self.value / 2, 0
        return True

    def grow(self) -> None:
        """Count a step that did not overflow."""
        self._state.num_steps_at_scale += 1
        if self.is_on and self._state.num_steps_at_scale == STEPS_BETWEEN_GROWTHS:
            self._state.loss_scale = min(self.value * 2, LARGEST_SCALE)
            self._state.num_steps_at_scale = 0
