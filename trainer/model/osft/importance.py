"""How much each block of a model changes what passes through it, measured on data: for a ratio of its own per block.

Knows nothing of ranks of matrices. Invariant: every rank measures the same packs, so all agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.fsdp import decoder_blocks, inference
from trainer.model.loss import token_loss_sum
from trainer.model.prepared import Prepared


def block_importance(prepared: Prepared, micro_batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The mean cosine similarity of what enters and what leaves each block, over all tokens; relative to their mean.

    A block whose output resembles its input passes on what was learned before; it gets a value above 1, and more of
    its directions are protected.

    Args:
        prepared: The model, read as packs; every rank of its mesh calls.
        micro_batches: The same packs on every rank, on the model's device.
    """
    model = prepared.model
    similarities: dict[str, list[Tensor]] = {name: [] for name in decoder_blocks(model)}
    with ExitStack() as stack, inference(model):
        for name, block in decoder_blocks(model).items():
            note = partial(_note_similarity, similarities[name].append)
            stack.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        for micro_batch in micro_batches:
            token_loss_sum(prepared, micro_batch)
    means = {name: torch.cat(values).double().mean().item() for name, values in similarities.items()}
    average = sum(means.values()) / len(means)
    return {name: mean / average for name, mean in means.items()}


def _note_similarity(
    note: Callable[[Tensor], None], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    entering: Tensor = args[0] if args else kwargs["hidden_states"]
    leaving: Tensor = output[0] if isinstance(output, tuple) else output
    note(nn.functional.cosine_similarity(entering.float(), leaving.float(), dim=-1).flatten())
