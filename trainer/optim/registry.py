"""Every optimizer by name: transformers' names for `optim`, and muon.

Only data and `load_class` are here; `build.py` builds from them. No package is imported before it is chosen. What a
`Spec` claims, the conformance suite in tests/trainer/test_trainer_optimizers.py checks, and docs/optimizers.md shows.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainer.config.suggest import one_of
from trainer.errors import MissingPackageError, UsageError
from trainer.optim.adapters import (
    ApolloState,
    GaloreState,
    GrokadamwState,
    LocalShards,
    PagedLocalShards,
    TorchaoState,
)
from trainer.optim.gradients import InBackward
from trainer.optim.muon import MUON_OPTIONS, mark_hidden_matrices

ADAM = ("betas", "eps")  # constructor arguments that adam_beta1, adam_beta2 and adam_epsilon give


@dataclass(frozen=True)
class Spec:
    """One optimizer: where its class is, what it takes, what it can and cannot do."""

    path: str  # module:Class
    package: str | None = None  # on PyPI; None for what torch and transformers bring
    licence: str = "BSD-3-Clause"
    takes: tuple[str, ...] = ()  # of ADAM
    fixed: Mapping[str, Any] = field(default_factory=dict)  # constructor arguments that make it what its name says
    extra_options: Mapping[str, Any] = field(default_factory=dict)  # optim_args beside the constructor's, with defaults
    mixins: tuple[type[Optimizer], ...] = ()  # what its class lacks
    prepare: Callable[[dict[str, Any], Mapping[str, Any]], None] | None = None  # (constructor arguments, extra options)
    arrange: Callable[[nn.Module, list[dict[str, Any]]], list[dict[str, Any]]] | None = None  # its own parameter groups
    target_options: Mapping[str, Any] | None = None  # optim_args for the matrices among optim_target_modules
    not_sharded: str = ""  # why it cannot train sharded parameters; empty: it can
    not_on_cpu: str = ""  # why it needs a GPU; empty: it does not
    steps_in_backward: bool = False
    averages_weights: bool = False  # evaluates and saves other weights than it trains: its schedule is constant
    has_plain_state: bool = False  # its state may be kept in bfloat16
    note: str = ""  # what to know before choosing it


_L2 = "weight_decay is added to the gradient, as L2"
_WHOLE_ROWS = "it needs whole rows and columns of a matrix ({})"


def _third_beta(arguments: dict[str, Any], extra: Mapping[str, Any]) -> None:
    arguments["betas"] = (*arguments["betas"], float(extra["beta3"]))


_ADAMW = Spec("torch.optim:AdamW", takes=ADAM, fixed={"fused": False}, has_plain_state=True)
_ADAFACTOR = Spec(
    "transformers.optimization:Adafactor",
    licence="Apache-2.0",
    fixed={"scale_parameter": False, "relative_step": False},
    not_sharded=_WHOLE_ROWS.format("transformers 5.23: mixed Tensor and DTensor"),
)
_TORCH = {
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": replace(_ADAMW, fixed={"fused": True}),
    "sgd": Spec("torch.optim:SGD", note=f"{_L2}; 4 bytes with optim_args momentum"),
    "adagrad": Spec("torch.optim:Adagrad", has_plain_state=True, note=_L2),
    "rmsprop": Spec("torch.optim:RMSprop", has_plain_state=True, note=_L2),
    "adafactor": _ADAFACTOR,
    "muon": Spec(
        "trainer.optim.muon:MuonWithAdamw",
        takes=ADAM,
        extra_options=MUON_OPTIONS,
        prepare=lambda arguments, extra: arguments.update(extra),
        arrange=mark_hidden_matrices,
        note="hidden matrices by Muon (4 bytes), everything else by AdamW (8 bytes); gathers one matrix at a time",
    ),
    "lomo": Spec(
        "torch.optim:SGD",
        mixins=(InBackward,),
        steps_in_backward=True,
        note="the update of lomo-optim, stepped by torch's SGD",
    ),
    "adalomo": replace(
        _ADAFACTOR,
        fixed={"scale_parameter": True, "relative_step": False},
        mixins=(InBackward,),
        steps_in_backward=True,
        note="the update of lomo-optim, stepped by transformers' Adafactor",
    ),
}


def _bitsandbytes(cls: str, bits: int, **more: Any) -> Spec:
    fixed = {"optim_bits": bits, **more.pop("fixed", {})}
    note = "8-bit state resumes at the same world size only" if bits == 8 else ""
    note = "; ".join(filter(None, [more.pop("note", ""), note]))
    return Spec(
        f"bitsandbytes.optim:{cls}",
        package="bitsandbytes",
        licence="MIT",
        fixed=fixed,
        mixins=(LocalShards,),
        note=note,
        **more,
    )


def _paged(spec: Spec) -> Spec:
    note = "; ".join(filter(None, ["state pages out to host memory on a GPU, not on a CPU", spec.note]))
    return replace(spec, fixed={**spec.fixed, "is_paged": True}, mixins=(PagedLocalShards,), note=note)


_BNB_ADAMW = _bitsandbytes("AdamW", 32, takes=ADAM)
_BNB_ADAMW_8BIT = _bitsandbytes("AdamW", 8, takes=ADAM)
_ADEMAMIX: dict[str, Any] = {"takes": ADAM, "extra_options": {"beta3": 0.9999}, "prepare": _third_beta}
_BNB_ADEMAMIX = _bitsandbytes("AdEMAMix", 32, **_ADEMAMIX)
_BNB_ADEMAMIX_8BIT = _bitsandbytes("AdEMAMix", 8, **_ADEMAMIX)
_BNB_LION = _bitsandbytes("Lion", 32, takes=("betas",))
_BNB_LION_8BIT = _bitsandbytes("Lion", 8, takes=("betas",))
_BNB_RMSPROP = _bitsandbytes("RMSprop", 32, note=_L2)
_BITSANDBYTES = {
    "adamw_bnb_8bit": _BNB_ADAMW_8BIT,
    "adamw_8bit": _BNB_ADAMW_8BIT,
    "paged_adamw_32bit": _paged(_BNB_ADAMW),
    "paged_adamw_8bit": _paged(_BNB_ADAMW_8BIT),
    "ademamix": _BNB_ADEMAMIX,
    "ademamix_8bit": _BNB_ADEMAMIX_8BIT,
    "paged_ademamix_32bit": _paged(_BNB_ADEMAMIX),
    "paged_ademamix_8bit": _paged(_BNB_ADEMAMIX_8BIT),
    "lion_32bit": _BNB_LION,
    "lion_8bit": _BNB_LION_8BIT,
    "paged_lion_32bit": _paged(_BNB_LION),
    "paged_lion_8bit": _paged(_BNB_LION_8BIT),
    "rmsprop_bnb": _BNB_RMSPROP,
    "rmsprop_bnb_32bit": _BNB_RMSPROP,
    "rmsprop_bnb_8bit": _bitsandbytes("RMSprop", 8, note=_L2),
}
_TORCHAO = Spec(
    "torchao.optim:AdamW8bit",
    package="torchao",
    takes=ADAM,
    mixins=(TorchaoState,),
    note="compiles on its first step; resumes at the same world size only",
)
_GALORE = Spec(
    "galore_torch:GaLoreAdamW",
    package="galore-torch",
    licence="Apache-2.0",
    takes=ADAM,
    fixed={"no_deprecation_warning": True},
    mixins=(GaloreState,),
    target_options={"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    not_sharded="galore-torch 1.0 takes the SVD of whole gradients",
    note="unmaintained since 2024",
)
_GALORE_ADAFACTOR = replace(
    _GALORE,
    path="galore_torch:GaLoreAdafactor",
    takes=(),
    fixed=_ADAFACTOR.fixed,
)
_GALORE_8BIT = replace(
    _GALORE,
    path="galore_torch:GaLoreAdamW8bit",
    fixed={},
    not_on_cpu="galore-torch 1.0 calls torch.cuda.synchronize in every step",
)
_APOLLO = Spec(
    "apollo_torch:APOLLOAdamW",
    package="apollo-torch",
    licence="CC-BY-NC: not for commercial use",
    takes=ADAM,
    mixins=(ApolloState,),
    target_options={
        "rank": 128,
        "proj": "random",
        "scale_type": "channel",
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
    },
    not_sharded="apollo-torch 1.0.3 mixes Tensor and DTensor",
)
_SCHEDULE_FREE = Spec(
    "schedulefree:AdamWScheduleFree",
    package="schedulefree",
    licence="Apache-2.0",
    takes=ADAM,
    averages_weights=True,
    note="evaluates and exports averaged weights; lr_scheduler_type constant or constant_with_warmup",
)


def _layerwise(spec: Spec) -> Spec:
    return replace(spec, mixins=(InBackward, *spec.mixins), steps_in_backward=True)


OPTIMIZERS: dict[str, Spec] = {
    **_TORCH,
    **_BITSANDBYTES,
    "adamw_torch_8bit": _TORCHAO,
    "adamw_torch_4bit": replace(_TORCHAO, path="torchao.optim:AdamW4bit"),
    "galore_adamw": _GALORE,
    "galore_adamw_8bit": _GALORE_8BIT,
    "galore_adafactor": _GALORE_ADAFACTOR,
    "galore_adamw_layerwise": _layerwise(_GALORE),
    "galore_adamw_8bit_layerwise": _layerwise(_GALORE_8BIT),
    "galore_adafactor_layerwise": _layerwise(_GALORE_ADAFACTOR),
    "apollo_adamw": _APOLLO,
    "apollo_adamw_layerwise": _layerwise(_APOLLO),
    "grokadamw": Spec(
        "grokadamw:GrokAdamW",
        package="grokadamw",
        licence="MIT",
        takes=ADAM,
        mixins=(GrokadamwState,),
        note="alpha release of 2024; keeps its state on the CPU; clips each parameter's gradient by itself",
    ),
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_radam": replace(_SCHEDULE_FREE, path="schedulefree:RAdamScheduleFree"),
    "schedule_free_sgd": replace(_SCHEDULE_FREE, path="schedulefree:SGDScheduleFree", takes=()),
    "stable_adamw": Spec("optimi:StableAdamW", package="torch-optimi", licence="MIT", takes=ADAM),
}

GONE = {  # transformers' names that nothing here can serve -> (why, what comes nearest)
    "adamw_anyprecision": ("torchdistx is archived and not on PyPI", "adamw_torch with optim_bf16_state"),
    "adamw_torch_xla": ("it needs torch_xla and a TPU", "adamw_torch"),
    "adamw_torch_npu_fused": ("it needs torch_npu and an Ascend NPU", "adamw_torch_fused"),
}


def find(name: str) -> Spec:
    """Look an optimizer up.

    Raises:
        UsageError: no optimizer has that name, or nothing provides it any more.
    """
    if name in GONE:
        why, instead = GONE[name]
        raise UsageError(f"optim = {name!r} is not there: {why}; nearest: {instead}")
    if name not in OPTIMIZERS:
        raise UsageError(one_of("optim", name, OPTIMIZERS, ", or your own as module:Class"))
    return OPTIMIZERS[name]


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
    """Return whether the package of an optimizer is there."""
    return importlib.util.find_spec(spec.path.partition(".")[0].partition(":")[0]) is not None
