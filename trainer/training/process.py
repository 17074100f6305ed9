"""What holds for the whole process while it trains: seeds, TF32, how memory is kept; and tensors to the device."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from transformers.trainer_utils import enable_full_determinism

from trainer.config.arguments import TrainingArguments
from trainer.model.precision import use_tf32

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ANY_SIZE = 2**31 - 1  # bytes, the most that mallopt can be told
LARGEST_OF_OLD = 2**25  # bytes, the most that older versions take for M_MMAP_THRESHOLD


def set_up_process(args: TrainingArguments, device: torch.device) -> None:
    """Seed every generator, and set what holds for the whole process."""
    enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
    use_tf32(args.tf32)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory, as torch does on a GPU; return whether it can (only glibc can).

    Each step frees its activations and allocates as much again. Memory that went back to the system in between comes as
    new pages, zeroed one by one at the first write: a product of 20 MB took 14 ms in new pages, 2 ms in kept ones.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    is_kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in (ANY_SIZE, LARGEST_OF_OLD))
    return is_kept and bool(mallopt(M_TRIM_THRESHOLD, ANY_SIZE))


def to_device(data: Any, device: torch.device) -> Any:
    """Copy the tensors of a micro-batch to the device, however they are nested; everything else stays as it is."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        return type(data)({name: to_device(value, device) for name, value in data.items()})  # type: ignore[call-arg]
    if isinstance(data, list | tuple):
        return type(data)(to_device(value, device) for value in data)
    return data
