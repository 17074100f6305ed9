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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.errors import ModelError
from trainer.model.attention import borders_given, packed_inputs
from trainer.model.cross_entropy import HeadOutput, cross_entropy_sum, linear_cross_entropy_sum
from trainer.model.modes import evaluating, uncompiled
from trainer.model.precision import accumulation_dtype, compute_context

IGNORED_LABEL = -100
FORWARD_METHOD = "forward_loss"
KERNEL_ATTRIBUTE = "_trainer_linear_cross_entropy"
_HEAD_ATTRIBUTE = "_trainer_head_output"
PROBE_LENGTH = 4
PROBE_EXPONENTS = (-4.0, 6.0)
PROBE_TOLERANCE = 1e-5
ROUTER_COEFFICIENT = "router_aux_loss_coef"

LinearCrossEntropy = Callable[[Tensor, nn.Linear, Tensor, HeadOutput, float], Tensor]


@dataclass(frozen=True)
class HeadMeasurement:
    """What `measure_head` found; `output` is None where the model's head cannot be replaced."""

    output: HeadOutput | None


def token_loss_sum(model: PreTrainedModel, micro_batch: Mapping[str, Any], label_smoothing: float = 0.0) -> Tensor:
    """Sum of cross-entropies over the trained tokens of one pack, a float32 scalar; works for FSDP2 models too.

    A model that returns a router loss gets it added: its coefficient times this pack's share of the mean over all
    tokens of the global batch, in units of loss tokens. Nothing is divided by the number of trained tokens.

    Args:
        model: A transformers model with a language-modelling head.
        micro_batch: One `MicroBatch`, on the model's device.
        label_smoothing: Share of the target spread evenly over the vocabulary.
    """
    sharded = getattr(model, FORWARD_METHOD, None)
    if sharded is not None:
        return sharded(micro_batch, label_smoothing)
    return forward_loss(model, micro_batch, label_smoothing)


def forward_loss(model: PreTrainedModel, micro_batch: Mapping[str, Any], label_smoothing: float = 0.0) -> Tensor:
    """What `token_loss_sum` computes; FSDP2 runs it as a forward method, with the root's weights gathered."""
    positions, targets = trained_positions(micro_batch)
    inputs = packed_inputs(model, micro_batch)
    with compute_context(model), borders_given(model):
        head_output = measured_head(model)
        if head_output is None:
            output, loss = _loss_from_logits(model, inputs, positions, targets, label_smoothing)
        else:
            output, loss = _loss_in_head(model, inputs, (positions, targets), head_output, label_smoothing)
    return loss + _router_loss(model, output, micro_batch)


def trained_positions(micro_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Positions (N,) whose next token is trained, and those tokens (N,)."""
    following = micro_batch["labels"][0, 1:]
    # The count is known from the plan, so a GPU need not be asked for it.
    positions = torch.nonzero_static(following != IGNORED_LABEL, size=int(micro_batch["num_loss_counted_tokens"]))
    return positions[:, 0], following[positions[:, 0]]


def measured_head(model: PreTrainedModel) -> HeadOutput | None:
    """What the model does to its head's output, measured at the first call."""
    measurement: HeadMeasurement | None = getattr(model, _HEAD_ATTRIBUTE, None)
    if measurement is None:
        measurement = HeadMeasurement(measure_head(model))
        setattr(model, _HEAD_ATTRIBUTE, measurement)
    return measurement.output


def measure_head(model: PreTrainedModel) -> HeadOutput | None:
    """Feed known values through the model in place of its head's output, and read the logits that it makes of them.

    Returns:
        Scale and soft cap, or None where the head is not one plain linear layer called once on (1,T,D), or the logits
        are another function of its output.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    known, shapes = _known_values(head), []

    def replacement(hidden: Tensor) -> Tensor:
        shapes.append(hidden.shape)
        return known

    device = known.device
    pack = {
        "input_ids": torch.arange(PROBE_LENGTH, device=device)[None] % head.out_features,
        "position_ids": torch.arange(PROBE_LENGTH, device=device)[None],
        "cu_seq_lens": torch.tensor([0, PROBE_LENGTH], dtype=torch.int32, device=device),
        "max_length": PROBE_LENGTH,
    }
    with torch.no_grad(), evaluating(model), uncompiled(), _replaced(head, replacement):
        logits = model.forward(**packed_inputs(model, pack)).logits
    torch.clear_autocast_cache()  # of weights cast without a gradient, which the forward pass at hand would take
    if shapes != [(1, PROBE_LENGTH, head.in_features)] or logits.shape != known.shape:
        return None
    return _fit(known.flatten(), logits.flatten().to(known.dtype))


def _known_values(head: nn.Linear) -> Tensor:
    """Values of both signs over many magnitudes, none of them in order of the vocabulary; (1, PROBE_LENGTH, V)."""
    dtype = accumulation_dtype(head.weight.dtype)
    magnitudes = torch.logspace(*PROBE_EXPONENTS, PROBE_LENGTH * head.out_features // 2, dtype=dtype)
    values = torch.cat([magnitudes, -magnitudes])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    return values[order].reshape(1, PROBE_LENGTH, head.out_features).to(head.weight.device)


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
def _replaced(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = function
    try:
        yield
    finally:
        del head.forward


def _loss_in_head(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    trained: tuple[Tensor, Tensor],
    head_output: HeadOutput,
    label_smoothing: float,
) -> tuple[Any, Tensor]:
    """The model's forward pass with the loss in place of its head."""
    head, losses = model.get_output_embeddings(), []
    compute: LinearCrossEntropy = getattr(model, KERNEL_ATTRIBUTE, linear_cross_entropy_sum)
    positions, targets = trained

    def replacement(hidden: Tensor) -> Tensor:
        losses.append(compute(hidden[0].index_select(0, positions), head, targets, head_output, label_smoothing))
        return hidden.new_zeros(1, 1, 1)

    with _replaced(head, replacement):
        output = model.forward(**inputs)
    return output, losses[0]


def _loss_from_logits(
    model: PreTrainedModel, inputs: dict[str, Any], positions: Tensor, targets: Tensor, label_smoothing: float
) -> tuple[Any, Tensor]:
    """The model's own logits at the trained positions, or at all of them where it cannot choose."""
    can_choose = "logits_to_keep" in inspect.signature(model.forward).parameters
    chosen = {"logits_to_keep": positions} if can_choose else {}
    output = model.forward(**inputs, **chosen)
    logits = output.logits[0] if can_choose else output.logits[0, positions]
    return output, cross_entropy_sum(logits, targets, label_smoothing)


def _router_loss(model: PreTrainedModel, output: Any, micro_batch: Mapping[str, Any]) -> Tensor | float:
    """A router loss is a mean over this pack's tokens: weigh it by them, and turn it into units of loss tokens."""
    router_loss = getattr(output, "aux_loss", None)
    if not isinstance(router_loss, Tensor):  # None, or 0 where the model was not asked for it
        return 0.0
    config = model.config.get_text_config()
    coefficient = getattr(config, ROUTER_COEFFICIENT, None)
    if coefficient is None:
        raise ModelError(
            f"model type {config.model_type!r} returns a router loss, but its config has no {ROUTER_COEFFICIENT}; "
            "set it, or set output_router_logits to false"
        )
    share = micro_batch["num_tokens"] / micro_batch["batch_num_tokens"]
    weighted: Tensor = coefficient * share * micro_batch["batch_num_loss_counted_tokens"] * router_loss.float()
    return weighted
