"""The state of an optimizer by the names of its parameters, and back into one built anew, on any number of ranks.

Owns what is done to `optimizer.state` and `optimizer.param_groups`; knows nothing of files. Invariant: state comes back
in the format in which it was saved (torch's own `load_state_dict` casts it to that of the parameter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor

from trainer.checkpoint.tensors import OPTIMIZER, Entry, StoredTensors, fill, pack, unpack
from trainer.errors import CheckpointError
from trainer.optim.adapters import revive


def pack_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Return an optimizer's state as JSON and named tensors.

    Raises:
        CheckpointError: it moves something that is no parameter of the model, or keeps what cannot be saved.
    """
    saved, tensors = optimizer.state_dict(), {}  # type: ignore[var-annotated]
    names = _names(optimizer, model)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, (name for group in names for name in group), strict=True))
    groups = [{**group, "params": list(members)} for group, members in zip(saved["param_groups"], names, strict=True)]
    state = {by_number[number]: values for number, values in saved["state"].items()}
    if extra := saved.keys() - {"state", "param_groups"}:
        raise CheckpointError(
            f"{type(optimizer).__name__} keeps {', '.join(sorted(extra))} beside state and parameter groups: "
            "it cannot be saved"
        )
    return pack({"state": state, "groups": groups}, OPTIMIZER, tensors), tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, form: Any, stored: StoredTensors, kept: frozenset[str]
) -> None:
    """Restore the saved state into an optimizer that was built like the saved one.

    Args:
        optimizer: built anew over the same parameters.
        model: with its layout over ranks.
        form: the JSON of `pack_optimizer`.
        stored: its tensors.
        kept: settings of the groups that stay as built, because their change was allowed.

    Raises:
        CheckpointError: the groups differ.
    """
    names, parameters = _names(optimizer, model), dict(model.named_parameters())
    groups = unpack(form["groups"], lambda name: stored.read(name, ()))
    if [group.pop("params") for group in groups] != names:
        raise CheckpointError(f"{stored.folder}: the optimizer's parameter groups are not those of this run")
    if strange := form["state"].keys() - {name for group in names for name in group}:
        raise CheckpointError(f"{stored.folder}: state of {sorted(strange)[0]}, which is not trained here")
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key not in kept})
    settings = {name: group for group, members in zip(optimizer.param_groups, names, strict=True) for name in members}
    optimizer.state.clear()
    for name, values in form["state"].items():
        parameter = parameters[name]
        optimizer.state[parameter] = unpack(values, _reader(parameter, settings[name], stored))
    revive(optimizer)


def check_form(form: Any) -> None:
    """Raise CheckpointError where the JSON of an optimizer is not of the form of `pack_optimizer`."""
    is_right = isinstance(form, dict) and isinstance(form.get("state"), dict) and isinstance(form.get("groups"), list)
    if not is_right or not all(isinstance(group, dict) and "params" in group for group in form["groups"]):
        raise CheckpointError("is no state of an optimizer: expected an object of state and groups")


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Names of the parameters, group by group."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
        raise CheckpointError("the optimizer moves a tensor that is no parameter of the model: it cannot be saved")
    return [[known[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _reader(parameter: nn.Parameter, settings: Mapping[str, Any], stored: StoredTensors) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        entry = stored.entry(name)
        placements = _placements(entry, parameter, stored)
        if placements is None:
            # torch keeps the step count on the CPU unless the kernel itself counts.
            is_count = name.endswith("/step") and not settings.get("fused") and not settings.get("capturable")
            return stored.read(name, ()).to("cpu" if is_count else parameter.device)
        assert isinstance(parameter, DTensor)
        mesh, dtype = parameter.device_mesh, stored.dtype(name)
        made = empty_dtensor(entry.shape, dtype=dtype, device_mesh=mesh, placements=placements)
        fill(made, name, stored)
        return made

    return read


def _placements(entry: Entry, parameter: nn.Parameter, stored: StoredTensors) -> list[Placement] | None:
    """How a tensor of the state lies over the ranks that share its parameter; None: each holds it as it is."""
    if not isinstance(parameter, DTensor):
        return None
    if entry.placements is not None and len(entry.placements) == parameter.device_mesh.ndim:
        return [Replicate() if dimension is None else Shard(dimension) for dimension in entry.placements]
    if entry.placements is None and (not entry.shape or stored.saved_world_size > 1):
        return None
    is_alike = entry.shape == tuple(parameter.shape)  # saved where nothing was sharded, or over another kind of mesh
    return list(parameter.placements) if is_alike else [Replicate()] * parameter.device_mesh.ndim
