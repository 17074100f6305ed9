"""`trainer export`: a run's weights, or any Hugging Face folder, written anew in another type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.atomic import is_untouched
from trainer.cli.parse import parse_alone, positional
from trainer.config.arguments import TrainingArguments
from trainer.config.fields import option
from trainer.errors import UsageError


@dataclass
class ExportOptions:
    """Write Hugging Face weights."""

    source: Path = positional("A run's output folder, one of its checkpoints, or a Hugging Face folder.")
    target: Path = positional("The folder to write.")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Type of the weights; as stored if unset."
    )
    max_shard_size: str = option("5GB", "Largest weight file.")


def run(words: Sequence[str]) -> int:
    """Read, convert, write; give the exit code."""
    options = parse_alone("trainer export", words, ExportOptions, "Write Hugging Face weights.")
    is_checkpoint = (options.source / "manifest.json").is_file()
    folder = options.source if is_checkpoint else newest_weights(options.source)
    if options.target.resolve() == folder.resolve():
        raise UsageError(f"source and target are the same folder: {folder}")
    if options.target.exists() and not (options.target.is_dir() and is_free(options.target)):
        raise UsageError(
            f"{options.target} holds what `trainer export` did not write: choose another folder, or move it away"
        )
    export_checkpoint(folder, options) if is_checkpoint else export(folder, options)
    print(f"{folder} -> {options.target}")
    return 0


def is_free(target: Path) -> bool:
    """Return whether an export may take the place of a folder: it is empty, or an older export that nobody changed."""
    return is_untouched(target) or not any(target.iterdir())


def newest_weights(source: Path) -> Path:
    """Find the weights of a folder: its own, or those of a run with the most samples trained."""
    if (source / "config.json").is_file():
        return source
    exports = sorted(source.glob("hf_format/samples_*"), key=lambda path: int(path.name.removeprefix("samples_")))
    if not exports:
        raise UsageError(f"{source}: holds neither a config.json nor hf_format/samples_N of a run")
    return exports[-1]


def export(folder: Path, options: ExportOptions) -> None:
    """Load on one process and write."""
    import torch

    from trainer.errors import ModelError
    from trainer.model.build import load_model
    from trainer.model.export import export_model
    from trainer.model.tokenizer import load_tokenizer

    args = TrainingArguments(model_name_or_path=str(folder))
    try:
        tokenizer = load_tokenizer(args)
    except ModelError:
        tokenizer = None  # weights alone can be exported too
    prepared = load_model(args, tokenizer, seed=0, is_packed=False)
    dtype = getattr(torch, options.save_dtype) if options.save_dtype else None
    export_model(prepared, tokenizer, options.target, dtype, options.max_shard_size)


def export_checkpoint(folder: Path, options: ExportOptions) -> None:
    """Load the weights of a checkpoint, whatever number of ranks wrote it, on one process and write."""
    import torch
    from transformers import AutoTokenizer

    from trainer.checkpoint.manifest import MODEL_FILES
    from trainer.checkpoint.tensors import StoredTensors
    from trainer.checkpoint.verify import find_damage
    from trainer.errors import CheckpointError
    from trainer.model.export import export_model
    from trainer.optim.averaging import averaged_weights
    from trainer.training.checkpoints import build_saved_model, build_saved_optimizer

    if faults := find_damage(folder):
        raise CheckpointError(f"{folder} is not a whole checkpoint: {faults[0]}")
    stored = StoredTensors(folder)
    prepared = build_saved_model(folder, stored, torch.device("cpu"), is_packed=False)
    has_tokenizer = (folder / MODEL_FILES / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL_FILES) if has_tokenizer else None
    dtype = getattr(torch, options.save_dtype) if options.save_dtype else None
    with averaged_weights(build_saved_optimizer(folder, stored, prepared.model)):
        export_model(prepared, tokenizer, options.target, dtype, options.max_shard_size)
