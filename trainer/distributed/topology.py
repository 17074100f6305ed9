"""Which rank this process is: the one source of rank and world size.

`current_topology` is right under torchrun, in a process group that `torch.multiprocessing.spawn` or srun's tasks made,
and in a notebook. The variables of torchrun and of SLURM are read here only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import UsageError


@dataclass(frozen=True)
class Topology:
    """Place of one process among all: rank of world_size, local_rank of local_world_size on its node.

    `restart` counts how often torchrun has started the ranks of this node anew.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restart: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise UsageError(
                f"rank {self.rank} of {self.world_size}, local rank {self.local_rank} of {self.local_world_size}: "
                "ranks count from 0 and lie below their world size; start with torchrun or unset RANK and WORLD_SIZE"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Topology:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and the restarts as torchrun sets them.

        Absent means one process.

        Raises:
            UsageError: a variable is not a whole number, or the ranks contradict each other.
        """
        world_size = _whole_number(environment, "WORLD_SIZE", 1)
        return cls(
            rank=_whole_number(environment, "RANK", 0),
            world_size=world_size,
            local_rank=_whole_number(environment, "LOCAL_RANK", 0),
            local_world_size=_whole_number(environment, "LOCAL_WORLD_SIZE", world_size),
            restart=_whole_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        )

    @property
    def is_main(self) -> bool:
        """Return whether this is the rank that writes and prints for all."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Return whether this is the rank that prepares data for its node."""
        return self.local_rank == 0


def current_topology(environment: Mapping[str, str] = os.environ) -> Topology:
    """Return the place of this process in the process group that exists, else in the one that torchrun describes.

    A group says rank and world size, not which of its ranks share a node. Where torchrun's LOCAL_RANK does not say it
    either, SLURM's variables do if they describe this very group; else all ranks are taken to be on one node, as those
    of `torch.multiprocessing.spawn` are.

    Raises:
        UsageError: a variable is not a whole number, or the ranks contradict each other.
    """
    import torch.distributed as dist  # here: the launcher and the planner read the environment without loading torch

    if not (dist.is_available() and dist.is_initialized()):
        return Topology.from_environment(environment)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    restart = _whole_number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
    if "LOCAL_RANK" in environment:
        local_rank = _whole_number(environment, "LOCAL_RANK", 0)
        local_world_size = _whole_number(environment, "LOCAL_WORLD_SIZE", world_size)
    elif _is_slurm_task(environment, rank, world_size):
        local_rank = _whole_number(environment, "SLURM_LOCALID", 0)
        local_world_size = _slurm_tasks_of_node(environment, world_size)
    else:
        local_rank, local_world_size = rank, world_size
    return Topology(rank, world_size, local_rank, local_world_size, restart)


def count_shards(world_size: int, replicate: int) -> int:
    """Return how many ranks share each copy of the model.

    Raises:
        UsageError: the ranks cannot be divided into so many copies.
    """
    if world_size % replicate:
        raise UsageError(
            f"replicate = {replicate}: {world_size} ranks cannot be divided into so many groups of one size; give a "
            "divisor, such as the number of nodes, or 1 to shard over all ranks"
        )
    return world_size // replicate


def refuse_lone_slurm_task(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError in a SLURM job of several tasks whose processes were given no ranks.

    Each task would train on its own and write into the same folder.
    """
    num_tasks = _whole_number(environment, "SLURM_NTASKS", 1)
    if num_tasks > 1 and not {"RANK", "WORLD_SIZE"} & environment.keys():
        raise UsageError(
            f"SLURM runs {num_tasks} tasks (SLURM_NTASKS), but RANK and WORLD_SIZE are not set: every task would be a "
            "run of its own. Start one task per node and let torchrun start the ranks: srun --ntasks-per-node=1 "
            "torchrun --nnodes=$SLURM_NNODES --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=NODE:29500 "
            "-m trainer train CONFIG.yaml; for one process, unset SLURM_NTASKS"
        )


def gpu_index(topology: Topology, num_visible: int, visible_devices: str | None) -> int:
    """Return which of the visible GPUs belongs to this rank.

    SLURM and container runtimes can show every rank one GPU of its own (CUDA_VISIBLE_DEVICES names one): number 0.

    Raises:
        UsageError: there are more ranks on this node than GPUs.
    """
    if topology.local_rank < num_visible:
        return topology.local_rank
    if num_visible == 1 and visible_devices and "," not in visible_devices:
        return 0
    raise UsageError(
        f"local rank {topology.local_rank} of {topology.local_world_size} has no GPU: {num_visible} are visible "
        f"(CUDA_VISIBLE_DEVICES = {visible_devices}); start at most as many ranks per node as there are GPUs, or set "
        "use_cpu"
    )


def _is_slurm_task(environment: Mapping[str, str], rank: int, world_size: int) -> bool:
    """Return whether the ranks of the group are the tasks of this job step, in their order."""
    if not {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"} <= environment.keys():
        return False
    return (environment["SLURM_PROCID"], environment["SLURM_NTASKS"]) == (str(rank), str(world_size))


def _slurm_tasks_of_node(environment: Mapping[str, str], world_size: int) -> int:
    """Read this node's entry of SLURM's counts, which are written like `4(x2),3`."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)).split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if matched is None:
            raise UsageError(f"environment variable SLURM_STEP_TASKS_PER_NODE: {part!r} is no count of tasks")
        counts += [int(matched[1])] * int(matched[2] or 1)
    return counts[min(_whole_number(environment, "SLURM_NODEID", 0), len(counts) - 1)]


def _whole_number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"environment variable {name}={text!r}: expected a whole number, as torchrun sets it")
    return int(text)
