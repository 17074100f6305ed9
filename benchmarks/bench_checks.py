"""What comparing ranks and probing the folder cost at the start: seconds, and the share of the start-up up to step 1.

python benchmarks/bench_checks.py [--rounds 3]

Starts `trainer train` for one step on a tiny model in fresh processes, on 1 and on 2 ranks, and times `agree` and what
`sole_run` does on entering, on every rank; prints the medians of the slowest rank. One rank compares nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STARTED = time.time()


def main() -> None:
    """Start the runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    sys.path.insert(0, str(ROOT))
    from tests.fixtures.corpora import write_chats
    from tests.fixtures.models import save_model
    from tests.fixtures.tokenizers import build_tokenizer

    print("| ranks | start-up, s | comparing, s | folder, s | share |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        build_tokenizer().save_pretrained(place / "model")
        save_model(place / "model", vocab_size=320, max_position_embeddings=512)
        write_chats(place / "chats.jsonl", 12)
        for num_ranks in (1, 2):
            measured = [measure(place, num_ranks) for _ in range(rounds)]
            start, comparing, probing = (statistics.median(column) for column in zip(*measured, strict=True))
            share = (comparing + probing) / start
            print(f"| {num_ranks} | {start:.2f} | {comparing:.3f} | {probing:.3f} | {share:.1%} |", flush=True)


def measure(place: Path, num_ranks: int) -> tuple[float, float, float]:
    """Return the seconds of one start, and of both checks in it, of the rank that took longest."""
    results = place / "results"
    results.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"] if num_ranks > 1 else []
    command = [sys.executable, *launcher, __file__, "--rank", str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    told = [json.loads(path.read_text()) for path in results.iterdir()]
    for path in results.iterdir():
        path.unlink()
    start, comparing, probing = (max(column) for column in zip(*told, strict=True))
    return start, comparing, probing


def run_rank(place: Path) -> None:
    """Train one step, and write how long what took."""
    from trainer.cli.main import main as command
    from trainer.training import agreement, loop, run_dir, trainer

    seconds = {"comparing": 0.0, "probing": 0.0, "start": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            given = function(*args, **options)
            seconds[name] += time.perf_counter() - began
            return given

        return call

    class Entered(AbstractContextManager[None]):
        def __init__(self, *args: Any) -> None:
            self.inner = run_dir.sole_run(*args)

        def __enter__(self) -> None:
            timed("probing", self.inner.__enter__)()

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    take_step = loop.take_step

    def first_step(*args: Any) -> Any:
        seconds["start"] = time.time() - STARTED
        return take_step(*args)

    trainer.agree = agreement.agree = timed("comparing", trainer.agree)  # the command compares before preparing
    trainer.sole_run = Entered
    loop.take_step = first_step
    words = ["--use-cpu", "--overwrite-output-dir", "--batch-size=4", "--max-tokens-per-rank=512", "--max-steps=1"]
    for name, path in {"data-path": "chats.jsonl", "model-name-or-path": "model", "data-cache-dir": "cache"}.items():
        words.append(f"--{name}={place / path}")
    code = command(["train", f"--output-dir={place / 'run'}", *words])
    assert code == 0
    told = [seconds["start"], seconds["comparing"], seconds["probing"]]
    (place / "results" / os.environ.get("RANK", "0")).write_text(json.dumps(told))


if __name__ == "__main__":
    if "--rank" in sys.argv:
        run_rank(Path(sys.argv[-1]))
    else:
        main()
