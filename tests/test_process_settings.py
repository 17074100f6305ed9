"""What holds for the whole process while it trains."""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.shape.source import ROOT
from trainer import host
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
