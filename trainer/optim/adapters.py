"""What optimizers of other packages lack, mixed into their classes: steps on shards, portable state, bfloat16 state.

A mixin overrides `step` or the state dictionary and calls the package's own. Also here: the averaged weights that
schedule-free optimizers evaluate.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.optim import Optimizer

from trainer.errors import CheckpointError
from trainer.optim.gradients import only


class Revived(Optimizer):
    """Mixin: what `state_dict` gives differs from the state itself; `revive` turns the one, loaded, into the other."""

    def revive(self) -> None:
        """Make the state what it was, in place."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self.revive()


def revive(optimizer: Optimizer) -> None:
    """Call after putting what a state dictionary held straight into `optimizer.state`."""
    if isinstance(optimizer, Revived):
        optimizer.revive()


def mix(cls: type[Optimizer], mixins: Sequence[type[Optimizer]]) -> type[Optimizer]:
    """Return the class with the mixins before it, the outermost first."""
    return type(cls.__name__, (*mixins, cls), {}) if mixins else cls


def plain_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound step without the hooks that torch wraps around every class's own."""
    if not getattr(step, "hooked", False):
        return step
    return step.__wrapped__.__get__(step.__self__)  # type: ignore[attr-defined]


@contextmanager
def averaged_weights(optimizer: Optimizer | None) -> Iterator[None]:
    """Put the weights to evaluate and to export into the model inside; change nothing for other optimizers, or None.

    Keeps a copy of the trained weights meanwhile: going there and back by the package's own formula would round.
    """
    if optimizer is None or not is_averaging(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)


def is_averaging(optimizer: Optimizer) -> bool:
    """Return whether an optimizer trains other weights than it evaluates."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


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
        """Return the state, sharded as the parameters are."""
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
    shards: dict[Tensor, nn.Parameter] = {}
    for whole in wholes:
        for parameter in whole:
            assert isinstance(parameter, DTensor)
            shard = shards[parameter] = nn.Parameter(parameter.to_local().detach())
            if isinstance(parameter.grad, DTensor) and shard.numel():
                shard.grad = parameter.grad.to_local()
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


class ObjectState(Revived):
    """Mixin: entries of a parameter's state that are objects become dictionaries, and objects again."""

    def flatten(self, value: Any) -> dict[str, Any] | None:
        """Return an object's contents, or None for a value that is plain already."""
        raise NotImplementedError

    def rebuild(self, group: dict[str, Any], parameter: nn.Parameter, name: str, contents: dict[str, Any]) -> Any:
        """Make the object called `name` again."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state, objects flattened."""
        state_dict = super().state_dict()
        flat: dict[int, dict[str, Any]] = {}
        for index, state in state_dict["state"].items():
            flat[index] = {}
            for name, value in state.items():
                contents = self.flatten(value)
                flat[index][name] = value if contents is None else contents
        return {**state_dict, "state": flat}

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


class GaloreState(ObjectState):
    """Mixin for galore-torch: the projector of a matrix."""

    def flatten(self, value: Any) -> dict[str, Any] | None:
        """Return a projector's attributes, all plain."""
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
        """Return the tensors inside a low-bit tensor."""
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
