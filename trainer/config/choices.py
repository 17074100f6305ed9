"""Names that options may have, as text: a wrong one, or a missing package, is found before torch is imported.

Tests hold these tables against the optimizer registry and against the installed transformers.
"""

from __future__ import annotations

import importlib.util

from trainer.config.suggest import one_of
from trainer.errors import MissingPackageError, UsageError

OPTIMIZERS: dict[str, str | None] = {  # name -> module of the package that it needs beside torch and transformers
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor", "muon")),
    **dict.fromkeys(("lomo", "adalomo")),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), "bitsandbytes"),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), "bitsandbytes"),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), "bitsandbytes"),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"), "bitsandbytes"),
    **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "torchao"),
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor"), "galore_torch"),
    **dict.fromkeys(("galore_adamw_layerwise", "galore_adamw_8bit_layerwise"), "galore_torch"),
    "galore_adafactor_layerwise": "galore_torch",
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), "apollo_torch"),
    "grokadamw": "grokadamw",
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), "schedulefree"),
    "stable_adamw": "optimi",
}
GONE = ("adamw_anyprecision", "adamw_torch_xla", "adamw_torch_npu_fused")  # the registry says why
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)
RESEARCH = ("galore_torch", "apollo_torch", "grokadamw")  # not in the extra `optimizers`: see pyproject.toml
TRACKERS = ("tensorboard", "wandb", "mlflow")  # each is a module, and an extra


def check_choices(optim: str, lr_scheduler_type: str, report_to: list[str], use_liger_kernels: bool) -> None:
    """Raise where an optimizer or a schedule is unknown, or a package that an option needs is not installed.

    Raises:
        UsageError: there is no such name.
        MissingPackageError: the message holds the `pip install`.
    """
    if lr_scheduler_type not in SCHEDULES:
        raise UsageError(one_of("lr_scheduler_type", lr_scheduler_type, SCHEDULES))
    if ":" not in optim and optim not in (*OPTIMIZERS, *GONE):
        raise UsageError(one_of("optim", optim, OPTIMIZERS, ", or your own as module:Class"))
    module = OPTIMIZERS.get(optim)
    if module is not None:
        check_installed(f"optim = {optim!r}", module, "research-optimizers" if module in RESEARCH else "optimizers")
    for name in report_to:
        if name in TRACKERS:
            check_installed(f"report_to = {name!r}", name, name)
    if use_liger_kernels:
        check_installed("use_liger_kernels", "liger_kernel", "gpu")


def check_installed(option: str, module: str, extra: str) -> None:
    """Raise MissingPackageError where a module is not installed, with the extra of ours that brings it."""
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError.in_extra(f"{option} needs the package {module}, which is not installed", extra)
