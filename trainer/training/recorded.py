"""Builds, on one process, the model and the optimizer that a checkpoint or a recorded step is of.

Knows nothing of the run that wrote it. Invariant: weights and state are those of the record, whatever number of ranks
wrote it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.optim import Optimizer
from transformers import GenerationConfig, PreTrainedModel

from trainer.checkpoint import manifest
from trainer.checkpoint.optimizer import restore_optimizer
from trainer.checkpoint.storage import StoredTensors
from trainer.config.arguments import TrainingArguments
from trainer.errors import CheckpointError
from trainer.model.build import build_on_meta, materialise, prepare_model, read_config
from trainer.model.osft.targets import apply_osft
from trainer.optim.optimizers import build_optimizer
from trainer.optim.registry import OPTIMIZERS
from trainer.training.checkpoints import MODEL_FILES, OPTIMIZER, read_importance
from trainer.training.output import PARAMETERS


def recorded_model(folder: Path, stored: StoredTensors, device: torch.device) -> PreTrainedModel:
    """Build the language model that a checkpoint or a recorded step is of, with its weights.

    Raises:
        CheckpointError: only its own program can build it.
    """
    if not (folder / MODEL_FILES / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is of a model that is not built from a config.json: build it yourself, and fill it with "
            "trainer.checkpoint.weights.restore_model"
        )
    args = TrainingArguments.from_mapping(manifest.read_json(folder / PARAMETERS))
    model = build_on_meta(read_config(args, folder / MODEL_FILES), trust_remote_code=args.trust_remote_code)
    if (folder / MODEL_FILES / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder / MODEL_FILES)
    if args.osft:
        apply_osft(model, args, read_importance(folder))
    prepare_model(model, args, None, device)
    materialise(model, stored, device)
    return model


def recorded_optimizer(folder: Path, stored: StoredTensors, model: PreTrainedModel) -> Optimizer | None:
    """Build the optimizer of a checkpoint with its state, where it averages the weights to export; else None."""
    args = TrainingArguments.from_mapping(manifest.read_json(folder / PARAMETERS))
    if args.optim not in OPTIMIZERS or not OPTIMIZERS[args.optim].averages_weights:
        return None
    optimizer = build_optimizer(model, args)
    restore_optimizer(optimizer, model, manifest.read_json(folder / OPTIMIZER), stored, frozenset())
    return optimizer
