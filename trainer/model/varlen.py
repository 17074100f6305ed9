"""Torch's variable-length attention kernel (CUDA) as an attention function of transformers, registered on import.

A module of its own because importing the kernel takes its time; `attention.choose_attention` does so where it is
chosen. Knows tensors only. Invariant: nothing here reads a value back from the device, or breaks a compiled graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from trainer.errors import ModelError
from trainer.model.attention import VARLEN, packed_sdpa
from trainer.model.precision import autocast_dtype

# Before torch 2.12 the kernel has no such option and takes grouped heads as they are.
_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_KERNEL: Callable[..., Any] = partial(varlen_attn, enable_gqa=True) if _GROUPS_HEADS else varlen_attn


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Torch's variable-length kernel where borders are given, else `packed_sdpa`; shapes as there."""
    borders = options.get("cu_seq_lens_q")
    if borders is None:
        return packed_sdpa(module, query, key, value, attention_mask, **options)
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} uses a soft cap or sinks, which 'varlen' does not know; use 'auto'")
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if options.get("dropout") or not causal:
        raise ModelError(f"{type(module).__name__} drops weights or is not causal, which 'varlen' cannot; use 'auto'")
    window = options.get("sliding_window")
    length = options["max_length_q"]
    # Autocast does not know the kernel, and float32 rotary tables have made queries and keys float32.
    dtype = autocast_dtype(value)
    rows = [tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value)]
    scale, reach = options.get("scaling"), (-1 if window is None else window - 1, 0)
    output: Tensor = _KERNEL(*rows, borders, borders, length, length, scale=scale, window_size=reach)
    return output[None], None


AttentionInterface.register(VARLEN, varlen)
