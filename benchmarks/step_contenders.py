"""One trainer on one workload: real (not padding) tokens a second, data loading included, and peak memory.

`python benchmarks/step_contenders.py NAME --model small --dtype float32` prints one JSON object. Every trainer gets the
same model and samples, AdamW and clipping at 1, and writes no checkpoints; each batches in its own way.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import workload
from transformers import TrainerCallback

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Stopwatch(TrainerCallback):
    """Counts tokens and seconds of the timed steps, and the seconds from the start of the process to the first."""

    def __init__(self, load: workload.Load) -> None:
        self.load = load
        self.num_tokens = 0
        self.num_positions = 0  # that the model runs over: tokens, and padding
        self.first_step_seconds = 0.0
        self.data_seconds = 0.0  # that timed steps of ours waited for data
        self._started = (time.perf_counter(), 0)
        self.measured: tuple[float, int] = (0.0, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "report" in kwargs:
            self.count(kwargs["report"].num_tokens)
        if "report" in kwargs and state.global_step > self.load.warm_up_steps:
            self.data_seconds += kwargs["report"].data_seconds
        if state.global_step not in (1, self.load.warm_up_steps, self.load.num_steps):
            return
        now = clock(), self.num_tokens
        if state.global_step == 1:
            self.first_step_seconds = seconds_since_launch()
        if state.global_step == self.load.warm_up_steps:
            self._started = now
        if state.global_step == self.load.num_steps:
            self.measured = now[0] - self._started[0], now[1] - self._started[1]

    def count(self, num_tokens: int, num_positions: int | None = None) -> None:
        """Take in what is run; without padding if not said otherwise."""
        self.num_tokens += num_tokens
        self.num_positions += num_tokens if num_positions is None else num_positions

    def counting(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Count what a collator gives: tokens under its attention mask, or all where it has none."""

        def counted(samples: Any) -> Any:
            batch = collate(samples)
            mask = batch.get("attention_mask")
            num_positions = batch["input_ids"].numel()
            self.count(num_positions if mask is None else int(mask.sum()), num_positions)
            return batch

        return counted


def clock() -> float:
    """Seconds, once the GPU has done what it was told to."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_since_launch() -> float:
    """Seconds since this process was started (Linux)."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Job:
    """What a contender trains, and how."""

    model_name: str
    dtype: str
    load: workload.Load
    recomputes: bool  # whether activations are recomputed, where memory does not hold them
    folder: Path
    lora_rank: int | None = None  # of adapters of all linear layers of the blocks; None trains everything
    watch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.load)

    @property
    def is_bfloat16(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def vocab_size(self) -> int:
        return workload.MODELS[self.model_name]["vocab_size"]

    def build_model(self) -> Any:
        return workload.build_model(self.model_name, DEVICE)

    def peft_config(self) -> Any:
        """How PEFT adapts the model: as our own options do."""
        if self.lora_rank is None:
            return None
        from peft import LoraConfig

        rank = self.lora_rank
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")

    def build_adapted_model(self) -> Any:
        """The model with PEFT's adapters, where there are any, for trainers that are given it so."""
        config = self.peft_config()
        if config is None:
            return self.build_model()
        from peft import get_peft_model

        return get_peft_model(self.build_model(), config)

    def samples(self) -> list[dict[str, Any]]:
        return workload.samples(self.vocab_size, self.load.num_samples)

    def autocast(self) -> Any:
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.is_bfloat16)


def ours(job: Job, **options: Any) -> None:
    from trainer import Trainer, TrainingArguments
    from trainer.data.store import TokenStore

    if job.recomputes:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_keeps": "nothing"} | options
    args = TrainingArguments(
        output_dir=str(job.folder),
        batch_size=job.load.samples_per_step,
        max_tokens_per_rank=job.load.tokens_per_micro_batch,
        max_steps=job.load.num_steps,
        bf16=job.is_bfloat16,
        export_final=False,
        disable_tqdm=True,
        lora_rank=job.lora_rank,
        **options,
    )
    data = TokenStore.from_samples((sample["input_ids"], sample["labels"]) for sample in job.samples())
    Trainer(job.build_model(), args, train_dataset=data, callbacks=[job.watch]).train()


