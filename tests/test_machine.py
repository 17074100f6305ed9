"""What holds for the whole process while it trains."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from trainer.training.machine import keep_freed_memory

ACTIVATION_BYTES = 2**26  # glibc by itself gives the system back whatever is larger than 2**25
PAGE_BYTES = resource.getpagesize()


def pages_that_a_second_use_touches(keeps: bool) -> int:
    if keeps:
        assert keep_freed_memory()
    torch.zeros(ACTIVATION_BYTES, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(ACTIVATION_BYTES, dtype=torch.uint8).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
@pytest.mark.parametrize("keeps", [True, False])
def test_memory_that_a_step_frees_is_kept_for_the_next(launch, keeps):
    pages = launch(1, pages_that_a_second_use_touches, keeps, group=False)[0].value
    assert (pages < 0.1 * ACTIVATION_BYTES / PAGE_BYTES) == keeps
