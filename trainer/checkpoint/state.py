"""What a resumed run must know beside its tensors: one small typed record, and the state of the callbacks.

Owns the record and its checks; knows nothing of files and of the loop. Invariant: it holds numbers, texts, lists and
dicts alone, and what it does not hold is derived from the options and the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from trainer.config.fields import check_options
from trainer.errors import CheckpointError, UsageError

PER_PROCESS = ("is_world_process_zero", "is_local_process_zero", "stateful_callbacks")


@dataclass
class RunRecord:
    """Where a run stands, the same on every rank."""

    state: dict[str, Any]  # the fields of RunState: step, position, sums, history, best metric
    should_stop: bool  # a callback asked for the end
    should_stop_epoch: bool
    schedule: dict[str, Any]
    callbacks: list[Any]  # [name of the class, state] of those that have one
    fingerprints: dict[str, Any]  # of data, tokenizer and model: name -> text
    metrics_bytes: int | None = None  # of metrics.jsonl at that moment
    stream: Any = None  # position of a stream that tells it

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, place: str) -> RunRecord:
        """Read it back.

        Raises:
            CheckpointError: a field is missing, unknown or of another type.
        """
        try:
            record = cls(**values)
            check_options(record)
        except (TypeError, UsageError) as error:
            raise CheckpointError(f"{place} is no record of a run ({error})") from error
        return record


def state_fields(state: Any) -> dict[str, Any]:
    """Give the fields of a TrainerState, without what differs from process to process."""
    return {name: value for name, value in dataclasses.asdict(state).items() if name not in PER_PROCESS}


def restore_state(state: Any, fields: dict[str, Any]) -> None:
    """Set the fields of a TrainerState."""
    known = {f.name for f in dataclasses.fields(state)} - set(PER_PROCESS)
    for name in known & fields.keys():
        setattr(state, name, fields[name])


def callback_states(callbacks: Sequence[TrainerCallback]) -> list[Any]:
    """Give the state of each callback that exports one, in transformers' protocol."""
    exporting = (callback for callback in callbacks if isinstance(callback, ExportableState))
    return [[type(callback).__name__, callback.state()] for callback in exporting]


def restore_callbacks(callbacks: Sequence[TrainerCallback], saved: list[Any]) -> None:
    """Give callbacks their state back, each to the next one of its class; they stay the objects that they are."""
    waiting = [callback for callback in callbacks if isinstance(callback, ExportableState)]
    for name, state in saved:
        found = next((callback for callback in waiting if type(callback).__name__ == name), None)
        if found is not None:
            waiting.remove(found)
            vars(found).update(vars(type(found).from_state(state)))