def transformers_options(job: Job) -> dict[str, Any]:
    load = job.load
    return {
        "output_dir": str(job.folder),
        "per_device_train_batch_size": load.samples_per_micro_batch,
        "gradient_accumulation_steps": load.samples_per_step // load.samples_per_micro_batch,
        "max_steps": load.num_steps,
        "bf16": job.is_bfloat16,
        "gradient_checkpointing": job.recomputes,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
    }


def tokens_only(job: Job) -> list[dict[str, Any]]:
    return [{name: sample[name] for name in ("input_ids", "labels")} for sample in job.samples()]


def pad(samples: Any) -> dict[str, torch.Tensor]:
    """Pad to the longest, as transformers' DataCollatorForSeq2Seq does, without needing a tokenizer."""
    width = max(len(sample["input_ids"]) for sample in samples)

    def column(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    return {
        "input_ids": column([s["input_ids"] for s in samples], 0),
        "labels": column([s["labels"] for s in samples], -100),
        "attention_mask": column([[1] * len(s["input_ids"]) for s in samples], 0),
    }


def transformers_padded(job: Job, order: str = "random", **options: Any) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**transformers_options(job), train_sampling_strategy=order, **options)
    model, collate = job.build_adapted_model(), job.watch.counting(pad)
    Trainer(model, args, data_collator=collate, train_dataset=tokens_only(job), callbacks=[job.watch]).train()


transformers_grouped = partial(transformers_padded, order="group_by_length")


def trl_packing(job: Job) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>")
    rows, tokens_per_step = job.load.samples_per_micro_batch, job.load.samples_per_step * workload.MEAN_LENGTH
    accumulation = {"gradient_accumulation_steps": max(1, round(tokens_per_step / (rows * workload.MAX_LENGTH)))}
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": workload.MAX_LENGTH}
    args = SFTConfig(**transformers_options(job) | accumulation | packing)
    data = Dataset.from_list(tokens_only(job))
    trainer = SFTTrainer(
        job.build_model(),
        args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[job.watch],
        peft_config=job.peft_config(),
    )
    trainer.data_collator = job.watch.counting(trainer.data_collator)
    trainer.train()


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def plain_loop(job: Job) -> None:
    """What one writes by hand: padded batches, transformers' own loss, AdamW."""
    model, load = job.build_adapted_model(), job.load
    if job.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    steps = chunks(job.samples(), load.samples_per_step)
    collate = job.watch.counting(pad)
    for step, samples in enumerate(islice(steps, load.num_steps), 1):
        num_items = sum(sum(label != -100 for label in sample["labels"][1:]) for sample in samples)
        for micro_batch in chunks(samples, load.samples_per_micro_batch):
            inputs = {name: tensor.to(DEVICE) for name, tensor in collate(micro_batch).items()}
            with job.autocast():
                loss = model(**inputs, use_cache=False, num_items_in_batch=num_items).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        job.watch.on_step_end(None, argparse.Namespace(global_step=step), None)


def mini_trainer(job: Job) -> None:
    """Its loader, collator, loss patch and step; its loop itself needs CUDA."""
    if job.lora_rank is not None:
        raise SystemExit("mini_trainer has no LoRA")
    from mini_trainer.none_reduction_losses import hf_fixed_cross_entropy_none_reduction
    from mini_trainer.sampler import get_data_loader
    from mini_trainer.train import take_gradient_step
    from mini_trainer.utils import patch_target_module

    patch_target_module("transformers.loss.loss_utils.fixed_cross_entropy", hf_fixed_cross_entropy_none_reduction)
    path = workload.write_jsonl(job.folder / "data.jsonl", job.vocab_size, job.load.num_samples)
    budget = job.load.tokens_per_micro_batch
    loader, _ = get_data_loader(str(path), job.load.samples_per_step, budget, seed=0, rank=0, world_size=1)
    model = job.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    batches: Iterator[Any] = iter(loader)
    for step in range(1, job.load.num_steps + 1):
        for micro_batch in next(batches):
            inputs = {name: micro_batch[name].to(DEVICE) for name in ("input_ids", "labels", "position_ids")}
            with job.autocast():
                loss = model(**inputs, use_cache=False).loss.float().sum()
            (loss / micro_batch["batch_num_loss_counted_tokens"]).backward()
            job.watch.count(inputs["input_ids"].numel())
        take_gradient_step(model, optimizer, schedule)
        job.watch.on_step_end(None, argparse.Namespace(global_step=step), None)


