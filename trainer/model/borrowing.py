"""What a trainer changes of a user's model while it runs it, and takes back after that: attributes, embedding noise.

This is the one place that assigns to attributes of a model. Invariant: after the outermost `held`, each attribute is
what it was, or absent again; outside of `embedding_noise`, and in evaluation mode, nothing is added. What stays (see
`Setting.stay`) belongs to sharding, which is not taken back either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ModelError

_ABSENT = object()


@dataclass(frozen=True)
class Setting:
    """A value that an attribute of a part of the model has while a trainer runs the model."""

    owner: Any
    name: str
    value: Any

    def stay(self) -> None:
        """Set it for good."""
        setattr(self.owner, self.name, self.value)


def settings_made_by(change: Callable[[], object], model: nn.Module) -> list[Setting]:
    """Call what sets attributes of the parts of a model; take that back, and return it as settings."""
    former = [(module, dict(vars(module))) for module in model.modules()]
    change()
    settings = []
    for module, before in former:
        for name, value in list(vars(module).items()):
            if value is not before.get(name, _ABSENT):
                settings.append(Setting(module, name, value))
                _put_back(module, name, before.get(name, _ABSENT))
    return settings


@dataclass
class Borrowing:
    """Puts settings in place while a model is in use, and what was there before back after it. May be nested."""

    settings: Sequence[Setting] = ()
    depth: int = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """The settings are in place inside."""
        self.depth += 1
        former: list[tuple[Setting, Any]] = []
        try:
            if self.depth == 1:
                for each in self.settings:
                    former.append((each, vars(each.owner).get(each.name, _ABSENT)))
                    setattr(each.owner, each.name, each.value)
            yield
        finally:
            self.depth -= 1
            for each, value in reversed(former):
                _put_back(each.owner, each.name, value)


def _put_back(owner: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


@contextmanager
def embedding_noise(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Add uniform noise of at most alpha / sqrt(T * D) to every embedding (N,T,D) inside; None adds none.

    NEFTune (Jain et al. 2023): a regulariser, in training mode alone. N samples, T tokens, D hidden size.
    """
    if alpha is None:
        yield
        return
    strength = alpha

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        limit = strength / math.sqrt(output.size(1) * output.size(2))
        return output + torch.empty_like(output).uniform_(-limit, limit)

    hook = _embeddings(model).register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


def _embeddings(model: Any) -> nn.Module:
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if not isinstance(embeddings, nn.Module):
        raise ModelError(f"neftune_noise_alpha: {type(model).__name__} has no input embeddings to add noise to")
    return embeddings
