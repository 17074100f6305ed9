"""From launch to the first optimizer step, beside the peers': `python benchmarks/bench_startup.py --rounds 5`.

Every contender imports what it needs, builds the same model, reads the same samples and takes one step. Before that:
how long `trainer --help` and `trainer train --help` take, the goal for the first being half a second, and how long it
takes to import the class of the model, which no contender can do without.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from compare import REPOSITORY, command_line, compare, report
from step_contenders import CONTENDERS

IMPORT = "import torch; from transformers import LlamaForCausalLM"


def seconds_of(words: Sequence[str], rounds: int) -> float:
    """Median time of a Python process."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    options = command_line(__doc__, CONTENDERS).parse_args()
    for words in (["--help"], ["train", "--help"]):
        print(f"trainer {' '.join(words)}: {seconds_of(['-m', 'trainer', *words], options.rounds):.2f} s")
    print(f"{IMPORT}: {seconds_of(['-c', IMPORT], options.rounds):.2f} s")
    script = str(Path(__file__).with_name("step_contenders.py"))
    model, load = ("tiny", "tiny") if options.tiny else ("small", "first-step")
    commands = {name: [script, name, "--model", model, "--load", load] for name in options.only}
    results = compare(commands, options.rounds)
    title = f"launch to the first step, {model} Llama"
    report(options, title, results, "first_step_seconds", ("peak_memory_mb",), is_cost=True)


if __name__ == "__main__":
    main()
