"""How a model is spread over ranks: activation checkpointing, compilation, FSDP2, and the regions that ranks own.

Gradients are SUMMED over ranks: the loss is a sum divided once by a count over the whole global batch. Knows nothing
of files. Invariant: names of parameters never change, and nothing here needs weights (meta tensors will do).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

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
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from trainer.config.groups import ModelArguments
from trainer.errors import ModelError
from trainer.model.precision import evaluating

Region = tuple[slice, ...]
_ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")} | {
    "torch_attn::_varlen_attn",
    *(f"aten::_scaled_dot_product_{name}" for name in _ATTENTION),
}


def unwrapped(model: Any) -> Any:
    """The model itself, where PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def checkpoint_activations(model: nn.Module, args: ModelArguments) -> None:
    """Recompute each block's activations in backward instead of keeping them, but for those that cost most if asked."""
    # Renamed during transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise ModelError(f"gradient_checkpointing: {type(model).__name__} does not support it; leave it off")
    settings = {"use_reentrant": False, **args.gradient_checkpointing_kwargs}
    if args.gradient_checkpointing_keeps == "products":
        if settings["use_reentrant"]:
            raise ModelError("gradient_checkpointing_keeps and use_reentrant exclude each other: leave the latter out")
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    had_hooks = bool(getattr(model, "_require_grads_hooks", None))
    enable(settings)
    disable_hooks: Any = getattr(model, "disable_input_require_grads", None)
    if disable_hooks is not None and not settings["use_reentrant"] and not had_hooks:
        disable_hooks()  # transformers (5.23) adds hooks that only reentrant recomputation needs, and keeps them


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = operation.name().partition(".")[0] in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: nn.Module, **settings: Any) -> None:
    """Compile each block in place, for all lengths at once, or the whole of a module without blocks.

    Hardly two batches of text are equally long. The first step is slow.
    """
    inner = unwrapped(model)
    blocks = decoder_blocks(inner) if isinstance(inner, PreTrainedModel) else {}
    for block in blocks.values():
        block.compile(dynamic=True, **settings)
    if not blocks:
        model.compile(**settings)


def shard_for_training(
    model: nn.Module,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None = None,
    unread: Collection[str] = (),
    *,
    casts_inputs: bool = True,
) -> None:
    """Spread a model over the ranks of a mesh with FSDP2, in place, unless an earlier trainer has done so.

    Args:
        model: With its weights, or on the meta device.
        mesh: One axis over the ranks that share the weights; or two, of replicas and of ranks that share a replica.
        compute_dtype: Format of gathered weights; gradients are reduced in float32 at least. None: as they are.
        unread: Names of parameters that no forward pass reads: sharded alike, but never gathered.
        casts_inputs: Whether what a part of the model is given is cast to that format, too.

    Raises:
        ModelError: It is sharded already, to compute in another format.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=casts_inputs)
    if not isinstance(model, FSDPModule):
        shard_model(model, mesh, policy, unread)
        return
    former = model._get_fsdp_state()._mp_policy
    if former != policy:
        raise ModelError(
            f"an earlier trainer has sharded this model to gather weights in {former.param_dtype or 'their format'}, "
            f"this one asks for {compute_dtype or 'their format'}: give the same options, or load the model anew"
        )


def shard_model(
    model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None, unread: Collection[str] = ()
) -> None:
    """Spread any module over the ranks of a mesh, in place: one group for each block, one for the rest.

    Scalars cannot be cut: every rank holds them whole, and `gradients.sum_whole_gradients` sees to their gradients.
    """
    policy = policy or MixedPrecisionPolicy()
    ignored = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    ignored |= {_shard_rows(model, name, mesh) for name in unread}
    inner = unwrapped(model)
    blocks = decoder_blocks(inner) if isinstance(inner, PreTrainedModel) else {}
    for module in (*blocks.values(), model):
        module.register_forward_hook(_own_outputs)  # runs before FSDP2's own
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    _gather_ahead(blocks)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")  # it runs an encoder by itself, beside the root's own forward
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A factor alone asks for PREMUL_SUM, which gloo lacks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _gather_ahead(blocks: Mapping[str, nn.Module]) -> None:
    """Make each block gather the next one's weights before it computes; backward does so by itself."""
    for (name, block), (next_name, following) in itertools.pairwise(blocks.items()):
        if name.rpartition(".")[0] == next_name.rpartition(".")[0]:  # of one list, so run one after the other
            cast(FSDPModule, block).set_modules_to_forward_prefetch([cast(FSDPModule, following)])