CONTENDERS: dict[str, Callable[[Job], None]] = {
    "ours": ours,
    "ours-compiled": partial(ours, torch_compile=True),
    "transformers-grouped": transformers_grouped,
    "trl-packing": trl_packing,
    "transformers-padded": transformers_padded,
    "mini-trainer": mini_trainer,
}
KEEPING = {"gradient_checkpointing": True, "gradient_checkpointing_keeps": "products"}
GPU_CONTENDERS: dict[str, Callable[[Job], None]] = {  # all recompute, or none does; but for ours-products
    "ours-eager": ours,
    "ours-compiled": partial(ours, torch_compile=True),
    "ours-products": partial(ours, **KEEPING),
    "ours-liger": partial(ours, use_liger_kernels=True),
    "transformers-grouped": transformers_grouped,
    "transformers-liger": partial(transformers_grouped, use_liger_kernel=True),
    "trl-packing": trl_packing,
    "plain-loop": plain_loop,
}


def gemm_flops_per_second(job: Job) -> float:
    """What the machine reaches on the largest matrix product of the model's layers, best of several tries."""
    shape = workload.MODELS[job.model_name]
    options: Any = {"dtype": getattr(torch, job.dtype), "device": DEVICE}
    left = torch.randn(job.load.tokens_per_micro_batch, shape["hidden_size"], **options)
    right = torch.randn(shape["hidden_size"], shape["intermediate_size"], **options)
    best = min(_seconds(lambda: left @ right) for _ in range(8))
    return 2 * left.shape[0] * left.shape[1] * right.shape[1] / best


def _seconds(action: Callable[[], Any]) -> float:
    started = clock()
    action()
    return clock() - started


def peak_memory_mb() -> float:
    """Most memory held so far, on the GPU or else in this process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(job: Job, train: Callable[[Job], None]) -> dict[str, float]:
    """Train, and give what it cost."""
    torch.manual_seed(0)
    train(job)
    seconds, num_tokens = job.watch.measured
    # Adapters need the gradients of what a layer reads, not those of its weights: two products of three.
    share = 1.0 if job.lora_rank is None else 2 / 3
    useful = share * workload.flops_per_token(job.model_name) * num_tokens / seconds
    return {
        "tokens_per_second": num_tokens / seconds,
        "tflops_per_second": useful / 1e12,
        "gemm_share_percent": 100 * useful / gemm_flops_per_second(job),
        "data_wait_percent": 100 * job.watch.data_seconds / seconds,
        "padding_percent": 100 * (job.watch.num_positions / job.watch.num_tokens - 1),
        "peak_memory_mb": peak_memory_mb(),
        "first_step_seconds": job.watch.first_step_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS | GPU_CONTENDERS)
    parser.add_argument("--model", choices=workload.MODELS, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--load", choices=workload.LOADS, default="cpu")
    parser.add_argument("--num-samples", type=int, help="by default those of the load")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--lora-rank", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load = workload.LOADS[options.load]
        load = replace(load, num_samples=options.num_samples or load.num_samples)
        job = Job(options.model, options.dtype, load, options.recompute, Path(folder), options.lora_rank)
        measured = measure(job, (CONTENDERS | GPU_CONTENDERS)[options.name])
    print(json.dumps({name: round(value, 2) for name, value in measured.items()}))


if __name__ == "__main__":
    main()
