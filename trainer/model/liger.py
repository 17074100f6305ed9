"""Optional fused kernels (Liger), imported only when asked for.

Knows the package's names and nothing of training. Invariant: with kernels or without, the loss is the same sum.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import MissingPackageError, ModelError
from trainer.labels import IGNORE_INDEX
from trainer.model.borrowing import Setting
from trainer.model.cross_entropy import HeadOutput
from trainer.model.precision import autocast_dtype

PACKAGE = "liger_kernel"
PROBE_ROWS = 4
PROBE_TOLERANCE = 1e-3  # relative: TF32 may be on; the wrong kernel is off by 0.1 or more
Fused = Callable[..., Tensor]  # (module, hidden) -> what the module's forward gives


def liger_settings(model: nn.Module, device: torch.device | str) -> list[Setting]:
    """What makes the norms and gated MLPs of a model run Liger's kernels: for these modules alone.

    Liger's own way replaces classes and functions of transformers for the whole process, where a model that asked for
    none gets them, too. Which kernel fits a class of modules is measured, on a copy of one of them.

    Raises:
        ModelError: The device is not a GPU, or no kernel fits any part of the model.
        MissingPackageError: Liger is not installed.
    """
    if torch.device(device).type != "cuda":
        raise ModelError(f"use_liger_kernels: the kernels need a GPU, the device is {device}; leave the option off")
    if importlib.util.find_spec(PACKAGE) is None:
        raise MissingPackageError.in_extra("use_liger_kernels needs the package liger-kernel", "gpu")
    settings = fused_settings(model, torch.device(device))
    if not settings:
        raise ModelError(f"use_liger_kernels: no kernel of Liger's fits a part of {type(model).__name__}; leave it off")
    return settings


def fused_settings(model: nn.Module, device: torch.device) -> list[Setting]:
    """Liger's kernels for those modules of a model whose results they give."""
    chosen: dict[type[nn.Module], Fused | None] = {}
    settings = []
    for module in model.modules():
        kind = type(module)
        if kind not in chosen:
            chosen[kind] = next((fused for fused in _candidates(module) if _agrees(module, fused, device)), None)
        fused = chosen[kind]
        if fused is not None:
            settings.append(Setting(module, "forward", partial(fused, module)))
    return settings


def _candidates(module: nn.Module) -> list[Fused]:
    """Kernels that a module of these parts might be."""
    parameters = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    if parameters == {"weight": 1} and _epsilon(module) is not None:
        return [partial(_rms_norm, offset=0.0, casting="llama"), partial(_rms_norm, offset=1.0, casting="gemma")]
    names = {name for name, _ in module.named_children()}
    if {"gate_proj", "up_proj", "down_proj"} <= names and hasattr(module, "act_fn"):
        return [partial(_gated_mlp, kernel="LigerSiLUMulFunction"), partial(_gated_mlp, kernel="LigerGELUMulFunction")]
    return []


def _epsilon(module: Any) -> float | None:
    epsilon: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon


def _rms_norm(module: Any, hidden: Tensor, *, offset: float, casting: str) -> Tensor:
    kernel = importlib.import_module(f"{PACKAGE}.ops.rms_norm").LigerRMSNormFunction
    # Not in place: the hidden states may be needed elsewhere.
    output: Tensor = kernel.apply(hidden, module.weight, _epsilon(module), offset, casting, False)
    return output


def _gated_mlp(module: Any, hidden: Tensor, *, kernel: str) -> Tensor:
    place = "swiglu" if kernel == "LigerSiLUMulFunction" else "geglu"
    function = getattr(importlib.import_module(f"{PACKAGE}.ops.{place}"), kernel)
    output: Tensor = module.down_proj(function.apply(module.gate_proj(hidden), module.up_proj(hidden)))
    return output


def _agrees(module: nn.Module, fused: Fused, device: torch.device) -> bool:
    """Return whether a kernel gives what a copy of the module gives, of random weights and inputs."""
    probe: Any = copy.deepcopy(module).to_empty(device=device).float().eval()  # adapters may have dropout
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        width = probe.weight.shape[0] if hasattr(probe, "weight") else probe.gate_proj.weight.shape[1]
        hidden = torch.randn(1, PROBE_ROWS, width, generator=generator).to(device)
        try:
            expected, found = probe(hidden), fused(probe, hidden)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # a module of that look that takes something else
            return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    return bool((expected - found).norm() <= PROBE_TOLERANCE * expected.norm())


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
