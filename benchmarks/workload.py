"""What the step benchmarks train: tokenized samples with the lengths of chat, and Llamas of several shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_LENGTH, MEDIAN_LENGTH, SIGMA = 1024, 120, 0.9
MEAN_LENGTH = 180


@dataclass(frozen=True)
class Load:
    """Sizes of steps and micro-batches, and how many steps are timed.

    transformers' grouping by length sorts a quarter of the samples at a time, up to 50 steps' worth, longest first. So
    on a CPU a quarter is as many as the timed steps take: fewer of a longer sorted run would be its longest only.
    """

    samples_per_step: int
    samples_per_micro_batch: int  # for trainers that count samples
    tokens_per_micro_batch: int  # for trainers that count tokens
    warm_up_steps: int
    timed_steps: int
    num_samples: int

    @property
    def num_steps(self) -> int:
        """All steps."""
        return self.warm_up_steps + self.timed_steps


LOADS = {
    "cpu": Load(48, 8, 8192, warm_up_steps=1, timed_steps=4, num_samples=768),
    "cpu-wide": Load(16, 4, 4096, warm_up_steps=1, timed_steps=2, num_samples=128),
    "gpu": Load(368, 16, 32_768, warm_up_steps=3, timed_steps=5, num_samples=4096),
    "first-step": Load(48, 8, 8192, warm_up_steps=0, timed_steps=1, num_samples=20_000),
    "tiny": Load(8, 4, 1024, warm_up_steps=1, timed_steps=1, num_samples=64),
}


def _shape(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }


MODELS = {
    "tiny": _shape(32, 64, 2, 4, 2, 128),
    "small": _shape(256, 688, 4, 8, 4, 4096),
    "wide": _shape(512, 1376, 8, 8, 4, 32_000),
    "0.5b": _shape(896, 4864, 24, 14, 2, 151_936),  # these three: as Qwen 2.5
    "1.5b": _shape(1536, 8960, 28, 12, 2, 151_936),
    "3b": _shape(2048, 11_008, 36, 16, 2, 151_936),
}
TIED = ("0.5b", "1.5b", "3b")


def samples(vocab_size: int, num_samples: int) -> list[dict[str, Any]]:
    """Random ids; the first half of each sample is the prompt and not trained, as is half of chat data."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(MEDIAN_LENGTH), SIGMA, num_samples), 4, MAX_LENGTH).astype(int)
    return [_sample(rng.integers(3, vocab_size, length).tolist()) for length in lengths]


def _sample(ids: list[int]) -> dict[str, Any]:
    half = len(ids) // 2
    return {
        "input_ids": ids,
        "labels": [-100] * half + ids[half:],
        "len": len(ids),
        "num_loss_counted_tokens": len(ids) - half,
    }


def write_jsonl(path: Path, vocab_size: int, num_samples: int) -> Path:
    """Write the samples, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples(vocab_size, num_samples))
    return path


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read one JSON object a line."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def build_model(name: str, device: str = "cpu") -> Any:
    """A Llama with random weights, the same for every contender."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], max_position_embeddings=2048, tie_word_embeddings=name in TIED)
    with torch.device(device):
        return LlamaForCausalLM(config)


def flops_per_token(name: str) -> float:
    """Forward and backward, without attention's own products: 6 for each weight of a matrix.

    The head counts for half: only trained tokens, half of all, need it.
    """
    shape = MODELS[name]
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = hidden * hidden * 2 + 2 * hidden * (hidden // heads) * shape["num_key_value_heads"]
    layers = shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"])
    return float(6 * layers + 6 * hidden * shape["vocab_size"] / 2)
