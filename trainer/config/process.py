"""What scripts ask transformers' TrainingArguments about the process they run in: rank, device, who goes first.

The answers are those of `trainer.distributed`, looked up when they are asked for; options know nothing of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from trainer.config.groups import LoaderArguments, MachineArguments

if TYPE_CHECKING:
    import torch
    from transformers.training_args import ParallelMode

    from trainer.distributed.topology import Topology


class ProcessWords(MachineArguments, LoaderArguments):
    """This process among all, under transformers' names."""

    place_model_on_device = True

    @property
    def _topology(self) -> Topology:
        from trainer.distributed.group import current_topology

        return current_topology()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._topology.world_size

    @property
    def process_index(self) -> int:
        """This process among all, from 0."""
        return self._topology.rank

    @property
    def local_process_index(self) -> int:
        """This process among those of its node, from 0."""
        return self._topology.local_rank

    @property
    def should_log(self) -> bool:
        """Whether this process reports for all."""
        return self._topology.is_lead

    @property
    def should_save(self) -> bool:
        """Whether this process writes for all; of sharded weights each writes its part."""
        return self._topology.is_lead

    @property
    def device(self) -> torch.device:
        """This process's device."""
        from trainer.distributed.group import choose_device

        return choose_device(self, self._topology)

    @property
    def n_gpu(self) -> int:
        """Devices that this process drives: one GPU, or none."""
        return int(self.device.type == "cuda")

    @property
    def parallel_mode(self) -> ParallelMode:
        """Whether there are several processes, as transformers says it."""
        from transformers.training_args import ParallelMode

        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """How long a rank waits for the others."""
        return timedelta(seconds=self.ddp_timeout)

    @property
    def train_batch_size(self) -> int:
        """Samples of one rank in one micro-batch of an ordinary data set; one process drives one device."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Samples of one rank in one evaluation batch of an ordinary data set."""
        return self.per_device_eval_batch_size

    def get_process_log_level(self) -> int:
        """Give the level of transformers' messages; on all ranks but the lead, warnings."""
        from transformers.utils.logging import get_verbosity

        return get_verbosity() if self.should_log else logging.WARNING

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Run the body on the first rank (of each node; with local=False of all), then on the others.

        Raises:
            PeerError: it failed there; `desc` says what was done.
        """
        from trainer.distributed.group import Group

        with Group.join(self).lead_first(local=local, what=desc):
            yield
