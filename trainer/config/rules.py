"""Which options belong to which kind of data: token data, which is packed, or a user's own, which is batched.

An option of the other kind would have no effect, so it is an error that names the one that has. Knows nothing of data.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from trainer.errors import UsageError

DataKind = Literal["token data", "custom data set"]

_FROM_FILE = "it prepares the file named by data_path"
_ANSWERS = "give compute_metrics to Trainer"
_PLANNED = "micro-batches are planned from batch_size and max_tokens_per_rank"
_READ = "token data is memory-mapped and needs no reading ahead"
_LOSS_ALONE = "token data is evaluated in packs, for its loss and exact answers"
_COLUMNS = "token data has input_ids and labels, no other columns"

_WITH_ARTICLE = {"token data": "token data", "custom data set": "a custom data set"}
_FOREIGN: dict[DataKind, dict[str, str]] = {
    "custom data set": {
        "batch_size": "give per_device_train_batch_size and gradient_accumulation_steps",
        "max_tokens_per_rank": "give per_device_train_batch_size",
        "max_tokens": "give max_steps or max_samples",
        "packing_cost": "batches are dealt by the number of samples",
        "osft": "only the matrices of a language model on token data are split",
        "attn_implementation": "choose it when you build the model",
        "eval_exact_match": _ANSWERS,
        "num_generation_samples": _ANSWERS,
        "generation_max_new_tokens": _ANSWERS,
        **dict.fromkeys(("train_on", "chat_template", "max_length", "overlong", "on_untrainable"), _FROM_FILE),
        **dict.fromkeys(("block_size", "dataset_num_proc", "data_cache_dir"), _FROM_FILE),
    },
    "token data": {
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), _PLANNED),
        "per_device_eval_batch_size": "evaluation is planned from batch_size and max_tokens_per_rank",
        "average_tokens_across_devices": "labels are always counted over all ranks",
        "dataloader_drop_last": "every sample is trained once an epoch",
        **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory"), _READ),
        **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"), _READ),
        **dict.fromkeys(("prediction_loss_only", "include_for_metrics", "batch_eval_metrics"), _LOSS_ALONE),
        **dict.fromkeys(("eval_do_concat_batches", "eval_accumulation_steps"), _LOSS_ALONE),
        **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "bf16 evaluates in bfloat16 too"),
        **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name"), _COLUMNS),
        "train_sampling_strategy": "the order is random, and packing wastes nothing on padding",
        **dict.fromkeys(("do_train", "do_eval", "do_predict"), "scripts read it, not the Trainer"),
        "auto_find_batch_size": "lower max_tokens_per_rank where memory runs out; the step stays the same",
        "fp16": "give bf16",
        "neftune_noise_alpha": "its noise would depend on what a sample is packed with",
        "gradient_checkpointing_kwargs": "blocks are recomputed without reentrance",
        **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), "each block is compiled by torch's compiler"),
    },
}


def check_data_kind(args: Any, kind: DataKind) -> None:
    """Raise UsageError where an option is set that has no effect on this kind of data."""
    given = args.as_given()
    for field in dataclasses.fields(args):
        advice = _FOREIGN[kind].get(field.name)
        if advice is not None and given[field.name] != _default(field):
            raise UsageError(f"{field.name} has no effect on {_WITH_ARTICLE[kind]}: {advice}")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
