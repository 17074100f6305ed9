"""What transformers' Trainer has and this one has not, by name: what to use instead.

Plain text. Asking a Trainer for one of these is an error that says it, and so is a subclass that overrides one, which
nothing would call.
"""

from __future__ import annotations

from trainer.errors import UsageError

_LOOP = "the loop is trainer.training.loop; callbacks, training_step and compute_loss change what it does"
_BATCHES = "override get_train_dataloader, or give data_collator; micro-batches are gathered and counted by the loop"
_LOADERS = "override get_train_dataloader or get_eval_dataloader"
_CHECKPOINTS = "checkpoints are written by trainer.checkpoint; a callback's on_save is told of each"
_ENGINE = "weights are sharded by FSDP2 over all ranks, and nothing else is parallel"
_SCRIPTS = "options and the schedule say it: trainer.state has max_steps, num_train_epochs and train_batch_size"

LEFT_OUT = {
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
    "_build_accelerator_args": "there is no accelerate underneath",
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
NEVER_CALLED = {"floating_point_ops": "state.total_flos counts 6 for each parameter and token"}  # but may be called


def check_overrides(kind: type) -> None:
    """Raise UsageError where a Trainer's subclass overrides what nothing calls."""
    for name, instead in (LEFT_OUT | NEVER_CALLED).items():
        if name in vars(kind):
            raise UsageError(f"{kind.__qualname__}.{name} would never be called by this Trainer: {instead}")
