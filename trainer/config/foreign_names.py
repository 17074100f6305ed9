"""transformers' TrainingArguments beside ours: which of its fields differ here or are missing, and what to use instead.

Plain text, no transformers imported. A test holds it against the installed transformers and docs/from-huggingface.md,
so that no field is forgotten: what stands in neither table is the same here as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ENGINE = "weights are always sharded over all ranks by FSDP2; start one process per GPU with torchrun and leave it out"
_LOGS = "set logging.getLogger('trainer').setLevel(...), or --log-level on the command line"


@dataclass(frozen=True)
class NotHere:
    """A field that our TrainingArguments lacks: the values that may still be given, and what to use instead."""

    default: Any  # transformers' own, which may be given: scripts hand on all they have
    instead: str
    also: tuple[Any, ...] = ()  # other values that may be given, since they make no difference
    reads: Any = None  # what a script that asks reads, where that is not the default

    def granted(self, value: object) -> tuple[bool, Any]:
        """Return whether a value asks for nothing that does not happen anyway, and the value, read if it was text."""
        for one in (self.default, *self.also):
            words = ("", "none", "null") if one is None else (str(one).lower(),)
            is_same = type(value) is type(one) and value == one
            if is_same or (isinstance(value, str) and value.lower() in words):
                return True, one
        return False, value


NOT_HERE: dict[str, NotHere] = {
    "accelerator_config": NotHere(None, "there is no accelerate underneath"),
    "dataloader_in_order": NotHere(True, "batches always come in order: a run can be repeated"),
    "dataloader_multiprocessing_context": NotHere(None, "torch's default start method is used"),
    "ddp_backend": NotHere(None, "gloo on the CPU, nccl on GPUs"),
    "ddp_broadcast_buffers": NotHere(None, _ENGINE),
    "ddp_bucket_cap_mb": NotHere(None, _ENGINE),
    "ddp_find_unused_parameters": NotHere(
        None, "parameters without a gradient are always allowed; leave it out", also=(False, True)
    ),
    "ddp_static_graph": NotHere(None, _ENGINE),
    "debug": NotHere("", "a non-finite loss or gradient always ends the run, with the step's number", also=(None,)),
    "deepspeed": NotHere(None, _ENGINE),
    "eval_use_gather_object": NotHere(False, "predictions of any nesting are gathered as tensors", also=(True,)),
    "enable_jit_checkpoint": NotHere(
        False, "a signal always ends the run in order, after the running step", reads=True
    ),
    "fsdp": NotHere(None, _ENGINE),
    "fsdp_config": NotHere(None, _ENGINE),
    "hub_always_push": NotHere(False, "each push is waited for, none is left out", also=(True,)),
    "hub_strategy": NotHere("every_save", "each export is pushed; checkpoints are not", also=("end",)),
    "ignore_data_skip": NotHere(
        False, "a resumed run always goes on where it stopped, without reading what came before"
    ),
    "liger_kernel_config": NotHere(None, "use_liger_kernels takes the kernels that fit the model"),
    "local_rank": NotHere(-1, "ranks come from torchrun's environment"),
    "log_level": NotHere("passive", _LOGS),
    "log_level_replica": NotHere("warning", _LOGS),
    "log_on_each_node": NotHere(True, "only the main rank writes and reports", reads=False),
    "parallelism_config": NotHere(None, _ENGINE),
    "restore_callback_states_from_checkpoint": NotHere(
        False, "callbacks with a state always go on with it", also=(True,), reads=True
    ),
    "save_on_each_node": NotHere(False, "checkpoints go to one folder that all nodes see"),
    "sortish_sampler": NotHere(False, "evaluation keeps the order of the data set, training shuffles all of it"),
    "torch_empty_cache_steps": NotHere(None, "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True instead"),
    "use_cache": NotHere(False, "training never keeps keys and values"),
}

DIFFERENT: dict[str, str] = {
    "bf16_full_eval": "the weights come back as they were after each evaluation; also while training; on one rank only",
    "eval_steps": "where left out, logging_steps, as there; evaluations fall on whole steps",
    "fp16_full_eval": "the weights come back as they were after each evaluation; also while training; on one rank only",
    "include_for_metrics": "with batch_eval_metrics, inputs are the main input of all ranks, as without",
    "include_num_input_tokens_seen": "non_padding is an error where no mask or tokenizer tells what padding is",
    "logging_nan_inf_filter": "with non_finite=skip alone: a loss that is not finite ends the run otherwise",
    "logging_steps": "10 by default; metrics.jsonl has every step",
    "metric_for_best_model": "loss by default; a metric that is not measured is an error at the first evaluation",
    "output_dir": "outputs by default",
    "push_to_hub": "each export is pushed, and waited for",
    "resume_from_checkpoint": "train() goes on from it; there only scripts read it",
    "save_total_limit": "the best checkpoint is one of so many, and always stays: with 1 it stays beside the newest",
}

ALIASES = {
    "max_tokens_per_gpu": "max_tokens_per_rank",
    "activation_checkpointing": "gradient_checkpointing",  # names that transformers 5 is moving to
    "use_liger_kernel": "use_liger_kernels",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

WITH_VALUE = ("eval_strategy", "save_strategy", "logging_strategy", "lr_scheduler_type", "optim", "hub_strategy")
"""Options that are enums in transformers: scripts ask them for `.value`."""

LEFT_TO_SCRIPTS = (  # beside all of the groups DataArguments and LoraArguments
    *("model_name_or_path", "model_config", "tokenizer_name_or_path", "trust_remote_code", "attn_implementation"),
)
"""Options that HfArgumentParser does not see in TrainingArguments, so that they do not conflict with a script's own."""

