"""`trainer export`: a run's weights, or any Hugging Face folder, written anew in another type, or adapters merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.atomic import is_untouched
from trainer.cli.check import check_folder
from trainer.cli.parse import parse_alone, positional
from trainer.config.fields import option
from trainer.errors import UsageError


@dataclass
class ExportOptions:
    """Write weights of a run or a checkpoint as a Hugging Face folder."""

    source: Path = positional("A run's output folder, one of its checkpoints, or a Hugging Face folder.")
    target: Path = positional("The folder to write.")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Type of the weights; as stored if unset."
    )
    max_shard_size: str = option("5GB", "Largest weight file.")
    trust_remote_code: bool = option(False, "Run code that comes with a model of the hub.")
    merge: bool = option(False, "Add adapters (LoRA) to the weights that they adapt; else adapters stay adapters.")


def run(words: Sequence[str]) -> int:
    """Read, convert, write; return the exit code."""
    options = parse_alone("trainer export", words, ExportOptions)
    check_folder("source", options.source)
    from trainer.training.saved_model import find_weights

    folder = Path(find_weights(options.source))
    if options.target.resolve() == folder.resolve():
        raise UsageError(f"source and target are the same folder: {folder}")
    if options.target.exists() and not (options.target.is_dir() and is_free(options.target)):
        raise UsageError(
            f"{options.target} holds what `trainer export` did not write: choose another folder, or move it away"
        )
    export(folder, options)
    print(f"{folder} -> {options.target}")
    return 0


def is_free(target: Path) -> bool:
    """Return whether an export may take the place of a folder: it is empty, or an older export that nobody changed."""
    return is_untouched(target) or not any(target.iterdir())


def export(source: Path, options: ExportOptions) -> None:
    """Load on one process and write."""
    import torch

    from trainer.model.export import export_model
    from trainer.model.lora import is_adapted, merge
    from trainer.optim.adapters import averaged_weights
    from trainer.training.saved_model import open_saved_model

    saved = open_saved_model(source, trust_remote_code=options.trust_remote_code)
    prepared = saved.prepared
    if options.merge and not is_adapted(prepared.outer):
        raise UsageError(f"--merge has no effect: {source} holds no adapters; leave it out")
    dtype = getattr(torch, options.save_dtype) if options.save_dtype else None
    with averaged_weights(saved.optimizer):
        if options.merge:
            prepared = replace(prepared, model=merge(prepared.outer), wrapper=None)
        export_model(prepared, saved.tokenizer, options.target, dtype, options.max_shard_size)
