"""Opens a model that was saved, wherever it lies: a run, one of its checkpoints, an export, or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer.checkpoint import manifest
from trainer.checkpoint.run_state import options_of
from trainer.checkpoint.tensors import StoredTensors
from trainer.checkpoint.verify import find_damage
from trainer.config.arguments import TrainingArguments
from trainer.errors import CheckpointError, ModelError, UsageError
from trainer.model.build import load_model
from trainer.model.prepared import Prepared
from trainer.model.tokenizer import load_tokenizer
from trainer.training.checkpoints import MODEL_FILES, build_saved_model, build_saved_optimizer, by_either_name


@dataclass(frozen=True)
class SavedModel:
    """A model on one process, and what was saved with it."""

    place: str  # a folder, or a name on the hub
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase | None
    options: TrainingArguments | None  # of the run that it comes from
    optimizer: Optimizer | None  # one that averages weights: `averaged_weights` gives the model those to use


def find_weights(place: str | Path) -> str:
    """Return where the weights of a place lie.

    Args:
        place: a run's output folder (its newest export, or else its newest whole checkpoint), a checkpoint, a Hugging
            Face folder, or a name on the hub.

    Raises:
        UsageError: a folder that holds no weights.
        CheckpointError: a run has neither an export nor a whole checkpoint.
    """
    folder = Path(place)
    checkpoint = by_either_name(folder)  # checkpoint-N is for transformers' scripts; the checkpoint holds everything
    if (checkpoint / manifest.MANIFEST).is_file():
        return str(checkpoint)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return str(place)
    exports = list(folder.glob("hf_format/samples_*"))
    if exports:
        return str(max(exports, key=lambda path: int(path.name.removeprefix("samples_"))))
    checkpoints = manifest.list_checkpoints(folder / manifest.FOLDER)
    for checkpoint in checkpoints:
        if not find_damage(checkpoint):
            return str(checkpoint)
    if checkpoints:
        raise CheckpointError(f"{folder} has no export, and none of its {len(checkpoints)} checkpoints is whole")
    raise UsageError(f"{folder}: holds neither a config.json, nor hf_format/samples_N or checkpoints of a run")


def open_saved_model(
    place: str | Path,
    device: torch.device | str = "cpu",
    *,
    is_packed: bool = False,
    is_bf16: bool = False,
    trust_remote_code: bool = False,
) -> SavedModel:
    """Load a model with its tokenizer, if there is one, on one process.

    Args:
        place: see `find_weights`.
        device: where to.
        is_packed: whether it will read packs.
        is_bf16: compute in bfloat16.
        trust_remote_code: run code that comes with a model of the hub.

    Raises:
        CheckpointError, ModelError, UsageError: it cannot be loaded; see the messages.
    """
    device = torch.device(device)
    weights = find_weights(place)
    folder = Path(weights)
    if (folder / manifest.MANIFEST).is_file():
        faults = find_damage(folder)
        if faults:
            raise CheckpointError(f"{folder} is not a whole checkpoint: {faults[0]}")
        stored = StoredTensors(folder)
        prepared = build_saved_model(folder, stored, device, is_packed=is_packed)
        has_tokenizer = (folder / MODEL_FILES / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder / MODEL_FILES) if has_tokenizer else None
        optimizer = build_saved_optimizer(folder, stored, prepared.model)
        return SavedModel(weights, prepared, tokenizer, options_of(folder), optimizer)
    args = TrainingArguments(model_name_or_path=weights, bf16=is_bf16, trust_remote_code=trust_remote_code)
    try:
        tokenizer = load_tokenizer(args)
    except ModelError:
        tokenizer = None  # weights alone can be exported too
    prepared = load_model(args, tokenizer, None, device, seed=0, is_packed=is_packed)
    run = folder.parent.parent
    is_export = folder.parent.name == "hf_format" and (run / manifest.PARAMETERS).is_file()
    return SavedModel(weights, prepared, tokenizer, options_of(run) if is_export else None, None)
