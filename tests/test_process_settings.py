"""What holds for the whole process while it trains."""

from __future__ import annotations

import platform
import resource
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.shape.source import ROOT
from trainer import host
from trainer.distributed import failure
from trainer.distributed import launch as launch_module
from trainer.distributed.group import imagined_mesh
from trainer.distributed.launch import run_on_ranks
from trainer.distributed.orphan import end_with_launcher
from trainer.errors import RankError
from trainer.training.process import keep_freed_memory

ACTIVATION_BYTES = 2**26  # glibc by itself gives the system back whatever is larger than 2**25
PAGE_BYTES = resource.getpagesize()
NUM_USES = 20
FEW = 0.1  # of all pages: what Python itself takes meanwhile, and a kept piece that it has cut


def pages_of_uses(keeps: bool) -> float:
    """New pages that a use of so much memory takes, of all that it fills, once it was used before."""
    if keeps:
        assert keep_freed_memory()
    pages = []
    for _ in range(NUM_USES):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(ACTIVATION_BYTES, dtype=torch.uint8)
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(pages) * PAGE_BYTES / ACTIVATION_BYTES


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
@pytest.mark.parametrize("keeps", [True, False])
def test_memory_that_a_step_frees_is_kept_for_the_next(launch, keeps):
    share = launch(1, pages_of_uses, keeps, group=False)[0].value
    assert (share < FEW) == keeps


def test_memory_is_that_of_the_machine_or_of_the_container_in_it(tmp_path: Path, monkeypatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(host, "LIMIT_OF_CONTAINER", limit)
    of_machine = host.host_memory()
    for text, expected in (("max\n", of_machine), (f"{2**62}\n", of_machine), ("1048576\n", 2**20)):
        limit.write_text(text)
        assert host.host_memory() == expected


def test_the_peak_of_a_process_is_its_own_not_its_parents() -> None:
    """What a launcher or a notebook held before it started the run is handed on through exec by getrusage."""
    small = "import torch; from trainer.training.metrics import peak_memory_bytes as p; print(p(torch.device('cpu')))"
    large = f"import subprocess, sys; held = b'x' * {2**30}; subprocess.run([sys.executable, '-c', {small!r}])"
    command = [sys.executable, "-c", large]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 2**20 < int(printed) < 2**30


def test_a_job_ends_with_the_code_of_what_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended_by(error: BaseException) -> None:
        def torchrun(_: list[str]) -> None:
            raise error

        monkeypatch.setattr(launch_module, "torchrun", torchrun)

    def failed(exitcode: int) -> ChildFailedError:
        return ChildFailedError("train", {1: ProcessFailure(1, 4242, exitcode, "none")})

    for error, code in ((SignalException("", signal.SIGTERM), 128 + signal.SIGTERM), (failed(1), 1), (failed(3), 3)):
        ended_by(error)
        assert run_on_ranks(2, "module", []) == code
    ended_by(failed(-signal.SIGKILL))
    with pytest.raises(RankError, match=r"rank 1 \(pid 4242\) was killed by SIGKILL"):
        run_on_ranks(2, "module", [])


def test_a_mesh_that_is_imagined_has_its_ranks_and_ends(launch) -> None:
    assert launch(1, ranks_of_imagined_mesh, group=False)[0].value == (64, "fake", False)


def ranks_of_imagined_mesh() -> tuple[int, str, bool]:
    with imagined_mesh(64, torch.device("cpu")) as mesh:
        found = mesh.size(), dist.get_backend()
    return *found, dist.is_initialized()


def test_a_rank_of_torchrun_watches_its_launcher_once(launch) -> None:
    assert launch(1, numbers_of_watchers, group=False)[0].value == [0, 1, 1]


def numbers_of_watchers() -> list[int]:
    found = []
    for environment in ({}, {"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "a"}):
        end_with_launcher(environment)
        found.append([thread.name for thread in threading.enumerate()].count("trainer-launcher"))
    return found


def test_ranks_that_announce_nothing_are_named(launch) -> None:
    said = launch(1, words_of_silent_ranks)[0].value
    assert said == "rank 1, 2 died or hangs: it did not answer within 1 s"


def words_of_silent_ranks() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failure, "SECONDS_TO_SPEAK", 0.6)
        return failure.name_failed_rank(0, 3, 99)
