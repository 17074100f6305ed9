"""transformers' TrainingArguments beside ours: which of its fields differ here or are missing, and what to use instead.

Plain text, no transformers imported. A test holds it against the installed transformers and docs/from-huggingface.md,
so that no field is forgotten: what stands in neither table is the same here as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NEVER = object()  # no value of the field says what happens here
_ENGINE = "weights are always sharded over all ranks by FSDP2; start one process per GPU with torchrun and leave it out"
_LOGS = "logging is yours to set up: logging.getLogger('trainer').setLevel(...)"


@dataclass(frozen=True)
class NotHere:
    """A field that our TrainingArguments lacks: the one value that may still be given, and what to use instead."""

    default: Any  # transformers' own, where that is what happens here
    instead: str
    also: tuple[Any, ...] = ()  # other values that may be given, since they make no difference

    @property
    def is_granted(self) -> bool:
        """Whether transformers' default says what happens here anyway, so that scripts may say it."""
        return self.default is not _NEVER

    def grants(self, value: object) -> bool:
        """Whether the value asks for nothing but that."""
        granted = (self.default, *self.also) if self.is_granted else self.also
        return any(type(value) is type(one) and value == one for one in granted)


NOT_HERE: dict[str, NotHere] = {
    "accelerator_config": NotHere(None, "there is no accelerate underneath"),
    "dataloader_in_order": NotHere(True, "batches always come in order: a run can be repeated"),
    "dataloader_multiprocessing_context": NotHere(None, "torch's default start method is used"),
    "ddp_backend": NotHere(None, "gloo on the CPU, nccl on GPUs"),
    "ddp_broadcast_buffers": NotHere(None, _ENGINE),
    "ddp_bucket_cap_mb": NotHere(None, _ENGINE),
    "ddp_find_unused_parameters": NotHere(None, "parameters without a gradient are always allowed; leave it out"),
    "ddp_static_graph": NotHere(None, _ENGINE),
    "debug": NotHere("", "a non-finite loss or gradient always ends the run, with the step's number", also=(None,)),
    "deepspeed": NotHere(None, _ENGINE),
    "eval_use_gather_object": NotHere(False, "predictions of any nesting are gathered as tensors", also=(True,)),
    "enable_jit_checkpoint": NotHere(_NEVER, "a signal always ends the run in order, after the running step"),
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
    "log_on_each_node": NotHere(_NEVER, "only the lead rank writes and reports"),
    "parallelism_config": NotHere(None, _ENGINE),
    "restore_callback_states_from_checkpoint": NotHere(
        _NEVER, "callbacks with a state always go on with it", also=(True,)
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
    "save_total_limit": "the best checkpoint stays beside so many of the newest",
}

ALIASES = {
    "max_tokens_per_gpu": "max_tokens_per_rank",
    "activation_checkpointing": "gradient_checkpointing",  # names that transformers 5 is moving to
    "use_liger_kernel": "use_liger_kernels",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

SEQ2SEQ = ("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config")
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
