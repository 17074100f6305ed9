"""Optimizers that refuse sharded parameters, run on the shard that each rank holds.

Right for elementwise optimizers only: what they do to a shard is what they would do to that part of the whole.
Invariant: between steps the optimizer holds the sharded parameters, and its state the local parts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.optim import Optimizer

from trainer.errors import CheckpointError
from trainer.optim.mixing import Revived, plain_step

BLOCK = 256  # elements that bitsandbytes scales together


class LocalShards(Revived):
    """Mixin: steps on local shards; `state_dict` gives elementwise state as sharded tensors, fit for any world size.

    State in 8-bit blocks cannot be: its tensors stay local, and belong to this rank and world size.
    """

    def step(self, closure: Any = None) -> Any:
        """Step with the shards in place of the parameters."""
        with on_local_shards(self):
            return plain_step(super().step)(closure)

    def state_dict(self) -> dict[str, Any]:
        """Give the state, sharded as the parameters are."""
        state_dict = Optimizer.state_dict(self)  # the package's own hides tensors in nested dictionaries
        state_dict["state"] = {
            index: _sharded_state(self._parameters()[index], state) for index, state in state_dict["state"].items()
        }
        return state_dict

    def revive(self) -> None:
        """Keep the local parts of sharded state.

        Raises:
            CheckpointError: blocks of another world size.
        """
        for parameter, state in self.state.items():
            state.update({name: _local(parameter, value) for name, value in state.items()})
            _check_blocks(parameter, state)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


class PagedLocalShards(LocalShards):
    """The same for paged optimizers, whose warning that a CPU has no pages is said once, when they are chosen."""

    _cpu_paged_warned = True


@contextmanager
def on_local_shards(optimizer: Optimizer) -> Iterator[None]:
    """Put each sharded parameter's local part in its place inside; empty parts are left out."""
    wholes = [group["params"] for group in optimizer.param_groups]
    if not any(isinstance(parameter, DTensor) for whole in wholes for parameter in whole):
        yield
        return
    states = optimizer.state
    shards = {parameter: _shard(parameter) for whole in wholes for parameter in whole}
    optimizer.state = defaultdict(dict, {shards[parameter]: state for parameter, state in states.items()})
    for group, whole in zip(optimizer.param_groups, wholes, strict=True):
        group["params"] = [shards[parameter] for parameter in whole]
    try:
        yield
    finally:
        for group, whole in zip(optimizer.param_groups, wholes, strict=True):
            group["params"] = whole
        known = {parameter: optimizer.state[shard] for parameter, shard in shards.items() if shard in optimizer.state}
        optimizer.state = defaultdict(dict, known)


def _shard(parameter: nn.Parameter) -> nn.Parameter:
    assert isinstance(parameter, DTensor)
    shard = nn.Parameter(parameter.to_local().detach())
    if isinstance(parameter.grad, DTensor) and shard.numel():
        shard.grad = parameter.grad.to_local()
    return shard


def _sharded_state(parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Any]:
    values = [value for value in state.values() if isinstance(value, Tensor)]
    if not isinstance(parameter, DTensor) or any(value.dtype == torch.uint8 for value in values):
        return state
    return {name: _sharded(parameter, value) for name, value in state.items()}


def _sharded(parameter: DTensor, value: Any) -> Any:
    """Make a sharded tensor of a local one in the shape of the local shard, or of several such behind each other."""
    local = parameter.to_local().shape
    if not isinstance(value, Tensor) or value.shape[-len(local) :] != local:
        return value
    placements = _placements(parameter, value)
    shape = torch.Size((*value.shape[: value.ndim - len(local)], *parameter.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _placements(parameter: DTensor, value: Tensor) -> list[Placement]:
    """How a tensor of the parameter's shape, or of several such behind each other, lies over the ranks."""
    shift = value.ndim - parameter.ndim
    return [Shard(p.dim + shift) if isinstance(p, Shard) else p for p in parameter.placements]


def _local(parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    if isinstance(parameter, DTensor) and value.shape[-parameter.ndim :] == parameter.shape:
        value = value.redistribute(placements=_placements(parameter, value))
    return value.to_local()


def _check_blocks(parameter: Tensor, state: dict[str, Any]) -> None:
    """Raise CheckpointError if there are fewer or more blocks than this rank's part of the parameter has."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    num_blocks = math.ceil(local.numel() / BLOCK)
    for name, value in state.items():
        if name.startswith("absmax") and value.shape[-1] != num_blocks:
            raise CheckpointError(
                f"8-bit optimizer state of {value.shape[-1]} blocks was saved, where a rank now holds {num_blocks}: "
                "resume at the world size that saved it"
            )
