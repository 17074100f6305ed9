"""What holds for the whole process: seeds, TF32, how memory is kept; and the record of where a run happened.

`environment.json` beside every run holds the record, and `trainer doctor` prints it: versions, machine, command line,
git commit, seeds.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_utils import enable_full_determinism

from trainer import __version__
from trainer.atomic import write_json
from trainer.config.arguments import TrainingArguments
from trainer.errors import OutputError
from trainer.host import host_memory
from trainer.model.precision import use_tf32
from trainer.training.run_dir import ENVIRONMENT

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
    """Make the C library keep freed memory, as torch does on a GPU; return whether it can (only glibc can).

    Each step frees its activations and allocates as much again. Memory that went back to the system in between comes as
    new pages, zeroed one by one at the first write: a product of 20 MB took 14 ms in new pages, 2 ms in kept ones.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    is_kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in (ANY_SIZE, LARGEST_OF_OLD))
    return is_kept and bool(mallopt(M_TRIM_THRESHOLD, ANY_SIZE))


PACKAGES = (  # that decide what a run computes, and how fast
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "huggingface-hub"),
    *("liger-kernel", "peft", "bitsandbytes", "datasets", "triton", "flash-attn"),
)
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "ATEN_CPU_CAPABILITY", "MKL_CBWR")


def environment_record(seed: int | None = None) -> dict[str, Any]:
    """Return the record as plain values."""
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    variables |= {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "TORCH_NCCL_"))}
    return {
        "trainer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed_versions(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": host_memory(),
        "gpus": [gpu_record(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "variables": variables,
        "command": sys.argv,
        "git": git_commit(Path.cwd()),
        "seed": seed,
    }


def write_record(folder: Path, seed: int) -> None:
    """Write the record into a run's folder.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_json(folder / ENVIRONMENT, environment_record(seed))
    except OSError as error:
        raise OutputError(f"{folder / ENVIRONMENT} cannot be written: {error}") from error


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages of `PACKAGES` that are installed."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__}  # with its build, +cu130 or +cpu


def processor_name() -> str:
    """Return the processor's name as Linux tells it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor()


def gpu_record(index: int) -> dict[str, Any]:
    """Return name, memory in bytes and compute capability of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Return commit and whether files differ from it, of the repository that a folder is in; None without one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": found.removesuffix("-dirty"), "is_changed": found.endswith("-dirty")}
