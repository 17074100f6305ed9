"""`trainer init`: a commented YAML file to start from, written from the options of the installed version."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer import __version__
from trainer.cli.parse import parse_alone, positional
from trainer.config.fields import default_of, option
from trainer.config.groups import IN_ORDER_OF_USE, GenerationArguments
from trainer.errors import OutputError, UsageError

WIDTH = 100


@dataclass(frozen=True)
class Recipe:
    """A file to start from: options that are set, and others that are there to be switched on."""

    summary: str
    options: Mapping[str, Any]
    offered: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = (
        "trainer preview {file}     shows samples, and what of them is trained",
        "trainer plan {file}        shows steps and packing, before anything is loaded",
        "trainer train {file}       trains; --nproc-per-node auto on all GPUs",
    )


_OFFERED = (
    *(
        "gradient_checkpointing",
        "max_length",
        "overlong",
        "weight_decay",
        "max_steps",
        "export_at_epoch",
        "export_best",
    ),
    *("save_total_limit", "resume_from_checkpoint", "report_to", "run_name", "seed"),
)
_EVALUATED = {"validation_split": 0.02, "eval_strategy": "epoch"}
RECIPES: dict[str, Recipe] = {
    "chat": Recipe(
        "Fine-tune a chat model on conversations: one JSON object a line, "
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.',
        {
            "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
            "bf16": True,
            "data_path": "chats.jsonl",
            "train_on": "assistant",
            "batch_size": 64,
            "max_tokens_per_rank": 8192,
            "num_train_epochs": 3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "learning_rate": 1e-5,
            "output_dir": "outputs/chat",
            **_EVALUATED,
        },
        (*_OFFERED, "chat_template", "on_untrainable", "eval_exact_match", "num_generation_samples"),
    ),
    "pretraining": Recipe(
        'Train on plain text, cut into blocks: one JSON object a line, {"text": ...}.',
        {
            "model_name_or_path": "Qwen/Qwen2.5-0.5B",
            "bf16": True,
            "data_path": "texts.jsonl",
            "block_size": 2048,
            "batch_size": 128,
            "max_tokens_per_rank": 16384,
            "num_train_epochs": 1,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 100},
            "warmup_steps": 100,
            "learning_rate": 1e-4,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "min_samples_per_checkpoint": 10000,
            "output_dir": "outputs/pretraining",
            "validation_split": 0.01,
            "eval_strategy": "steps",
            "eval_steps": 200,
        },
        (*(name for name in _OFFERED if name not in ("weight_decay", "overlong", "max_length")), "max_tokens"),
    ),
    "lora": Recipe(
        "Train low-rank adapters of a chat model (docs/lora.md) on conversations; needs "
        "`pip install 'reference-trainer[lora]'`.",
        {
            "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
            "bf16": True,
            "data_path": "chats.jsonl",
            "batch_size": 16,
            "max_tokens_per_rank": 8192,
            "num_train_epochs": 3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "learning_rate": 2e-4,
            "lora_rank": 16,
            "output_dir": "outputs/lora",
            **_EVALUATED,
        },
        (
            *_OFFERED,
            *("lora_alpha", "lora_dropout", "lora_target_modules", "lora_use_rslora", "lora_use_dora", "train_on"),
        ),
        (
            "trainer preview {file}     shows samples, and what of them is trained",
            "trainer plan {file}        shows steps and packing, before anything is loaded",
            "trainer train {file}       trains; --nproc-per-node N on N GPUs",
            "trainer export outputs/lora merged --merge    writes one model, adapters added",
        ),
    ),
    "osft": Recipe(
        "Teach a model new things without losing what it knows: orthogonal subspace fine-tuning (docs/osft.md) on "
        "conversations.",
        {
            "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
            "bf16": True,
            "data_path": "chats.jsonl",
            "batch_size": 64,
            "max_tokens_per_rank": 8192,
            "num_train_epochs": 2,
            "lr_scheduler_type": "cosine",
            "learning_rate": 5e-6,
            "osft": True,
            "osft_unfreeze_rank_ratio": 0.25,
            "output_dir": "outputs/osft",
            **_EVALUATED,
        },
        (*_OFFERED, "osft_target_patterns", "osft_rank_ratios", "osft_adaptive_samples", "train_on"),
    ),
    "seq2seq": Recipe(
        "Train an encoder-decoder model on a data set of your own, from Python: Seq2SeqTrainer(model, "
        'Seq2SeqTrainingArguments.from_yaml("seq2seq.yaml"), train_dataset=..., eval_dataset=...).',
        {
            "bf16": True,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 32,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 3,
            "learning_rate": 5e-5,
            "warmup_steps": 0.05,
            "label_smoothing_factor": 0.1,
            "predict_with_generate": True,
            "generation_max_length": 128,
            "eval_strategy": "epoch",
            "output_dir": "outputs/seq2seq",
        },
        ("generation_num_beams", "train_sampling_strategy", "load_best_model_at_end", "save_total_limit", "seed"),
        ("README.md and docs/from-huggingface.md have examples.",),
    ),
}


@dataclass
class InitOptions:
    """Write a commented YAML file to start from."""

    recipe: Literal["chat", "pretraining", "lora", "osft", "seq2seq"] = positional(
        "chat, pretraining, lora, osft or seq2seq."
    )
    output: Path | None = option(None, "The file to write; by default the recipe's name and .yaml.")
    overwrite: bool = option(False, "Write over a file that is there already.")


def run(words: Sequence[str]) -> int:
    """Write the file, say what to do with it; return the exit code."""
    options = parse_alone("trainer init", words, InitOptions)
    recipe = RECIPES[options.recipe]
    path = options.output or Path(f"{options.recipe}.yaml")
    if path.exists() and not options.overwrite:
        raise UsageError(f"{path} is there already: name another file with --output, or say --overwrite")
    try:
        path.write_text(render(options.recipe), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    print(f"wrote {path}; set what it is about in it, then:")
    for step in recipe.next_steps:
        print(f"  {step.format(file=path)}")
    return 0


def render(name: str) -> str:
    """Return the text of a recipe's file: options in the order of use, each with its help above it."""
    recipe = RECIPES[name]
    lines = [f"# {line}" for line in textwrap.wrap(recipe.summary, WIDTH - 2)]
    lines += [
        f"# Written by `trainer init {name}` of version {__version__}.",
        "# Options that begin with # have their defaults.",
    ]
    lines += ["# `trainer train --help-all` lists all others."]
    for group in (*IN_ORDER_OF_USE, GenerationArguments):
        fields = [f for f in dataclasses.fields(group) if f.name in recipe.options or f.name in recipe.offered]
        if fields:
            lines += ["", f"# --- {str(group.__doc__).rstrip('.')}", ""]
        for field in fields:
            is_set = field.name in recipe.options
            value = recipe.options[field.name] if is_set else default_of(field)
            lines += [f"# {line}" for line in textwrap.wrap(str(field.metadata["help"]), WIDTH - 2)]
            lines.append(f"{'' if is_set else '#'}{field.name}: {_written(value)}")
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
