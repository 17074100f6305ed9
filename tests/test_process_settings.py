"""What holds for the whole process while it trains."""

from __future__ import annotations

import platform
import resource
import statistics

import pytest
import torch

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
