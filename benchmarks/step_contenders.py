"""One trainer on one workload: real (not padding) tokens a second, data loading included, and peak memory.

`python benchmarks/step_contenders.py NAME --model small --dtype float32` prints one JSON object. Every trainer gets the
same model and samples, AdamW, clipping at 1, no compile and no checkpoints; each batches in its own way.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import workload
from transformers import TrainerCallback

NUM_STEPS = workload.WARM_UP_STEPS + workload.TIMED_STEPS


class Stopwatch(TrainerCallback):
    """Counts tokens and seconds of the timed steps."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._started = (0.0, 0)
        self.measured: tuple[float, int] = (0.0, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_tokens += kwargs["report"].num_tokens if "report" in kwargs else 0
        now = time.perf_counter(), self.num_tokens
        if state.global_step == workload.WARM_UP_STEPS:
            self._started = now
        if state.global_step == NUM_STEPS:
            self.measured = now[0] - self._started[0], now[1] - self._started[1]

    def counting(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Count what a collator gives: tokens under its attention mask, or all where it has none."""

        def counted(samples: Any) -> Any:
            batch = collate(samples)
            mask = batch.get("attention_mask")
            self.num_tokens += int(batch["input_ids"].numel() if mask is None else mask.sum())
            return batch

        return counted


def ours(model: Any, dtype: str, folder: Path, watch: Stopwatch) -> None:
    from trainer import Trainer, TrainingArguments
    from trainer.data.store import TokenStore

    pairs = ((sample["input_ids"], sample["labels"]) for sample in workload.samples(model.config.vocab_size))
    args = TrainingArguments(
        output_dir=str(folder),
        batch_size=workload.SAMPLES_PER_STEP,
        max_tokens_per_rank=workload.TOKENS_PER_MICRO_BATCH,
        max_steps=NUM_STEPS,
        bf16=dtype == "bfloat16",
        export_final=False,
        disable_tqdm=True,
    )
    Trainer(model, args, train_dataset=TokenStore.from_samples(pairs), callbacks=[watch]).train()


def transformers_options(dtype: str, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": workload.SAMPLES_PER_MICRO_BATCH,
        "gradient_accumulation_steps": workload.SAMPLES_PER_STEP // workload.SAMPLES_PER_MICRO_BATCH,
        "max_steps": NUM_STEPS,
        "bf16": dtype == "bfloat16",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def tokens_only(vocab_size: int) -> list[dict[str, Any]]:
    return [{name: s[name] for name in ("input_ids", "labels")} for s in workload.samples(vocab_size)]


def pad(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest, as transformers' DataCollatorForSeq2Seq does, without needing a tokenizer."""
    width = max(len(sample["input_ids"]) for sample in samples)

    def column(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    return {
        "input_ids": column([s["input_ids"] for s in samples], 0),
        "labels": column([s["labels"] for s in samples], -100),
        "attention_mask": column([[1] * len(s["input_ids"]) for s in samples], 0),
    }


def transformers_padded(model: Any, dtype: str, folder: Path, watch: Stopwatch, order: str = "random") -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**transformers_options(dtype, folder), train_sampling_strategy=order)
    data = Dataset.from_list(tokens_only(model.config.vocab_size))
    Trainer(model, args, data_collator=watch.counting(pad), train_dataset=data, callbacks=[watch]).train()


def transformers_grouped(model: Any, dtype: str, folder: Path, watch: Stopwatch) -> None:
    transformers_padded(model, dtype, folder, watch, order="group_by_length")


def trl_packing(model: Any, dtype: str, folder: Path, watch: Stopwatch) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>")
    options = transformers_options(dtype, folder) | {"gradient_accumulation_steps": 1}  # 8 rows of 1,024 tokens
    args = SFTConfig(**options, packing=True, packing_strategy="bfd", max_length=workload.MAX_LENGTH)
    data = Dataset.from_list(tokens_only(model.config.vocab_size))
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[watch])
    trainer.data_collator = watch.counting(trainer.data_collator)
    trainer.train()


def mini_trainer(model: Any, dtype: str, folder: Path, watch: Stopwatch) -> None:
    """Its loader, collator, loss patch and step; its loop itself needs CUDA."""
    from mini_trainer.none_reduction_losses import hf_fixed_cross_entropy_none_reduction
    from mini_trainer.sampler import get_data_loader
    from mini_trainer.train import take_gradient_step
    from mini_trainer.utils import patch_target_module

    patch_target_module("transformers.loss.loss_utils.fixed_cross_entropy", hf_fixed_cross_entropy_none_reduction)
    path = workload.write_jsonl(folder / "data.jsonl", model.config.vocab_size)
    budget = workload.TOKENS_PER_MICRO_BATCH
    loader, _ = get_data_loader(str(path), workload.SAMPLES_PER_STEP, budget, seed=0, rank=0, world_size=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    batches: Iterator[Any] = iter(loader)
    for step in range(1, NUM_STEPS + 1):
        for micro_batch in next(batches):
            inputs = {name: micro_batch[name] for name in ("input_ids", "labels", "position_ids")}
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(**inputs, use_cache=False).loss.float().sum()
            (loss / micro_batch["batch_num_loss_counted_tokens"]).backward()
            watch.num_tokens += inputs["input_ids"].numel()
        take_gradient_step(model, optimizer, schedule)
        watch.on_step_end(None, argparse.Namespace(global_step=step), None)


CONTENDERS = {
    "ours": ours,
    "transformers-grouped": transformers_grouped,
    "trl-packing": trl_packing,
    "transformers-padded": transformers_padded,
    "mini-trainer": mini_trainer,
}


def gemm_flops_per_second(model_name: str, dtype: str) -> float:
    """What the machine reaches on the largest matrix product of the model's layers, best of several tries."""
    shape = workload.MODELS[model_name]
    kind = getattr(torch, dtype)
    left = torch.randn(workload.TOKENS_PER_MICRO_BATCH, shape["hidden_size"], dtype=kind)
    right = torch.randn(shape["hidden_size"], shape["intermediate_size"], dtype=kind)
    best = min(_seconds(lambda: left @ right) for _ in range(8))
    return 2 * left.shape[0] * left.shape[1] * right.shape[1] / best


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--model", choices=workload.MODELS, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.manual_seed(0)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        model = workload.build_model(options.model)
        CONTENDERS[options.name](model, options.dtype, Path(folder), watch)
    seconds, num_tokens = watch.measured
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    flops = workload.flops_per_token(options.model)
    share = flops * num_tokens / seconds / gemm_flops_per_second(options.model, options.dtype)
    measured = {"tokens_per_second": num_tokens / seconds, "peak_rss_mb": peak, "gemm_share_percent": 100 * share}
    print(json.dumps({name: round(value, 1) for name, value in measured.items()}))


if __name__ == "__main__":
    main()
