"""The loss of a pack: the SUM of its token cross-entropies, never a mean. One line of the project divides, not here.

The head is applied, and the loss computed, at trained positions only and in pieces, so that the logits never exist as
a whole: the model runs its own forward pass with its head replaced by a piecewise cross-entropy. What the model does
to logits after its head (scale, soft cap) is measured once, by feeding it known values; a model for which that fails
computes its logits at the trained positions by itself.

T tokens in a pack, N trained positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.labels import IGNORE_INDEX
from trainer.model.attention import packed_forward, packed_inputs
from trainer.model.cross_entropy import GroupSums, HeadOutput, cross_entropy_sum
from trainer.model.fsdp import inference
from trainer.model.precision import accumulation_dtype, uncompiled
from trainer.model.prepared import Prepared

PROBE_LENGTH = 4
PROBE_EXPONENTS = (-4.0, 6.0)
PROBE_TOLERANCE = 1e-5
ROUTER_COEFFICIENT = "router_aux_loss_coef"


def token_loss_sum(
    prepared: Prepared,
    micro_batch: Mapping[str, Any],
    label_smoothing: float = 0.0,
    source_sums: Tensor | None = None,
) -> Tensor:
    """Sum of cross-entropies over the trained tokens of one pack, a float32 scalar; works for FSDP2 models too.

    A model that returns a router loss gets it added: its coefficient times this pack's share of the mean over all
    tokens of the global batch, in units of loss tokens. Nothing is divided by the number of trained tokens.

    Args:
        prepared: A transformers model with a language-modelling head, prepared for packs.
        micro_batch: One `MicroBatch`, on the model's device.
        label_smoothing: Share of the target spread evenly over the vocabulary.
        source_sums: (S,) float64; the loss of the tokens of each of S sources, without the router loss, is added to it.
    """
    is_in_use = prepared.borrowing.depth > 0
    assert is_in_use or not prepared.recomputes, "enter Prepared.in_use around forward and backward"
    positions, targets = trained_positions(micro_batch)
    by_source = None if source_sums is None else GroupSums(sources_at(micro_batch, positions), source_sums)
    with prepared.in_use(), prepared.compute_context(), packed_forward():
        inputs = packed_inputs(prepared.model, micro_batch)
        if prepared.head is None:
            outputs, loss = _loss_from_logits(prepared.model, inputs, (positions, targets), label_smoothing, by_source)
        else:
            outputs, loss = _loss_in_head(prepared, inputs, (positions, targets), label_smoothing, by_source)
    share = micro_batch["num_tokens"] / micro_batch["batch_num_tokens"]
    return loss + router_loss(prepared, outputs, share, micro_batch["batch_num_loss_counted_tokens"])


def trained_positions(micro_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Positions (N,) whose next token is trained, and those tokens (N,)."""
    following = micro_batch["labels"][0, 1:]
    # The count is known from the plan, so a GPU need not be asked for it.
    positions = torch.nonzero_static(following != IGNORE_INDEX, size=int(micro_batch["num_loss_counted_tokens"]))
    return positions[:, 0], following[positions[:, 0]]


