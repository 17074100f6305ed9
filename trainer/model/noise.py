"""NEFTune: uniform noise on the embeddings while training, as a regulariser (Jain et al. 2023).

Invariant: the model computes as before outside the context, and in evaluation mode always.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ModelError

# Shapes: N samples, T tokens, D hidden size.


@contextmanager
def embedding_noise(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Add noise of at most alpha / sqrt(T * D) to every embedding (N,T,D) inside the context; None adds none."""
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
