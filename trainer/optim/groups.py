"""Parameter groups: what decays, what has its own learning rate, which matrices an optimizer treats in low rank.

Invariant: every trainable parameter is in exactly one group. A pattern that matches nothing, or two that match the
same parameter, are errors; the group whose learning rate is logged, that of no pattern, comes first.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config.groups import OptimizerArguments
from trainer.errors import UsageError

Group = dict[str, Any]  # of torch.optim: params, weight_decay, lr where it has its own
Named = dict[str, nn.Parameter]
EMBEDDINGS, HEAD = "embeddings", "head"  # patterns that mean the model's own, whatever they are called
MATRIX_DIMENSIONS = 2  # and more: what weight decay and low rank are for
_SETTINGS = {"learning_rate": "lr", "weight_decay": "weight_decay"}


def parameter_groups(model: nn.Module, args: OptimizerArguments) -> list[Group]:
    """Put what is trained into groups: those of no pattern first, then one or two for each pattern of `optim_groups`.

    Norms and biases (below 2 dimensions) do not decay, unless their pattern gives a weight_decay.

    Raises:
        UsageError: nothing is trained; a pattern matches nothing, or what another one matches.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UsageError("every parameter is frozen: loosen freeze_patterns")
    chosen = {pattern: match(pattern, model, trained) for pattern in args.optim_groups}
    _check_apart(chosen)
    taken = {name for names in chosen.values() for name in names}
    groups = by_decay([p for name, p in trained.items() if name not in taken], args.weight_decay)
    for pattern, settings in args.optim_groups.items():
        own = _settings(pattern, settings)
        parameters = [trained[name] for name in chosen[pattern]]
        if "weight_decay" in own:
            groups += by_kind([{"params": parameters, **own}])
        else:
            groups += [{**group, **own} for group in by_decay(parameters, args.weight_decay)]
    return groups


def by_decay(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[Group]:
    """Split parameters into matrices, which decay, and norms and biases, which do not; without empty groups."""
    members = list(parameters)
    matrices = {"params": [p for p in members if p.ndim >= MATRIX_DIMENSIONS], "weight_decay": weight_decay}
    others = {"params": [p for p in members if p.ndim < MATRIX_DIMENSIONS], "weight_decay": 0.0}
    return by_kind([matrices, others])


def by_kind(groups: Iterable[Group]) -> list[Group]:
    """Split every group into sharded parameters and whole ones (scalars), which torch steps apart; none is empty."""
    split = [
        {**group, "params": [p for p in group["params"] if isinstance(p, DTensor) == is_sharded]}
        for group in groups
        for is_sharded in (True, False)
    ]
    return [group for group in split if group["params"]]


def match(pattern: str, model: nn.Module, trained: Named) -> list[str]:
    """Names of the trained parameters that a pattern means: `embeddings`, `head`, or a regular expression's matches."""
    if pattern in (EMBEDDINGS, HEAD):
        end = _end(model, pattern)
        members = set() if end is None else set(end.parameters())
        return _require(pattern, [name for name, parameter in trained.items() if parameter in members], trained)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"optim_groups: {pattern!r} is not a regular expression: {error}") from error
    return _require(pattern, [name for name in trained if expression.search(name)], trained)


def target_matrices(model: nn.Module, targets: str | Sequence[str]) -> set[Tensor]:
    """Trained weights of the linear modules among `optim_target_modules`.

    Args:
        model: the model.
        targets: `all-linear`, a regular expression for whole module names, or a list of names, parts of names, or such
            expressions.

    Raises:
        UsageError: no trained linear module is meant.
    """
    from transformers.trainer_utils import check_target_module_exists

    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        meant = {name for name, _ in model.named_modules()}
    else:
        meant = {name for name, _ in model.named_modules() if check_target_module_exists(targets, name)}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {module.weight for name, module in linear.items() if name in meant and module.weight.requires_grad}
    if not found:
        raise UsageError(
            f"optim_target_modules = {targets!r} means no trained linear module; this model has, for one, "
            f"{next(reversed(linear), 'none')}"
        )
    return found


def split_targets(groups: list[Group], targets: set[Tensor], settings: Mapping[str, Any]) -> list[Group]:
    """Split every group into target matrices, which get the settings, and the rest."""
    rest = [{**group, "params": [p for p in group["params"] if p not in targets]} for group in groups]
    theirs = [{**group, "params": [p for p in group["params"] if p in targets], **settings} for group in groups]
    return [group for group in (*rest, *theirs) if group["params"]]


def _end(model: nn.Module, which: str) -> nn.Module | None:
    method = "get_input_embeddings" if which == EMBEDDINGS else "get_output_embeddings"
    found: nn.Module | None = getattr(model, method, lambda: None)()
    return found


def _require(pattern: str, names: list[str], trained: Named) -> list[str]:
    if not names:
        near = difflib.get_close_matches(pattern, trained, n=3, cutoff=0) or list(trained)[:3]
        raise UsageError(f"optim_groups: {pattern!r} matches no trained parameter; names like it: {', '.join(near)}")
    return names


def _check_apart(chosen: Mapping[str, list[str]]) -> None:
    owner: dict[str, str] = {}
    for pattern, names in chosen.items():
        for name in names:
            if name in owner:
                raise UsageError(
                    f"optim_groups: {owner[name]!r} and {pattern!r} both match {name}: a parameter has one group"
                )
            owner[name] = pattern


def _settings(pattern: str, settings: Any) -> dict[str, float]:
    """Check what a pattern sets, and give it under torch's names; YAML takes 1e-4 for text."""
    allowed = " and ".join(_SETTINGS)
    if not isinstance(settings, Mapping) or not settings or settings.keys() - _SETTINGS.keys():
        raise UsageError(f"optim_groups: {pattern!r} sets {settings!r}: give one or both of {allowed}")
    try:
        own = {_SETTINGS[name]: float(value) for name, value in settings.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"optim_groups: {pattern!r} sets {settings!r}: {allowed} are numbers") from error
    if not all(0 <= value < math.inf for value in own.values()):
        raise UsageError(f"optim_groups: {pattern!r} sets {settings!r}: {allowed} are at least 0")
    return own