def _shard_rows(model: nn.Module, name: str, mesh: DeviceMesh) -> nn.Parameter:
    """Replace a parameter by its rows on this rank, split as FSDP2 splits; without communication."""
    place, _, own_name = name.rpartition(".")
    parameter = model.get_parameter(name)
    placements: list[Placement] = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    rows = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
    sharded = nn.Parameter(rows, requires_grad=parameter.requires_grad)
    model.get_submodule(place).register_parameter(own_name, sharded)
    return sharded


def _own_outputs(module: nn.Module, inputs: object, outputs: Any) -> Any:
    """Copy outputs that are views, as T5's position bias is: written to in place, they would lose FSDP2's gathering."""

    def owned(output: Any) -> Any:
        is_view = isinstance(output, Tensor) and output.requires_grad and output._base is not None
        return output.clone() if is_view else output

    return tree_map(owned, outputs) if torch.is_grad_enabled() else outputs


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


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """Add up, in place, what each rank computed from its shard of a tensor; replicas are not added to each other."""
    if isinstance(like, DTensor):
        for axis, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(values, group=like.device_mesh.get_group(axis))
    return values


def gather_rows(tensor: Tensor, owner: int) -> Tensor | None:
    """The whole of a row-sharded tensor on one rank of its mesh, None on the others (all of them call)."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    seat = _Seat.of(tensor, owner)
    if not seat.is_in_replica:
        return None
    mine = tensor.to_local()
    mine = nn.functional.pad(mine, (0, 0, 0, seat.num_rows - len(mine))).contiguous()
    pieces = [torch.empty_like(mine) for _ in range(seat.num_members)] if seat.is_owner else None
    dist.gather(mine, pieces, group=seat.group, group_dst=seat.member)
    return torch.cat(pieces)[: len(tensor)] if pieces else None


def scatter_rows(tensor: Tensor | None, target: Tensor, owner: int) -> None:
    """Spread a tensor that one rank of the mesh holds over the shards of `target` (all of them call)."""
    target = target.detach()
    if not isinstance(target, DTensor):
        assert tensor is not None
        target.copy_(tensor)
        return
    seat, mine = _Seat.of(target, owner), target.to_local()
    rows = mine.new_empty(seat.num_rows, target.shape[1])
    if seat.is_in_replica:
        pieces = None
        if seat.is_owner:
            assert tensor is not None
            num_absent = seat.num_rows * seat.num_members - len(tensor)
            pieces = list(nn.functional.pad(tensor.to(rows.dtype), (0, 0, 0, num_absent)).split(seat.num_rows))
        dist.scatter(rows, pieces, group=seat.group, group_src=seat.member)
    if target.device_mesh.ndim > 1:
        dist.broadcast(rows, group=target.device_mesh.get_group(0), group_src=seat.replica)
    mine.copy_(rows[: len(mine)])


@dataclass(frozen=True)
class _Seat:
    """Where one rank of a mesh sits: in which replica, and as which member of it."""

    replica: int
    member: int
    num_members: int
    num_rows: int  # of each member's shard; the last ones may hold fewer
    is_in_replica: bool  # whether this rank belongs to that replica
    is_owner: bool  # whether this rank is that one
    group: dist.ProcessGroup  # of the members of this rank's replica

    @classmethod
    def of(cls, tensor: DTensor, rank: int) -> _Seat:
        mesh = tensor.device_mesh
        num_members = mesh.size(mesh.ndim - 1)
        replica, member = divmod(rank, num_members)
        here = list(mesh.get_coordinate() or ())
        is_in_replica = mesh.ndim == 1 or here[0] == replica
        is_owner = is_in_replica and here[-1] == member
        num_rows = -(-tensor.shape[0] // num_members)
        return cls(replica, member, num_members, num_rows, is_in_replica, is_owner, mesh.get_group(mesh.ndim - 1))


def model_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh over which the parameters of a model are sharded, or None."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def any_rank(flag: bool, mesh: DeviceMesh | None) -> bool:
    """Return whether the flag is set on any rank of a mesh (all of them call)."""
    return largest_of_ranks(float(flag), mesh) > 0


def largest_of_ranks(value: float, mesh: DeviceMesh | None) -> float:
    """The largest of the values of all ranks of a mesh (all of them call); the value itself on one process."""
    if mesh is None:
        return value
    values = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
    for axis in range(mesh.ndim):
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=mesh.get_group(axis))
    return values.item()


def is_main(mesh: DeviceMesh | None) -> bool:
    """Return whether this rank acts for all ranks of a mesh."""
    return mesh is None or not any(mesh.get_coordinate() or ())
