"""Saves a run and brings it back: what of it goes into a checkpoint, and in which order it comes out again.

Owns the meaning of the records; files and ranks are the checkpoint room's business. Invariant: a run that goes on from
a checkpoint is, bit for bit, the run that was never stopped (on another number of ranks: up to the order of sums).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.trainer_callback import CallbackHandler

from trainer.atomic import LISTING, MALFORMED, read_json, read_listing, read_sealed, sync_size, write_json
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import MODEL_FILES, OPTIMIZER_STATE, PARAMETERS, STATE, rank_file
from trainer.checkpoint.optimizer_state import pack_optimizer, restore_optimizer
from trainer.checkpoint.run_state import (
    RunRecord,
    callback_states,
    check_changes,
    find_changes,
    option_changes,
    restore_callbacks,
    restore_random_state,
    restore_state,
    start_random_state,
    state_fields,
)
from trainer.checkpoint.tensors import StoredTensors, model_tensors, pack, restore_model, unpack
from trainer.checkpoint.verify import Found, check, newest_whole
from trainer.checkpoint.writer import CheckpointWriter, Contents
from trainer.config.arguments import TrainingArguments
from trainer.data.length import RunLength
from trainer.distributed.group import Group
from trainer.errors import CheckpointError, TrainerError, UsageError, named_error
from trainer.model.fsdp import unwrapped
from trainer.model.lora import is_adapted, write_adapters, write_configurations
from trainer.model.osft.layers import is_osft_parameter
from trainer.optim.adapters import is_averaging
from trainer.optim.schedules import advance
from trainer.training.callbacks import Events, RunState
from trainer.training.run_dir import (
    METRICS,
    continue_output_dir,
    end_of_file,
    read_run_id,
    remove_twin,
    twin_of,
)
from trainer.training.step import Engine

logger = logging.getLogger(__name__)

ADAM_BYTES = 8  # of state for each trained parameter, which most optimizers stay below
WEIGHTS_INDEX, TRAINER_STATE = "model.safetensors.index.json", "trainer_state.json"  # transformers' names
IMPORTANCE = "osft_importance.json"  # among them, where `osft_adaptive_samples` gave each block a ratio of its own
OPTIMIZER_SETTINGS = {  # option -> what it sets in the parameter groups
    "learning_rate": ("lr", "initial_lr"),
    "weight_decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
}
SCHEDULE_OPTIONS = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}
BATCH_OPTIONS = {"batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"}


@dataclass(frozen=True)
class Restored:
    """A checkpoint that a run goes on from, and what its change of options means for the length."""

    folder: Path
    record: RunRecord
    changes: dict[str, str]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        args: when and where.
        engine: model, optimizer and schedule.
        events: state and callbacks.
        batches: where global batches come from; a stream's position is asked of them.
        identify: returns the fingerprints of data and tokenizer.
        is_async: whether training goes on while one is written.
    """

    def __init__(
        self,
        args: TrainingArguments,
        engine: Engine,
        events: Events,
        batches: Any,
        identify: Callable[[], dict[str, str | None]],
        *,
        is_async: bool,
    ) -> None:
        self.args, self.engine, self.events, self.batches = args, engine, events, batches
        self._identify = functools.cache(identify)
        self.folder = Path(args.output_dir, manifest.FOLDER)
        self.is_on = args.save_strategy != "no"
        if args.save_only_model and is_averaging(engine.optimizer):
            raise UsageError(
                "save_only_model leaves out the state from which the optimizer computes the averaged weights that are "
                "evaluated and exported: leave it off, or choose another optim"
            )
        self._writer = CheckpointWriter(
            self.folder,
            engine.group,
            is_async=is_async,
            limit=args.save_total_limit,
            report=functools.partial(events.tell, "on_write"),
        )
        self.has_twins = False  # whether scripts find a checkpoint-N for each, see `_write_twin`
        self._files: dict[str, bytes] | None = None
        self._restored: Restored | None = None
        self._has_explained_twins = False

    def save(self) -> None:
        """Save the state after the present step, if that was not done; a former save is finished first."""
        state = self.events.state
        is_saved, state.saved_step = state.saved_step == state.global_step, state.global_step
        self.mark_best()
        if is_saved:
            return
        self.finish()
        self._announce(self._writer.save(self._contents()))

    def mark_best(self) -> None:
        """Take the checkpoint of this step, if there is one, for the best, if it is."""
        state = self.events.state
        if state.best_global_step == state.saved_step == state.global_step:
            folder = manifest.folder_of(self.folder, state.global_step)
            state.best_model_checkpoint = str(twin_of(folder) if self.has_twins else folder)
        self._writer.best_step = state.best_global_step

    def poll(self) -> None:
        """Publish a save that was written meanwhile.

        Raises:
            CheckpointError: it failed.
        """
        self._announce(self._writer.poll())

    def finish(self) -> None:
        """Wait for a save in flight."""
        self._announce(self._writer.wait())

    def find(self, asked: bool | str | None) -> Path | None:
        """Find the checkpoint to go on from; None to start from the beginning.

        Args:
            asked: "auto" (the newest whole one in output_dir, if there is any), True (the same, but there must be
                one), a checkpoint's folder, or None.

        Raises:
            CheckpointError: there is none that is whole.
        """
        if asked is None or asked is False:
            return None
        group = self.engine.group
        if asked not in (True, "auto", "true"):
            folder = by_either_name(Path(str(asked)))
            if manifest.step_of(folder.resolve()) >= 0 or (folder / manifest.MANIFEST).is_file():
                check(folder, group)
                return folder
            found = newest_whole(folder, group)
            return self._chosen(found, folder, must_exist=True)
        return self._chosen(newest_whole(self.folder, group), self.folder, must_exist=asked != "auto")

    def restore(self, folder: Path, length: RunLength) -> RunLength:
        """Bring the run to where it was when a checkpoint was written; return how long it is from there.

        Raises:
            CheckpointError: the checkpoint is another run's.
            UsageError: something changed that was not allowed to.
        """
        if not manifest.read_manifest(folder).is_resumable:
            raise CheckpointError(f"{folder} holds weights alone (save_only_model): a run cannot go on from it")
        with reading(folder):
            record = RunRecord.from_dict(read_json(folder / STATE), str(folder / STATE))
            changes = option_changes(folder, self.args) | find_changes(record.fingerprints, self._identify())
            names = [name for name, _ in record.callbacks]
            present = [name for name, _ in callback_states(self.events.handler.callbacks)]
            changes |= find_changes({"callbacks": names}, {"callbacks": present})
            check_changes(changes, self.args.allow_change, str(folder))
            osft = self.engine.osft
            if read_importance(folder) != (None if osft is None else osft.importance):
                raise UsageError(
                    f"{folder} records another importance of the blocks than was measured now (osft_adaptive_samples): "
                    "name it in the option resume_from_checkpoint, so that it is known when the model is built"
                )
            self._restored = Restored(folder, record, changes)
            group = self.engine.group
            stored = StoredTensors(folder, group.rank, group.world_size)
            with group.unhurried():  # one node's disk may be much slower
                restore_model(self.engine.model, stored)
            kept = frozenset(key for name in changes for key in OPTIMIZER_SETTINGS.get(name, ()))
            form = read_json(folder / OPTIMIZER_STATE)
            restore_optimizer(self.engine.optimizer, self.engine.model, form, stored, kept)
            state = self.events.state
            restore_state(state, _unpack_plain(record.state))
            state.resumed_step, state.resumed_samples = state.global_step, state.num_samples_seen
            restore_callbacks(self.events.handler.callbacks, record.callbacks)
            self.batches.move_to(_unpack_plain(record.stream))
            if SCHEDULE_OPTIONS & changes.keys():
                advance(self.engine.schedule, state.global_step)
            else:
                self.engine.schedule.load_state_dict(_unpack_plain(record.schedule))
            continue_output_dir(self.args, group, folder, record, state.global_step)
        per_epoch, num_samples = length.steps_per_epoch, self.batches.num_samples
        is_other_size = bool(BATCH_OPTIONS & changes.keys()) and self.args.max_steps <= 0
        if not is_other_size or per_epoch is None or num_samples is None:
            return length
        # Batches have another size from here on: count on from the steps taken; the position counts samples.
        left = math.ceil((num_samples - state.num_epoch_samples_seen) / self.batches.samples_per_step)
        would_have_taken = (state.num_epochs_done + 1) * per_epoch - left
        return replace(length, num_steps_more=state.global_step - would_have_taken)

    def begin(self) -> None:
        """Set what the beginning of a run resets: random generators, and what callbacks had asked for."""
        if self.is_on:
            self._check_room()
            self._identify()  # once, here: a save should not read data
            self._writer.run_id = read_run_id(Path(self.args.output_dir))
        if self._restored is None:
            return
        restored, group = self._restored, self.engine.group
        self._restored = None
        if restored.record.should_stop and group.is_main:
            logger.warning("%s: a callback ended this run here; it is over, nothing more is trained", restored.folder)
        self.events.control.should_training_stop |= restored.record.should_stop
        self.events.control.should_epoch_stop |= restored.record.should_stop_epoch
        if manifest.read_manifest(restored.folder).world_size == group.world_size:
            body, _ = read_sealed(restored.folder / rank_file(group.rank))
            with reading(restored.folder):
                restore_random_state(body["random"], group.device)
        else:
            start_random_state(self.args.seed, self.events.state.global_step, group.rank)

    def _check_room(self) -> None:
        """Warn where the disk has no room for the next checkpoint."""
        folder = Path(self.args.output_dir)
        if not self.engine.group.is_main or not folder.is_dir():
            return
        planned = 0
        for parameter in self.engine.model.parameters():
            planned += parameter.numel() * parameter.element_size()
            if parameter.requires_grad and not self.args.save_only_model:
                planned += parameter.numel() * ADAM_BYTES
        free = shutil.disk_usage(folder).free
        if free < planned:
            logger.warning(
                "output_dir %s has %.1f GB free, and a checkpoint takes about %.1f GB: free some, or choose another",
                folder,
                free / 1e9,
                planned / 1e9,
            )

    def _contents(self) -> Contents:
        model, control = self.engine.model, self.events.control
        is_over = 0 < self.events.state.max_steps <= self.events.state.global_step
        metrics = Path(self.args.output_dir, METRICS)
        metrics_bytes = sync_size(metrics)
        record = RunRecord(
            state=_pack_plain(state_fields(self.events.state), "the state"),
            should_stop=control.should_training_stop and not is_over and not self.events.is_stopped_by_signal,
            should_stop_epoch=control.should_epoch_stop,
            schedule=_pack_plain(self.engine.schedule.state_dict(), "the learning-rate schedule"),
            callbacks=callback_states(self.events.handler.callbacks),
            fingerprints=self._identify(),
            metrics_bytes=metrics_bytes,
            metrics_sha256=end_of_file(metrics, metrics_bytes) if metrics_bytes else None,
            stream=_pack_plain(self.batches.position(), "the position of train_dataset"),
        )
        records = {PARAMETERS: self.args.to_dict(), STATE: dataclasses.asdict(record)}
        tensors = {"model": model_tensors(model)}
        if not self.args.save_only_model:
            records[OPTIMIZER_STATE], tensors["optimizer"] = pack_optimizer(self.engine.optimizer, model)
        if self._files is None:
            self._files = self.model_files()
        return Contents(
            self.events.state.global_step, tensors, records, self._files, is_resumable=not self.args.save_only_model
        )

    def model_files(self) -> dict[str, bytes]:
        """Configuration and tokenizer, as they are written for others; read once, for they do not change."""
        if not self.engine.group.is_main:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            handler: CallbackHandler = self.events.handler
            model: Any = unwrapped(self.engine.model)
            if isinstance(model, PreTrainedModel):
                model.config.save_pretrained(folder)
                generation = getattr(model, "generation_config", None)
                if generation is not None:
                    generation.to_json_file(Path(folder, "generation_config.json"))
            if is_adapted(model):
                write_configurations(self.engine.model, Path(folder))
            osft = self.engine.osft
            if osft is not None and osft.importance is not None:
                write_json(Path(folder, IMPORTANCE), osft.importance)
            if hasattr(handler.processing_class, "save_pretrained"):
                handler.processing_class.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(Path(MODEL_FILES, path.relative_to(folder))): path.read_bytes() for path in paths}

    def _chosen(self, found: Found, folder: Path, *, must_exist: bool) -> Path | None:
        for name, reason in found.passed_over.items():
            if self.engine.group.is_main:
                logger.warning("passed over %s: %s", name, reason)
        if found.folder is None and (must_exist or found.passed_over):
            reasons = "".join(f"; {name}: {reason}" for name, reason in found.passed_over.items())
            is_usual = folder == self.folder
            what = "No valid checkpoint found in output directory" if is_usual else "Can't find a valid checkpoint at"
            raise CheckpointError(f"{what} {folder}: none to go on from{reasons}")
        return found.folder

    def _write_twin(self, folder: Path) -> None:
        """Make checkpoint-N, where users of transformers look for a checkpoint; remove those whose checkpoint is gone.

        It holds copies of config and tokenizer, so that callbacks may write into it without changing the checkpoint,
        and an index that leads from_pretrained to the weights. Of several ranks each saved its own part: no file of
        these could be read by others. Adapters are small, and written there once more.
        """
        twin, source = twin_of(folder), folder / MODEL_FILES
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        model = self.engine.model
        tensors, is_whole = model_tensors(model), self.engine.group.world_size == 1
        is_whole &= not any(is_osft_parameter(name) for name in tensors)
        try:
            twin.mkdir(exist_ok=True)
            if names:
                shutil.copytree(source, twin, dirs_exist_ok=True)
            if is_adapted(model):
                stored, is_whole = StoredTensors(folder), True
                names += write_adapters(model, {name: stored.read(name, ()) for name in tensors}, twin)
            elif is_whole and "config.json" in names:
                file = os.path.relpath(folder / "model_0.safetensors", twin)
                write_json(twin / WEIGHTS_INDEX, {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)})
                names.append(WEIGHTS_INDEX)
            self.events.state.save_to_json(str(twin / TRAINER_STATE))
            write_json(twin / LISTING, {"files": [*names, TRAINER_STATE]})
            for other in folder.parents[1].glob("checkpoint-*"):
                if read_listing(other) and not by_either_name(other).exists():
                    remove_twin(other)
        except OSError as error:
            logger.warning("%s could not be written: %s; use %s", twin, error, folder)
        if not is_whole and not self._has_explained_twins:
            self._has_explained_twins = True
            logger.warning(
                "%s holds no weights that from_pretrained could read: run `trainer export %s FOLDER` first",
                twin,
                folder,
            )

    def _announce(self, folder: Path | None) -> None:
        if folder is not None:
            if self.has_twins and self.engine.group.is_main:
                self._write_twin(folder)
            is_asked = self.events.control.should_save  # transformers' event takes it back
            self.events.emit("on_save", checkpoint=folder)
            self.events.control.should_save |= is_asked


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Name the checkpoint in whatever a record of the wrong form raises.

    Raises:
        CheckpointError: instead of it.
    """
    try:
        yield
    except TrainerError:
        raise
    except MALFORMED as error:
        reason = named_error(error)
        raise CheckpointError(f"{folder} cannot be read ({reason}); resume from another checkpoint") from error


def load_best_weights(model: nn.Module, optimizer: Optimizer, state: RunState, group: Group) -> None:
    """Load the weights of the best checkpoint, and the state of an optimizer that averages weights."""
    if state.best_model_checkpoint is None or state.best_global_step == state.global_step:
        return
    folder = by_either_name(Path(state.best_model_checkpoint))
    stored = StoredTensors(folder, group.rank, group.world_size)
    restore_model(model, stored)
    if is_averaging(optimizer):
        restore_optimizer(optimizer, model, read_json(folder / OPTIMIZER_STATE), stored, frozenset())


def read_importance(folder: Path) -> dict[str, float] | None:
    """Read by which importance of its blocks the model of a checkpoint was split; None where one ratio holds for all.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / MODEL_FILES / IMPORTANCE
    return dict(read_json(path)) if path.is_file() else None


def by_either_name(folder: Path) -> Path:
    """Return our checkpoint of step N for `checkpoint-N` of an output folder, as transformers names it."""
    name, _, step = folder.name.partition("-")
    if name != "checkpoint" or not step.isdigit() or (folder / manifest.MANIFEST).exists():
        return folder
    ours = manifest.folder_of(folder.parent / manifest.FOLDER, int(step))
    return ours if ours.exists() or (folder / LISTING).exists() else folder


def _pack_plain(value: Any, name: str) -> Any:
    tensors: dict[str, Any] = {}
    form = pack(value, name, tensors)
    if tensors:
        raise CheckpointError(f"{name} holds a tensor ({next(iter(tensors))}): a checkpoint keeps it as numbers only")
    return form


def _unpack_plain(form: Any) -> Any:
    return unpack(form, torch.tensor)  # never called: there are no tensors
