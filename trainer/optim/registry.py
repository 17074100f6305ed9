"""Every optimizer by name: transformers' names for `optim`, and muon.

Only data stands here; `optimizers.py` builds from it. Invariant: what a `Spec` claims (bytes, sharding, CPU), the
conformance suite in tests/trainer/test_trainer_optimizers.py checks, and docs/optimizers.md repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trainer.config.suggest import one_of
from trainer.errors import UsageError
from trainer.optim.in_backward import InBackward
from trainer.optim.local_shards import LocalShards, PagedLocalShards
from trainer.optim.muon import MUON_OPTIONS, mark_hidden_matrices
from trainer.optim.portable_state import ApolloState, GaloreState, GrokadamwState, TorchaoState
from trainer.optim.spec import ADAM, Shape, Spec, blocks, floats

_L2 = "weight_decay is added to the gradient, as L2"
_WHOLE_ROWS = "it needs whole rows and columns of a matrix ({})"


def _factored(shape: Shape) -> int:
    """State of Adafactor: a float32 for each row and each column of a matrix, and for each element of a vector."""
    if len(shape) < 2:
        return 4 * math.prod(shape)
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def _low_rank(state: Callable[[Shape], int]) -> Callable[[Shape, int], int]:
    """State of a projected gradient, and its projector."""

    def target_bytes(shape: Shape, rank: int) -> int:
        longer, shorter = max(shape), min(shape)
        rank = min(rank, shorter)
        projected = (longer, rank) if shape[0] >= shape[1] else (rank, longer)
        return state(projected) + 4 * rank * shorter

    return target_bytes


def _third_beta(arguments: dict[str, Any], extra: Mapping[str, Any]) -> None:
    arguments["betas"] = (*arguments["betas"], float(extra["beta3"]))


_ADAMW = Spec("torch.optim:AdamW", floats(2), takes=ADAM, fixed={"fused": False}, has_plain_state=True)
_ADAFACTOR = Spec(
    "transformers.optimization:Adafactor",
    _factored,
    licence="Apache-2.0",
    fixed={"scale_parameter": False, "relative_step": False},
    not_sharded=_WHOLE_ROWS.format("transformers 5.23: mixed Tensor and DTensor"),
)
_TORCH = {
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": replace(_ADAMW, fixed={"fused": True}, is_fused=True),
    "sgd": Spec("torch.optim:SGD", floats(0), note=f"{_L2}; 4 bytes with optim_args momentum"),
    "adagrad": Spec("torch.optim:Adagrad", floats(1), has_plain_state=True, note=_L2),
    "rmsprop": Spec("torch.optim:RMSprop", floats(1), has_plain_state=True, note=_L2),
    "adafactor": _ADAFACTOR,
    "muon": Spec(
        "trainer.optim.muon:MuonWithAdamw",
        floats(2),
        takes=ADAM,
        extra_options=MUON_OPTIONS,
        prepare=lambda arguments, extra: arguments.update(extra),
        arrange=mark_hidden_matrices,
        target_bytes=lambda shape, rank: 4 * math.prod(shape),
        note="hidden matrices by Muon (4 bytes), everything else by AdamW (8 bytes); gathers one matrix at a time",
    ),
    "lomo": Spec(
        "torch.optim:SGD",
        floats(0),
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


def _bitsandbytes(cls: str, state_bytes: Callable[[Shape], int], bits: int, **more: Any) -> Spec:
    fixed = {"optim_bits": bits, **more.pop("fixed", {})}
    note = "8-bit state resumes at the same world size only" if bits == 8 else ""
    note = "; ".join(filter(None, [more.pop("note", ""), note]))
    return Spec(
        f"bitsandbytes.optim:{cls}",
        state_bytes,
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


_BNB_ADAMW = _bitsandbytes("AdamW", floats(2), 32, takes=ADAM)
_BNB_ADAMW_8BIT = _bitsandbytes("AdamW", blocks(2), 8, takes=ADAM)
_ADEMAMIX: dict[str, Any] = {"takes": ADAM, "extra_options": {"beta3": 0.9999}, "prepare": _third_beta}
_BNB_ADEMAMIX = _bitsandbytes("AdEMAMix", floats(3), 32, **_ADEMAMIX)
_BNB_ADEMAMIX_8BIT = _bitsandbytes("AdEMAMix", blocks(3), 8, **_ADEMAMIX)
_BNB_LION = _bitsandbytes("Lion", floats(1), 32, takes=("betas",))
_BNB_LION_8BIT = _bitsandbytes("Lion", blocks(1), 8, takes=("betas",))
_BNB_RMSPROP = _bitsandbytes("RMSprop", floats(1), 32, note=_L2)
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
    "rmsprop_bnb_8bit": _bitsandbytes("RMSprop", blocks(1), 8, note=_L2),
}
_TORCHAO = Spec(
    "torchao.optim:AdamW8bit",
    blocks(2),
    package="torchao",
    takes=ADAM,
    mixins=(TorchaoState,),
    note="compiles on its first step; resumes at the same world size only",
)
_GALORE = Spec(
    "galore_torch:GaLoreAdamW",
    floats(2),
    package="galore-torch",
    licence="Apache-2.0",
    takes=ADAM,
    fixed={"no_deprecation_warning": True},
    mixins=(GaloreState,),
    target_options={"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    target_bytes=_low_rank(floats(2)),
    not_sharded="galore-torch 1.0 takes the SVD of whole gradients",
    note="unmaintained since 2024",
)
_GALORE_ADAFACTOR = replace(
    _GALORE,
    path="galore_torch:GaLoreAdafactor",
    state_bytes=_factored,
    takes=(),
    fixed=_ADAFACTOR.fixed,
    target_bytes=_low_rank(_factored),
)
_GALORE_8BIT = replace(
    _GALORE,
    path="galore_torch:GaLoreAdamW8bit",
    state_bytes=blocks(2),
    fixed={},
    target_bytes=_low_rank(blocks(2)),
    not_on_cpu="galore-torch 1.0 calls torch.cuda.synchronize in every step",
)
_APOLLO = Spec(
    "apollo_torch:APOLLOAdamW",
    floats(2),
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
    target_bytes=_low_rank(floats(2)),
    not_sharded="apollo-torch 1.0.3 mixes Tensor and DTensor",
)
_SCHEDULE_FREE = Spec(
    "schedulefree:AdamWScheduleFree",
    floats(2),
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
    "adamw_torch_4bit": replace(_TORCHAO, path="torchao.optim:AdamW4bit", state_bytes=blocks(2, bits=4, size=128)),
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
        floats(3),
        package="grokadamw",
        licence="MIT",
        takes=ADAM,
        mixins=(GrokadamwState,),
        note="alpha release of 2024; keeps its state on the CPU; clips each parameter's gradient by itself",
    ),
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_radam": replace(_SCHEDULE_FREE, path="schedulefree:RAdamScheduleFree"),
    "schedule_free_sgd": replace(_SCHEDULE_FREE, path="schedulefree:SGDScheduleFree", state_bytes=floats(1), takes=()),
    "stable_adamw": Spec("optimi:StableAdamW", floats(2), package="torch-optimi", licence="MIT", takes=ADAM),
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
