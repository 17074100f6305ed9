"""The scale of the loss in float16, whose small gradients would be 0: as large as the gradients' range allows.

A step whose gradients overflow is taken again at half the scale, so that no sample is lost; after many steps that did
not overflow the scale is doubled. Invariant: every rank sees the same norm and so has the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

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
        """Whether the gradients overflowed at this scale and may not at a smaller one, which then holds."""
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
