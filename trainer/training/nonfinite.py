"""A loss or gradient that is NaN or infinite: what is needed to look at it goes to crash/step_N, then policy decides.

Knows the parts of a checkpoint, not when one is due. Invariant: the step was not taken on any rank, and all ranks act
alike.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.manifest import PARAMETERS, folder_of
from trainer.checkpoint.tensors import model_tensors, pack
from trainer.checkpoint.writer import CheckpointWriter, Contents
from trainer.config.arguments import TrainingArguments
from trainer.errors import NonFiniteError
from trainer.training.callbacks import RunState
from trainer.training.checkpoints import Checkpoints
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
    """Give a batch as lists and dicts of tensors and numbers."""
    if hasattr(value, "micro_batches"):
        return {"micro_batches": plain(value.micro_batches), "num_samples": list(value.num_samples)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if hasattr(value, "items") else value
