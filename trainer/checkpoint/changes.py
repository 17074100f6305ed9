"""What changed between the run that was saved and the one that goes on, by name, and what of it was allowed.

Owns which options may change freely: those that move no number beyond the order of a sum. Invariant: an option that
nobody thought of counts as harmful.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trainer.errors import UsageError

HARMLESS = frozenset(
    # where things lie; that they are the same things is checked by fingerprints
    ("output_dir", "overwrite_output_dir", "data_path", "validation_data_path", "data_cache_dir", "dataset_num_proc")
    + ("model_name_or_path", "model_config", "tokenizer_name_or_path", "trust_remote_code", "chat_template")
    # what is saved, shown and logged
    + ("save_strategy", "save_steps", "save_total_limit", "save_only_model", "async_save", "min_samples_per_save")
    + ("resume_from_checkpoint", "allow_change", "load_best_model_at_end")
    + ("min_samples_per_checkpoint", "export_at_epoch", "export_best", "export_final", "save_dtype")
    + ("logging_strategy", "logging_steps", "logging_first_step", "disable_tqdm", "report_to", "run_name")
    + ("logging_nan_inf_filter", "do_train", "do_eval", "do_predict")
    + ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision")
    # how ranks and memory are used: the same samples in every step, numbers up to the order of a sum
    + ("max_tokens_per_rank", "packing_cost", "use_cpu", "ddp_timeout")
    + ("torch_compile", "torch_compile_backend", "torch_compile_mode")
    + ("gradient_checkpointing", "gradient_checkpointing_keeps")
    + ("per_device_eval_batch_size", "eval_accumulation_steps", "non_finite")
    + ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory")
)


def find_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Name what differs, with both values; an option that only one of the two knows counts where it has a value."""
    names = [name for name in {**saved, **current} if name not in HARMLESS]
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
            f"{place} cannot be gone on with exactly: {listed}; set it back, or say allow_change={','.join(refused)}"
        )
