"""`Prepared`: all that a run knows of its model, handed to whoever needs it; nothing of it is kept on the model.

What a model computes with while a trainer runs it (attention, kernels, compiled blocks) is put in place by `in_use`
and taken back after it. Invariant: outside of `in_use` a model computes as its user made it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trainer.model.attention import Attention
from trainer.model.borrowing import Borrowing
from trainer.model.cross_entropy import HeadOutput, LinearCrossEntropy, linear_cross_entropy_sum
from trainer.model.osft.layers import Osft
from trainer.model.traits import ModelTraits, read_traits


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train on this rank, and what is known of it."""

    model: Any  # an nn.Module, on several ranks the root that FSDP2 shards
    device: torch.device
    mesh: DeviceMesh | None  # the ranks over which it is sharded; None on one process
    compute_dtype: torch.dtype
    uses_autocast: bool  # else FSDP2's policy, or the weights' own format, sees to the compute dtype
    traits: ModelTraits  # what its forward takes, read before sharding changed its class
    stored_dtype: torch.dtype | None = None  # in which it was stored before training: exports go back to it
    attention: Attention | None = None  # None where the model keeps its own: custom data sets
    head: HeadOutput | None = None  # what becomes of its head's output; None where that cannot be told
    linear_cross_entropy: LinearCrossEntropy = linear_cross_entropy_sum
    osft: Osft | None = None
    wrapper: Any = None  # of PEFT, around the model, if that holds adapters
    recomputes: bool = False  # activations, in the backward pass
    borrowing: Borrowing = field(default_factory=Borrowing)

    @classmethod
    def as_it_is(cls, model: nn.Module) -> Prepared:
        """A model on one process that nothing was done to."""
        parameter = next(model.parameters())
        stored = getattr(getattr(model, "config", None), "dtype", None)
        return cls(model, parameter.device, None, parameter.dtype, False, read_traits(model), stored)

    @property
    def outer(self) -> Any:
        """The model as users hold it: with PEFT's wrapper, if it has one; same parameters, other names."""
        return self.model if self.wrapper is None else self.wrapper

    def in_use(self) -> AbstractContextManager[None]:
        """Context in which a trainer runs the model, forward and backward; may be nested.

        Inside, attention, kernels and compiled blocks are those that were prepared; after it the model is as before.
        """
        return self.borrowing.held()

    def compute_context(self) -> AbstractContextManager[object]:
        """Context in which to call the model, so that it computes in its format."""
        if not self.uses_autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)
