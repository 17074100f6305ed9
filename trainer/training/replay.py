"""Runs one recorded step again, rank after rank on one process, and finds where the first non-finite value appears.

Owns the hooks; knows nothing of the run that the step was part of. Invariant: weights, inputs and random draws are
those of the recorded step; nothing is updated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainer.atomic import read_sealed
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import rank_file
from trainer.checkpoint.run_state import options_of, set_generator_states
from trainer.checkpoint.tensors import StoredTensors, unpack
from trainer.checkpoint.verify import find_damage
from trainer.config.arguments import TrainingArguments
from trainer.distributed.group import Group
from trainer.errors import CheckpointError
from trainer.model.prepared import Prepared
from trainer.training.checkpoints import build_saved_model
from trainer.training.packed_task import pack_loss
from trainer.training.process import to_device


@dataclass(frozen=True)
class Finding:
    """The first non-finite value of a step."""

    rank: int
    micro_batch: int  # from 0
    place: str


def replay(folder: Path, group: Group) -> Finding | None:
    """Run a recorded step of token data again; None if everything is finite this time.

    Raises:
        CheckpointError: the record is damaged, or of a model that only its own program can build.
    """
    if faults := find_damage(folder):
        raise CheckpointError(f"{folder} is not a whole record of a step: {faults[0]}")
    prepared = build_saved_model(folder, StoredTensors(folder), group.device, is_packed=True)
    args = options_of(folder)
    if (name := _first_bad_weight(prepared.model)) is not None:
        return Finding(0, 0, f"weight {name}, before the step")
    world_size = manifest.read_manifest(folder).world_size
    for rank in range(world_size):
        with prepared.in_use():
            finding = _replay_rank(prepared, args, _read_own(folder, rank, world_size), rank, group)
        if finding is not None:
            return finding
    return None


def _read_own(folder: Path, rank: int, world_size: int) -> Any:
    """Batch and generators of one rank."""
    body, _ = read_sealed(folder / rank_file(rank))
    stored = StoredTensors(folder, rank, world_size)
    return unpack(body["step"], lambda name: stored.read(name, ()))


def _replay_rank(prepared: Prepared, args: TrainingArguments, own: Any, rank: int, group: Group) -> Finding | None:
    set_generator_states(own["random"], group.device)
    for number, micro_batch in enumerate(own["batch"]):
        with _watching(prepared.model) as seen:
            loss = pack_loss(prepared, to_device(micro_batch, group.device), args.label_smoothing_factor)
            loss.backward()
        bad = [name for name, p in prepared.model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
        seen += [] if _is_finite(loss) else ["the loss, of finite outputs"]
        seen += [f"gradient of {name}" for name in bad[:1]]
        if seen:
            return Finding(rank, number, seen[0])
    return None


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Note, in the order in which they come, outputs of modules and their gradients that are not finite."""
    seen: list[str] = []

    def after(name: str, module: nn.Module) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                if not _is_finite(tensor):
                    seen.append(f"forward: output of {name or 'the model'} ({type(module).__name__})")
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: note(gradient, name))

        return hook

    def note(gradient: Tensor, name: str) -> None:
        if not _is_finite(gradient):
            seen.append(f"backward: gradient of the output of {name or 'the model'}")

    handles = [module.register_forward_hook(after(name, module)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first_bad_weight(model: nn.Module) -> str | None:
    return next((name for name, weight in model.named_parameters() if not _is_finite(weight)), None)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
