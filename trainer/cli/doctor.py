"""`trainer doctor`: what this machine has, how fast it is, and what is wrong with it, on one page."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trainer.cli.parse import parse_alone
from trainer.config.fields import option

SECONDS_OF_TIMING = 0.5
REDUCED_BYTES, NUM_REDUCTIONS = 16 * 2**20, 10
FILE_BYTES = 64 * 2**20
SLOW_FOLDER = 50e6  # bytes per second
LITTLE_DISK = 10e9  # bytes
OPTIONAL = {  # package -> (what it is for, the extra that brings it)
    "liger_kernel": ("fused kernels on a GPU", "gpu"),
    "matplotlib": ("trainer report", "report"),
    "peft": ("LoRA", "lora"),
    "bitsandbytes": ("8-bit optimizers", "optimizers"),
    "rouge_score": ("the scorer rouge_l", "rouge"),
    "datasets": ("data sets of the hub", "datasets"),
    "optuna": ("hyperparameter_search", "search"),
}
KNOWN_FAULTS = (  # (package, versions up to which, what is wrong)
    ("torch", (2, 11), "is older than what this package is tested with: varlen attention is missing"),
    ("transformers", (5, 17), "is older than what this package is tested with"),
)


@dataclass
class DoctorOptions:
    """Look at this machine: versions, speed, disk, what is wrong."""

    model_name_or_path: str | None = option(None, "Say which attention and kernels this model would get here, and why.")
    output_dir: str = option(".", "The folder whose disk is looked at.")
    nproc_per_node: int = option(1, "Time an all_reduce on so many ranks of this machine.", above=0)
    json: bool = option(False, "Print one JSON object instead of the page.")


@dataclass
class Findings:
    """Lines of the page by section, and what is wrong."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run(words: Sequence[str]) -> int:
    """Look, print; return 1 where something is wrong that a run would meet."""
    options = parse_alone("trainer doctor", words, DoctorOptions)
    from trainer.training.process import environment_record

    found = Findings()
    record = environment_record()
    found.sections["versions"] = {"trainer": record["trainer"], "python": record["python"], **record["packages"]}
    found.sections["machine"] = {
        name: record[name] for name in ("processor", "cores", "threads", "memory_bytes", "gpus")
    }
    check_versions(record["packages"], found)
    check_threads(record, found)
    check_folder(Path(options.output_dir), found)
    time_kernels(found)
    if options.nproc_per_node > 1:
        time_all_reduce(options.nproc_per_node, found)
    if options.model_name_or_path is not None:
        describe_model(options.model_name_or_path, found)
    check_optional(found)
    if options.json:
        lists = {"variables": record["variables"], "notes": found.notes, "problems": found.problems}
        print(json.dumps({**found.sections, **lists}, indent=1))
    else:
        show(found)
    return 1 if found.problems else 0


def check_versions(packages: dict[str, str], found: Findings) -> None:
    """Note what is known to be wrong with the installed versions."""
    for name, least, fault in KNOWN_FAULTS:
        parts = packages.get(name, "0").split("+")[0].split(".")
        version = tuple(int(part) for part in parts[:2] if part.isdigit())
        if version < least:
            found.problems.append(f"{name} {packages.get(name)} {fault}")


def check_threads(record: dict[str, Any], found: Findings) -> None:
    """Note more threads than cores: they spin while they wait for each other."""
    if record["threads"] > record["cores"]:
        found.problems.append(
            f"torch uses {record['threads']} threads on {record['cores']} cores: set OMP_NUM_THREADS={record['cores']}"
        )


def check_folder(folder: Path, found: Findings) -> None:
    """Measure free space, the speed of writing, and whether the folder can be locked."""
    import fcntl
    import os

    section: dict[str, Any] = {"folder": str(folder.resolve())}
    found.sections["disk"] = section
    try:
        section["free_bytes"] = shutil.disk_usage(folder).free
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.") as file:
            block, started = bytes(2**20), time.perf_counter()
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            section["write_bytes_per_second"] = FILE_BYTES / (time.perf_counter() - started)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            section["can_be_locked"] = True
    except OSError as error:
        found.problems.append(f"{folder}: {error}; choose another --output-dir")
        return
    if section["free_bytes"] < LITTLE_DISK:
        found.problems.append(f"{folder} has {section['free_bytes'] / 1e9:.1f} GB free: checkpoints may not fit")
    if section["write_bytes_per_second"] < SLOW_FOLDER:
        found.problems.append(
            f"{folder} takes {section['write_bytes_per_second'] / 1e6:.0f} MB/s: saving will be slow; use a local disk"
        )


