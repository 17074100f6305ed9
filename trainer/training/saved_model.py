"""Opens a model that was saved, wherever it lies: a run, one of its checkpoints, an export, or the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.atomic import read_json
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import MODEL_FILES, OPTIMIZER_STATE, STATE
from trainer.checkpoint.optimizer_state import restore_optimizer
from trainer.checkpoint.run_state import options_of
from trainer.checkpoint.tensors import StoredTensors, restore_model
from trainer.checkpoint.verify import find_damage
from trainer.config.arguments import TrainingArguments
from trainer.errors import CheckpointError, ModelError, UsageError
from trainer.model.build import build_on_meta, load_model, materialise, open_model, prepare_model, read_config
from trainer.model.lora import ADAPTER_CONFIG, base_fingerprint, hold, place_of_base, read_adapters, recorded_adapters
from trainer.model.osft.layers import apply_osft
from trainer.model.prepared import Prepared
from trainer.model.tokenizer import load_tokenizer
from trainer.optim.build import build_optimizer
from trainer.optim.registry import OPTIMIZERS
from trainer.training.checkpoints import by_either_name, read_importance


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
    if not folder.is_dir() or any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
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
        code = trust_remote_code
        prepared = build_saved_model(folder, stored, device, is_packed=is_packed, trust_remote_code=code)
        has_tokenizer = (folder / MODEL_FILES / "tokenizer_config.json").is_file()
        place = folder / MODEL_FILES
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=code) if has_tokenizer else None
        optimizer = build_saved_optimizer(folder, stored, prepared.outer)
        return SavedModel(weights, prepared, tokenizer, options_of(folder), optimizer)
    adapters = folder if (folder / ADAPTER_CONFIG).is_file() else None
    base = weights if adapters is None else place_of_base(adapters)
    if base is None:
        raise ModelError(f"{weights} holds adapters and does not say of which model: name it in {ADAPTER_CONFIG}")
    args = TrainingArguments(model_name_or_path=base, bf16=is_bf16, trust_remote_code=trust_remote_code)
    if (folder / "tokenizer_config.json").is_file():
        args.tokenizer_name_or_path = weights
    try:
        tokenizer = load_tokenizer(args)
    except ModelError:
        tokenizer = None  # weights alone can be exported too
    if adapters is None:
        prepared = load_model(args, tokenizer, None, device, seed=0, is_packed=is_packed)
    else:
        wrapper = read_adapters(_build_base(args, device), adapters)
        prepared = prepare_model(wrapper, args, None, device, is_packed=is_packed)
    run = folder.parent.parent
    is_export = folder.parent.name == "hf_format" and (run / manifest.PARAMETERS).is_file()
    return SavedModel(weights, prepared, tokenizer, options_of(run) if is_export else None, None)


def build_saved_model(
    folder: Path, stored: StoredTensors, device: torch.device, *, is_packed: bool, trust_remote_code: bool
) -> Prepared:
    """Build the language model that a checkpoint or the record of a step holds, with its weights.

    Its own code is run if the caller trusts it, whatever the record says: that may come from others.

    Raises:
        CheckpointError: only its own program can build it, or the model that its adapters adapt has changed.
    """
    files, args = folder / MODEL_FILES, options_of(folder)
    args.trust_remote_code = trust_remote_code
    if not (files / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is of a model that is not built from a config.json: build it yourself, and fill it with "
            "trainer.checkpoint.tensors.restore_model"
        )
    if (files / ADAPTER_CONFIG).is_file():
        wrapper = _build_adapted(folder, stored, args, device)
        prepared = prepare_model(wrapper, args, None, device, is_packed=is_packed, is_record=True)
        _check_base(folder, prepared)
        return prepared
    model = build_on_meta(read_config(args, files), trust_remote_code=args.trust_remote_code)
    if (files / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files)
    adapt = partial(apply_osft, args=args, importance=read_importance(folder)) if args.osft else None
    return prepare_model(model, args, None, device, is_packed=is_packed, weights=stored, is_record=True, adapt=adapt)


def _build_adapted(folder: Path, stored: StoredTensors, args: TrainingArguments, device: torch.device) -> Any:
    """Build a model with the adapters of a checkpoint, which holds these alone."""
    if args.model_name_or_path is None and args.model_config is None:
        base = place_of_base(folder / MODEL_FILES)
        if base is None:
            raise CheckpointError(
                f"{folder} holds adapters of a model that a script built: load it there, and fill it with "
                "trainer.checkpoint.tensors.restore_model"
            )
        args = replace(args, model_name_or_path=base)
    wrapper = recorded_adapters(_build_base(args, device), folder / MODEL_FILES)
    restore_model(wrapper, stored)
    return wrapper


def _check_base(folder: Path, prepared: Prepared) -> None:
    """Raise CheckpointError where adapters were trained on other weights than lie there now."""
    if not (folder / STATE).is_file():
        return  # the record of a step
    recorded = read_json(folder / STATE)["fingerprints"].get("base_weights")
    if recorded is not None and recorded != base_fingerprint(prepared.outer):
        raise CheckpointError(
            f"{folder} holds adapters of other weights than those found now in "
            f"{prepared.model.config.name_or_path or 'the model'}: put back the model that was trained on"
        )


def _build_base(args: TrainingArguments, device: torch.device) -> PreTrainedModel:
    """Build the model that adapters are to be put into, in the format in which a run holds it."""
    model, weights = open_model(args, None, args.seed)
    model.requires_grad_(False)
    hold(model, model.config.dtype or torch.float32, torch.bfloat16 if args.bf16 else torch.float32)
    materialise(model, weights, device)
    return model


def build_saved_optimizer(folder: Path, stored: StoredTensors, model: PreTrainedModel) -> Optimizer | None:
    """Build the optimizer of a checkpoint with its state, where it averages the weights to export; else None."""
    args = options_of(folder)
    if args.optim not in OPTIMIZERS or not OPTIMIZERS[args.optim].averages_weights:
        return None
    optimizer = build_optimizer(model, args)
    restore_optimizer(optimizer, model, read_json(folder / OPTIMIZER_STATE), stored, frozenset())
    return optimizer
