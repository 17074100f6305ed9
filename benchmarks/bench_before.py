"""This tree beside an older one: `python benchmarks/bench_before.py --before FOLDER --rounds 7`.

The same short runs of token data and of rows, in turn, in one process each: seconds to the first step, and seconds of a
step, loader and callbacks included. Times are of the processor, with one thread, so that a busy machine tells little;
the least of a run's steps counts, and ratios are taken round by round. Uses public names only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compare import REPOSITORY, run, times_ahead

KINDS = ("token data", "rows")
NUM_STEPS, WARM_UP_STEPS = 40, 8


def train(tree: str, kind: str) -> dict[str, float]:
    """Train with the package of a tree; return the processor's seconds to the first step and of a step."""
    sys.path.insert(0, tree)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    import trainer
    from trainer import Trainer, TrainingArguments

    assert Path(trainer.__file__).is_relative_to(tree), trainer.__file__
    torch.set_num_threads(1)
    ended: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended.append(time.process_time())

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    rows = []
    for number in range(64):
        ids = [(7 * number + 3 * place) % 250 + 3 for place in range(16 + number % 16)]
        rows.append({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as folder:
        data: Any = [{"input_ids": row["input_ids"][:16], "labels": row["labels"][:16]} for row in rows]
        options: dict[str, Any] = {"per_device_train_batch_size": 8}
        if kind == "token data":
            path = Path(folder, "data.jsonl")
            path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
            data, options = trainer.JsonlDataset(path), {"batch_size": 8, "max_tokens_per_rank": 128}
        args = TrainingArguments(
            output_dir=str(Path(folder, "run")),
            use_cpu=True,
            max_steps=NUM_STEPS,
            save_strategy="no",
            export_final=False,
            disable_tqdm=True,
            **options,
        )
        Trainer(LlamaForCausalLM(config), args, train_dataset=data, callbacks=[Clock()]).train()
    steps = [later - earlier for earlier, later in zip(ended[WARM_UP_STEPS:], ended[WARM_UP_STEPS + 1 :], strict=False)]
    return {"first_step": ended[0], "step": min(steps), "median_step": statistics.median(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="folder of the older tree")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train", nargs=2, metavar=("TREE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        print(json.dumps(train(*options.train)))
        return
    if options.before is None:
        parser.error("--before: name the folder of the older tree")
    trees = {"here": str(REPOSITORY), "before": str(Path(options.before).resolve())}
    for kind in KINDS:
        found: dict[str, list[Any]] = {name: [] for name in trees}
        for _ in range(options.rounds):
            for name, tree in trees.items():
                measured = run(f"{name}, {kind}", [str(Path(__file__)), "--train", tree, kind])
                if "failed" in measured:
                    sys.exit(1)
                found[name].append(measured)
        for measure in ("first_step", "step", "median_step"):
            ratios = times_ahead(found["here"], found["before"], measure)
            least = min(each[measure] for each in found["here"]) / min(each[measure] for each in found["before"])
            print(f"{kind}, {measure}: {statistics.median(ratios):.3f} of before (median), {least:.3f} (least)")


if __name__ == "__main__":
    main()
