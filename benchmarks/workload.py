"""What the step benchmarks train: tokenised samples with the lengths of chat, and Llamas of two shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NUM_SAMPLES, MAX_LENGTH, MEDIAN_LENGTH, SIGMA = 20_000, 1024, 120, 0.9
SAMPLES_PER_STEP = 48  # 8,600 tokens on average
SAMPLES_PER_MICRO_BATCH = 8  # for trainers that count samples
TOKENS_PER_MICRO_BATCH = 8192  # for trainers that count tokens
WARM_UP_STEPS, TIMED_STEPS = 2, 6

MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "wide": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    },
}


def samples(vocab_size: int, num_samples: int = NUM_SAMPLES) -> list[dict[str, Any]]:
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


def write_jsonl(path: Path, vocab_size: int) -> Path:
    """Write the samples, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples(vocab_size))
    return path


def build_model(name: str) -> Any:
    """A Llama with random weights, the same for every contender."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODELS[name], max_position_embeddings=2048, tie_word_embeddings=False))


def flops_per_token(name: str) -> float:
    """Forward and backward, without attention's own products: 6 for each weight of a matrix.

    The head counts for half: only trained tokens, half of all, need it.
    """
    shape = MODELS[name]
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = hidden * hidden * 2 + 2 * hidden * (hidden // heads) * shape["num_key_value_heads"]
    layers = shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"])
    return float(6 * layers + 6 * hidden * shape["vocab_size"] / 2)
