"""`python -m tests.memory_table`: the table of docs/memory.md, estimated against measured bytes on a CPU."""

from __future__ import annotations

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from tests.test_memory import measured_bytes
from trainer.config.arguments import TrainingArguments
from trainer.training.memory import Load, estimate_memory

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "vocab_size": 4096}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
LOAD = Load(num_tokens=512, longest=150, num_loss_tokens=300, accumulates=False)
MODELS: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZES, **HEADS),
    "Gemma 3": AutoConfig.for_model("gemma3_text", **SIZES, **HEADS, head_dim=32, sliding_window=128),
    "Qwen 3 MoE": AutoConfig.for_model("qwen3_moe", **SIZES, **HEADS, **EXPERTS),
}
OPTIONS = (
    *({}, {"bf16": True}, {"gradient_checkpointing": True}, {"optim": "sgd"}, {"optim": "adafactor"}),
    {"osft": True, "osft_unfreeze_rank_ratio": 0.5},
)


def rows() -> list[str]:
    """Measure, and return the lines of the table."""
    lines = ["| model | options | estimated peak, MiB | measured | off by |", "|---|---|---|---|---|"]
    for name, config in MODELS.items():
        for options in OPTIONS if name == "Llama" else OPTIONS[:1]:
            args = TrainingArguments(**options)
            estimated = estimate_memory(args, config, LOAD, is_sharded=False, on_gpu=False).peak
            measured, _ = measured_bytes(args, config, LOAD)
            words = ", ".join(f"`{key}={value}`" for key, value in options.items()) or "defaults"
            numbers = f"{estimated / 2**20:.1f} | {measured / 2**20:.1f} | {estimated / measured - 1:+.1%}"
            lines.append(f"| {name} | {words} | {numbers} |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
