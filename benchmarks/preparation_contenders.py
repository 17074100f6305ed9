"""One way from chats in a file to samples with trained tokens marked: tokens a second, on all cores.

`python benchmarks/preparation_contenders.py NAME FOLDER chats.jsonl` (or `chats.parquet`) prints one JSON object;
`write_chats` has filled the folder.
The limit is the tokenizer's own batch encoding of texts that are in memory and rendered already: as `tokenizer(texts)`
runs it, and without each token's place in the text.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import workload

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_WORDS, VOCABULARY, WORDS_PER_MESSAGE = 5000, 8192, 60
TEXTS_AT_ONCE = 1000
JSONL, PARQUET = "chats.jsonl", "chats.parquet"  # the same chats

Prepare = Callable[[], int]  # gives the number of tokens


def write_chats(folder: Path, num_samples: int) -> None:
    """Write chats of made-up words, as frequent as those of a language, and a byte-level BPE tokenizer of them."""
    import pyarrow
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(NUM_WORDS)]
    frequencies = 1 / np.arange(1, NUM_WORDS + 1)
    lengths = rng.lognormal(np.log(WORDS_PER_MESSAGE), 0.7, (num_samples, 2)).astype(int) + 1
    drawn = iter(rng.choice(words, lengths.sum(), p=frequencies / frequencies.sum()).tolist())
    chats = []
    for user, assistant in lengths.tolist():
        contents = {"user": _text(drawn, user), "assistant": _text(drawn, assistant)}
        chats.append({"messages": [{"role": role, "content": content} for role, content in contents.items()]})
    with (folder / JSONL).open("w") as file:
        file.writelines(json.dumps(chat) + "\n" for chat in chats)
    parquet.write_table(pyarrow.Table.from_pylist(chats), folder / PARQUET)
    _train_tokenizer(folder)


def _text(words: Iterator[str], length: int) -> str:
    return " ".join(next(words) for _ in range(length)).capitalize() + "."


def _train_tokenizer(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    contents = (message["content"] for chat in workload.read_jsonl(folder / JSONL) for message in chat["messages"])
    special = [START, END]
    trained.train_from_iterator(contents, vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    trained.save(str(folder / "bpe.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bpe.json"), eos_token=END, pad_token=END, chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder / "tokenizer")


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def batch_encoding(folder: Path, _: str, method: str = "encode_batch") -> Prepare:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # all cores, though tox says otherwise
    tokenizer = load_tokenizer(folder)
    encode = getattr(tokenizer.backend_tokenizer, method)
    texts = [
        tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in workload.read_jsonl(folder / JSONL)
    ]

    def prepare() -> int:
        batches = (encode(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE))
        return sum(len(encoding.ids) for encodings in batches for encoding in encodings)

    return prepare


def ours(folder: Path, data_name: str) -> Prepare:
    from trainer.config.groups import DataArguments
    from trainer.data.prepare import prepare

    tokenizer = load_tokenizer(folder)

    def run() -> int:
        with tempfile.TemporaryDirectory() as cache:
            args = DataArguments(data_cache_dir=cache, dataset_num_proc=os.cpu_count())
            return int(prepare(folder / data_name, tokenizer, args).lengths.sum())

    return run


def read_dataset(path: Path, cache: str) -> Any:
    """Read as `datasets` does."""
    from datasets import Dataset

    read = Dataset.from_parquet if path.suffix == ".parquet" else Dataset.from_json
    return read(str(path), cache_dir=cache)


def datasets_map(folder: Path, data_name: str) -> Prepare:
    """What one writes by hand: the tokenizer's own masks, whose template has marks around what is trained."""
    tokenizer = load_tokenizer(folder)

    def tokenize(chat: Any) -> dict[str, list[int]]:
        found = tokenizer.apply_chat_template(
            chat["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, masks = found["input_ids"], found["assistant_masks"]
        return {"input_ids": ids, "labels": [i if trained else -100 for i, trained in zip(ids, masks, strict=True)]}

    def prepare() -> int:
        with tempfile.TemporaryDirectory() as cache:
            data = read_dataset(folder / data_name, cache)
            data = data.map(tokenize, num_proc=os.cpu_count(), remove_columns=["messages"])
            return sum(map(len, data["input_ids"]))

    return prepare


def trl(folder: Path, data_name: str) -> Prepare:
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = load_tokenizer(folder), workload.build_model("tiny")
    model.resize_token_embeddings(len(tokenizer))

    def prepare() -> int:
        with tempfile.TemporaryDirectory() as cache:
            args = SFTConfig(
                output_dir=cache,
                assistant_only_loss=True,
                dataset_num_proc=os.cpu_count(),
                max_length=None,
                use_cpu=True,
                bf16=False,
                report_to=[],
            )
            data = read_dataset(folder / data_name, cache)
            trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
            return sum(map(len, trainer.train_dataset["input_ids"]))

    return prepare


CONTENDERS: dict[str, Callable[[Path, str], Prepare]] = {
    "ours": ours,
    "batch-encoding": batch_encoding,
    "batch-encoding-fast": partial(batch_encoding, method="encode_batch_fast"),
    "datasets-map": datasets_map,
    "trl": trl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data_name", choices=[JSONL, PARQUET])
    options = parser.parse_args()
    prepare = CONTENDERS[options.name](options.folder, options.data_name)
    started = time.perf_counter()
    num_tokens = prepare()
    print(json.dumps({"tokens_per_second": num_tokens / (time.perf_counter() - started), "tokens": num_tokens}))


if __name__ == "__main__":
    main()