SEQ2SEQ = ("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config")
RENAMED = {"min_samples_per_save": "min_samples_per_full_checkpoint"}
"""Former names of our own options, as older checkpoints record them."""

FORMER_NAMES = {  # of transformers before 5, which scripts still have
    "adafactor": "optim=adafactor",
    "evaluation_strategy": "eval_strategy",
    "fp16_backend": "fp16",
    "half_precision_backend": "fp16 or bf16",
    "logging_dir": "TENSORBOARD_LOGGING_DIR in the environment",
    "group_by_length": "train_sampling_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "save_safetensors": "weights are always in safetensors",
    "use_mps_device": "the device is found",
    "warmup_ratio": "warmup_steps, below 1",
}

_FOUR_BITS = (
    "quantised weights cannot be trained or adapted; with lora_rank and bf16 a model stored in bfloat16 stays so"
)
_ATTENTION = "attn_implementation, which is chosen by itself"
_PACKED = "samples are always packed, each seeing only itself"
OF_MINI_TRAINER = {  # flags of mini_trainer that are not supported -> what to do instead
    "serialized_callbacks": "pickled callbacks are never executed; give Trainer(callbacks=[...]) from Python",
}
OTHER_TOOLS = {  # names that other trainers give an option -> ours, or what to do
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "max_epochs": "num_train_epochs",
    "optimizer": "optim",
    "optimizer_type": "optim",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "gradient_clipping": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "num_warmup_steps": "warmup_steps",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "model_max_length": "max_length",
    "micro_batch_size": "max_tokens_per_rank",
    "train_batch_size": "batch_size",
    "effective_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "tokenizer": "tokenizer_name_or_path",
    "tokenizer_name": "tokenizer_name_or_path",
    "dataset": "data_path",
    "datasets": "data_path",
    "dataset_name": "data_path",
    "dataset_path": "data_path",
    "train_file": "data_path",
    "eval_data_path": "validation_data_path",
    "validation_file": "validation_data_path",
    "val_set_size": "validation_split",
    "val_size": "validation_split",
    "output": "output_dir",
    "precision": "bf16",
    "mixed_precision": "bf16",
    "torch_dtype": "bf16",
    "dtype": "bf16",
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "use_flash_attn": _ATTENTION,
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "padding_free": _PACKED,
    "use_liger": "use_liger_kernels",
    "liger_kernel": "use_liger_kernels",
    "wandb_project": "report_to=wandb, and WANDB_PROJECT in the environment",
    "resume": "resume_from_checkpoint",
    "nproc": "nproc_per_node",
    "num_gpus": "nproc_per_node",
    "gpus": "nproc_per_node",
    "verbose": "log_level",
    "load_in_4bit": _FOUR_BITS,
    "load_in_8bit": _FOUR_BITS,
    **OF_MINI_TRAINER,
    **dict.fromkeys(("use_peft", "use_lora", "lora", "lora_r", "adapter", "finetuning_type"), "lora_rank"),
    **dict.fromkeys(("lora_target", "lora_target_linear"), "lora_target_modules"),
    "use_rslora": "lora_use_rslora",
    "use_dora": "lora_use_dora",
    "init_lora_weights": "lora_init",
    "peft_config": "lora_rank and its like, or give Trainer the model that peft.get_peft_model returns",
    "lora_modules_to_save": "give Trainer the model that peft.get_peft_model returns",
    "lora_target_parameters": "give Trainer the model that peft.get_peft_model returns",
}

VALUES = {  # values that people try -> the ones meant
    "adam": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adamw_hf": "adamw_torch",
    "adam8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit",
    "cos": "cosine",
    "cosine_annealing": "cosine",
    "warmup": "constant_with_warmup",
}
