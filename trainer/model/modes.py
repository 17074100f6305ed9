"""How a module runs, switched for a while. Invariant: every part gets back the mode it had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the context, the former mode of every part after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled parts run as they were written: a probe does not wait for a graph that no training step uses."""
    with torch.compiler.set_stance("force_eager"):
        yield
