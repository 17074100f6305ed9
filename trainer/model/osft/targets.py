"""Which matrices are split for OSFT, how many directions of each train, and what trains beside them.

Knows names and shapes, never values: it works on the meta device, before sharding. Invariant: a pattern that finds
nothing, or finds what cannot be split, is an error that names it; what is not asked for does not train.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.groups import OsftArguments
from trainer.errors import ModelError
from trainer.model.freezing import matching_names
from trainer.model.fsdp import decoder_blocks
from trainer.model.osft.layers import Osft, OsftLinear

SPLITTABLE = (nn.Linear, Conv1D)
ROUNDING = 1e-9  # of a ratio times a rank: 0.7 of 10 directions are 7, not 8


def apply_osft(model: PreTrainedModel, args: OsftArguments, importance: Mapping[str, float] | None = None) -> Osft:
    """Replace the target matrices of a model by split ones, freeze what shall not train, and return what keeps them.

    Args:
        model: Whole, on any device.
        args: Which matrices, which ratios, what trains beside them.
        importance: Of each block by name, 1 on average (`osft_importance`); None for the same ratio in all.

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