def time_kernels(found: Findings) -> None:
    """Time a matrix product and causal attention in the dtypes that a run may use."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, tokens = (8192, 4096) if device.type == "cuda" else (768, 512)
    section: dict[str, Any] = {"device": str(device)}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = _seconds_of(partial(torch.matmul, a, b), device)
        section[f"matmul_{name}_tflops"] = 2 * size**3 / seconds / 1e12
        heads = torch.randn(1, 8, tokens, 64, device=device, dtype=dtype)
        attend = partial(scaled_dot_product_attention, heads, heads, heads, is_causal=True)
        seconds = _seconds_of(attend, device)
        section[f"attention_{name}_tflops"] = 4 * 8 * tokens**2 * 64 / 2 / seconds / 1e12
    found.sections["speed"] = section
    ratio = section["matmul_bfloat16_tflops"] / section["matmul_float32_tflops"]
    if ratio < 0.5:
        found.notes.append(
            f"bfloat16 products run at {ratio:.0%} of the speed of float32: this device emulates them; leave bf16 off"
        )


def _seconds_of(act: Callable[[], Any], device: Any) -> float:
    """Return the seconds that a call takes, the mean over `SECONDS_OF_TIMING` after a warm-up."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    act()
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS_OF_TIMING:
        act()
        wait()
        count += 1
    return (time.perf_counter() - started) / count


def time_all_reduce(num_ranks: int, found: Findings) -> None:
    """Time an all_reduce on ranks of this machine, over NCCL where each has a GPU, else over gloo."""
    import socket

    import torch
    from torch import multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use_cpu = torch.cuda.device_count() < num_ranks
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "seconds")
        multiprocessing.spawn(_all_reduce, (num_ranks, port, use_cpu, results), num_ranks)
        seconds = float(results.read_text(encoding="utf-8"))
    found.sections["all_reduce"] = {
        "ranks": num_ranks,
        "device": "cpu" if use_cpu else "cuda",
        "bus_bytes_per_second": 2 * (num_ranks - 1) / num_ranks * REDUCED_BYTES / seconds,
    }


def _all_reduce(rank: int, num_ranks: int, port: int, use_cpu: bool, results: Path) -> None:
    """Run on one rank: join the others as torchrun's ranks do, and time their sum."""
    import os

    import torch

    from trainer.config.groups import MachineArguments
    from trainer.distributed.group import Group

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    with Group.join(MachineArguments(use_cpu=use_cpu)) as group:
        values = torch.zeros(REDUCED_BYTES // 4, device=group.device)
        group.sum_tensor(values)
        group.barrier()
        started = time.perf_counter()
        for _ in range(NUM_REDUCTIONS):
            group.sum_tensor(values)
        values.sum().item()  # the barrier is between hosts: it does not wait for a GPU
        group.barrier()
        if rank == 0:
            results.write_text(str((time.perf_counter() - started) / NUM_REDUCTIONS), encoding="utf-8")


def describe_model(place: str, found: Findings) -> None:
    """Say which attention a model would get here."""
    import torch

    from trainer.config.arguments import TrainingArguments
    from trainer.model.build import build_on_meta, find_model, read_config

    args = TrainingArguments(model_name_or_path=place)
    config = read_config(args, find_model(args))
    model = build_on_meta(config)
    found.sections["model"] = {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention": "varlen kernel with bf16" if torch.cuda.is_available() else "SDPA, document by document",
    }


def check_optional(found: Findings) -> None:
    """Note which optional packages import, and how to install those that are not there."""
    section: dict[str, str] = {}
    for name, (use, extra) in OPTIONAL.items():
        try:
            importlib.import_module(name)
            section[name] = f"there ({use})"
        except ImportError:
            section[name] = f"not installed: {use}; pip install 'reference-trainer[{extra}]'"
        except Exception as error:  # noqa: BLE001  a broken package may raise anything while it is imported
            section[name] = f"broken: {type(error).__name__}: {error}"
            found.problems.append(f"{name} cannot be imported: {error}")
    found.sections["optional packages"] = section


def show(found: Findings) -> None:
    """Print the page."""
    for title, lines in found.sections.items():
        print(title)
        for name, value in lines.items():
            print(f"  {name:<26}{_readable(name, value)}")
    for note in found.notes:
        print(f"note: {note}")
    if not found.problems:
        print("nothing is wrong")
    for problem in found.problems:
        print(f"problem: {problem}")


def _readable(name: str, value: Any) -> str:
    if name.endswith("bytes_per_second"):
        return f"{value / 1e6:,.0f} MB/s"
    if name.endswith("_bytes"):
        return f"{value / 1e9:,.1f} GB"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(str(each.get("name", each)) for each in value) or "none"
    return str(value)
