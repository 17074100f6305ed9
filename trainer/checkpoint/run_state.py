"""What a resumed run must know beside its tensors: position, callbacks, random generators, fingerprints of the data.

Owns the record and its checks; knows nothing of files and of the loop. Invariants: it holds numbers, texts, lists and
dicts alone; what it does not hold follows from options and data; a generator that is restored draws the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import ExportableState, TrainerCallback

from trainer.config.fields import check_options
from trainer.data.batched import has_length
from trainer.data.store import TokenStore
from trainer.errors import CheckpointError, UsageError

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
    """Give what tells a data set from others: content of token data, else its own fingerprint, else its length."""
    if dataset is None:
        return None
    if isinstance(dataset, TokenStore):
        return _store_fingerprint(dataset)
    if isinstance(own := getattr(dataset, "_fingerprint", None), str):
        return f"{type(dataset).__name__} {own}"
    return f"{type(dataset).__name__} of {len(dataset) if has_length(dataset) else 'unknown'} samples"


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Give what tells a tokenizer from others: vocabulary, rules, special tokens, chat template."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    rules = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else ""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [sorted(tokenizer.get_vocab().items()), rules, special, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _store_fingerprint(store: TokenStore) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(store.lengths).tobytes())
    digest.update(np.ascontiguousarray(store.num_loss_tokens).tobytes())
    for i in np.unique(np.linspace(0, len(store) - 1, NUM_SAMPLES_READ).astype(int)):
        sample = store.sample(int(i))
        digest.update(sample.input_ids.tobytes())
        digest.update(sample.labels.tobytes())
    return f"{len(store)} samples {digest.hexdigest()[:32]}"
