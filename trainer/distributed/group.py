"""Life of the process group, and every collective of ours. One process is a group of one: callers never ask.

Joins a group that exists already (a notebook, a test), else starts the one that torchrun's environment describes, and
ends only what it started. Knows nothing of models and data.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.config.groups import MachineArguments
from trainer.distributed.failure import announce, is_loss_of_peer, name_failed_rank
from trainer.distributed.orphan import end_with_launcher
from trainer.distributed.topology import (
    Topology,
    count_shards,
    current_topology,
    gpu_index,
    refuse_lone_slurm_task,
)
from trainer.errors import PeerError, RankError
from trainer.host import host_memory

SECONDS_BETWEEN_BEATS = 0.25
SECONDS_BEFORE_TELLING = 300.0  # that other ranks are at work for so long; a disk that hangs would wait in silence

logger = logging.getLogger(__name__)
Given = TypeVar("Given")


class Group:
    """All ranks of a run as seen from one of them."""

    def __init__(
        self, topology: Topology, device: torch.device, *, replicate: int = 1, owns_process_group: bool = False
    ) -> None:
        self.topology, self.device = topology, device
        self._owns_process_group, self._replicate = owns_process_group, replicate
        self._num_failures = 0  # equal on all ranks: where one fails, all do
        # Flags, counts and errors travel between CPUs: a wait for them over NCCL ends in its watchdog's abort when a
        # rank is gone, and nobody is told which.
        self._control: dist.ProcessGroup | None = None
        if topology.world_size > 1 and "cpu" not in dist.get_backend_config():
            self._control = dist.new_group(backend="gloo")

    @classmethod
    def join(cls, args: MachineArguments) -> Group:
        """Join the group that exists, or start the one that the environment describes."""
        topology = current_topology()
        end_with_launcher()
        count_shards(topology.world_size, args.replicate)  # the mesh comes after hours of preparing, perhaps
        if dist.is_initialized():
            return cls(topology, _device_of_backend(), replicate=args.replicate)
        refuse_lone_slurm_task()
        device = choose_device(args, topology)
        if topology.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            timeout = timedelta(seconds=args.ddp_timeout)
            with threads_that_give_way():
                dist.init_process_group(
                    backend,
                    store=_store_of_this_start(topology, timeout),
                    rank=topology.rank,
                    world_size=topology.world_size,
                    timeout=timeout,
                    device_id=device if device.type == "cuda" else None,
                )
        return cls(topology, device, replicate=args.replicate, owns_process_group=topology.world_size > 1)

    @functools.cached_property
    def mesh(self) -> DeviceMesh | None:
        """What models are sharded over, None for one process; all ranks call.

        It is made at first use, once ranks have agreed on `replicate`: others would wait for each other.
        """
        if self.world_size == 1:
            return None
        with threads_that_give_way():
            return mesh_over_ranks(self.device, self.world_size, self._replicate)

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.topology.world_size

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes and prints for all."""
        return self.topology.is_main

    def sum(self, values: list[float]) -> list[float]:
        """Sum each value over ranks, in float64, in one collective; every rank gets the same result."""
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor of the run's device or of the CPU over ranks in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self._control if values.device.type == "cpu" else None)
        return values

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's tensor, in the order of ranks: same type and number of dimensions (>= 1), any sizes."""
        if self.world_size == 1:
            return [tensor]
        sizes = torch.stack(self._gather_alike(torch.tensor(tensor.shape)))
        room = tensor.new_zeros(sizes.amax(0).tolist())
        room[_corner(tensor.shape)] = tensor
        return [part[_corner(size)] for part, size in zip(self._gather_alike(room), sizes.tolist(), strict=True)]

    def _gather_alike(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self._control if tensor.device.type == "cpu" else None)
        return gathered

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.any(False)

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Leave the body together with all ranks, however long it takes some of them; it calls no collectives."""
        with unhurried(None if self.world_size == 1 else self.any):
            yield

    def try_on_main(self, act: Callable[[], Given], *kinds: type[Exception]) -> tuple[Given | None, Exception | None]:
        """Run something on the main rank; return (its result, None), or (None, its error) if it is of these kinds.

        The other ranks wait, however long it takes, and get (None, None): `first_error` tells them.
        """
        with self.unhurried():
            if not self.is_main:
                return None, None
            try:
                return act(), None
            except kinds as error:
                return None, error

    def first_error(self, error: BaseException | None) -> str | None:
        """Say what went wrong on the first rank where something did, naming it; None where nothing did.

        All ranks call, each with its own error or None, and all get the same answer.
        """
        text = b"" if error is None else f"{type(error).__name__}: {error}".encode()
        sizes = self.sum([float(len(text)) * (rank == self.rank) for rank in range(self.world_size)])
        failed = next((rank for rank, size in enumerate(sizes) if size), None)
        if failed is None:
            return None
        letters = list(text) if failed == self.rank else [0] * int(sizes[failed])
        said = self.sum_tensor(torch.tensor(letters, dtype=torch.int32)).tolist()
        return f"rank {failed}: {bytes(said).decode(errors='replace')}" if self.world_size > 1 else text.decode()

    def from_main(self, numbers: list[int]) -> list[int]:
        """Return the main rank's numbers on every rank."""
        count = int(self.sum([float(len(numbers)) * self.is_main])[0])
        mine = numbers if self.is_main else [0] * count
        return self.sum_tensor(torch.tensor(mine, dtype=torch.int64)).tolist()

    @contextmanager
    def naming_faults(self, where: Callable[[], str]) -> Iterator[None]:
        """Make errors of the body that come from a lost rank name it; `where` returns what this rank was doing.

        Of several around each other, the innermost one does.

        Raises:
            RankError: another rank failed, died or hangs.
        """
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            if self.world_size == 1:
                raise
            number, self._num_failures = self._num_failures, self._num_failures + 1
            announce(error, where(), self.rank, number)
            if not is_loss_of_peer(error):
                raise
            raise RankError(f"{where()}: {name_failed_rank(self.rank, self.world_size, number)}") from error

    @contextmanager
    def main_first(self, *, local: bool = True, what: str = "work") -> Iterator[None]:
        """Run the body on the first rank (of each node, or of all), then on the others, which find done what it did.

        The others wait, however long it takes; it calls no collectives.

        Raises:
            PeerError: it failed on the first rank, which says why; the body is not run on the others.
            RankError: it failed on the first rank of another node.
        """
        leads = self.topology.is_local_main if local else self.topology.is_main
        error: BaseException | None = None
        with self.unhurried():
            if leads:
                try:
                    yield
                except BaseException as caught:  # noqa: BLE001  raised below, once the others know
                    error = caught
        has_failed = self.any(error is not None)
        if error is not None:
            raise error
        if has_failed:
            kind = RankError if leads else PeerError
            raise kind(f"{what} stopped because the first rank failed; see its message")
        if not leads:
            yield

    def close(self) -> None:
        """End the process group if this object started it."""
        if self._owns_process_group and dist.is_initialized():
            dist.destroy_process_group()
        self._owns_process_group = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def unhurried(is_any_at_work: Callable[[bool], bool] | None) -> Iterator[None]:
    """Leave the body together with all ranks, however long it takes some of them.

    While one is at work, a thread of it takes part in a collective of all every `SECONDS_BETWEEN_BEATS`: so no timeout
    of a collective counts its work, and a rank that dies is noticed.

    Args:
        is_any_at_work: asks, with whether this rank is; a collective. None for one process.
    """
    if is_any_at_work is None:
        yield
        return
    is_done = threading.Event()
    lost: list[Exception] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # each thread has one of its own

    def beat() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        try:
            while not is_done.wait(SECONDS_BETWEEN_BEATS):
                is_any_at_work(True)
        except Exception as error:  # noqa: BLE001  raised by the thread that works
            lost.append(error)

    thread = threading.Thread(target=beat, name="trainer-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
    if lost:
        raise lost[0]
    since, tells_after = time.monotonic(), SECONDS_BEFORE_TELLING
    while is_any_at_work(False):
        if time.monotonic() - since > tells_after:
            logger.warning("other ranks have been at work for %.0f s; this one waits for them", tells_after)
            tells_after *= 2


def mesh_over_ranks(device: torch.device, world_size: int, replicate: int = 1) -> DeviceMesh:
    """Build the mesh that a model is sharded over: one axis of all ranks, or replicas and the ranks that share each.

    Neighbouring ranks share a replica: with one replica a node, weights are gathered inside nodes alone.
    """
    if replicate == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    sizes = (replicate, count_shards(world_size, replicate))
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))


