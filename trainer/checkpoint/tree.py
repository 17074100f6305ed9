"""Nested Python values as JSON and named tensors, and back: how the state of any optimizer goes on disk without pickle.

Owns the tags; knows nothing of files and ranks. Invariants: `unpack` gives back what `pack` took, type for type and bit
for bit, and builds nothing but numbers, texts, tensors, lists, tuples and dicts of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from trainer.errors import CheckpointError

TENSOR, TUPLE, DICT = "$tensor", "$tuple", "$dict"


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Give the JSON form of a value; its tensors go into `tensors`, named by their path from `name` on.

    Raises:
        CheckpointError: something in it is neither number, text, tensor, list, tuple nor dict.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | np.integer | np.floating):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, Tensor):
        if name in tensors:
            raise CheckpointError(f"two tensors of a checkpoint would be named {name!r}")
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, list | tuple):
        items = [pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    if isinstance(value, dict):
        return _pack_dict(value, name, tensors)
    raise CheckpointError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}: only numbers, texts, tensors, and lists, "
        "tuples and dicts of them can be saved; give the object that owns it a state_dict of these"
    )


def _pack_dict(value: dict[Any, Any], name: str, tensors: dict[str, Tensor]) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: pack(item, f"{name}/{key}", tensors) for key, item in value.items()}
    unsaved: dict[str, Tensor] = {}
    pairs = [[pack(key, name, unsaved), pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]
    return {DICT: pairs}


def unpack(form: Any, read: Callable[[str], Tensor]) -> Any:
    """Give the value back; `read` gives a tensor by its name."""
    if isinstance(form, list):
        return [unpack(item, read) for item in form]
    if not isinstance(form, dict):
        return form
    if form.keys() == {TENSOR}:
        return read(form[TENSOR])
    if form.keys() == {TUPLE}:
        return tuple(unpack(item, read) for item in form[TUPLE])
    if form.keys() == {DICT}:
        return {unpack(key, read): unpack(item, read) for key, item in form[DICT]}
    return {key: unpack(item, read) for key, item in form.items()}
