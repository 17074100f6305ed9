"""Optional fused kernels (Liger), imported only when asked for.

Knows the package's names and nothing of training. Invariant: with kernels or without, the loss is the same sum.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.errors import MissingPackageError, ModelError
from trainer.labels import IGNORE_INDEX
from trainer.model.cross_entropy import HeadOutput
from trainer.model.precision import autocast_dtype

PACKAGE = "liger_kernel"


def apply_liger_kernels(model: PreTrainedModel, device: torch.device | str | None = None) -> None:
    """Replace norms, rotary embedding and MLP of a model by Liger's, and the loss by its fused head and cross-entropy.

    Raises:
        ModelError: The device is not a GPU, or Liger does not know the model type.
        MissingPackageError: Liger is not installed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type != "cuda":
        raise ModelError(f"use_liger_kernels: the kernels need a GPU, the device is {device}; leave the option off")
    if importlib.util.find_spec(PACKAGE) is None:
        raise MissingPackageError("use_liger_kernels needs the package liger-kernel; pip install liger-kernel")
    patches = importlib.import_module(f"{PACKAGE}.transformers.monkey_patch")
    model_type = model.config.model_type
    known = patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in known:
        raise ModelError(
            f"use_liger_kernels: Liger knows no model type {model_type!r}; known: {', '.join(sorted(known))}"
        )
    patches._apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)


def liger_cross_entropy_sum(
    hidden: Tensor, head: nn.Linear, targets: Tensor, head_output: HeadOutput, label_smoothing: float = 0.0
) -> Tensor:
    """`linear_cross_entropy_sum` by Liger's fused kernel in sum mode, gradients accumulated in float32.

    Liger (0.8) reads a count back from the GPU: the host waits for it once in each micro-batch, which ours does not.
    """
    if head_output.scale != 1.0:
        if head.bias is not None:
            raise ModelError("use_liger_kernels: a scaled head with a bias is not supported; leave the option off")
        hidden = hidden * head_output.scale
    losses = importlib.import_module(f"{PACKAGE}.transformers.fused_linear_cross_entropy")
    compute = losses.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="sum",
        softcap=head_output.softcap,
        accum_dtype=torch.float32,
    )
    dtype = autocast_dtype(hidden)  # once for all of its pieces, which autocast would do for each
    bias = None if head.bias is None else head.bias.to(dtype)
    loss: Tensor = compute(head.weight.to(dtype), hidden.to(dtype), targets, bias)
    return loss.float()
