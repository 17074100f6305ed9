"""Sum of cross-entropies of a linear head, in pieces: the logits of all positions never exist at once.

Gradients are computed along with the loss, piece by piece, so that backward needs no logits either. Knows nothing of
models. Invariant: equal to cross-entropy over whole logits in value and gradient; memory does not grow with N * V.

N trained positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.model.precision import accumulation_dtype, autocast_dtype

# Logits held at once. A GPU wants large products, a CPU wants to stay in its cache.
LOGITS_PER_PIECE = {"cpu": 2**21, "cuda": 2**27}
# Every piece reads the whole head and updates its whole gradient. With fewer rows that is what takes the time: on 2
# cores, a vocabulary of 262,144 takes 3.4 times as long in pieces of 8 rows as in pieces of 128, and one of 128,256 in
# pieces of 16 as well.
LEAST_ROWS_PER_PIECE = 128


@dataclass(frozen=True)
class HeadOutput:
    """What a model does to the output x of its head: s * x, then c * tanh(. / c) where it has a soft cap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, values: Tensor) -> Tensor:
        """The logits made of a head's output."""
        scaled = values if self.scale == 1.0 else values * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def backward(self, gradients: Tensor, logits: Tensor) -> Tensor:
        """Gradients for a head's output, from those for the logits made of it; in the memory of the latter."""
        scaled = gradients if self.scale == 1.0 else gradients.mul_(self.scale)
        return scaled if self.softcap is None else scaled.mul_(1 - (logits / self.softcap) ** 2)


LinearCrossEntropy = Callable[..., Tensor]


@dataclass(frozen=True)
class GroupSums:
    """Sums of the loss by group of positions, measured beside the total: `groups` (N,), `sums` (G,) in float64."""

    groups: Tensor
    sums: Tensor

    def add(self, losses: Tensor, start: int = 0) -> None:
        """Add the losses of the positions from `start` on."""
        groups = self.groups[start : start + len(losses)]
        losses = losses.detach().double()
        # Whole sums in a fixed order: adding by index adds in another order in every run on a GPU.
        self.sums.add_(torch.stack([(losses * (groups == k)).sum() for k in range(len(self.sums))]))


@dataclass(frozen=True)
class _Settings:
    head_output: HeadOutput
    label_smoothing: float
    dtype: torch.dtype
    needs_gradients: bool
    rows_per_piece: int
    by_group: GroupSums | None = None


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, by_group: GroupSums | None = None
) -> Tensor:
    """Sum over positions of the cross-entropy of logits (N,V) with targets (N,), in float32 or more."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    if by_group is not None:
        by_group.add(F.cross_entropy(logits.detach(), targets, reduction="none", label_smoothing=label_smoothing))
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def linear_cross_entropy_sum(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    head_output: HeadOutput,
    label_smoothing: float = 0.0,
    by_group: GroupSums | None = None,
    rows_per_piece: int | None = None,
) -> Tensor:
    """The same, from the head's input (N,D); float32 or more. Backward may run once.

    The logits of `rows_per_piece` positions are held at once; None: of as many as suit the device.
    """
    if rows_per_piece is None:
        rows_per_piece = choose_rows_per_piece(hidden.device.type, head.weight.shape[0])
    settings = _Settings(
        head_output, label_smoothing, autocast_dtype(hidden), torch.is_grad_enabled(), rows_per_piece, by_group
    )
    return _LinearCrossEntropySum.apply(hidden, head.weight, head.bias, targets, settings)


def choose_rows_per_piece(device_type: str, vocab_size: int) -> int:
    """Return of how many positions the logits are held at once on a device of that type."""
    logits = LOGITS_PER_PIECE.get(device_type, LOGITS_PER_PIECE["cpu"])
    return max(logits // vocab_size, LEAST_ROWS_PER_PIECE)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            total, gradients = _loss_and_gradients((hidden, weight, bias), targets, settings, ctx.needs_input_grad[:3])
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward ran twice through one loss; its gradients are kept for one run only")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(grad_output).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _loss_and_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    settings: _Settings,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss sum, and its gradients for hidden states, weight and bias where wanted, in the accumulation format."""
    hidden, weight, bias = inputs
    smoothing, accumulation = settings.label_smoothing, accumulation_dtype(settings.dtype)
    total = torch.zeros((), dtype=accumulation, device=hidden.device)
    gradients: list[Tensor | None] = []
    for tensor, is_wanted in zip(inputs, wanted, strict=True):
        if tensor is not None and is_wanted:
            gradients.append(torch.zeros_like(tensor, dtype=accumulation))
        else:
            gradients.append(None)
    grad_hidden, grad_weight, grad_bias = gradients
    is_training = settings.needs_gradients and any(wanted)
    matrix = weight.to(settings.dtype)
    for start in range(0, hidden.shape[0], settings.rows_per_piece):
        piece = hidden[start : start + settings.rows_per_piece].to(settings.dtype)
        piece_targets = targets[start : start + settings.rows_per_piece, None]
        output = F.linear(piece, matrix, None if bias is None else bias.to(settings.dtype)).to(accumulation)
        logits = settings.head_output.apply(output)
        log_probabilities = logits.log_softmax(dim=1)
        expected = log_probabilities.gather(1, piece_targets)[:, 0]
        if smoothing:
            expected = (1 - smoothing) * expected + smoothing * log_probabilities.mean(dim=1)
        losses = -expected
        total += losses.sum()
        if settings.by_group is not None:
            settings.by_group.add(losses, start)
        if not is_training:
            continue
        # Gradient of the loss for the logits: softmax - smoothed target, (rows,V), in the memory of log_probabilities.
        errors = log_probabilities.exp_()
        if smoothing:
            errors -= smoothing / errors.shape[1]
        errors.scatter_add_(1, piece_targets, torch.full_like(piece_targets, smoothing - 1, dtype=errors.dtype))
        slope = settings.head_output.backward(errors, logits).to(settings.dtype)
        if grad_hidden is not None:
            grad_hidden[start : start + len(piece)] = slope @ matrix
        if grad_weight is not None and slope.dtype == grad_weight.dtype:
            grad_weight.addmm_(slope.t(), piece)
        elif grad_weight is not None:
            grad_weight += slope.t() @ piece
        if grad_bias is not None:
            grad_bias += slope.sum(dim=0)
    return total, gradients
