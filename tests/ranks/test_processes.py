"""No process and no file outlives pytest, whatever ends it; and the other ways to start ranks."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.ranks.inner import HEADER, LOAD, ROOT, collect, run_anew

pytest_plugins = "pytester"

PASSING = """
import pytest

@pytest.mark.world_size(1, 2)
def test_passes(ranks):
    import torch.distributed as dist  # which the process that only collects does without
    assert dist.get_world_size() == ranks.world_size

def answer():
    import torch.distributed as dist
    return dist.get_rank()

def test_launches(launch): assert launch(2, answer).values == [0, 1]
"""

WAITING = """
def test_waits(ranks):
    if ranks.rank == 0:
        os.system("sleep 300 &")
    reduce()
    open(f"pid{ranks.rank}", "w").write(f"{os.getpid()} {os.getppid()} {os.readlink('/proc/self/fd/1')}")
    time.sleep(300)
"""


def tree_of(pids):
    """These processes and whatever they are parents of, that still run."""
    living = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX" and (int(entry.name) in pids or int(fields[1]) in pids):
                living.add(int(entry.name))
    return living


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="SIGKILL"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_pytest(tmp_path, number):
    (tmp_path / "test_inner.py").write_text(HEADER + WAITING)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *LOAD, "-o", "rank_preload="]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        files = [tmp_path / "pid0", tmp_path / "pid1"]
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
        words = [file.read_text().split() for file in files]
        pids = {int(pid) for pid, parent, _ in words for pid in (pid, parent)}
        directory = Path(words[0][2]).parent
        assert directory.name.startswith("ranks-")
        assert len(tree_of(pids)) >= 4  # zygote, two ranks, and what rank 0 started
        family = tree_of(pids)
        process.send_signal(number)
        process.wait(30)
    assert wait_until(lambda: not tree_of(family))
    assert wait_until(lambda: not directory.exists())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--rank-zygote=exec",), id="exec"),
        pytest.param(("--rank-zygote=exec", "-n", "1"), id="exec-xdist", marks=pytest.mark.slow),
        pytest.param(("--rank-zygote=off",), id="off", marks=pytest.mark.slow),
        pytest.param(("--rank-isolation=fork",), id="isolated", marks=pytest.mark.slow),
        pytest.param(("-n", "2"), id="xdist", marks=pytest.mark.slow),  # as the default lane runs everything
    ],
)
def test_ranks_start_in_other_ways(pytester, options):
    preload = ("-o", "rank_preload=torch.distributed")
    found = run_anew(pytester, PASSING, *preload, *options)
    found.result.assert_outcomes(passed=3)
    assert "ranks: 2 runs on several ranks (gloo-2: 2)" in found.text  # the test and the launched job


@pytest.mark.slow
def test_fresh_interpreters_come_again_after_a_failure(pytester):
    body = "def test_a(ranks): assert 0\ndef test_b(ranks): pass"
    run_anew(pytester, body, "--rank-zygote=off").result.assert_outcomes(failed=1, passed=1)


def test_options_choose_cells(pytester):
    body = """
    @pytest.mark.world_size(1, 2, 3)
    @pytest.mark.backend("gloo", "fake")
    def test_cells(ranks): pass
    """
    chosen = collect(pytester, body, "--ranks=2,3", "--backends=gloo")
    assert re.findall(r"test_cells\[(.+?)\]", chosen.text) == ["gloo-2", "gloo-3"]
    assert "(4 deselected)" in chosen.text


def test_what_lacks_hardware_is_listed(pytester, monkeypatch):
    body = """
    @pytest.mark.world_size(2, 64)
    @pytest.mark.backend("nccl")
    def test_cells(ranks): pass
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makepyfile("import pytest\n" + textwrap.dedent(body))
    listed = pytester.runpytest_inprocess("-Werror", *LOAD)
    listed.assert_outcomes(skipped=2)
    assert "cells not run here" in listed.stdout.str()
    assert "nccl-64 needs 64 GPUs, there are 0 (1 test)" in listed.stdout.str()


@pytest.mark.parametrize(
    ("body", "options", "said"),
    [
        ("@pytest.mark.world_size(0)\ndef test_x(ranks): pass", (), "world_size(0,): allowed are positive integers"),
        ("@pytest.mark.backend('mpi')\ndef test_x(ranks): pass", (), "allowed are any of gloo, nccl, fake, threads"),
        ("def test_x(ranks): pass", ("--gpus=99",), "--gpus=99: allowed are auto and numbers up to"),
        ("def test_x(ranks): pass", ("--backends=glo",), "got 'glo'; allowed: a comma-separated list of gloo"),
        (
            "@pytest.mark.backend('threads')\ndef test_x(ranks, capsys): pass",
            (),
            "fixture 'capsys' changes the process, which all threads share",
        ),
    ],
    ids=["size", "backend", "gpus", "backends", "threads"],
)
def test_the_impossible_is_refused_at_collection(pytester, body, options, said):
    refused = collect(pytester, body, *options)
    assert refused.result.ret != 0
    assert said in refused.text + refused.result.stderr.str()


def test_coverage_counts_what_ranks_run(pytester):
    pytester.makepyfile(measured="def f(rank):\n    if rank:\n        return 1\n    return 2\n")
    pytester.makepyfile(unmeasured="import torch.distributed.distributed_c10d")  # is slow to import under coverage
    body = """
    import measured
    def test_f(ranks): measured.f(ranks.rank)
    """
    covered = run_anew(pytester, body, "-p", "unmeasured", "--cov=measured", "--cov-branch", "--cov-report=term")
    assert "100%" in covered.text


ELSEWHERE = """
import os, signal, sys, sysconfig
sysconfig.get_config_vars()  # reads a file named after the system
sys.platform = "darwin"
sys.modules["fcntl"] = None
del signal.SIGRTMIN, os.pidfd_open
"""


def test_other_systems_are_told_the_reason_and_run_the_rest(pytester):
    pytester.makepyfile(elsewhere=ELSEWHERE)
    body = """
    import pytest
    def test_ranks(ranks): pass
    def test_launches(launch): pass
    def test_other(): pass
    """
    found = run_anew(pytester, body, "-p", "elsewhere", "-rs")
    found.result.assert_outcomes(passed=1, skipped=2)
    assert "ranks are forks, watched through /proc and pidfd, which darwin lacks" in found.text
    assert "cells not run here" in found.text
