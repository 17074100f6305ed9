"""The state of every random generator of a process, as JSON values. Invariant: what is restored draws the same."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


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
