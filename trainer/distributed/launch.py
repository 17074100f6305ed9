"""Runs torchrun from Python: the same command again, once per rank, on this machine.

Owns what becomes of its answer: one message that names the rank, where torchrun prints its own traceback. Knows
nothing of what the ranks run.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

from trainer.errors import RankError

_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def number_of_ranks(asked: int | Literal["auto"], *, use_cpu: bool) -> int:
    """Return how many ranks to start: as many as asked; for "auto" one for each GPU, or one on the CPU."""
    if asked != "auto":
        return asked
    return 1 if use_cpu else max(torch.cuda.device_count(), 1)


def run_on_ranks(nproc_per_node: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` on that many ranks, and return the job's exit code.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU are passed on, so that the ranks can save; where they stop,
    the exit code is 128 plus the signal. A rank that fails has said why: the code is its own.

    Raises:
        RankError: a rank was killed.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # a failure is told once, by us
    # torchrun itself handles signals that end a job. These others would end the launcher alone, and leave its ranks.
    before = {number: signal.signal(number, _pass_on) for number in _PASSED_ON}
    try:
        torchrun(["--standalone", f"--nproc-per-node={nproc_per_node}", "-m", module, *arguments])
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        rank, failure = _cause(error.failures)
        if failure.exitcode < 0:
            how = f"killed by {failure.signal_name()}"
            raise RankError(f"rank {rank} (pid {failure.pid}) was {how}, and the others were ended") from None
        return int(failure.exitcode)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to every child of this process: the ranks, which decide what it means."""
    for thread in Path("/proc/self/task").glob("*/children"):
        for child in thread.read_text().split():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(int(child), number)


def _cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that was killed, else one that failed; torchrun itself ends the others by SIGTERM."""
    return min(failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].exitcode))
