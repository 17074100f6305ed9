"""Which parameters are trained: freezing by regular expressions on their names, and finding names by them.

Knows nothing of optimizers or sharding. Invariant: a pattern that freezes nothing, or patterns that leave nothing to
train, are errors, never ignored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from trainer.errors import ModelError

NUM_NEAR_NAMES = 5
OPERATIONS_PER_PARAMETER = 6  # multiply and add, in the forward pass and twice in the backward pass


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose name matches a pattern (`re.search`); tied weights answer to both names.

    Returns:
        The names frozen, in the model's order.

    Raises:
        ModelError: A pattern is no regular expression or matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = matching_names("freeze_patterns", patterns, parameters, "parameter")
    for name in frozen:
        parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ModelError(
            f"freeze_patterns: {', '.join(map(repr, patterns))} freeze all {len(parameters)} parameters; "
            "leave at least one to train"
        )
    return frozen


def matching_names(option: str, patterns: Iterable[str], names: Collection[str], kind: str) -> list[str]:
    """The names that match some pattern (`re.search`), in their own order.

    Raises:
        ModelError: A pattern of the option is no regular expression, or matches no such kind of name.
    """
    matching: set[str] = set()
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ModelError(
                f"{option}: {pattern!r} is not a regular expression ({error}); escape special characters with a "
                "backslash"
            ) from error
        matches = [name for name in names if expression.search(name)]
        if not matches:
            raise ModelError(
                f"{option}: {pattern!r} matches no {kind} of this model; "
                f"names like it: {', '.join(near_names(pattern, names))}"
            )
        matching.update(matches)
    return [name for name in names if name in matching]


def near_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The names nearest to a pattern, one for each kind of parameter (layer numbers count as one kind)."""
    kinds = {re.sub(r"\.\d+\.", ".0.", name): name for name in reversed(list(names))}
    plain = re.sub(r"[^\w.]", "", pattern)

    def likeness(name: str) -> float:
        parts = [name, *name.split("."), ".".join(name.split(".")[-2:])]
        return max(difflib.SequenceMatcher(None, plain, part).ratio() for part in parts)

    return sorted(kinds.values(), key=likeness, reverse=True)[:NUM_NEAR_NAMES]


def operations_per_input(model: nn.Module) -> int:
    """Estimate the floating-point operations that training does for a token, embeddings aside.

    0 for what is no model of transformers, where a parameter may be used in any way.
    """
    num_parameters: Any = getattr(model, "num_parameters", None)
    return 0 if num_parameters is None else OPERATIONS_PER_PARAMETER * num_parameters(exclude_embeddings=True)
