"""The options, in small groups: what a part of the trainer needs is its group and no more.

Fields carry the names of transformers' TrainingArguments wherever the meaning is the same. Only declarations stand
here, and what one group says by itself; what two options may not say together is in `training.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.fields import option
from trainer.errors import UsageError

INT32 = 2**31 - 1  # lengths of samples and borders in a pack are 32 bits wide
SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # values of lr_scheduler_type
LARGEST_SEED = 2**32 - 1  # of numpy's global generator


@dataclass
class ExportArguments:
    """Output and exports."""

    output_dir: str = option("outputs", "Folder of everything that the run writes.", at_resume="free")
    overwrite_output_dir: bool = option(False, "Start afresh in a folder that already holds a run.", at_resume="free")
    min_samples_per_checkpoint: int | None = option(
        None, "Export Hugging Face weights each time so many samples were trained.", above=0, at_resume="free"
    )
    export_at_epoch: bool = option(False, "Export Hugging Face weights after each epoch.", at_resume="free")
    export_best: bool = option(
        False, "Export Hugging Face weights whenever metric_for_best_model improves.", at_resume="free"
    )
    export_final: bool = option(True, "Export Hugging Face weights after the last step.", at_resume="free")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Type of exported weights; by default the type in which the model was stored.", at_resume="free"
    )


@dataclass
class ModelArguments:
    """Model and tokenizer."""

    model_name_or_path: str | None = option(None, "Folder or hub name of the model to fine-tune.", at_resume="free")
    model_config: str | None = option(
        None, "A config.json, or its folder, to start from random weights instead.", at_resume="free"
    )
    tokenizer_name_or_path: str | None = option(
        None, "Folder or hub name of the tokenizer, if not the model's own.", at_resume="free"
    )
    trust_remote_code: bool = option(
        False, "Run code that comes with the model. Only for sources you trust.", at_resume="free"
    )
    attn_implementation: str = option("auto", "auto, packed_sdpa, varlen, flash_attention_2 or sdpa.")
    bf16: bool = option(False, "Compute in bfloat16; master weights, gradients summed and optimizer stay in float32.")
    fp16: bool = option(False, "Compute in float16 with a scaled loss, where the GPU has no bfloat16.")
    tf32: bool | None = option(
        None, "Let float32 products on the GPU keep 10 bits of mantissa; by default torch's way."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in backward to save memory.", at_resume="free")
    gradient_checkpointing_keeps: Literal["nothing", "products"] = option(
        "nothing",
        "What of a block is not recomputed: nothing; or products, of matrices and attention, which cost most.",
        at_resume="free",
    )
    gradient_checkpointing_kwargs: dict[str, Any] = option({}, "Settings of torch.utils.checkpoint, as JSON.")
    torch_compile: bool = option(False, "Compile each transformer block.", at_resume="free")
    torch_compile_backend: str | None = option(None, "Compiler to use, if not torch's own.", at_resume="free")
    torch_compile_mode: str | None = option(None, "Mode of torch's compiler.", at_resume="free")
    neftune_noise_alpha: float | None = option(None, "Strength of the noise that NEFTune adds to embeddings.", above=0)
    use_liger_kernels: bool = option(False, "Use Liger's fused kernels (GPU only).")
    freeze_patterns: list[str] = option([], "Regular expressions; parameters whose name matches one are not trained.")


@dataclass
class OsftArguments:
    """Orthogonal subspace fine-tuning."""

    osft: bool = option(False, "Train weight matrices only where their largest singular values do not reach.")
    osft_unfreeze_rank_ratio: float | None = option(
        None,
        "Share of a matrix's singular directions that trains, the smallest ones; 0 none, 1 all.",
        minimum=0,
        maximum=1,
    )
    osft_target_patterns: list[str] = option(
        [], "Regular expressions on names of modules to split; by default every linear layer of the blocks."
    )
    osft_rank_ratios: dict[str, float] = option(
        {}, "Other ratios for modules whose name matches a pattern, as JSON; the last that matches counts."
    )
    osft_train_patterns: list[str] = option(
        [], "Regular expressions on names of parameters that train beside the split matrices; by default none does."
    )
    osft_adaptive_samples: int | None = option(
        None, "Give more important blocks a smaller ratio, measured on so many training samples.", above=0
    )
    osft_svd_dtype: Literal["float32", "float64"] = option("float32", "Format of the singular value decompositions.")
    osft_leak_limit: float = option(
        1e-4, "Stop when more of an update lies in what is protected.", above=0, below=math.inf
    )


@dataclass
class LoraArguments:
    """Low-rank adapters (LoRA), by PEFT."""

    lora_rank: int | None = option(
        None, "Train adapters of this rank and nothing else of the model (docs/lora.md); 16 is a good start.", above=0
    )
    lora_alpha: int | None = option(
        None, "The adapters' output counts alpha / rank times; by default twice the rank.", above=0
    )
    lora_dropout: float = option(0.0, "Dropout of the adapters' inputs.", minimum=0, below=1)
    lora_target_modules: None | str | list[str] = option(
        None, "Names of modules to adapt or their ends, or one regular expression; by default all-linear, without head."
    )
    lora_use_rslora: bool = option(False, "Scale by alpha over the root of the rank (rank-stabilised LoRA).")
    lora_use_dora: bool = option(False, "Train the magnitude of each weight's rows, too (DoRA); slower.")
    lora_init: str = option("default", "First values of the adapters: default (Kaiming), gaussian or orthogonal.")


@dataclass
class DataArguments:
    """Training and validation data."""

    data_path: None | str | list[str] = option(
        None,
        "Messages, prompt/completion, text or token ids: files, a glob, a folder, hf://datasets/NAME (docs/data.md).",
        at_resume="free",
    )
    data_mixture: list[dict[str, Any]] = option(
        [], "Sources with path, name, weight or repeat, train_on, chat_template ..., as JSON; instead of data_path."
    )
    mixture_unit: Literal["samples", "tokens"] = option("samples", "What the weights of a mixture are shares of.")
    mixture_stop: Literal["first_exhausted", "all_exhausted"] = option(
        "first_exhausted",
        "An epoch of a weighted mixture ends when the first source is used up, or repeats sources until all are.",
    )
    data_format: Literal["sharegpt", "alpaca"] | None = option(
        None, "Format of another trainer that the rows are in.", at_resume="free"
    )
    columns: dict[str, str] = option(
        {}, "Columns in which fields stand: messages=conversations, or as JSON.", at_resume="free"
    )
    dataset_split: str | None = option(
        None, "Split of a data set on the hub or saved by datasets; by default train.", at_resume="free"
    )
    dataset_revision: str | None = option(None, "Revision of a data set on the hub.", at_resume="free")
    on_broken: Literal["error", "drop"] = option("error", "What to do with rows that cannot be used.", at_resume="free")
    on_overlap: Literal["warn", "error"] = option(
        "warn", "What to do where held-out samples are trained on as well.", at_resume="free"
    )
    validation_data_path: None | str | list[str] = option(
        None, "Held-out data in the same form as data_path.", at_resume="free"
    )
    validation_split: float = option(0.0, "Fraction of the documents held out for evaluation.", minimum=0, below=1)
    train_on: Literal["assistant", "all", "last"] = option(
        "assistant", "Which turns are trained: every assistant turn, all turns, or the last assistant turn."
    )
    chat_template: str | None = option(
        None, "A Jinja file to use instead of the tokenizer's own chat template.", at_resume="free"
    )
    chat_template_kwargs: dict[str, Any] = option(
        {}, 'Variables of the chat template, as JSON: {"enable_thinking": false}, for instance.'
    )
    split_chats: bool = option(
        True, "Make several samples of a chat whose turns the template writes otherwise once it goes on."
    )
    on_open_turn: Literal["close", "error"] = option(
        "close", "What to do where the template writes no end token after the last turn: append it, or refuse."
    )
    max_length: int | None = option(
        None, "Longest sample allowed, in tokens; by default the token budget.", above=0, maximum=INT32
    )
    overlong: Literal["error", "drop", "truncate", "split"] = option("error", "What to do with longer samples.")
    on_untrainable: Literal["error", "drop"] = option("error", "What to do with samples without a trained token.")
    block_size: int | None = option(
        None, "Pretraining: join documents with EOS, cut blocks of so many tokens.", above=1, maximum=INT32
    )
    dataset_num_proc: int | None = option(
        None, "Processes that tokenize; by default one per core.", above=0, at_resume="free"
    )
    data_cache_dir: str | None = option(
        None, "Where prepared data is kept; by default ~/.cache/trainer/prepared.", at_resume="free"
    )


@dataclass
class BatchArguments:
    """Global batch and token budget."""

    batch_size: int = option(64, "Samples per optimizer step, over all ranks.", above=0, maximum=INT32)
    max_tokens_per_rank: int = option(
        8192, "Token budget of one rank in one micro-batch.", above=0, maximum=INT32, at_resume="free"
    )
    packing_cost: Literal["attention", "tokens"] = option(
        "attention", "What packing balances over ranks: tokens plus squared lengths, or tokens alone.", at_resume="free"
    )
    label_smoothing_factor: float = option(0.0, "Share of the target spread over the vocabulary.", minimum=0, below=1)


@dataclass
class LoaderArguments:
    """Batches of custom data sets; token data is packed instead."""

    per_device_train_batch_size: int = option(8, "Samples of one rank in one micro-batch.", above=0, maximum=INT32)
    per_device_eval_batch_size: int = option(
        8, "Samples of one rank in one evaluation batch.", above=0, maximum=INT32, at_resume="free"
    )
    gradient_accumulation_steps: int = option(1, "Micro-batches of one rank in one optimizer step.", above=0)
    average_tokens_across_devices: bool = option(True, "Count the labels of a step over all ranks, not on each alone.")
    dataloader_drop_last: bool = option(False, "Leave out the samples of an epoch that do not fill a micro-batch.")
    dataloader_num_workers: int = option(
        0, "Processes that read and collate; 0 does it in the training process.", minimum=0, at_resume="free"
    )
    dataloader_pin_memory: bool = option(
        True, "Collate into page-locked memory where there is a GPU.", at_resume="free"
    )
    dataloader_persistent_workers: bool = option(False, "Keep those processes from epoch to epoch.", at_resume="free")
    dataloader_prefetch_factor: int | None = option(
        None, "Batches that each process reads ahead.", above=0, at_resume="free"
    )
    remove_unused_columns: bool = option(True, "Leave out columns that the model's forward does not take.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = option(
        "random", "Order of training samples; group_by_length draws batches of like lengths."
    )
    length_column_name: str = option("length", "Column with the lengths, for group_by_length, where there is one.")
    auto_find_batch_size: bool = option(False, "Where memory runs out, start again with smaller micro-batches.")
    label_names: list[str] | None = option(None, "Columns that are labels; by default those of the model's forward.")


@dataclass
class OptimizerArguments:
    """Optimizer."""

    optim: str = option("adamw_torch_fused", "Name of the optimizer (docs/optimizers.md), or your own as module:Class.")
    optim_args: str | None = option(None, "Its further settings, as name=value, name=value.")
    optim_target_modules: None | str | list[str] = option(
        None, "GaLore, APOLLO: the matrices in low rank: all-linear, a regular expression, or a list of names."
    )
    optim_groups: dict[str, Any] = option(
        {}, "Own learning_rate, weight_decay by regular expression on parameter names, or by embeddings, head; as JSON."
    )
    optim_bf16_state: bool = option(False, "Keep the optimizer's state in bfloat16, rounded at random.")
    learning_rate: float = option(5e-5, "Peak learning rate.", minimum=0, below=math.inf)
    weight_decay: float = option(
        0.0, "Decoupled weight decay; never applied to norms and biases.", minimum=0, below=math.inf
    )
    adam_beta1: float = option(0.9, "Decay of AdamW's first moment.", minimum=0, below=1)
    adam_beta2: float = option(0.999, "Decay of AdamW's second moment.", minimum=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", above=0, below=math.inf)
    max_grad_norm: float = option(1.0, "Clip the global gradient norm to this; 0 never clips.", minimum=0)


@dataclass
class ScheduleArguments:
    """Length of training and learning-rate schedule."""

    num_train_epochs: float = option(3.0, "Passes over the data, fractions allowed; inf never stops.", above=0)
    max_steps: int = option(-1, "Stop after so many optimizer steps, whatever num_train_epochs says.", minimum=-1)
    max_tokens: int | None = option(None, "Stop once so many loss tokens were trained.", above=0, maximum=2**62)
    max_samples: int | None = option(None, "Stop once so many samples were trained.", above=0, maximum=2**62)
    lr_scheduler_type: str = option("linear", "Name of one of transformers' schedules.")
    lr_scheduler_kwargs: dict[str, Any] = option({}, "Extra settings of the schedule, as JSON.")
    warmup_steps: float = option(0, "Steps of warm-up; below 1 a share of all steps.", minimum=0, below=math.inf)

    def get_warmup_steps(self, num_training_steps: int | None) -> int:
        """Return warm-up in steps, of so many that are trained (None: endlessly); a share of them is rounded up."""
        if self.warmup_steps >= 1 or self.warmup_steps == 0:
            return int(self.warmup_steps)
        if num_training_steps is None:
            raise UsageError(f"warmup_steps = {self.warmup_steps} is a share of all steps, but training never ends")
        return math.ceil(self.warmup_steps * num_training_steps)


@dataclass
class EvaluationArguments:
    """Evaluation on held-out data."""

    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "When to evaluate during training.")
    eval_steps: float | None = option(
        None, "Steps between evaluations; below 1 a share of all steps; by default logging_steps.", above=0
    )
    min_samples_per_evaluation: int | None = option(None, "Evaluate each time so many samples were trained.", above=0)
    eval_on_start: bool = option(False, "Evaluate before the first step.")
    eval_delay: float = option(0, "Steps, or epochs with eval_strategy=epoch, before the first evaluation.", minimum=0)
    eval_at_end: bool = option(False, "Evaluate after the last step; with eval_strategy=steps that is always done.")
    metric_for_best_model: str = option("loss", "Evaluation metric that tells the best model.")
    metric_improvement_threshold: float = option(
        0.0, "By how much that metric must be better than the best so far to be the best.", minimum=0, below=math.inf
    )
    greater_is_better: bool | None = option(None, "Whether more of that metric is better; by default not for a loss.")
    eval_exact_match: bool = option(False, "Answer held-out chats greedily and count exact answers at each evaluation.")
    score_answers: list[str] = option(
        [],
        "Scores of generated answers to held-out chats at each evaluation: exact_match, contains, regex, numeric, "
        "json_equal, rouge_l, or module:function of your own.",
    )
    num_generation_samples: int = option(0, "Held-out chats whose answers are shown before and after.", minimum=0)
    generation_max_new_tokens: int = option(128, "Longest generated answer, in tokens.", above=0)


@dataclass
class PredictionArguments:
    """Evaluation and prediction of custom data sets."""

    prediction_loss_only: bool = option(False, "Measure the loss alone, and keep no predictions.")
    include_for_metrics: list[str] = option([], "What compute_metrics sees besides: inputs, loss.")
    batch_eval_metrics: bool = option(False, "Call compute_metrics for each batch, with compute_result at the last.")
    eval_do_concat_batches: bool = option(True, "Join predictions into one array; else a list has one for each batch.")
    eval_accumulation_steps: int | None = option(
        None,
        "Batches after which predictions move from the GPU to main memory; by default at the end.",
        above=0,
        at_resume="free",
    )
    bf16_full_eval: bool = option(False, "Hold the weights in bfloat16 while evaluating; they come back unchanged.")
    fp16_full_eval: bool = option(False, "Hold the weights in float16 while evaluating; they come back unchanged.")


@dataclass
class CheckpointArguments:
    """Checkpoints and resuming."""

    save_strategy: Literal["no", "steps", "epoch", "best", "signal"] = option(
        "steps",
        "When to save the full state: every save_steps and at the end, ...; on signals too, unless no.",
        at_resume="free",
    )
    save_steps: float = option(
        500,
        "Steps between checkpoints, with save_strategy=steps; below 1 a share of all steps.",
        above=0,
        at_resume="free",
    )
    min_samples_per_full_checkpoint: int | None = option(
        None, "Save the full state each time so many samples were trained, too.", above=0, at_resume="free"
    )
    save_total_limit: int | None = option(
        None, "Keep so many checkpoints, the best and the newest; with 1, both.", above=0, at_resume="free"
    )
    save_only_model: bool = option(False, "Save weights without what a resumed run needs.", at_resume="free")
    async_save: bool | None = option(
        None,
        "Write checkpoints beside training, which waits only for a copy in memory; by default with token data.",
        at_resume="free",
    )
    load_best_model_at_end: bool = option(False, "Save the best model, and end with its weights.", at_resume="free")
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint to go on from; auto: the newest whole one in output_dir, or from the start if none.",
        at_resume="free",
    )
    allow_change: list[str] = option(
        [], "Options (or data, eval_data, tokenizer, callbacks) that a resume may change.", at_resume="free"
    )
    non_finite: Literal["stop", "skip"] = option(
        "stop", "When loss or gradient is NaN or infinite: stop, or leave that step out and go on.", at_resume="free"
    )


@dataclass
class LoggingArguments:
    """Logging and progress."""

    logging_strategy: Literal["no", "steps", "epoch"] = option(
        "steps", "When callbacks and log history get a line.", at_resume="free"
    )
    logging_steps: float = option(
        10,
        "Steps between two such lines; below 1 a share of all steps; metrics.jsonl has every step.",
        above=0,
        at_resume="free",
    )
    logging_first_step: bool = option(False, "Log the first step too.", at_resume="free")
    logging_nan_inf_filter: bool = option(
        True,
        "Leave the losses of steps that non_finite=skip left out out of the logged mean; else they show in it.",
        at_resume="free",
    )
    include_num_input_tokens_seen: Literal["no", "all", "non_padding"] = option(
        "no", "Add to each line the number of input tokens so far, with or without padding."
    )
    report_to: str | list[str] = option(
        "none",
        "Experiment trackers: tensorboard, wandb, mlflow or another that transformers knows; all; none.",
        at_resume="free",
    )
    run_name: str | None = option(None, "Name of the run in the trackers.", at_resume="free")
    project: str = option("huggingface", "Project of the run, for trackio.", at_resume="free")
    trackio_space_id: str | None = option(None, "Space that shows the run, for trackio.", at_resume="free")
    trackio_bucket_id: str | None = option(None, "Bucket of that space, for trackio.", at_resume="free")
    trackio_static_space_id: str | None | Literal[False] = option(
        None, "Static copy of that space, for trackio; false: none.", at_resume="free"
    )
    disable_tqdm: bool = option(False, "Plain lines instead of a progress bar.", at_resume="free")


@dataclass
class HubArguments:
    """Hugging Face hub."""

    push_to_hub: bool = option(False, "Push each export to the hub, with a model card.", at_resume="free")
    hub_model_id: str | None = option(
        None, "Repository on the hub; by default the name of output_dir.", at_resume="free"
    )
    hub_token: str | None = option(
        None, "Token that may write there; by default that of `hf auth login`.", is_secret=True, at_resume="free"
    )
    hub_private_repo: bool | None = option(
        None, "Whether a new repository, or trackio's space, is private.", at_resume="free"
    )
    hub_revision: str | None = option(None, "Branch of the repository; by default main.", at_resume="free")


@dataclass
class MachineArguments:
    """Seeds and machine."""

    seed: int = option(42, "Seed of weights, data order and dropout.", minimum=0, maximum=LARGEST_SEED)
    data_seed: int | None = option(
        None, "Seed of the data order alone; by default seed.", minimum=0, maximum=LARGEST_SEED
    )
    full_determinism: bool = option(False, "Refuse operations that are not reproducible on the GPU; slower.")
    skip_memory_metrics: bool = option(
        True, "Leave out the memory used by each stage, which costs time to watch.", at_resume="free"
    )
    use_cpu: bool = option(False, "Stay on the CPU although a GPU is there.", at_resume="free")
    replicate: int = option(
        1,
        "Copies of the sharded model: ranks are divided into so many neighbouring groups, and each holds all weights.",
        minimum=1,
        at_resume="free",
    )
    ddp_timeout: int = option(
        1800, "Seconds a rank waits for the others before the job ends.", above=0, maximum=INT32, at_resume="free"
    )


@dataclass
class ScriptArguments:
    """For scripts; the Trainer itself reads none of it."""

    do_train: bool = option(False, "For scripts: whether to train.", at_resume="free")
    do_eval: bool = option(False, "For scripts: whether to evaluate.", at_resume="free")
    do_predict: bool = option(False, "For scripts: whether to predict.", at_resume="free")


@dataclass
class GenerationArguments:
    """Generated predictions."""

    predict_with_generate: bool = option(False, "Predict what the model generates, not its logits.")
    generation_max_length: int | None = option(
        None, "Longest answer in tokens, its first one included; by default that of the generation config.", above=0
    )
    generation_num_beams: int | None = option(None, "Beams; by default those of the generation config.", above=0)
    generation_config: str | Any = option(
        None, "A GenerationConfig, or folder, file or hub name of one, for the model."
    )


GROUPS = (
    ExportArguments,
    ModelArguments,
    OsftArguments,
    LoraArguments,
    DataArguments,
    BatchArguments,
    LoaderArguments,
    OptimizerArguments,
    ScheduleArguments,
    EvaluationArguments,
    CheckpointArguments,
    PredictionArguments,
    LoggingArguments,
    HubArguments,
    MachineArguments,
    ScriptArguments,
)

IN_ORDER_OF_USE = (  # of the help and the documentation; above is the order of positional arguments
    ModelArguments,
    DataArguments,
    BatchArguments,
    ScheduleArguments,
    OptimizerArguments,
    LoraArguments,
    OsftArguments,
    EvaluationArguments,
    CheckpointArguments,
    ExportArguments,
    LoggingArguments,
    MachineArguments,
    HubArguments,
    LoaderArguments,
    PredictionArguments,
    ScriptArguments,
)
