"""Random outcomes in random order: no verdict is wrong and nothing is left behind."""

import os
import random
import re

import pytest

from tests.ranks.inner import run

NUM_OUTCOMES = 500 if os.environ.get("RUN_SLOW") == "1" else 25
KINDS = {
    "pass": ("passed", "reduce(); reduce()"),
    "pass_quietly": ("passed", "pass"),
    "fail_on_all": ("failed", "reduce(); assert False"),
    "fail_on_one": ("failed", "assert ranks.rank != ranks.world_size - 1; reduce()"),
    "killed": ("failed", "ranks.rank or os.kill(os.getpid(), signal.SIGKILL); reduce()"),
    "deadlock": ("failed", "reduce(); ranks.rank or reduce()"),
    "extra": ("failed", "ranks.rank or dist.all_reduce(torch.ones(1), async_op=True)"),
    "skip": ("skipped", "pytest.skip('here')"),
    "leak": ("failed", "os.environ['SOAK'] = 'x'"),
}
WEIGHTS = [20, 10, 4, 4, 4, 1, 3, 4, 2]


@pytest.mark.timeout(900)
def test_no_verdict_is_wrong(launch, tmp_path):
    draw = random.Random(NUM_OUTCOMES)
    kinds = draw.choices(list(KINDS), WEIGHTS, k=NUM_OUTCOMES)
    lines = [
        f"@pytest.mark.world_size({draw.choice([2, 2, 2, 3])})\ndef test_{number}_{kind}(ranks): {KINDS[kind][1]}\n"
        for number, kind in enumerate(kinds)
    ]
    soaked = run(launch, tmp_path, "\n".join(lines), "--tb=no", "--rank-timeout=60")
    found = dict(re.findall(r"::test_(\d+)_\w+\[gloo-\d\] (PASSED|FAILED|SKIPPED|ERROR)", soaked.text))
    wrong = {
        f"{number} {kind}": found.get(str(number))
        for number, kind in enumerate(kinds)
        if (found.get(str(number)) or "").lower() != KINDS[kind][0]
    }
    assert wrong == {}
