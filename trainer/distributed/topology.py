"""Which rank this process is: pure arithmetic, and the only reader of torchrun's environment variables."""

from __future__ import annotations

import os
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
    def is_lead(self) -> bool:
        """Whether this is the rank that writes and prints for all."""
        return self.rank == 0

    @property
    def is_local_lead(self) -> bool:
        """Whether this is the rank that prepares data for its node."""
        return self.local_rank == 0


def _whole_number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"environment variable {name}={text!r}: expected a whole number, as torchrun sets it")
    return int(text)
