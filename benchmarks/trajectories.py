"""Short deterministic trainings whose every number is written down, to find out whether a change moved one.

    python benchmarks/trajectories.py --write golden.json       before the change
    python benchmarks/trajectories.py --compare golden.json     after it: exit code 1 and a table where numbers differ

The runs use public names only, so that the file also runs in older trees: `PYTHONPATH=OLD python benchmarks/...`.
Bits are those of one machine, one torch and one number of threads (1): a file written elsewhere proves nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 64
WORLD_SIZES = (1, 2)
LENGTHS = (9, 3, 17, 5, 30, 2, 11, 7, 24, 4, 13, 6, 19, 8, 21, 10)
CLOCK = ("seconds", "per_second", "runtime", "bytes", "memory", "time")  # parts of names of what the clock decides

Row = dict[str, list[int]]


def draw_rows(seed: int = 0) -> list[Row]:
    """Return token samples of the lengths above; about half of the labels are trained, the last one always."""
    source = random.Random(seed)
    rows = []
    for length in LENGTHS:
        ids = [source.randrange(3, VOCABULARY) for _ in range(length)]
        labels = [token if source.random() < 0.5 else -100 for token in ids]
        rows.append({"input_ids": ids, "labels": [*labels[:-1], ids[-1]]})
    return rows


def pad_rows(rows: list[Row]) -> dict[str, Any]:
    """Collate rows of several lengths into padded tensors."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, True, 0),
        "attention_mask": pad_sequence(masks, True, 0),
        "labels": pad_sequence(labels, True, -100),
    }


def build_llama(**options: Any) -> Any:
    """Build a random decoder of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **{**sizes, **heads, **options}))


def build_t5() -> Any:
    """Build a random encoder-decoder of one layer each, without dropout."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **sizes, **special))


def train_token_data(folder: Path, **options: Any) -> Any:
    """Token data from a file of samples that are tokens already: planned, packed, evaluated."""
    from trainer import JsonlDataset, Trainer, TrainingArguments

    for name, seed in (("train", 0), ("held_out", 1)):
        lines = [json.dumps(row) for row in draw_rows(seed)]
        (folder / f"{name}_{os.getpid()}.jsonl").write_text("\n".join(lines) + "\n")
    train, held_out = (JsonlDataset(folder / f"{name}_{os.getpid()}.jsonl") for name in ("train", "held_out"))
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        batch_size=4,
        max_tokens_per_rank=64,
        num_train_epochs=2,
        **{**every_run(), **options},
    )
    return Trainer(build_llama(), args, train_dataset=train, eval_dataset=held_out)


def train_chats(folder: Path) -> Any:
    """A run from files alone: configuration, tokenizer and chats of the quickstart."""
    from trainer import Trainer, TrainingArguments

    quickstart = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
    lines = (quickstart / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        model_config=str(quickstart / "model"),
        tokenizer_name_or_path=str(quickstart / "tokenizer"),
        data_path=str(folder / "chats.jsonl"),
        data_cache_dir=str(folder / "cache"),
        dataset_num_proc=1,
        batch_size=8,
        max_tokens_per_rank=512,
        num_train_epochs=1,
        **every_run(),
    )
    return Trainer(args=args)


def train_rows(folder: Path, **options: Any) -> Any:
    """A data set and a collator of the user's, with accumulation and evaluation."""
    from trainer import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=3,
        num_train_epochs=2,
        **{**every_run(), **options},
    )
    return Trainer(build_llama(), args, data_collator=pad_rows, train_dataset=draw_rows(), eval_dataset=draw_rows(1))


def train_seq2seq(folder: Path) -> Any:
    """An encoder-decoder that generates when evaluated."""
    from trainer import Seq2SeqTrainer, Seq2SeqTrainingArguments

    args = Seq2SeqTrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        num_train_epochs=1,
        predict_with_generate=True,
        generation_max_length=8,
        **every_run(),
    )
    rows, held_out = draw_rows(), draw_rows(1)
    for row in rows + held_out:
        row["labels"] = row["input_ids"][:6]
    return Seq2SeqTrainer(build_t5(), args, data_collator=pad_rows, train_dataset=rows, eval_dataset=held_out)


