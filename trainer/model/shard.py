"""How a model is spread over ranks: activation checkpointing, compilation, FSDP2, and the regions that ranks own.

Gradients are SUMMED over ranks: the loss is a sum divided once by a count over the whole global batch. Knows nothing
of files. Invariant: names of parameters never change, and nothing here needs weights (meta tensors will do).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from trainer.errors import ModelError
from trainer.model.loss import FORWARD_METHOD, forward_loss
from trainer.model.modes import evaluating
from trainer.model.precision import use_compute_dtype

Region = tuple[slice, ...]
_MESH = "_trainer_mesh"  # of a model that was sharded here; all of its parameters may be scalars, which are whole


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The repeated blocks of a model by name: what is sharded, compiled and recomputed as one."""
    classes = set(model._no_split_modules or [])
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = {
        f"{name}.{index}": block
        for name, modules in lists.items()
        for index, block in enumerate(modules)
        if type(block).__name__ in classes
    }
    if blocks or not lists:
        return blocks
    name, longest = max(lists.items(), key=lambda item: len(item[1]))
    return {f"{name}.{index}": block for index, block in enumerate(longest)}


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each block's activations in backward instead of keeping them."""
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"gradient_checkpointing: model type {model.config.model_type!r} does not support it; leave it off"
        )
    # Renamed during transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each block in place; the first steps are slow."""
    for block in decoder_blocks(model).values():
        block.compile()


def shard_model(model: PreTrainedModel, mesh: DeviceMesh, compute_dtype: torch.dtype = torch.float32) -> None:
    """Spread a language model over the ranks of a mesh with FSDP2, in place, for `token_loss_sum`.

    Args:
        model: With its weights, or on the meta device (see `load.materialise`).
        mesh: One axis over the ranks that share the weights.
        compute_dtype: Format of gathered weights and activations; gradients are reduced in float32 at least.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype.itemsize < torch.float32.itemsize:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        use_compute_dtype(model, compute_dtype, by_autocast=False)
    shard_modules(model, mesh, policy)
    setattr(model, FORWARD_METHOD, functools.partial(forward_loss, model))
    register_fsdp_forward_method(model, FORWARD_METHOD)


def shard_modules(model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> None:
    """Spread any module over the ranks of a mesh, in place: one group for each block, one for the rest.

    Scalars cannot be cut: every rank holds them whole, and `gradients.sum_whole_gradients` sees to their gradients.
    """
    policy = policy or MixedPrecisionPolicy()
    whole_ones = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    blocks = decoder_blocks(model) if isinstance(model, PreTrainedModel) else {}
    for module in (*blocks.values(), model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole_ones)
    setattr(model, _MESH, mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A factor alone asks for PREMUL_SUM, which gloo lacks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; after it a sharded model's parameters are its shards again.

    FSDP2 leaves the root's weights gathered after a forward pass and counts on the backward pass to free them. An
    optimizer built in between would hold the gathered copies, and never move the model.
    """
    with torch.no_grad(), evaluating(model):
        yield
    if isinstance(model, FSDPModule):
        model.reshard()


def local_part(tensor: Tensor) -> tuple[Tensor, Region]:
    """What this rank holds of a tensor, and which region of the whole that is."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    region = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return tensor.to_local(), region


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from the ranks that hold it (all of them call)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is spread over ranks already, by an earlier Trainer for one."""
    return isinstance(model, FSDPModule)


def model_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh over which a model is sharded, or None."""
    mesh: DeviceMesh | None = getattr(model, _MESH, None)
    return mesh or next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def any_rank(flag: bool, model: nn.Module) -> bool:
    """Whether the flag is set on any rank that shares the model (all of them call)."""
    mesh = model_mesh(model)
    if mesh is None:
        return flag
    value = torch.tensor(float(flag), device=mesh.device_type)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=mesh.get_group())
    return bool(value.item())


def is_lead(model: nn.Module) -> bool:
    """Whether this rank acts for all that share the model."""
    mesh = model_mesh(model)
    return mesh is None or not any(mesh.get_coordinate() or ())
