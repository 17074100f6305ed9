"""State that packages keep as objects, given and taken as plain tensors and numbers.

Invariant: `state_dict` of a class with one of these mixins holds tensors, numbers, strings, lists and dictionaries
only, and loading it gives the same optimizer, bit for bit.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.errors import CheckpointError
from trainer.optim.mixing import Revived, plain_step


class ObjectState(Revived):
    """Mixin: entries of a parameter's state that are objects become dictionaries, and objects again."""

    def flatten(self, value: Any) -> dict[str, Any] | None:
        """Give an object's contents, or None for a value that is plain already."""
        raise NotImplementedError

    def rebuild(self, group: dict[str, Any], parameter: nn.Parameter, name: str, contents: dict[str, Any]) -> Any:
        """Make the object called `name` again."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Give the state, objects flattened."""
        state_dict = super().state_dict()
        state_dict["state"] = {
            index: {name: self._plain(value) for name, value in state.items()}
            for index, state in state_dict["state"].items()
        }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; what is in objects passes by torch's own loading, which casts what it meets."""
        objects = {i: {n: v for n, v in s.items() if isinstance(v, dict)} for i, s in state_dict["state"].items()}
        plain = {i: {n: v for n, v in s.items() if n not in objects[i]} for i, s in state_dict["state"].items()}
        Optimizer.load_state_dict(self, {**state_dict, "state": plain})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, contents in objects.items():
            self.state[parameters[index]].update(contents)
        self.revive()

    def revive(self) -> None:
        """Make objects of dictionaries."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                for name, contents in state.items():
                    if isinstance(contents, dict):
                        state[name] = self.rebuild(group, parameter, name, contents)

    def _plain(self, value: Any) -> Any:
        contents = self.flatten(value)
        return value if contents is None else contents


class GaloreState(ObjectState):
    """Mixin for galore-torch: the projector of a matrix."""

    def flatten(self, value: Any) -> dict[str, Any] | None:
        """Give a projector's attributes, all plain."""
        return dict(vars(value)) if type(value).__name__ in ("GaLoreProjector", "GradientProjector") else None

    def rebuild(self, group: dict[str, Any], parameter: nn.Parameter, name: str, contents: dict[str, Any]) -> Any:
        """Make the projector again."""
        projector = self.new_projector(group, self.state[parameter])
        vars(projector).update(contents)
        return projector

    def new_projector(self, group: dict[str, Any], state: dict[str, Any]) -> Any:
        """Make an empty projector."""
        return sys.modules["galore_torch.galore_projector"].GaLoreProjector(group["rank"])


class ApolloState(GaloreState):
    """Mixin for apollo-torch: the same, made by its own method."""

    def new_projector(self, group: dict[str, Any], state: dict[str, Any]) -> Any:
        """Make an empty projector."""
        return self._initialize_projector(group, state)  # type: ignore[attr-defined]


class TorchaoState(ObjectState):
    """Mixin for torchao: low-bit state of this rank's shard; learning rates, which it wants as tensors, are numbers."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, **options: Any) -> None:
        rates = [group.get("lr", lr) for group in groups]
        super().__init__(groups, lr=lr, **options)  # type: ignore[call-arg]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    def step(self, closure: Any = None) -> Any:
        """Step with the learning rates as tensors.

        Not with what was compiled for other state: torch 2.13 takes the 8-bit step from disk for 4 bits, and fails.
        """
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float32)
        try:
            with functorch_config.patch(enable_autograd_cache=False):
                return plain_step(super().step)(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def flatten(self, value: Any) -> dict[str, Any] | None:
        """Give the tensors inside a low-bit tensor."""
        local = value.to_local() if isinstance(value, DTensor) else value
        return {name: getattr(local, name) for name in local.tensor_attrs} if hasattr(local, "tensor_attrs") else None

    def rebuild(self, group: dict[str, Any], parameter: nn.Parameter, name: str, contents: dict[str, Any]) -> Any:
        """Make the low-bit tensor again."""
        buffer = self._new_buffer(parameter, name == "exp_avg")  # type: ignore[attr-defined]
        local = buffer.to_local() if isinstance(buffer, DTensor) else buffer
        for part, value in contents.items():
            held, given = getattr(local, part), value.to_local() if isinstance(value, DTensor) else value
            if held.shape != given.shape:
                raise CheckpointError(
                    f"low-bit optimizer state of shape {tuple(given.shape)} was saved where a rank holds "
                    f"{tuple(held.shape)}: resume at the world size that saved it"
                )
            held.copy_(given)
        return buffer


class GrokadamwState(Optimizer):
    """Mixin for grokadamw, which keeps its state in the parameter groups and uses a deprecated name of torch."""

    def step(self, closure: Any = None) -> Any:
        """Step with the state where the package looks for it, and back."""
        for group in self.param_groups:
            group["state"] = self.state
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.cuda.amp.autocast", category=FutureWarning)
                warnings.filterwarnings("ignore", message="CUDA is not available or torch_xla", category=UserWarning)
                return plain_step(super().step)(closure)
        finally:
            for group in self.param_groups:
                del group["state"]
