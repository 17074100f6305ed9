"""Training steps beside the peers': `python benchmarks/bench_step.py --model small --dtype float32 --rounds 5`.

Peers that are not installed are reported and left out; `tox -e bench-peers` installs them.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from compare import command_line, compare, report
from step_contenders import CONTENDERS


def main() -> None:
    parser = command_line(__doc__, CONTENDERS)
    parser.add_argument("--model", choices=["small", "wide"], default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--num-samples", type=int, help="a few steps' worth, and grouping by length sorts one step at a time"
    )
    parser.add_argument("--lora-rank", type=int, help="adapters of that rank, by PEFT, instead of the whole model")
    options = parser.parse_args()
    script = str(Path(__file__).with_name("step_contenders.py"))
    model = "tiny" if options.tiny else options.model
    load = {"tiny": "tiny", "small": "cpu", "wide": "cpu-wide"}[model]
    setting = ["--model", model, "--dtype", options.dtype, "--load", load]
    if options.num_samples is not None:
        setting += ["--num-samples", str(options.num_samples)]
    if options.lora_rank is not None:
        setting += ["--lora-rank", str(options.lora_rank)]
    commands = {name: [script, name, *setting] for name in options.only}
    results = compare(commands, options.rounds)
    title = f"steps of the {model} Llama, {options.dtype}"
    if options.lora_rank is not None:
        title += f", LoRA of rank {options.lora_rank}"
    report(options, title, results, "tokens_per_second", ("padding_percent", "peak_memory_mb", "gemm_share_percent"))
    if "ours" in results:
        waits = statistics.median(run["data_wait_percent"] for run in results["ours"])
        print(f"\nours waits for data in {waits:.2f} % of the time of a step")


if __name__ == "__main__":
    main()
