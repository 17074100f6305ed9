"""What holds for the whole process while it trains: seeds, number formats of products, how memory is kept."""

from __future__ import annotations

import ctypes

import torch
from transformers import set_seed
from transformers.trainer_utils import enable_full_determinism

from trainer.config.arguments import TrainingArguments
from trainer.model.precision import use_tf32

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ANY_SIZE = 2**31 - 1  # bytes, the most that mallopt can be told
LARGEST_OF_OLD = 2**25  # bytes, the most that older versions take for M_MMAP_THRESHOLD


def start_machine(args: TrainingArguments, device: torch.device) -> None:
    """Seed every generator, and set what holds for the whole process."""
    enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
    use_tf32(args.tf32)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, as torch does on a GPU; gives whether it can (glibc alone).

    Each step frees its activations and allocates as much again. What went back to the system in between comes as new
    pages, zeroed one by one as they are first written: a product of 20 MB took 14 ms in them, 2 in kept ones.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    is_kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in (ANY_SIZE, LARGEST_OF_OLD))
    return is_kept and bool(mallopt(M_TRIM_THRESHOLD, ANY_SIZE))
