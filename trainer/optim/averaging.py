"""Schedule-free optimizers train one set of weights and evaluate another, an average: here the two are swapped.

Knows such an optimizer by its `train` and `eval` methods, wherever it comes from. Invariant: looking at the averaged
weights changes nothing; training goes on from the very bits it stopped at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer


@contextmanager
def averaged_weights(optimizer: Optimizer | None) -> Iterator[None]:
    """Give the model the weights to evaluate and to export inside; changes nothing for other optimizers, or None.

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
    """Whether an optimizer trains other weights than it evaluates."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
