"""Starts torchrun from Python: the same command again, once per rank, on this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def run_on_ranks(nproc_per_node: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` on that many ranks, and give back the job's exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc_per_node}"]
    process = subprocess.Popen([*command, "-m", module, *arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:  # torchrun got the same signal and passes it on: wait for the ranks to save
        process.wait()
        return EXIT_INTERRUPTED
