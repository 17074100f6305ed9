"""Optimizer state kept in bfloat16 between steps, at half the memory.

A step reads and writes the state of one parameter in float32 and rounds it back at random, up or down in proportion to
the distance: rounded to the nearest, a second moment that decays by 0.999 would never decay. Invariant: the draws
depend on the step and the parameter alone, so a resumed run draws the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.optim.in_backward import only
from trainer.optim.mixing import plain_step


class Bfloat16State(Optimizer):
    """Mixin: floating-point tensors of a parameter's state are bfloat16 between steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step on one parameter after the other."""
        assert closure is None
        members = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for index, (group, parameter) in enumerate(members):
            if parameter.grad is not None:
                self._step_on_one(index, group, parameter)

    @torch.no_grad()
    def _step_on_one(self, index: int, group: dict[str, Any], parameter: Tensor) -> None:
        state = self.state[parameter]
        state.update({name: value.float() for name, value in state.items() if _is_kept(name, value)})
        with only(self, group, parameter):
            plain_step(super().step)()
        draws = torch.Generator(parameter.device).manual_seed(int(state["step"]) * 2**24 + index)
        state.update({name: round_at_random(value, draws) for name, value in state.items() if _is_kept(name, value)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; torch's own loading casts to the parameter's type, which loses nothing."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: value.bfloat16() for name, value in state.items() if _is_kept(name, value)})


def round_at_random(value: Tensor, draws: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with the probability that makes the mean exact."""
    local = value.to_local() if hasattr(value, "to_local") else value
    bits = local.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=draws)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32).bfloat16()
    result = value.bfloat16()
    (result.to_local() if hasattr(result, "to_local") else result).copy_(rounded)
    return result


def _is_kept(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and name != "step"
