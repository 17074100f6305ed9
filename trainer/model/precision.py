"""Which number format a model computes in: float32 master weights always, bfloat16 compute where asked.

A sharded model gets its compute format from FSDP2's policy (`fsdp.py`); a model on one process from autocast, entered
through `Prepared.compute_context` by everyone who runs a forward pass. Invariant: parameters and their gradients stay
float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer.errors import UsageError

BFLOAT16_SETS = ("amx_bf16", "avx512_bf16", "avx10_1", "avx10_2")  # of x86-64 instructions, as torch names them


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the context, the former mode of every part after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # parents before children, which they set too
            module.train(mode)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled parts run as they were written: a probe does not wait for a graph that no training step uses."""
    with torch.compiler.set_stance("force_eager"):
        yield


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


def emulates_bfloat16(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether a processor computes bfloat16 products without instructions for them: many times slower than float32.

    Args:
        capabilities: What `torch.cpu.get_capabilities` returns; of this processor, if not given. Of processors other
            than x86-64, and by a torch that has no such function, nothing is claimed.
    """
    if capabilities is None:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("architecture") == "x86_64" and not any(capabilities.get(name) for name in BFLOAT16_SETS)


def use_tf32(is_allowed: bool | None) -> None:
    """Set whether float32 products on the GPU run in TF32; None leaves torch as it is.

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
