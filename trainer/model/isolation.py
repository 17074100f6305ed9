"""The isolation probe: does a sample's output depend on what it is packed with? Asked of the real model, at start.

Knows nothing of why a model might leak (a mask ignored, a cache left on, recurrent state carried over). Invariant: a
model that passes gives each sample of a pack the logits that it has alone, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.distributed.failure import is_loss_of_peer
from trainer.errors import IsolationError, ModelError
from trainer.model.attention import packed_forward, packed_inputs
from trainer.model.fsdp import inference
from trainer.model.precision import uncompiled
from trainer.model.prepared import Prepared

PACK_WIDE_ROPE = ("dynamic", "longrope")  # their scaling follows the largest position of the whole input
PROBE_LENGTHS = (8, 5, 6)
# Relative (Frobenius) size of the change that counts as a leak. Neighbours exchanged: the same kernels on the same
# shapes, so rounding hardly differs. Alone: other shapes. A leak measured 0.02 to 2 on tiny random models.
EXCHANGED_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
ALONE_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def check_isolation(prepared: Prepared) -> None:
    """Run a short sample between two others, between two other ones, and alone; compare its logits.

    Raises:
        IsolationError: The logits differ, or the model cannot run packs at all; names model type and implementation.
        ModelError: The logits are not finite.
    """
    model = prepared.model
    (before, sample, after), (other, _, another) = _probe_samples(model, seed=0), _probe_samples(model, seed=1)
    try:
        with prepared.in_use(), inference(model), uncompiled(), prepared.compute_context(), packed_forward():
            packed = _logits(model, [before, sample, after])[1]
            exchanged = _logits(model, [other, sample, another])[1]
            alone = _logits(model, [sample])[0]
    except (ValueError, NotImplementedError, TypeError, RuntimeError) as error:
        if is_loss_of_peer(error) or isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise
        raise IsolationError(f"{_named(prepared)} cannot run packed samples: {error}") from error
    precision = torch.bfloat16 if prepared.compute_dtype.itemsize < torch.float32.itemsize else torch.float32
    _compare(prepared, packed, exchanged, EXCHANGED_LIMIT[precision], "what it is packed with")
    _compare(prepared, packed, alone, ALONE_LIMIT[precision], "being packed at all")


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Refuse samples that reach past the positions for which the model was made, or that change others' positions.

    Args:
        model: Any transformers model.
        longest: Tokens of the longest sample.

    Raises:
        ModelError: A sample is longer than the model's positions.
        IsolationError: The model rescales the positions of a whole pack when one of its samples is long.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ModelError(
            f"the longest sample has {longest} tokens, model type {config.model_type!r} has positions for {limit}; "
            "set max_length and overlong, or raise max_position_embeddings in the model's config"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or limit
    if rope.get("rope_type") in PACK_WIDE_ROPE and original is not None and longest > original:
        raise IsolationError(
            f"model type {model.config.model_type!r} scales rotary positions ({rope['rope_type']}) by the longest "
            f"sample of a pack once that passes {original} tokens; the longest here has {longest}, so what samples are "
            "packed with would matter: "
            f"set max_length to {original}"
        )


def _probe_samples(model: PreTrainedModel, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return [torch.randint(vocabulary, (length,), generator=generator) for length in PROBE_LENGTHS]


def _logits(model: PreTrainedModel, samples: list[Tensor]) -> list[Tensor]:
    """Logits of each sample of one pack, (length, V)."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(sample) for sample in samples])
    pack: dict[str, Any] = {
        "input_ids": torch.cat(samples)[None].to(device),
        "position_ids": torch.cat([torch.arange(len(sample)) for sample in samples])[None].to(device),
        "cu_seq_lens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(device),
        "max_length": max(PROBE_LENGTHS),
    }
    logits = model(**packed_inputs(model, pack)).logits[0]
    return list(logits.float().split(lengths.tolist()))


def _compare(prepared: Prepared, packed: Tensor, other: Tensor, limit: float, what: str) -> None:
    named = _named(prepared)
    if not bool(torch.isfinite(packed).all() and torch.isfinite(other).all()):
        raise ModelError(f"{named} gives logits that are not finite; check its weights")
    smallest = torch.finfo(packed.dtype).tiny
    change = ((packed - other).norm() / (other - other.mean()).norm().clamp_min(smallest)).item()
    if change > limit:
        raise IsolationError(
            f"{named} leaks between packed samples: logits of a sample change by {change:.2g} (relative; "
            f"allowed {limit:g}) with {what}; choose another attn_implementation, or a model that can be packed"
        )


def _named(prepared: Prepared) -> str:
    model_type = prepared.model.config.model_type
    if prepared.attention is None:
        return f"model type {model_type!r}"
    return f"model type {model_type!r} with attn_implementation {prepared.attention.name!r}"
