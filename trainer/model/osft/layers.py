"""Orthogonal subspace fine-tuning: matrices of which only the directions of small singular values train.

A matrix W (N outputs, M inputs) becomes W + D. On its shorter side D is held in the free directions by a fixed basis F;
on its longer side the trained factor L is kept orthogonal to the protected directions P by projection, of its gradient
before clipping and of itself after the optimizer's step, whatever the optimizer does. So D = L F^T (or F L^T) reaches
every matrix whose rows and columns are free, and nothing else. W itself is never touched. Knows nothing of where F and
P come from (`factors.py`). Invariant: the names of W and its bias never change.

`apply_osft` decides which matrices are split, how many directions of each train, and what trains beside them, by names
and shapes alone: it works on the meta device, before sharding. A pattern that finds nothing, or finds what cannot be
split, is an error that names it.

N outputs, M inputs, R = min(N, M), r free directions, k = R - r protected ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.groups import OsftArguments
from trainer.errors import LeakError, ModelError
from trainer.model.freezing import matching_names
from trainer.model.fsdp import decoder_blocks, local_shard, sum_over_shards, whole

UPDATE, FREE, PROTECTED = "osft_update", "osft_free", "osft_protected"


class OsftLinear(nn.Module):
    """A frozen linear layer and its trained update; starts as the layer that it replaces.

    Attributes:
        weight: W, (N, M); or (M, N) where it came from a Conv1D.
        osft_update: L, (max(N, M), r), trained, 0 at the start.
        osft_free: F, (min(N, M), r), orthonormal columns; 0 until the matrix is decomposed.
        osft_protected: P, (max(N, M), k), orthonormal columns; no forward pass reads it.
    """

    def __init__(self, layer: nn.Linear | Conv1D, num_free: int) -> None:
        super().__init__()
        self.is_transposed = isinstance(layer, Conv1D)
        self.weight, self.bias = layer.weight, layer.bias
        num_outputs, num_inputs = self.matrix(layer.weight).shape
        self.is_tall = num_outputs >= num_inputs
        long, short = max(num_outputs, num_inputs), min(num_outputs, num_inputs)
        self.osft_update = nn.Parameter(layer.weight.new_zeros(long, num_free))
        self.osft_free = nn.Parameter(layer.weight.new_zeros(short, num_free), requires_grad=False)
        self.osft_protected = nn.Parameter(layer.weight.new_zeros(long, short - num_free), requires_grad=False)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as (N, M), however it is stored; its own inverse."""
        return weight.mT if self.is_transposed else weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute x (W + D)^T + b for inputs (..., M)."""
        into, out_of = (self.osft_free, self.osft_update) if self.is_tall else (self.osft_update, self.osft_free)
        return F.linear(inputs, self.matrix(self.weight), self.bias) + F.linear(inputs @ into, out_of)

    def extra_repr(self) -> str:
        """Say the sizes."""
        num_outputs, num_inputs = self.matrix(self.weight).shape
        return f"{num_outputs} outputs, {num_inputs} inputs, {self.osft_free.shape[1]} free directions"


def osft_layers(model: nn.Module) -> dict[str, OsftLinear]:
    """The split matrices of a model, by the name of their module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OsftLinear)}


def is_osft_parameter(name: str) -> bool:
    """Return whether a parameter is part of a split matrix and no weight of the original model."""
    return name.rpartition(".")[2] in (UPDATE, FREE, PROTECTED)


def unread_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that no forward pass reads."""
    return [f"{name}.{PROTECTED}" for name in osft_layers(model)]


@torch.no_grad()
def merged_weight(layer: OsftLinear) -> Tensor:
    """The whole of W + D as W is stored, gathered from the ranks that hold it (all of them call)."""
    update, free = whole(layer.osft_update), whole(layer.osft_free)
    change = update @ free.mT if layer.is_tall else free @ update.mT
    return whole(layer.weight) + layer.matrix(change)


def coefficients(tensor: Tensor, basis: Tensor) -> Tensor:
    """What of each column lies along each column of a basis, (k, r), for plain and row-sharded tensors alike."""
    return sum_over_shards(local_shard(basis).mT @ local_shard(tensor), like=tensor)


def remove(tensor: Tensor, basis: Tensor) -> Tensor:
    """Take out of a tensor, in place, what lies in the span of an orthonormal basis; give the coefficients removed."""
    removed = coefficients(tensor, basis)
    local_shard(tensor).addmm_(local_shard(basis), removed, alpha=-1)
    return removed


class Osft:
    """Keeps the trained factors of a model out of what is protected, and measures how well.

    `start_osft` makes it ready. `project_gradients` belongs between the last backward pass of a step and
    the gradient norm, `project_updates` behind the optimizer's step; `report` tells of the step between them.
    """

    def __init__(self, model: nn.Module, args: OsftArguments, importance: Mapping[str, float] | None = None) -> None:
        self.model, self.args = model, args
        self.importance = importance  # of each block, by which the model was split; None: one ratio for all
        self.reconstruction_error = math.nan  # not measured yet
        self._removed: list[Tensor] = []  # squared norms: removed from the gradients, left of them

    @cached_property
    def layers(self) -> list[OsftLinear]:
        """The split matrices that train: read when the model has been frozen as asked."""
        return [layer for layer in osft_layers(self.model).values() if layer.osft_update.requires_grad]

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take the protected directions out of the gradients, so that norm and clipping see what will move."""
        removed, left = [], []
        for layer in self.layers:
            gradient = layer.osft_update.grad
            if gradient is not None:
                removed.append(remove(gradient, layer.osft_protected).square().sum())
                left.append(_square_sum(gradient))
        self._removed = [torch.stack(removed), self._whole_sums(left)] if left else []

    @torch.no_grad()
    def project_updates(self) -> None:
        """Take the protected directions out of the factors."""
        for layer in self.layers:
            remove(layer.osft_update, layer.osft_protected)

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """The metrics of the step that was just taken: measured here, whoever moved the factors.

        Raises:
            LeakError: more of some update lies in the protected directions than the limit allows.
        """
        leaked = [coefficients(layer.osft_update, layer.osft_protected).square().sum() for layer in self.layers]
        sizes = self._whole_sums([_square_sum(layer.osft_update) for layer in self.layers])
        shares = torch.where(sizes > 0, torch.stack(leaked) / sizes, 0.0)  # 0 where nothing moved
        leak, limit = shares.max().sqrt().item(), self.args.osft_leak_limit
        if not leak <= limit:
            worst = self.layers[int(shares.argmax())]
            name = next(name for name, layer in osft_layers(self.model).items() if layer is worst)
            raise LeakError(
                f"osft/leak is {leak:.3g} in {name}, the limit {limit:.3g} (osft_leak_limit): something besides the "
                "optimizer's step moves the weights, or multiplies matrices in less than float32 (TF32)"
            )
        removed, left = (float(part.sum()) for part in self._removed) if self._removed else (0.0, 0.0)
        return {
            "osft/leak": leak,
            "osft/projected_share": math.sqrt(removed / (removed + left)) if removed else 0.0,
            "osft/reconstruction_error": self.reconstruction_error,
        }

    def _whole_sums(self, sums: list[Tensor]) -> Tensor:
        return sum_over_shards(torch.stack(sums), like=self.layers[0].osft_update)


