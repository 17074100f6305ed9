"""What transformers' Trainer has and this one has not, by name, and what to use instead.

Asking a Trainer for one of these names is an error that says so. So is overriding one, since nothing would call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.errors import UsageError

_LOOP = "the loop is trainer.training.loop; callbacks, training_step and compute_loss change what it does"
_BATCHES = "override get_train_dataloader, or give data_collator; micro-batches are gathered and counted by the loop"
_LOADERS = "override get_train_dataloader or get_eval_dataloader"
_CHECKPOINTS = "checkpoints are written by trainer.checkpoint; a callback's on_save is told of each"
_ENGINE = "weights are sharded by FSDP2 over all ranks, and nothing else is parallel"
_SCRIPTS = "options and the schedule say it: trainer.state has max_steps, num_train_epochs and train_batch_size"

UNSUPPORTED = {
    "autocast_smart_context_manager": "use compute_loss_context_manager",
    "create_accelerator_and_postprocess": "there is no accelerate underneath",
    "get_batch_samples": _BATCHES,
    "get_cp_size": _ENGINE,
    "get_sp_size": _ENGINE,
    "get_tp_size": _ENGINE,
    "set_initial_training_values": _SCRIPTS,
    "store_flos": "state.total_flos grows with every step",
    "deepspeed": _ENGINE,
    "label_smoother": "label_smoothing_factor says it; compute_loss smooths",
    "propagate_args_to_deepspeed": _ENGINE,
    "current_gradient_accumulation_steps": "args.gradient_accumulation_steps says it; the loop divides",
    "_build_accelerator_args": "there is no accelerate underneath",
    "_determine_best_metric": "metric_for_best_model and greater_is_better say it",
    "_evaluate": "override evaluate",
    "_finalize_training": _LOOP,
    "_finish_current_push": "exports are pushed as they are made: see push_to_hub",
    "_get_collator_with_removed_columns": "remove_unused_columns says it",
    "_get_dataloader": _LOADERS,
    "_get_grad_norm": "the loop measures it; max_grad_norm clips",
    "_get_learning_rate": "use get_learning_rates",
    "_get_output_dir": "args.output_dir says it",
    "_has_mixed_mesh_grads": _ENGINE,
    "_hp_search_setup": "override model_init, or call hyperparameter_search",
    "_init_training_state": _LOOP,
    "_issue_warnings_after_load": _CHECKPOINTS,
    "_move_model_to_device": _ENGINE,
    "_prepare_context_parallel_inputs": _ENGINE,
    "_prepare_for_training": _LOOP,
    "_report_to_hp_search": "hyperparameter_search reports each evaluation",
    "_save_scaler": _CHECKPOINTS,
    "_track_num_input_tokens": "include_num_input_tokens_seen says it",
    "_validate_args": "TrainingArguments checks itself",
    "_clip_grad_norm": "max_grad_norm says it; on_pre_optimizer_step comes after clipping",
    "_get_eval_sampler": _LOADERS,
    "_get_num_items_in_batch": _BATCHES,
    "_get_train_sampler": _LOADERS + ", or say train_sampling_strategy",
    "_inner_training_loop": _LOOP,
    "_load_best_model": _CHECKPOINTS,
    "_load_from_checkpoint": _CHECKPOINTS,
    "_load_optimizer_and_scheduler": _CHECKPOINTS,
    "_load_rng_state": _CHECKPOINTS,
    "_maybe_log_save_evaluate": _LOOP,
    "_prepare_input": "use _prepare_inputs",
    "_push_from_checkpoint": "exports are pushed as they are made: see push_to_hub",
    "_remove_unused_columns": "remove_unused_columns says it",
    "_run_epoch": _LOOP,
    "_save": "override save_model",
    "_save_checkpoint": _CHECKPOINTS,
    "_save_optimizer_and_scheduler": _CHECKPOINTS,
    "_save_rng_state": _CHECKPOINTS,
    "_set_signature_columns_if_needed": "remove_unused_columns keeps what the model's forward takes",
    "_wrap_model": _ENGINE,
}
NEVER_CALLED = {  # by the trainer; scripts may call them
    "floating_point_ops": "state.total_flos counts 6 for each parameter and token",
    "get_decay_parameter_names": "optim_groups says what decays; or override create_optimizer",
    "get_optimizer_cls_and_kwargs": "give optimizer_cls_and_kwargs, or override create_optimizer",
    "get_total_train_batch_size": _SCRIPTS,
    "is_local_process_zero": _ENGINE,
    "is_world_process_zero": _ENGINE,
    "num_examples": _SCRIPTS,
}


def check_overrides(kind: type, attributes: Mapping[str, Any]) -> None:
    """Raise UsageError where something overrides what nothing calls.

    Args:
        kind: the class of a Trainer; its bases and mixins are looked at too, and what was assigned to ours.
        attributes: what was assigned to the object.
    """
    for name, instead in (UNSUPPORTED | NEVER_CALLED).items():
        owners = [f"{base.__qualname__}.{name}" for base in kind.__mro__ if _is_override(vars(base).get(name))]
        if name in attributes:
            owners.insert(0, f"{kind.__qualname__} object's {name}")
        if owners:
            raise UsageError(f"{owners[0]} would never be called by this Trainer: {instead}")


def _is_override(value: Any) -> bool:
    """Return whether a class attribute was written by a user, not by this package."""
    function = getattr(value, "__func__", value)
    return value is not None and not str(getattr(function, "__module__", "")).startswith("trainer.")
