"""Starts torchrun from Python: the same command again, once per rank, on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


def run_on_ranks(nproc_per_node: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` on that many ranks, and give back the job's exit code.

    SIGINT and SIGTERM are passed on once, so that the ranks can save; the exit code is then 128 plus the signal.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc_per_node}"]
    process = subprocess.Popen([*torchrun, "-m", module, *arguments], start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code
