"""Runs torchrun from Python: the same command again, once per rank, on this machine.

Owns what becomes of its answer: one message that names the rank, where torchrun prints its own traceback. Knows
nothing of what the ranks run.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

from trainer.errors import RankError


def run_on_ranks(nproc_per_node: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` on that many ranks, and give back the job's exit code.

    SIGINT and SIGTERM are passed on, so that the ranks can save; the exit code is then 128 plus the signal. A rank that
    fails has said why: the code is its own.

    Raises:
        RankError: a rank was killed.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # a failure is told once, by us
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
    return 0


def _cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that was killed, else one that failed; torchrun itself ends the others by SIGTERM."""
    return min(failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].exitcode))