def sources_at(micro_batch: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Number of the source of the sample in which each position lies, (N,)."""
    samples = torch.searchsorted(micro_batch["cu_seq_lens"][1:], positions, right=True)
    sources: Tensor = micro_batch["source_ids"][samples]
    return sources


def measure_head(prepared: Prepared) -> HeadOutput | None:
    """Feed known values through the model in place of its head's output, and read the logits that it makes of them.

    Returns:
        Scale and soft cap, or None where the head is not one plain linear layer called once on (1,T,D), or the logits
        are another function of its output.
    """
    model, device = prepared.model, prepared.device
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    known, shapes = _known_values(head, device), []

    def replacement(hidden: Tensor) -> Tensor:
        shapes.append(hidden.shape)
        return known

    pack = {
        "input_ids": torch.arange(PROBE_LENGTH, device=device)[None] % head.out_features,
        "position_ids": torch.arange(PROBE_LENGTH, device=device)[None],
        "cu_seq_lens": torch.tensor([0, PROBE_LENGTH], dtype=torch.int32, device=device),
        "max_length": PROBE_LENGTH,
    }
    with (
        prepared.in_use(),
        inference(model),
        uncompiled(),
        prepared.compute_context(),
        packed_forward(),
        _in_place_of(head, replacement),
    ):
        logits = model(**packed_inputs(model, pack)).logits
    if shapes != [(1, PROBE_LENGTH, head.in_features)] or logits.shape != known.shape:
        return None
    return _fit(known.flatten(), logits.flatten().to(known.dtype))


def _known_values(head: nn.Linear, device: torch.device) -> Tensor:
    """Values of both signs over many magnitudes, none of them in order of the vocabulary; (1, PROBE_LENGTH, V)."""
    dtype = accumulation_dtype(head.weight.dtype)
    magnitudes = torch.logspace(*PROBE_EXPONENTS, PROBE_LENGTH * head.out_features // 2, dtype=dtype)
    values = torch.cat([magnitudes, -magnitudes])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    return values[order].reshape(1, PROBE_LENGTH, head.out_features).to(device)


def _fit(known: Tensor, logits: Tensor) -> HeadOutput | None:
    """The scale s and cap c for which logits = c * tanh(s * known / c), or s * known without a cap."""
    smallest = known.abs().argmin()
    scale = (logits[smallest] / known[smallest]).item()
    for softcap in (None, logits.abs().max().item()):
        candidate = HeadOutput(scale, softcap)
        if torch.allclose(candidate.apply(known), logits, rtol=PROBE_TOLERANCE, atol=0):
            return candidate
    return None


@contextmanager
def _in_place_of(head: nn.Linear, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, what the model takes for the output of its head is a function of the head's input.

    The head itself runs on no position at all, outside autocast, which would cast its whole weight for that.
    """
    outputs: list[Tensor] = []
    off: list[Any] = []

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = inputs
        outputs.append(function(hidden))
        off.append(torch.autocast(hidden.device.type, enabled=False))
        off[-1].__enter__()
        return (hidden.new_empty(*hidden.shape[:-2], 0, head.in_features, dtype=head.weight.dtype),)

    def after(*_: Any) -> Tensor:
        off.pop().__exit__(None, None, None)
        return outputs.pop()

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss_in_head(
    prepared: Prepared,
    inputs: dict[str, Any],
    trained: tuple[Tensor, Tensor],
    label_smoothing: float,
    by_source: GroupSums | None,
) -> tuple[Any, Tensor]:
    """The model's forward pass with the loss in place of its head.

    The loss leaves the model among its outputs: FSDP2 hangs its backward hooks on those.
    """
    head, head_output, losses = prepared.model.get_output_embeddings(), prepared.head, []
    assert head_output is not None
    positions, targets = trained
    more = {} if by_source is None else {"by_group": by_source}

    def replacement(hidden: Tensor) -> Tensor:
        kept = hidden[0].index_select(0, positions)
        losses.append(prepared.linear_cross_entropy(kept, head, targets, head_output, label_smoothing, **more))
        return hidden.new_zeros(1, 1, 1)

    def with_loss(_: nn.Module, inputs: Any, outputs: Any) -> Any:
        outputs["loss"] = losses[0]
        return outputs

    handle = prepared.model.register_forward_hook(with_loss, prepend=True)
    try:
        with _in_place_of(head, replacement):
            outputs = prepared.model(**inputs)
    finally:
        handle.remove()
    return outputs, outputs["loss"]


def _loss_from_logits(
    model: Any,
    inputs: dict[str, Any],
    trained: tuple[Tensor, Tensor],
    label_smoothing: float,
    by_source: GroupSums | None,
) -> tuple[Any, Tensor]:
    """The model's own logits at the trained positions, or at all of them where it cannot choose."""
    positions, targets = trained
    can_choose = "logits_to_keep" in inspect.signature(model.forward).parameters
    chosen = {"logits_to_keep": positions} if can_choose else {}
    output = model(**inputs, **chosen)
    logits = output.logits[0] if can_choose else output.logits[0, positions]
    return output, cross_entropy_sum(logits, targets, label_smoothing, by_source)


def router_loss(prepared: Prepared, outputs: Any, share: float, unit: float = 1) -> Tensor | float:
    """A micro-batch's part of the router loss of the global batch; 0 where the model gives none.

    What a model returns is a mean over the tokens of the micro-batch, so it weighs as much as the micro-batch has of
    the tokens of the global batch.

    Args:
        prepared: The model.
        outputs: What its forward pass gave.
        share: Tokens of the micro-batch, as part of those of the global batch.
        unit: What the loss at hand will be divided by.

    Raises:
        ModelError: The model's config has no coefficient for it, or asks for it and none comes back.
    """
    mean = getattr(outputs, "aux_loss", None)
    if not isinstance(mean, Tensor):  # None, or 0 where the model was not asked for it
        if hasattr(outputs, "aux_loss") and getattr(prepared.model.config, "output_router_logits", False):
            # granitemoe of transformers 5.17: its blocks record no router logits, so their loss is 0.
            raise ModelError(
                f"the config of model type {prepared.model.config.model_type!r} asks for a router loss "
                f"(output_router_logits), and transformers {transformers.__version__} computes none; take a newer one, "
                "or set output_router_logits to false"
            )
        return 0.0
    config = prepared.model.config.get_text_config()
    coefficient = getattr(config, ROUTER_COEFFICIENT, None)
    if coefficient is None:
        raise ModelError(
            f"model type {config.model_type!r} returns a router loss, but its config has no {ROUTER_COEFFICIENT}; "
            "set it, or set output_router_logits to false"
        )
    weighted: Tensor = coefficient * share * unit * mean.float()
    return weighted