def every_run() -> dict[str, Any]:
    """Options that all runs share."""
    return {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "export_final": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }


CASES: dict[str, Callable[[Path], Any]] = {
    "token_data": train_token_data,
    "token_data_bf16": lambda folder: train_token_data(folder, bf16=True),
    "token_data_osft": lambda folder: train_token_data(folder, osft=True, osft_unfreeze_rank_ratio=0.25),
    "token_data_muon": lambda folder: train_token_data(folder, optim="muon", lr_scheduler_type="cosine"),
    "chats": train_chats,
    "rows": train_rows,
    "rows_sgd": lambda folder: train_rows(folder, optim="sgd", lr_scheduler_type="cosine"),
    "seq2seq": train_seq2seq,
}
EVALUATED = ("token_data", "rows", "seq2seq")


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """Train one case and return its numbers: of each step, of the evaluation at the end, of the exported weights."""
    from safetensors import safe_open

    trainer = CASES[name](folder)
    trainer.train()
    found: dict[str, Any] = {"evaluation": without_clock(trainer.evaluate()) if name in EVALUATED else {}}
    export = Path(trainer.save_model(str(folder / "export")) or folder / "export")
    if int(os.environ.get("RANK", "0")):
        return {}
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    found["steps"] = [without_clock(json.loads(line)) for line in lines]
    digest = hashlib.sha256()
    for file in sorted(export.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for tensor_name in sorted(tensors.keys()):
                digest.update(tensor_name.encode())
                digest.update(tensors.get_tensor(tensor_name).float().numpy().tobytes())
    return {**found, "weights": digest.hexdigest()}


def without_clock(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that neither the clock nor the machine decides."""
    return {name: value for name, value in numbers.items() if not any(part in name for part in CLOCK)}


def work(folder: Path, cases: list[str]) -> None:
    """Run cases in this process, a rank of one group, and write what rank 0 found."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    size = os.environ.get("WORLD_SIZE", "1")
    for name in cases:
        place = folder / f"{name}_{size}"
        place.mkdir(exist_ok=True)
        found = run_case(name, place)
        if found:
            (folder / f"{name}_{size}.json").write_text(json.dumps(found))


def record(cases: list[str]) -> dict[str, Any]:
    """Run all cases on each number of ranks, each number in processes of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    results = {}
    for size in WORLD_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            words = [__file__, "--work", folder, "--cases", *cases]
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
            done = subprocess.run([sys.executable, *launch, *words], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{size} ranks ended with exit code {done.returncode}:\n{done.stderr[-8000:]}")
            for file in sorted(Path(folder).glob("*.json")):
                results[f"{file.stem}_ranks" if size > 1 else f"{file.stem}_rank"] = json.loads(file.read_text())
    return results


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Return a line for each number that differs or is gone; numbers that are new do not count."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = [f"{place} {name}: only before" for name in before.keys() - after.keys()]
        for name in sorted(before.keys() & after.keys()):
            lines += differences(before[name], after[name], f"{place} {name}")
        return lines
    if isinstance(before, list) and isinstance(after, list):
        lines = [] if len(before) == len(after) else [f"{place}: {len(before)} entries before, {len(after)} after"]
        for number, pair in enumerate(zip(before, after, strict=False), start=1):
            lines += differences(*pair, f"{place} {number}")
        return lines
    if before == after:
        return []
    if isinstance(before, float) and isinstance(after, float) and before:
        return [f"{place}: {before!r} before, {after!r} after: {abs(after / before - 1):.1e} apart"]
    return [f"{place}: {before!r} before, {after!r} after"]


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of the processes that this one starts
    options = parser.parse_args()
    if options.work:
        work(options.work, options.cases)
        return
    found = record(options.cases)
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    if options.compare:
        golden = json.loads(options.compare.read_text())
        wanted = {case: numbers for case, numbers in golden.items() if case.rsplit("_", 2)[0] in options.cases}
        lines = differences(wanted, found)
        print("\n".join(lines) or f"{len(wanted)} trajectories are equal, bit for bit")
        raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
