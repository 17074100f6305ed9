"""What is known of an optimizer before it is built: where its class lives, what it takes, what it can and cannot do.

Knows no optimizer by name. Invariant: nothing here imports a package; `load_class` does, when an optimizer is chosen.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainer.errors import MissingPackageError, UsageError

Shape = tuple[int, ...]
ADAM = ("betas", "eps")  # constructor arguments that adam_beta1, adam_beta2 and adam_epsilon give


@dataclass(frozen=True)
class Spec:
    """One optimizer.

    `state_bytes` gives the bytes of its state for a float32 parameter of some shape; `target_bytes` the same for the
    matrices that it treats otherwise: those among `optim_target_modules`, at some rank; hidden ones for muon.
    """

    path: str  # module:Class
    state_bytes: Callable[[Shape], int]
    package: str | None = None  # on PyPI; None for what torch and transformers bring
    licence: str = "BSD-3-Clause"
    takes: tuple[str, ...] = ()  # of ADAM
    fixed: Mapping[str, Any] = field(default_factory=dict)  # constructor arguments that make it what its name says
    extra_options: Mapping[str, Any] = field(default_factory=dict)  # optim_args beside the constructor's, with defaults
    mixins: tuple[type[Optimizer], ...] = ()  # what its class lacks
    prepare: Callable[[dict[str, Any], Mapping[str, Any]], None] | None = None  # (constructor arguments, extra options)
    arrange: Callable[[nn.Module, list[dict[str, Any]]], list[dict[str, Any]]] | None = None  # its own parameter groups
    target_options: Mapping[str, Any] | None = None  # optim_args for the matrices among optim_target_modules
    target_bytes: Callable[[Shape, int], int] | None = None
    not_sharded: str = ""  # why it cannot train sharded parameters; empty: it can
    not_on_cpu: str = ""  # why it needs a GPU; empty: it does not
    is_fused: bool = False
    steps_in_backward: bool = False
    averages_weights: bool = False  # evaluates and saves other weights than it trains: its schedule is constant
    has_plain_state: bool = False  # its state may be kept in bfloat16
    note: str = ""  # what to know before choosing it


def floats(count: int) -> Callable[[Shape], int]:
    """State of so many float32 for each element of a parameter."""
    return lambda shape: 4 * count * math.prod(shape)


def blocks(count: int, bits: int = 8, size: int = 256, smallest: int = 4096) -> Callable[[Shape], int]:
    """State of so many numbers for each element, in few bits with a float32 a block; small tensors in float32."""

    def state_bytes(shape: Shape) -> int:
        numel = math.prod(shape)
        if numel < smallest:
            return 4 * count * numel
        return count * (numel * bits // 8 + 4 * math.ceil(numel / size))

    return state_bytes


def load_class(name: str, path: str, package: str | None) -> Any:
    """Import what `path`, module:name, stands for; the root logger stays as it was.

    Raises:
        MissingPackageError: a package is not there; the message holds the `pip install`.
        UsageError: the module has nothing of that name.
    """
    module_name, _, attribute = path.partition(":")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        advice = f"pip install {package}" if package else "install the package that holds it"
        raise MissingPackageError(f"optim = {name!r} cannot import {module_name} ({error}): {advice}") from error
    except AttributeError as error:
        raise UsageError(f"optim = {name!r}: {error}; write it as module:Class") from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return found


def is_installed(spec: Spec) -> bool:
    """Whether the package of an optimizer is there."""
    return importlib.util.find_spec(spec.path.partition(".")[0].partition(":")[0]) is not None
