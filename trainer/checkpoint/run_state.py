"""What a resumed run must know beside its tensors: position, callbacks, random generators, fingerprints of the data.

Owns the record and its checks; knows nothing of files and of the loop. Invariants: it holds numbers, texts, lists and
dicts alone; what it does not hold follows from options and data; a generator that is restored draws the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from trainer.atomic import MALFORMED, read_json
from trainer.checkpoint.manifest import PARAMETERS
from trainer.config.arguments import TrainingArguments, names_free_at_resume
from trainer.config.fields import check_options, describe, fits, types_of
from trainer.data.batched import has_length
from trainer.data.store import TokenStore
from trainer.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)

NUM_SAMPLES_READ = 64  # of a token store, spread over it; all lengths are read besides
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
    metrics_sha256: str | None = None  # of the end of these bytes
    stream: Any = None  # position of a stream that tells it

    @classmethod
    def from_dict(cls, values: Any, place: str) -> RunRecord:
        """Read it back; fields that this version does not know are ignored.

        Raises:
            CheckpointError: a field is missing or of another type.
        """
        try:
            known = {each.name: values[each.name] for each in dataclasses.fields(cls) if each.name in values}
            record = cls(**known)
            check_options(record)
            for name, state in record.callbacks:
                if not isinstance(name, str) or not isinstance(state, dict):
                    raise TypeError(f"{name!r} is no callback with its state")
        except (*MALFORMED, UsageError) as error:
            raise CheckpointError(f"{place} is no record of a run ({error})") from error
        return record


def state_fields(state: TrainerState) -> dict[str, Any]:
    """Return the fields of a TrainerState, without what differs from process to process."""
    return {name: value for name, value in dataclasses.asdict(state).items() if name not in PER_PROCESS}


def restore_state(state: TrainerState, saved: dict[str, Any]) -> None:
    """Set the fields of a TrainerState.

    Raises:
        CheckpointError: one has a value of another type; nothing was set.
    """
    kind: Any = type(state)
    hints, values = types_of(kind), {}
    for each in dataclasses.fields(kind):
        if each.name not in saved or each.name in PER_PROCESS:
            continue
        value = values[each.name] = saved[each.name]
        if not fits(value, hints[each.name]):
            raise CheckpointError(f"{each.name} = {value!r} in the state: expected {describe(hints[each.name])}")
    for name, value in values.items():
        setattr(state, name, value)


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options with which a checkpoint was saved, as the file holds them.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    path = folder / PARAMETERS
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} is no record of options: it holds {type(saved).__name__} instead of an object")
    return saved


def options_of(folder: Path) -> TrainingArguments:
    """Return the options of a checkpoint that this version knows, for building its model.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    args, rest = TrainingArguments.from_record(read_options(folder))
    if rest:
        logger.debug("%s was saved with options that are unknown here, which do not matter: %s", folder, rest)
    return args


def option_changes(folder: Path, args: TrainingArguments) -> dict[str, str]:
    """Return which options differ from those of a checkpoint in a way that may move numbers: name -> both values.

    An option that the version which saved it did not have counts as saved with its default value.
    """
    saved, rest = type(args).from_record(read_options(folder))
    changes = find_changes(saved.to_dict(), args.to_dict())
    if unknown := {name: value for name, value in rest.items() if value not in (None, False, [], {})}:
        changes["unknown_options"] = f"{unknown} when it was saved, which this class of arguments does not know"
    return changes


def find_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs, with both values; a name that only one of the two has counts where it has a value."""
    free = names_free_at_resume()
    names = [name for name in {**saved, **current} if name not in free]
    return {
        name: f"{saved.get(name)!r} when it was saved, {current.get(name)!r} now"
        for name in names
        if saved.get(name) != current.get(name)
    }


def check_changes(changes: Mapping[str, str], allowed: Collection[str], place: str) -> None:
    """Raise UsageError where something changed that was not allowed to."""
    refused = {name: values for name, values in changes.items() if name not in allowed}
    if refused:
        listed = "; ".join(f"{name} was {values}" for name, values in refused.items())
        raise UsageError(
            f"{place} cannot be resumed exactly: {listed}; set it back, or say allow_change={','.join(refused)}"
        )


def callback_states(callbacks: Sequence[TrainerCallback]) -> list[Any]:
    """Return the state of each callback that exports one, in transformers' protocol."""
    exporting = (callback for callback in callbacks if isinstance(callback, ExportableState))
    return [[type(callback).__name__, callback.state()] for callback in exporting]


def restore_callbacks(callbacks: Sequence[TrainerCallback], saved: list[Any]) -> None:
    """Restore the state of callbacks, each saved one in the next of its class; they stay the same objects."""
    waiting = [callback for callback in callbacks if isinstance(callback, ExportableState)]
    for name, state in saved:
        found = next((callback for callback in waiting if type(callback).__name__ == name), None)
        if found is not None:
            waiting.remove(found)
            vars(found).update(vars(type(found).from_state(state)))


def random_state(device: torch.device) -> dict[str, Any]:
    """Take the state of Python's, numpy's and torch's generators, and of the device's."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    state = {
        "python": [version, list(words), gauss],
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators where they were; a device's only if the state was taken on such a device."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], np.uint32)}})
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def check_random_state(state: dict[str, Any]) -> None:
    """Set generators of our own to a state.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError, AttributeError: it is no such state.
    """
    version, words, gauss = state["python"]
    random.Random().setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], np.uint32)
    np.random.RandomState().set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.Generator().set_state(_bytes(state["torch"]))


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Copy the state of torch's generators, which dropout draws from: quick enough for every step."""
    states = {"torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generator_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put torch's generators where they were; a device's only if the state was taken on such a device."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def start_random_state(seed: int, step: int, rank: int) -> None:
    """Seed all generators anew for a rank that did not exist when the state was taken."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "big"))
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def data_fingerprint(dataset: Any) -> str | None:
    """Return what identifies a data set: content of token data, else its own fingerprint, else its length."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return "; ".join(f"{name}: {data_fingerprint(each)}" for name, each in dataset.items())
    if isinstance(dataset, TokenStore):
        digest = hashlib.sha256(np.ascontiguousarray(dataset.lengths).tobytes())
        digest.update(np.ascontiguousarray(dataset.num_loss_tokens).tobytes())
        for i in np.unique(np.linspace(0, len(dataset) - 1, NUM_SAMPLES_READ).astype(int)):
            sample = dataset.sample(int(i))
            digest.update(sample.input_ids.tobytes())
            digest.update(sample.labels.tobytes())
        return f"{len(dataset)} samples {digest.hexdigest()[:32]}"
    if isinstance(own := getattr(dataset, "_fingerprint", None), str):
        return f"{type(dataset).__name__} {own}"
    return f"{type(dataset).__name__} of {len(dataset) if has_length(dataset) else 'unknown'} samples"


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Return what identifies a tokenizer: a hash of vocabulary, rules, special tokens and chat template."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    rules = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else ""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [sorted(tokenizer.get_vocab().items()), rules, special, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