def _square_sum(tensor: Tensor) -> Tensor:
    return local_shard(tensor).square().sum()


SPLITTABLE = (nn.Linear, Conv1D)
ROUNDING = 1e-9  # of a ratio times a rank: 0.7 of 10 directions are 7, not 8


def apply_osft(model: PreTrainedModel, args: OsftArguments, importance: Mapping[str, float] | None = None) -> Osft:
    """Replace the target matrices of a model by split ones, freeze what shall not train, and return what keeps them.

    Args:
        model: Whole, on any device.
        args: Which matrices, which ratios, what trains beside them.
        importance: Of each block by name, 1 on average (`block_importance`); None for the same ratio in all.

    Raises:
        ModelError: a pattern finds nothing, or a module that is no linear layer or shares its weight.
    """
    targets = find_targets(model, args.osft_target_patterns)
    ratios = target_ratios(targets, args, importance or {})
    model.requires_grad_(False)
    _train_the_rest(model, targets, args.osft_train_patterns)
    for name, ratio in ratios.items():
        layer = model.get_submodule(name)
        num_free = num_free_directions(min(layer.weight.shape), ratio)
        if num_free == min(layer.weight.shape):
            layer.weight.requires_grad_(True)
        elif num_free:
            model.set_submodule(name, OsftLinear(layer, num_free))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("osft: every ratio is 0 and osft_train_patterns is empty, so nothing trains; raise a ratio")
    return Osft(model, args, importance)


def num_free_directions(rank: int, ratio: float) -> int:
    """How many of `rank` directions train: the ratio of them, rounded up."""
    return min(rank, math.ceil(ratio * rank - ROUNDING))


def find_targets(model: PreTrainedModel, patterns: Collection[str]) -> list[str]:
    """Names of the modules whose matrices are split: those that match, or every matrix of the blocks."""
    matrices = {name: module for name, module in model.named_modules() if _holds_matrix(module)}
    if patterns:
        targets = matching_names("osft_target_patterns", patterns, matrices, "module with a matrix")
    else:
        targets = [name for name in matrices if any(name.startswith(f"{block}.") for block in decoder_blocks(model))]
    _check_splittable(model, targets)
    return targets


def target_ratios(targets: Collection[str], args: OsftArguments, importance: Mapping[str, float]) -> dict[str, float]:
    """The ratio of free directions of each target: its last matching pattern's, else its block's, else everyone's."""
    common = args.osft_unfreeze_rank_ratio
    assert common is not None
    ratios = dict.fromkeys(targets, common)
    for block, value in importance.items():
        kept = (1 - common) * (1 + value) / 2
        ratios |= {name: 1 - min(kept, 1.0) for name in targets if name.startswith(f"{block}.")}
    for pattern, ratio in args.osft_rank_ratios.items():
        ratios |= dict.fromkeys(matching_names("osft_rank_ratios", [pattern], targets, "target matrix"), ratio)
    return ratios


def _holds_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _check_splittable(model: nn.Module, targets: Collection[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in targets:
        module = model.get_submodule(name)
        if type(module) not in SPLITTABLE:
            raise ModelError(
                f"osft: {name} is a {type(module).__name__}; only Linear and Conv1D layers can be split; "
                "choose others with osft_target_patterns"
            )
        sharers = [other for other in owners[id(module.weight)] if other != name]
        if sharers:
            raise ModelError(
                f"osft: {name} shares its weight with {', '.join(sharers)}, which would not see its update; "
                "leave it out of osft_target_patterns"
            )


def _train_the_rest(model: nn.Module, targets: Collection[str], patterns: Collection[str]) -> None:
    weights = {f"{name}.weight" for name in targets}
    rest = {
        name: parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name not in weights
    }
    for name in matching_names("osft_train_patterns", patterns, rest, "parameter outside the target matrices"):
        rest[name].requires_grad_(True)
