"""A loss or gradient that is NaN or infinite: its step is recorded in crash/step_N, and `replay` looks at it again.

Invariants: the step was not taken on any rank, and all ranks act alike. A replay has the weights, inputs and random
draws of the recorded step, goes through its ranks one after the other on one process, and updates nothing.
"""

from __future__ import annotations

import logging
import math
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
from trainer.checkpoint.manifest import PARAMETERS, folder_of, rank_file
from trainer.checkpoint.run_state import options_of, set_generator_states
from trainer.checkpoint.tensors import StoredTensors, model_tensors, pack, unpack
from trainer.checkpoint.verify import find_damage
from trainer.checkpoint.writer import CheckpointWriter, Contents
from trainer.config.arguments import TrainingArguments
from trainer.data.loader import to_device
from trainer.distributed.group import Group
from trainer.errors import CheckpointError, NonFiniteError
from trainer.model.prepared import Prepared
from trainer.training.callbacks import RunState
from trainer.training.checkpoints import Checkpoints
from trainer.training.packed_task import pack_loss
from trainer.training.saved_model import build_saved_model
from trainer.training.step import Engine, GlobalBatch, StepResult

logger = logging.getLogger(__name__)

FOLDER, CRASH = "crash", "crash.json"


class CrashRecorder:
    """Records the first step of a run that could not be taken, and stops or goes on as `non_finite` says."""

    def __init__(self, args: TrainingArguments, engine: Engine, state: RunState, checkpoints: Checkpoints) -> None:
        self.args, self.engine, self.state, self.checkpoints = args, engine, state, checkpoints
        self.folder = Path(args.output_dir, FOLDER)

    def handle(self, batch: GlobalBatch, result: StepResult, random: dict[str, Tensor]) -> None:
        """Record the step that was not taken; all ranks call.

        Args:
            batch: this rank's share of the global batch.
            result: what came of it.
            random: state of the generators before it.

        Raises:
            NonFiniteError: the policy is to stop.
        """
        step = self.state.global_step + 1
        text = f"step {step}: {result.problem}{self._ranks(result)}: the step was not taken"
        if self.state.num_skipped_steps == 0:
            text += f"; look at it with: trainer replay {self._record(step, text, batch, random)}"
        self.state.num_skipped_steps += 1
        if self.args.non_finite == "stop":
            self.checkpoints.finish()
            raise NonFiniteError(f"{text}; the weights are those of the step before")
        if self.engine.group.is_main:
            logger.warning("%s (skipped: %d so far)", text, self.state.num_skipped_steps)

    def _ranks(self, result: StepResult) -> str:
        """Say on which ranks the loss itself was not finite."""
        group = self.engine.group
        is_bad = not math.isfinite(result.own_loss)
        flags = group.sum([float(is_bad and rank == group.rank) for rank in range(group.world_size)])
        bad = [str(rank) for rank, flag in enumerate(flags) if flag]
        return f" (loss on rank {', '.join(bad)})" if bad else " (the loss is finite on every rank)"

    def _record(self, step: int, text: str, batch: GlobalBatch, random: dict[str, Tensor]) -> Path:
        """Write weights, batch and generators of every rank as a checkpoint of their own."""
        own: dict[str, Tensor] = {}
        form = pack({"batch": plain(batch), "random": dict(random)}, "step", own)
        position = {
            "epoch": self.state.num_epochs_done,
            "first_sample": self.state.num_epoch_samples_seen,
            "num_samples": self.engine.task.counts(batch).num_samples,
            "seed": self.args.order_seed,
        }
        contents = Contents(
            step,
            {"model": model_tensors(self.engine.model), "batch": own},
            {CRASH: {"what": text, "step": step, **position}, PARAMETERS: self.args.to_dict()},
            self.checkpoints.model_files(),
            {"step": form},
            is_resumable=False,
        )
        if not folder_of(self.folder, step).exists():
            CheckpointWriter(self.folder, self.engine.group, is_async=False, limit=None).save(contents)
        return folder_of(self.folder, step)


def plain(value: Any) -> Any:
    """Return a batch as lists and dicts of tensors and numbers."""
    if hasattr(value, "micro_batches"):
        return {"micro_batches": plain(value.micro_batches), "num_samples": list(value.num_samples)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if hasattr(value, "items") else value


@dataclass(frozen=True)
class Finding:
    """The first non-finite value of a step."""

    rank: int
    micro_batch: int  # from 0
    place: str


def replay(folder: Path, group: Group, *, trust_remote_code: bool = False) -> Finding | None:
    """Run a recorded step of token data again; None if everything is finite this time.

    `trust_remote_code` says whether code that comes with the model is run.

    Raises:
        CheckpointError: the record is damaged, or of a model that only its own program can build.
    """
    if faults := find_damage(folder):
        raise CheckpointError(f"{folder} is not a whole record of a step: {faults[0]}")
    stored = StoredTensors(folder)
    prepared = build_saved_model(folder, stored, group.device, is_packed=True, trust_remote_code=trust_remote_code)
    args = options_of(folder)
    for name, weight in prepared.model.named_parameters():
        if not _is_finite(weight):
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


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
