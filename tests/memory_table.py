"""`python -m tests.memory_table`: the table of docs/memory.md, estimated against measured bytes on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from tests.test_memory import measured_bytes
from trainer.config.arguments import TrainingArguments
from trainer.training.memory import Load, estimate_memory

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "vocab_size": 4096}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LOAD = Load(num_tokens=512, longest=150, num_loss_tokens=300, accumulates=False)
MODELS: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZES, **HEADS),
    "Gemma 3": AutoConfig.for_model("gemma3_text", **SIZES, **HEADS, head_dim=32, sliding_window=128),
    "Qwen 3": AutoConfig.for_model("qwen3", **SIZES, **HEADS, head_dim=32),
}
OPTIONS = (
    *({}, {"bf16": True}, {"gradient_checkpointing": True}, {"optim": "sgd"}, {"optim": "adafactor"}),
    {"osft": True, "osft_unfreeze_rank_ratio": 0.5},
)


def rows() -> Iterator[str]:
    """Measure, and yield the lines of the table."""
    yield "| model | options | estimated peak, MiB | measured | off by |"
    yield "|---|---|---|---|---|"
    for name, config in MODELS.items():
        for options in OPTIONS if name == "Llama" else OPTIONS[:1]:
            args = TrainingArguments(**options)
            estimated = estimate_memory(args, config, LOAD, is_sharded=False, on_gpu=False).peak
            measured, _ = measured_bytes(args, config, LOAD)
            words = ", ".join(f"`{key}={value}`" for key, value in options.items()) or "defaults"
            numbers = f"{estimated / 2**20:.1f} | {measured / 2**20:.1f} | {estimated / measured - 1:+.1%}"
            yield f"| {name} | {words} | {numbers} |"


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
