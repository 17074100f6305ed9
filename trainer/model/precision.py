"""Which number format a model computes in: float32 master weights always, bfloat16 compute where asked.

A sharded model gets its compute format from FSDP2's policy (`fsdp.py`); a model on one process from autocast, entered
through `compute_context` by everyone who runs a forward pass. Invariant: parameters and their gradients stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from trainer.errors import UsageError

_DTYPE, _AUTOCAST = "_trainer_compute_dtype", "_trainer_autocast"


def use_compute_dtype(model: nn.Module, dtype: torch.dtype, *, by_autocast: bool) -> None:
    """Record that a model computes in `dtype`, and whether `compute_context` must see to it."""
    setattr(model, _DTYPE, dtype)
    setattr(model, _AUTOCAST, by_autocast)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The format in which a model computes."""
    dtype: torch.dtype = getattr(model, _DTYPE, None) or next(model.parameters()).dtype
    return dtype


def compute_context(model: nn.Module) -> AbstractContextManager[object]:
    """Context in which to call a model, so that it computes in its format."""
    if not getattr(model, _AUTOCAST, False):
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=compute_dtype(model))


@contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Hold the model's weights in `dtype` inside (None: as they are); after it they are what they were, to the bit."""
    if dtype is None:
        yield
        return
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    kept = [tensor.detach().to("cpu", copy=True) for tensor in tensors]  # off the device, whose memory this is to save
    model.to(dtype)
    try:
        yield
    finally:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.data = before.to(tensor.device)


def use_tf32(is_allowed: bool | None) -> None:
    """Let float32 products on the GPU run in TF32, or not; None leaves torch as it is.

    Raises:
        UsageError: There is no GPU that could.
    """
    if is_allowed is None:
        return
    if is_allowed and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0)):
        raise UsageError("tf32 has no effect here: it needs a GPU of NVIDIA's Ampere generation or newer")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Format in which a matrix product takes a tensor here: that of autocast where it is on, else the tensor's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Format for sums over values of `dtype`: never less than float32."""
    return torch.promote_types(dtype, torch.float32)
