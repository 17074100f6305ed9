"""How long a run stands still while it saves: ours in the loop, ours beside the training, transformers' Trainer.

    python benchmarks/bench_checkpoint.py [--hidden 512 --layers 8 --saves 5]

One process, one run of each kind over the same model; each saves after every fourth step. The stall is the time from
the end of a step that saves to the beginning of the next, less that of the steps between. transformers' Trainer needs
the package accelerate and is left out, with a word, where that is absent.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import TrainerCallback

SAVE_STEPS = 4
LENGTH = 32
VOCABULARY = 4096


class Gaps(TrainerCallback):
    """Seconds between the end of each step and the beginning of the next."""

    def __init__(self) -> None:
        self.gaps: dict[int, float] = {}
        self._ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ended = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.gaps[state.global_step] = time.perf_counter() - self._ended

    def stall(self) -> float:
        saving = [gap for step, gap in self.gaps.items() if step % SAVE_STEPS == 0]
        others = [gap for step, gap in self.gaps.items() if step % SAVE_STEPS]
        return statistics.median(saving) - statistics.median(others)


def build_model(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def options(folder: Path, num_saves: int) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "max_steps": SAVE_STEPS * num_saves + 2,
        "save_steps": SAVE_STEPS,
        "use_cpu": True,
    }


def ours(folder: Path, model: LlamaForCausalLM, num_saves: int, *, is_async: bool) -> float:
    from trainer import Trainer, TrainingArguments

    gaps = Gaps()
    args = TrainingArguments(**options(folder, num_saves), async_save=is_async, export_final=False)
    Trainer(model, args, train_dataset=rows(64), callbacks=[gaps]).train()
    return gaps.stall()


def transformers_own(folder: Path, model: LlamaForCausalLM, num_saves: int) -> float:
    from transformers import Trainer, TrainingArguments

    gaps = Gaps()
    args = TrainingArguments(**options(folder, num_saves), report_to=[], disable_tqdm=True)
    Trainer(model, args, train_dataset=rows(64), callbacks=[gaps]).train()
    return gaps.stall()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=5)
    chosen = parser.parse_args()
    size = sum(p.numel() for p in build_model(chosen.hidden, chosen.layers).parameters())
    print(f"{size / 1e6:.0f} M parameters, {12 * size / 1e6:.0f} MB with AdamW's state; median stall of a save:")
    kinds = {
        "ours, in the loop": lambda folder, model: ours(folder, model, chosen.saves, is_async=False),
        "ours, beside the training": lambda folder, model: ours(folder, model, chosen.saves, is_async=True),
        "transformers": lambda folder, model: transformers_own(folder, model, chosen.saves),
    }
    for name, run in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                stall = run(Path(folder), build_model(chosen.hidden, chosen.layers))
            except ImportError as error:
                print(f"{name:<28} left out: {str(error).splitlines()[0]}")
            else:
                print(f"{name:<28} {stall * 1000:8.0f} ms")


if __name__ == "__main__":
    main()
