"""A trained model as a Hugging Face folder: config, generation config, tokenizer, safetensors; or a module as weights.

All ranks call, the main rank writes. Knows nothing of how training resumes. Invariants: the folder appears whole or
not at all; its weights, loaded by transformers, give the logits of the trained model in the format saved; tied
weights are stored once, under the names of the hub.
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
import logging
import os
import shutil
import stat
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.atomic import is_untouched, read_listing, sync, write_listing
from trainer.distributed.group import unhurried
from trainer.errors import CheckpointError
from trainer.model.fsdp import any_rank, is_main, whole
from trainer.model.lora import ADAPTER_CONFIG, adapter_tensors, is_adapted
from trainer.model.osft.layers import is_osft_parameter, merged_weight, osft_layers
from trainer.model.prepared import Prepared

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # an export holds one of these, or PEFT's ADAPTER_CONFIG


def export_model(
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | os.PathLike[str],
    save_dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    *,
    is_shared: bool = False,
) -> None:
    """Write a model for others to use; an older export in `directory` is replaced.

    Args:
        prepared: The model, plain or sharded.
        tokenizer: Saved beside the model, if given.
        directory: The folder to make.
        save_dtype: Format of the weights; None for the one in which the model was stored before training, of adapters
            for the one in which they are trained.
        max_shard_size: Largest safetensors file.
        is_shared: The folder holds other things as well, which stay; only file by file does the export appear whole.

    Raises:
        CheckpointError: The main rank could not write, or `directory` holds something else than an export.
    """
    target, model, mesh = Path(directory), prepared.outer, prepared.mesh
    dtype = save_dtype if save_dtype is not None or is_adapted(model) else prepared.stored_dtype
    tensors = _gather(model, dtype, is_main(mesh))
    error: Exception | None = None
    with unhurried(None if mesh is None else partial(any_rank, mesh=mesh)):
        if is_main(mesh):
            try:
                _check_range(tensors)
                hidden = _stage(model, tokenizer, tensors, target, max_shard_size)
                (_move_files if is_shared else _replace_folder)(hidden, target)
            except (OSError, ValueError, RuntimeError, SafetensorError) as caught:
                error = caught
    if error is not None:
        any_rank(True, mesh)
        raise CheckpointError(f"could not export to {target}: {error}") from error
    if any_rank(False, mesh):
        raise CheckpointError(f"could not export to {target}: the main rank failed; see its message")


def _gather(model: nn.Module, dtype: torch.dtype | None, lead: bool) -> dict[str, Tensor]:
    """Every stored tensor, whole, on the CPU of the main rank; floating-point ones in `dtype`, if one is given."""
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    split = {f"{name}.weight": layer for name, layer in osft_layers(model).items()}
    stored = adapter_tensors(model) if is_adapted(model) else model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name in tied or is_osft_parameter(name):
            continue
        gathered = merged_weight(split[name]) if name in split else whole(tensor)
        if lead:
            kept = dtype if dtype is not None and gathered.is_floating_point() else gathered.dtype
            tensors[name] = gathered.to("cpu", kept, copy=True).contiguous()
    return tensors


def _check_range(tensors: dict[str, Tensor]) -> None:
    """Refuse weights that became infinite in a narrower format."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values beyond the range of float16; choose bfloat16 or float32")


def _stage(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    tensors: dict[str, Tensor],
    target: Path,
    max_shard_size: str,
) -> Path:
    """Write into a hidden folder beside the target; gives that folder."""
    hidden = target.with_name(f".{target.name}.writing")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        if is_adapted(model):
            # All adapters, under PEFT's names: the first in the folder itself, others in folders of their own.
            type(model).save_pretrained(model, hidden, state_dict=tensors)
        elif isinstance(model, PreTrainedModel):
            _write(model, tensors, hidden, max_shard_size)
        else:
            save_file(tensors, hidden / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save_pretrained(hidden)
        write_listing(hidden)
        _seal(hidden)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return hidden


def _replace_folder(hidden: Path, target: Path) -> None:
    """Rename a finished export, in place of an older one; what is not an untouched export of ours is set aside."""
    try:
        looks_like_export = any((target / name).is_file() for name in (CONFIG, WEIGHTS, ADAPTER_CONFIG))
        if target.exists() and not looks_like_export and any(target.iterdir()):
            raise ValueError("the folder holds something else than an export; choose another")
        if is_untouched(target):
            former = target.with_name(f".{target.name}.former")
            shutil.rmtree(former, ignore_errors=True)
            target.rename(former)
            hidden.rename(target)
            shutil.rmtree(former, ignore_errors=True)
        else:
            if looks_like_export:
                names = (target.with_name(f"{target.name}.{number}") for number in itertools.count(1))
                aside = next(path for path in names if not path.exists())
                target.rename(aside)
                logger.warning("%s holds what this trainer did not write: set aside as %s", target, aside)
            hidden.rename(target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _move_files(hidden: Path, target: Path) -> None:
    """Move the files of a finished export among others; weights of an older one go, the config comes last."""
    target.mkdir(parents=True, exist_ok=True)
    new = {path.name: path for path in hidden.iterdir()}
    for name in read_listing(target) - new.keys():
        if fnmatch.fnmatch(name, "model*.safetensors*"):
            (target / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == CONFIG):
        new[name].replace(target / name)
    hidden.rmdir()


def _write(model: PreTrainedModel, tensors: dict[str, Tensor], directory: Path, max_shard_size: str) -> None:
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    generation = getattr(model, "generation_config", None)
    # save_pretrained writes into the config, takes the dtype from the float32 parameters, and refuses a generation
    # config that it finds contradictory, though it loaded it. So it gets a double of the model with its own configs.
    double: Any = object.__new__(type(model))
    vars(double).update(vars(model))
    double.config, double.generation_config = copy.deepcopy(model.config), GenerationConfig()
    type(double).save_pretrained(double, directory, state_dict=tensors, max_shard_size=max_shard_size)
    double.config.dtype = dtype
    double.config.save_pretrained(directory)
    if generation is not None:
        generation.to_json_file(directory / "generation_config.json")


def _seal(directory: Path) -> None:
    """Put every file on disk, so that the rename cannot outrun them, and make it readable for who may read the folder.

    The safetensors library writes files that only their owner can read.
    """
    readable = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            path.chmod(readable)
        sync(path)
