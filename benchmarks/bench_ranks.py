"""What one multi-rank test costs: warm ranks against a process per test and torch's own test cases, in one run.

python benchmarks/bench_ranks.py                  2 and 4 ranks, an all_reduce and an FSDP2 step of a tiny Llama
python benchmarks/bench_ranks.py --sizes 2 --tests 200

Prints seconds per test and the ratio to spawn; the first test is left out and stands in the last column.
torch's test cases need the package expecttest.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
BODIES = ("all_reduce", "fsdp2")
CONFTEST = """
import time

def pytest_runtest_logfinish(nodeid):
    with open("times", "a") as file:
        file.write(f"{time.perf_counter()}\\n")
"""
TESTS = """
import pytest
from benchmarks.bench_ranks import {body}
from transformers import LlamaForCausalLM  # as tests of models do: the zygote has it, no rank imports it

@pytest.mark.world_size({size})
@pytest.mark.isolation({isolation!r})
@pytest.mark.parametrize("number", range({tests}))
def test_body(ranks, number): {body}()
"""


def all_reduce() -> None:
    """The cheapest test that needs ranks."""
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == dist.get_world_size()


def fsdp2() -> None:
    """Shard a 2-layer Llama, one forward, backward, clip and step of the optimizer that runs have by default."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model, mesh = LlamaForCausalLM(config), init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def on_warm_ranks(body: str, size: int, tests: int, isolation: str = "warm") -> list[float]:
    """Seconds of each test under the harness, between the ends of two tests."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "conftest.py").write_text(CONFTEST)
        text = TESTS.format(body=body, size=size, tests=tests, isolation=isolation)
        Path(directory, "test_bench.py").write_text(text)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "no:pytest_ranks", "-p", "no:trainer_ranks", "-p", "tests.fixtures.ranks.plugin"]
        environment = _environment()
        started = time.perf_counter()
        subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL)
        ends = [float(line) for line in Path(directory, "times").read_text().split()]
    return [ends[0] - started, *(after - before for before, after in zip(ends, ends[1:], strict=False))]


def on_spawned_ranks(body: str, size: int, tests: int) -> list[float]:
    """A process per rank and test."""
    return [_timed(functools.partial(_spawn, body, size)) for _ in range(tests)]


def on_test_case(kind: str, body: str, size: int, tests: int) -> list[float]:
    """torch's MultiProcessTestCase or MultiProcContinuousTest, through pytest as its users run them."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "conftest.py").write_text(CONFTEST)
        Path(directory, "test_bench.py").write_text(_test_case(kind, body, size, tests))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = _environment()
        started = time.perf_counter()
        subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL)
        ends = [float(line) for line in Path(directory, "times").read_text().split()]
    return [ends[0] - started, *(after - before for before, after in zip(ends, ends[1:], strict=False))]


def _test_case(kind: str, body: str, size: int, tests: int) -> str:
    methods = "\n".join(f"    def test_{number}(self): self.body()" for number in range(tests))
    start = "dist.init_process_group('gloo', store=dist.FileStore(self.file_name, {0}), rank=self.rank, world_size={0})"
    per_test = start.format(size) + "; "
    setup = "    def setUp(self):\n        super().setUp()\n        self._spawn_processes()\n"
    is_continuous = kind == "MultiProcContinuousTest"
    return (
        "import torch.distributed as dist\n"
        f"from torch.testing._internal.common_distributed import {kind}\n"
        f"from benchmarks.bench_ranks import {body}\n"
        f"class TestBench({kind}):\n"
        f"    world_size = {size}\n"
        + ("    @classmethod\n    def backend_str(cls): return 'gloo'\n" if is_continuous else setup)
        + f"    def body(self): {'' if is_continuous else per_test}{body}()\n{methods}\n"
    )


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def _spawn(body: str, size: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_spawned, (body, size, directory), nprocs=size)


def _spawned(rank: int, body: str, size: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    globals()[body]()
    dist.destroy_process_group()


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Print one table per body and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tests", type=int, default=100, help="tests on warm ranks")
    parser.add_argument("--slow-tests", type=int, default=3, help="tests of the ways that start processes each time")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for body in BODIES:
        for size in args.sizes:
            _table(body, size, args.tests, args.slow_tests)


def _table(body: str, size: int, tests: int, slow_tests: int) -> None:
    print(f"\n{body}, {size} ranks: seconds per test")
    spawned = sorted(on_spawned_ranks(body, size, slow_tests))
    spawn = spawned[len(spawned) // 2]
    rows = [("mp.spawn", [spawn, *spawned])]
    rows.append(("MultiProcessTestCase", on_test_case("MultiProcessTestCase", body, size, slow_tests + 1)))
    rows.append(("MultiProcContinuousTest", on_test_case("MultiProcContinuousTest", body, size, tests)))
    rows.append(("warm ranks", on_warm_ranks(body, size, tests)))
    rows.append(("new ranks per test", on_warm_ranks(body, size, max(10, tests // 5), "fork")))
    for name, seconds in rows:
        rest = sorted(seconds[1:])
        median, mean = rest[len(rest) // 2], sum(rest) / len(rest)
        ratio = f"{spawn / median:6.0f}x"
        print(f"  {name:24} median {median:7.4f}  mean {mean:7.4f}  {ratio}  first {seconds[0]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