@contextmanager
def imagined_mesh(world_size: int, device: torch.device) -> Iterator[DeviceMesh]:
    """Mesh of ranks of which only the first is there, for tensors without values: nothing is sent.

    No process group may exist; the one behind the mesh ends with the context.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the back end

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=world_size)
    try:
        yield mesh_over_ranks(device, world_size)
    finally:
        dist.destroy_process_group()


def _store_of_this_start(topology: Topology, timeout: timedelta) -> dist.Store:
    """Store in which the ranks meet, apart from what ranks that are gone have left there.

    torchrun keeps one store over all its restarts (pytorch/pytorch#135712). The nodes of a larger job may differ in
    their number of restarts: there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each start a store of its own.
    """
    store, _, _ = next(dist.rendezvous("env://", topology.rank, topology.world_size, timeout=timeout))
    store.set_timeout(timeout)
    is_one_node = topology.local_world_size == topology.world_size
    return dist.PrefixStore(f"trainer/start_{topology.restart if is_one_node else 0}", store)


def _corner(sizes: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in sizes)


def _device_of_backend() -> torch.device:
    """Return the device that the existing group communicates over."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if "nccl" in dist.get_backend_config()
        else torch.device("cpu")
    )


def choose_device(args: MachineArguments, topology: Topology) -> torch.device:
    """Return the GPU of this process, or the CPU where there is none or `use_cpu` asks for it."""
    if args.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    device = torch.device("cuda", gpu_index(topology, torch.cuda.device_count(), visible))
    torch.cuda.set_device(device)
    return device


def memory_of_rank(args: MachineArguments, topology: Topology) -> int:
    """Return the bytes of memory that a rank may fill: those of its GPU, or its share of this machine's."""
    device = choose_device(args, topology)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory() // topology.local_world_size


@contextmanager
def threads_that_give_way() -> Iterator[None]:
    """Keep threads that the body starts from displacing one that computes (Linux; elsewhere nothing changes).

    For gloo: its thread that reads sockets spins while another thread holds the lock it wants, and where it has
    displaced that very thread, for its whole slice. Of 2 ranks on 2 cores a reduce_scatter of 20 KB took 1.7 ms instead
    of 0.3.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    _schedule(os.SCHED_BATCH)  # this thread; those that it starts inherit it
    try:
        yield
    finally:
        _schedule(os.SCHED_OTHER)


def _schedule(policy: int) -> None:
    with suppress(PermissionError):  # a sandbox that forbids it costs time, nothing else
        os.sched_setscheduler(0, policy, os.sched_param(0))
