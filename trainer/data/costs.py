"""What a sample costs: integer FLOPs as a function of its length.

Owns the cost model and its derivation from a model's configuration; knows no samples, no ranks and no torch. Costs are
integers, so that every rank and every machine plans the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UsageError

Lengths = TypeVar("Lengths", int, NDArray[np.int64])


@dataclass(frozen=True)
class CostModel:
    """cost(length) = per_token * length + per_square * length**2, in an arbitrary unit; both integers, not negative."""

    per_token: int
    per_square: int

    def __post_init__(self) -> None:
        if self.per_token < 0 or self.per_square < 0 or self.per_token + self.per_square == 0:
            raise UsageError(
                f"cost model per_token={self.per_token}, per_square={self.per_square}: "
                "both must be >= 0 and one of them > 0"
            )

    def of(self, length: Lengths) -> Lengths:
        """Cost of one sample, or of each sample of an int64 array."""
        return length * (self.per_token + self.per_square * length)

    def longest_within(self, cost: int) -> int:
        """The longest sample that costs at most `cost` (>= 0): the inverse of `of`, rounded down."""
        if self.per_square == 0:
            return cost // self.per_token
        return (isqrt(self.per_token**2 + 4 * self.per_square * cost) - self.per_token) // (2 * self.per_square)


TOKENS = CostModel(per_token=1, per_square=0)


def cost_model_from_config(config: Mapping[str, Any] | object) -> CostModel:
    """The cost model of a transformer, from its configuration (a transformers config or its dict).

    Forward FLOPs in units of one squared token, so per_square is 1: 2 per weight and token in the linear layers and
    the head, and 4 * heads * head_dim per squared token in each full-attention layer. The causal half that kernels
    skip is not subtracted, because attention reaches about half the rate of the linear layers. Backward is a multiple
    of forward and drops out. Sliding-window layers cost their window per token. With nothing but `hidden_size` and
    `num_hidden_layers` this is 6 * hidden_size tokens per squared token. Without any full attention: `TOKENS`.
    """
    shape = _Shape(config)
    square = 4 * shape.query_width * shape.num_full_layers
    if square == 0:
        return TOKENS
    windows = 4 * shape.query_width * shape.window * shape.num_sliding_layers
    linear = 2 * (shape.num_layers * shape.layer_weights + shape.hidden * shape.vocabulary) + windows
    return CostModel(per_token=(linear + square // 2) // square, per_square=1)


class _Shape:
    """The sizes that decide the FLOPs, read from a configuration under the names in use."""

    def __init__(self, config: Mapping[str, Any] | object) -> None:
        self._config = _field(config, "text_config") or config
        self.hidden = self._required("hidden_size", "n_embd", "d_model")
        self.num_layers = self._required("num_hidden_layers", "n_layer", "num_layers")
        self.vocabulary = self._get(0, "vocab_size")
        num_heads = self._get(1, "num_attention_heads", "n_head")
        self._head_width = self._get(self.hidden // num_heads, "head_dim")
        self.query_width = num_heads * self._head_width
        self._num_key_value_heads = self._get(num_heads, "num_key_value_heads")
        kinds = self._value("layer_types") or ["full_attention"] * self.num_layers
        self.num_full_layers = sum(kind == "full_attention" for kind in kinds)
        self.num_sliding_layers = sum(kind == "sliding_attention" for kind in kinds)
        self.window = self._get(0, "sliding_window")

    @property
    def layer_weights(self) -> int:
        """Weights that one token meets in one layer: projections in and out of attention, then the active MLPs."""
        attention = self.hidden * 2 * (self.query_width + self._num_key_value_heads * self._head_width)
        return attention + self._mlp_weights

    @property
    def _mlp_weights(self) -> int:
        inner = self._get(0, "intermediate_size")
        if not inner:
            return 8 * self.hidden**2  # two matrices to and from 4 * hidden, as GPT-2 had them
        active = self._get(0, "num_experts_per_tok")
        if active:
            inner = active * self._get(inner, "moe_intermediate_size")
        return 3 * self.hidden * inner  # gate, up, down

    def _value(self, *names: str) -> Any:
        return next((value for name in names if (value := _field(self._config, name)) is not None), None)

    def _get(self, default: int, *names: str) -> int:
        value = self._value(*names)
        return default if value is None else int(value)

    def _required(self, *names: str) -> int:
        value = self._value(*names)
        if value is None:
            raise UsageError(f"no cost model from this configuration: none of {', '.join(names)} is set; use TOKENS")
        return int(value)


def _field(config: Mapping[str, Any] | object, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
