"""All rules about combinations of options: what has no effect beside what, what excludes what, what needs what.

One table for the options among themselves, one for those that a kind of data takes no notice of, one for commands,
which build everything from options. What one option may be by itself stands at the option.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.groups import SCHEDULES_BY_METRIC
from trainer.errors import UsageError

if TYPE_CHECKING:
    from trainer.config.arguments import TrainingArguments

DataKind = Literal["token data", "custom data set"]
# What else a resume may change.
IDENTITIES = ("data", "eval_data", "base_weights", "tokenizer", "callbacks", "unknown_options")


class CombinationError(UsageError):
    """Options contradict each other; `idle` names those that have no effect and may as well be left out."""

    def __init__(self, message: str, idle: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.idle = idle


@dataclass(frozen=True)
class Rule:
    """One rule: which options it is about, when it is broken, what to say then."""

    options: tuple[str, ...]  # applies where one of these is given; none: always
    is_broken: Callable[[Any], bool]
    text: str  # {option} stands for its value, {given} for those of `options` that are given
    details: Callable[[Any], str] = lambda args: ""  # stands for {details}
    leaves_idle: bool = False  # the options given are without effect, and may as well be left out


def no_effect(*options: str, unless: Callable[[Any], bool], why: str) -> Rule:
    """Options that do nothing unless something else is so."""
    return Rule(options, lambda args: not unless(args), f"{{given}} {{has}} no effect {why}", leaves_idle=True)


def needs(*options: str, unless: Callable[[Any], bool], what: str) -> Rule:
    """Options that cannot do their work unless something else is so, and are left idle without it."""
    return Rule(options, lambda args: not unless(args), f"{{given}} {{needs}} {what}", leaves_idle=True)


def exclude(first: str, second: str, about: str = "") -> Rule:
    """Two options of which one may be given."""
    return Rule(
        (),
        lambda args: bool(getattr(args, first) and getattr(args, second)),
        about or f"{first} and {second} exclude each other: give one",
    )


def wrong(is_broken: Callable[[Any], bool], text: str) -> Rule:
    """Values that are wrong beside each other."""
    return Rule((), is_broken, text)


_EVALUATIONS = "set eval_strategy or min_samples_per_evaluation"
_OSFT = (
    "osft_unfreeze_rank_ratio",
    "osft_target_patterns",
    "osft_rank_ratios",
    "osft_train_patterns",
    "osft_adaptive_samples",
    "osft_svd_dtype",
    "osft_leak_limit",
)
_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")


def _is_fraction_above_one(name: str) -> Callable[[Any], bool]:
    def is_broken(args: Any) -> bool:
        interval = getattr(args, name)
        return interval is not None and interval >= 1 and interval != int(interval)

    return is_broken


def _unknown_changes(args: Any) -> list[str]:
    known = {field.name for field in dataclasses.fields(args)} | set(IDENTITIES)
    return [name for name in args.allow_change if name not in known]


RULES: tuple[Rule, ...] = (
    # intervals
    *(
        wrong(
            _is_fraction_above_one(name),
            f"{name} = {{{name}}}: expected a whole number, or a share of all steps below 1",
        )
        for name in ("logging_steps", "eval_steps", "save_steps")
    ),
    wrong(
        lambda args: args.max_steps == 0,
        "max_steps = 0 would train nothing: give a positive number, or -1 for no limit",
    ),
    # evaluation
    wrong(
        lambda args: not {"inputs", "loss"}.issuperset(args.include_for_metrics),
        "include_for_metrics = {include_for_metrics}: allowed are inputs and loss",
    ),
    no_effect(
        "eval_steps",
        unless=lambda args: args.eval_strategy == "steps",
        why="with eval_strategy={eval_strategy}: say eval_strategy=steps",
    ),
    exclude("fp16_full_eval", "bf16_full_eval"),
    no_effect(
        "eval_delay",
        unless=lambda args: args.eval_strategy != "no",
        why="with eval_strategy=no: say steps or epoch",
    ),
    no_effect(
        "metric_improvement_threshold",
        "greater_is_better",
        "metric_for_best_model",
        unless=lambda args: args.does_evaluate,
        why=f"without evaluations: {_EVALUATIONS}",
    ),
    needs(
        "export_best",
        "load_best_model_at_end",
        unless=lambda args: args.does_evaluate,
        what=f"evaluations to choose by: {_EVALUATIONS}",
    ),
    wrong(
        lambda args: args.save_strategy == "best" and not args.does_evaluate,
        f"save_strategy=best needs evaluations to choose by: {_EVALUATIONS}",
    ),
    # model and data
    exclude(
        "model_name_or_path",
        "model_config",
        "model_name_or_path (loads weights) and model_config (starts from random weights) exclude each other: give one",
    ),
    exclude("validation_split", "validation_data_path"),
    exclude("data_path", "data_mixture"),
    no_effect(
        "mixture_unit",
        "mixture_stop",
        unless=lambda args: any(isinstance(entry, dict) and entry.get("weight") for entry in args.data_mixture),
        why="without weights: give each source of data_mixture a weight",
    ),
    no_effect(
        "on_overlap",
        unless=lambda args: bool(args.validation_split or args.validation_data_path),
        why="without held-out data: give validation_split or validation_data_path",
    ),
    wrong(
        lambda args: args.data_path is not None and args.data_path == args.validation_data_path,
        "data_path and validation_data_path are both {data_path!r}: held-out data must not be trained on",
    ),
    wrong(
        lambda args: args.max_length is not None and args.max_length > args.max_tokens_per_rank,
        "max_length = {max_length} is more than max_tokens_per_rank = {max_tokens_per_rank}, which no sample may "
        "exceed: lower the one or raise the other",
    ),
    no_effect(
        "length_column_name",
        unless=lambda args: args.train_sampling_strategy == "group_by_length",
        why="with train_sampling_strategy={train_sampling_strategy}: say train_sampling_strategy=group_by_length",
    ),
    no_effect(
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        unless=lambda args: args.dataloader_num_workers > 0,
        why="without dataloader_num_workers: give a number of processes",
    ),
    # computation
    exclude("bf16", "fp16"),
    no_effect(
        "gradient_checkpointing_kwargs",
        "gradient_checkpointing_keeps",
        unless=lambda args: args.gradient_checkpointing,
        why="without gradient_checkpointing: switch it on",
    ),
    # schedule
    no_effect(
        "warmup_steps",
        unless=lambda args: args.lr_scheduler_type not in ("constant", *SCHEDULES_BY_METRIC),
        why="with lr_scheduler_type={lr_scheduler_type}: say constant_with_warmup",
    ),
    wrong(
        lambda args: (
            args.lr_scheduler_type in SCHEDULES_BY_METRIC
            and args.eval_strategy == "no"
            and args.min_samples_per_evaluation is None
        ),
        f"lr_scheduler_type={{lr_scheduler_type}} goes by metric_for_best_model: {_EVALUATIONS}",
    ),
    # OSFT
    wrong(
        lambda args: args.osft and args.osft_unfreeze_rank_ratio is None,
        "osft needs osft_unfreeze_rank_ratio, the share of each matrix that trains: 0.25 is a good start",
    ),
    no_effect(*_OSFT, unless=lambda args: args.osft, why="without osft: say osft=true"),
    wrong(
        lambda args: (
            not all(isinstance(ratio, int | float) and 0 <= ratio <= 1 for ratio in args.osft_rank_ratios.values())
        ),
        "osft_rank_ratios = {osft_rank_ratios}: each ratio is a number from 0 to 1",
    ),
    # LoRA
    no_effect(
        *("lora_alpha", "lora_dropout", "lora_target_modules", "lora_use_rslora", "lora_use_dora", "lora_init"),
        unless=lambda args: args.lora_rank is not None,
        why="without lora_rank: say lora_rank=16",
    ),
    exclude("osft", "lora_rank", "osft splits the matrices of a model, lora_rank puts adapters beside them: give one"),
    wrong(
        lambda args: args.lora_init not in ("default", "gaussian", "orthogonal"),
        "lora_init = {lora_init!r}: allowed are default, gaussian and orthogonal; other ways of PEFT (pissa, olora, "
        "loftq, eva ...) change the model's own weights or read data first: call get_peft_model in a script and give "
        "Trainer the model that it returns",
    ),
    wrong(
        lambda args: args.lora_init == "orthogonal" and bool(args.lora_rank % 2),
        "lora_init=orthogonal needs an even rank, lora_rank is {lora_rank}",
    ),
    Rule(
        ("optim_target_modules",),
        lambda args: args.lora_rank is not None,
        "optim={optim} projects gradients of whole matrices, and those of adapters have lora_rank={lora_rank} already: "
        "choose another optim",
    ),
    # checkpoints
    no_effect(
        "save_steps",
        unless=lambda args: args.save_strategy == "steps",
        why="with save_strategy={save_strategy}: say save_strategy=steps",
    ),
    no_effect(
        "save_total_limit",
        "min_samples_per_full_checkpoint",
        "save_only_model",
        unless=lambda args: args.save_strategy != "no",
        why="with save_strategy=no",
    ),
    needs(
        "load_best_model_at_end",
        unless=lambda args: args.save_strategy != "no",
        what="checkpoints: set save_strategy",
    ),
    Rule(
        (),
        lambda args: bool(_unknown_changes(args)),
        f"allow_change names {{details}}: give names of options, or {', '.join(IDENTITIES)}",
        details=lambda args: ", ".join(_unknown_changes(args)),
    ),
    # logging
    no_effect(
        "logging_first_step",
        unless=lambda args: args.logging_strategy == "steps",
        why="with logging_strategy={logging_strategy}: say logging_strategy=steps",
    ),
    no_effect(
        *_TRACKIO,
        unless=lambda args: bool({"trackio", "all"} & set(args.report_to)),
        why="without report_to=trackio; other trackers read their own environment variables",
    ),
    # generation, of Seq2SeqTrainingArguments alone
    no_effect(
        "generation_max_length",
        "generation_num_beams",
        unless=lambda args: args.predict_with_generate,
        why="without predict_with_generate",
    ),
)

_WHEN = "set eval_strategy, min_samples_per_evaluation, eval_on_start or eval_at_end"
COMMAND_RULES: tuple[Rule, ...] = (  # from Python one may still call `evaluate` or `generate`, a command does not
    no_effect(
        "eval_exact_match",
        "score_answers",
        unless=lambda args: args.does_evaluate,
        why=f"without evaluations: {_WHEN}",
    ),
    needs(
        "num_generation_samples",
        unless=lambda args: args.has_held_out_data,
        what="held-out chats: give validation_split or validation_data_path",
    ),
    no_effect(
        "validation_split",
        "validation_data_path",
        unless=lambda args: args.does_evaluate or args.num_generation_samples > 0,
        why=f"without evaluations: {_WHEN}",
    ),
    wrong(
        lambda args: args.does_evaluate and not args.has_held_out_data,
        "evaluation needs held-out data: give validation_split or validation_data_path",
    ),
)


_FROM_FILE = "it prepares the file named by data_path"
_ANSWERS = "give compute_metrics to Trainer"
_PLANNED = "micro-batches are planned from batch_size and max_tokens_per_rank"
_READ = "token data is memory-mapped and needs no reading ahead"
_LOSS_ALONE = "token data is evaluated in packs, for its loss and exact answers"
_COLUMNS = "token data has input_ids and labels, no other columns"

NO_EFFECT_ON: dict[DataKind, dict[str, str]] = {
    "custom data set": {
        "batch_size": "give per_device_train_batch_size and gradient_accumulation_steps",
        "max_tokens_per_rank": "give per_device_train_batch_size",
        "max_tokens": "give max_steps or max_samples",
        "packing_cost": "batches are dealt by the number of samples",
        "osft": "only the matrices of a language model on token data are split",
        "lora_rank": "wrap the model in peft.get_peft_model, and give that",
        "attn_implementation": "choose it when you build the model",
        "eval_exact_match": _ANSWERS,
        "score_answers": _ANSWERS,
        "num_generation_samples": _ANSWERS,
        "generation_max_new_tokens": _ANSWERS,
        **dict.fromkeys(("train_on", "chat_template", "max_length", "overlong", "on_untrainable"), _FROM_FILE),
        **dict.fromkeys(("chat_template_kwargs", "split_chats", "on_open_turn"), _FROM_FILE),
        **dict.fromkeys(("block_size", "dataset_num_proc", "data_cache_dir"), _FROM_FILE),
        **dict.fromkeys(("data_mixture", "mixture_unit", "mixture_stop", "on_overlap"), _FROM_FILE),
        **dict.fromkeys(("data_format", "columns", "dataset_split", "dataset_revision", "on_broken"), _FROM_FILE),
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


def check_rules(args: TrainingArguments, rules: Collection[Rule] = RULES) -> None:
    """Raise CombinationError, a UsageError, where the options break a rule."""
    given = given_options(args)
    for rule in rules:
        named = [name for name in rule.options if name in given]
        if (rule.options and not named) or not rule.is_broken(args):
            continue
        several = len(named) > 1
        words = {
            "given": f"{', '.join(named[:-1])} and {named[-1]}" if several else "".join(named),
            "has": "have" if several else "has",
            "needs": "need" if several else "needs",
            "details": rule.details(args),
        }
        message = rule.text.format_map({**vars(args), **words})
        raise CombinationError(message, tuple(named) if rule.leaves_idle else ())


def given_options(args: TrainingArguments) -> dict[str, Any]:
    """Return the options that differ from their defaults, without those that were derived from others."""
    unset: Mapping[str, Any] = args.defaults()
    return {name: value for name, value in args.as_given().items() if value != unset[name]}


def check_data_kind(args: TrainingArguments, kind: DataKind) -> None:
    """Raise UsageError where an option is given that has no effect on this kind of data."""
    for name in given_options(args):
        if name in NO_EFFECT_ON[kind]:
            what = "a custom data set" if kind == "custom data set" else kind
            raise UsageError(f"{name} has no effect on {what}: {NO_EFFECT_ON[kind][name]}")
