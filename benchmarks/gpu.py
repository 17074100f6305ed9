"""Training steps on one GPU beside the peers': `python benchmarks/gpu.py --output gpu.json`, in under 8 minutes.

Llamas in the shapes of Qwen 2.5 (0.5, 1.5 and 3 billion weights, random), chat lengths, bfloat16, 32k tokens in a
micro-batch of ours. Each contender runs in a process of its own under a limit of time; what fails is reported and takes
none of the others along. Model FLOPs as in `workload.flops_per_token`; `--tiny` shows on any machine that it runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from compare import Measured, run, versions
from step_contenders import GPU_CONTENDERS

PEAK_TFLOPS = 989.0  # of an H200, dense bfloat16
VARIANTS = ("ours-products", "ours-liger", "transformers-liger")  # measured on the first model alone
RECOMPUTED = ("3b",)  # whose activations do not fit
SECONDS_IN_ALL, SECONDS_EACH = 460.0, 90.0


def plan(models: list[str]) -> list[tuple[str, str]]:
    """Which contender runs on which model, the most telling first: time may run out."""
    return [(model, name) for model in models for name in GPU_CONTENDERS if name not in VARIANTS or model == models[0]]


def command(model: str, name: str, load: str) -> list[str]:
    """How to run one contender."""
    script = str(Path(__file__).with_name("step_contenders.py"))
    recomputing = ["--recompute"] if model in RECOMPUTED else []
    return [script, name, "--model", model, "--dtype", "bfloat16", "--load", load, *recomputing]


def measure_all(jobs: list[tuple[str, str]], load: str, seconds_in_all: float) -> list[Measured]:
    """Run one after the other until the time is up; gives a row for each, with why there are no numbers."""
    rows, end = [], time.perf_counter() + seconds_in_all
    for model, name in jobs:
        limit = min(SECONDS_EACH, end - time.perf_counter())
        measured = (
            run(f"{model} {name}", command(model, name, load), limit) if limit > 0 else {"failed": "no time left"}
        )
        rows.append(row_of(model, name, measured))
    return rows


def row_of(model: str, name: str, measured: Measured) -> Measured:
    """What a contender said of itself, beside its name and with its share of the peak."""
    share = {} if "failed" in measured else {"mfu_percent": round(100 * measured["tflops_per_second"] / PEAK_TFLOPS, 2)}
    return {"model": model, "contender": name, **measured, **share}


def table(rows: list[Measured]) -> str:
    """A Markdown table of all rows."""
    lines = ["| model | contender | tokens/s | MFU % | peak MB |", "|---" * 5 + "|"]
    for row in rows:
        lines.append(f"| {row['model']} | {row['contender']} | {_cells(row)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    if "failed" in row:
        reason = (row["failed"].splitlines() or ["it said nothing"])[-1]
        return f"{reason} | | "
    return f"{row['tokens_per_second']:,.0f} | {row['mfu_percent']:.1f} | {row['peak_memory_mb']:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--models", nargs="+", default=["1.5b", "0.5b", "3b"])
    parser.add_argument("--only", nargs="+", choices=GPU_CONTENDERS, default=list(GPU_CONTENDERS))
    parser.add_argument("--seconds", type=float, default=SECONDS_IN_ALL, help="time for all of them together")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two steps, on any machine")
    options = parser.parse_args()
    models, load = (["tiny"], "tiny") if options.tiny else (options.models, "gpu")
    jobs = [(model, name) for model, name in plan(models) if name in options.only]
    rows = measure_all(jobs, load, options.seconds)
    machine = versions("trl", "liger-kernel")
    options.output.write_text(json.dumps({"machine": machine, "peak_tflops": PEAK_TFLOPS, "rows": rows}, indent=2))
    print(f"{machine}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
