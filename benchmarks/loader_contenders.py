"""One loader on one data file: real tokens a second of one rank, and the time until its first batch.

`python benchmarks/loader_contenders.py NAME --num-samples 20000` prints one JSON object. Each reads the same tokenized
JSONL, prepared in its own way before the clock runs where it keeps what it prepared, and gives batches of about 32k
tokens as its own trainer would get them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import workload

BUDGET, SAMPLES_PER_BATCH, VOCABULARY = 32_768, 182, 4096
MOST_BATCHES = 50

Batches = Iterator[int]  # tokens of each batch, once it is there
Contender = Callable[[Path], Callable[[], Batches]]  # prepares; what comes back opens the data and gives batches


def ours(data: Path) -> Callable[[], Batches]:
    from trainer.data.loader import get_data_loader
    from trainer.data.order import EpochSampler
    from trainer.data.store import StoreWriter, TokenStore

    folder = data.with_suffix(".store")
    with StoreWriter(folder) as writer:
        for sample in workload.read_jsonl(data):
            writer.append(sample["input_ids"], sample["labels"])

    def opened() -> Batches:
        store = TokenStore.open(folder)
        loader = get_data_loader(
            store=store,
            batch_size=SAMPLES_PER_BATCH,
            max_tokens_per_gpu=BUDGET,
            rank=0,
            world_size=1,
            sampler=EpochSampler(len(store)),
        )
        return (sum(micro_batch["num_tokens"] for micro_batch in batch) for batch in loader)

    return opened


def mini_trainer(data: Path) -> Callable[[], Batches]:
    from mini_trainer.sampler import get_data_loader

    def opened() -> Batches:
        loader, _ = get_data_loader(str(data), SAMPLES_PER_BATCH, BUDGET, seed=0, rank=0, world_size=1)
        return (sum(micro_batch["input_ids"].numel() for micro_batch in batch) for batch in loader)

    return opened


def transformers(data: Path, order: str) -> Callable[[], Batches]:
    from datasets import Dataset
    from step_contenders import pad
    from transformers import Trainer, TrainingArguments

    Dataset.from_list(list(workload.read_jsonl(data))).save_to_disk(data.with_suffix(".arrow"))

    def opened() -> Batches:
        args = TrainingArguments(
            output_dir=str(data.parent),
            per_device_train_batch_size=SAMPLES_PER_BATCH,
            train_sampling_strategy=order,
            use_cpu=True,
            report_to=[],
        )
        dataset = Dataset.load_from_disk(data.with_suffix(".arrow"))
        model = workload.build_model("tiny")
        loader = Trainer(model, args, data_collator=pad, train_dataset=dataset).get_train_dataloader()
        return (int(batch["attention_mask"].sum()) for batch in loader)

    return opened


def trl_packing(data: Path) -> Callable[[], Batches]:
    import torch
    from datasets import Dataset
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    names = ["input_ids", "labels"]
    Dataset.from_list(list(workload.read_jsonl(data))).select_columns(names).save_to_disk(data.with_suffix(".arrow"))

    def opened() -> Batches:
        dataset = Dataset.load_from_disk(data.with_suffix(".arrow"))
        packed = pack_dataset(dataset, workload.MAX_LENGTH, "bfd")
        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        rows = BUDGET // workload.MAX_LENGTH
        loader = torch.utils.data.DataLoader(packed, rows, shuffle=True, collate_fn=collate)
        return (batch["input_ids"].numel() for batch in loader)

    return opened


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "trl-packing": trl_packing,
    "transformers-grouped": partial(transformers, order="group_by_length"),
    "transformers-padded": partial(transformers, order="random"),
    "mini-trainer": mini_trainer,
}


def measure(opened: Callable[[], Batches]) -> dict[str, float]:
    """Open the data, and read up to so many batches."""
    started = time.perf_counter()
    batches = opened()
    first = next(batches)
    first_seconds = time.perf_counter() - started
    num_tokens = sum(islice(batches, MOST_BATCHES))
    seconds = time.perf_counter() - started - first_seconds
    return {
        "tokens_per_second": (num_tokens or first) / (seconds if num_tokens else first_seconds),
        "first_batch_milliseconds": 1000 * first_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--num-samples", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = workload.write_jsonl(Path(folder) / "data.jsonl", VOCABULARY, options.num_samples)
        measured = measure(CONTENDERS[options.name](data))
    print(json.dumps({name: round(value, 1) for name, value in measured.items()}))


if __name__ == "__main__":
    main()
