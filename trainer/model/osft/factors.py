"""What OSFT takes from the weights: factors of the split matrices, and how much each block changes what passes it.

The singular value decompositions are spread over the ranks. `block_importance` decides the ratio of each block.

Knows nothing of training. Invariants: a rank holds one matrix and its factors at a time on top of its shards; all
ranks, replicas too, end with the factors that one rank computed; what is decomposed already is left alone, so a
resumed run computes none; all ranks measure the importance on the same packs and agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.fsdp import (
    decoder_blocks,
    gather_rows,
    inference,
    largest_of_ranks,
    local_shard,
    model_mesh,
    scatter_rows,
    sum_over_shards,
)
from trainer.model.loss import token_loss_sum
from trainer.model.osft.layers import Osft, OsftLinear
from trainer.model.prepared import Prepared

LARGEST_SKEWNESS = 1e-5  # of singular vectors; more of it would break osft_leak_limit
Progress = Callable[[int, int], None]
"""Called with (work done, work in all) after each round of decompositions; work grows as their time does."""


def start_osft(osft: Osft, progress: Progress | None = None) -> int:
    """Decompose what is not decomposed yet, and measure how well that describes the weights (all ranks call).

    Weights and factors must be in place: those of a checkpoint, if there is one.

    Returns:
        The number of matrices decomposed: none after a resume.
    """
    num_decomposed = decompose(osft, getattr(torch, osft.args.osft_svd_dtype), progress)
    osft.reconstruction_error = reconstruction_error(osft)
    return num_decomposed


@torch.no_grad()
def decompose(osft: Osft, dtype: torch.dtype, progress: Progress | None = None) -> int:
    """Fill the free and protected directions of every split matrix that has none yet; every rank of the mesh calls.

    Matrices are dealt out dearest first, one to each rank per round, so that no rank waits long for another.

    Args:
        osft: Of a model with its weights, plain or sharded.
        dtype: Format to decompose in, float32 or float64; a wider format of the weights is kept.
        progress: Told after each round.

    Returns:
        The number of matrices decomposed.
    """
    layers = _undecomposed(osft)
    done, total = 0, sum(map(_work, layers))
    for batch in _rounds(layers, osft.model):
        matrices = [gather_rows(layer.weight, owner) for owner, layer in enumerate(batch)]
        factors = [
            split(layer, matrix, dtype) if matrix is not None else (None, None)
            for layer, matrix in zip(batch, matrices, strict=True)
        ]
        for owner, (layer, (free, protected)) in enumerate(zip(batch, factors, strict=True)):
            scatter_rows(free, layer.osft_free, owner)
            scatter_rows(protected, layer.osft_protected, owner)
        done += sum(map(_work, batch))
        if progress is not None:
            progress(done, total)
    return len(layers)


def split(layer: OsftLinear, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The free directions of the shorter side (R, r) and the protected ones of the longer side (max(N, M), k)."""
    matrix = layer.matrix(weight).to(torch.promote_types(weight.dtype, dtype))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    if matrix.device.type == "cuda" and max(map(_skewness, (left, right.mT))) > LARGEST_SKEWNESS:
        # The fast driver is Jacobi's, which stops early for some matrices; QR iterations take longer.
        left, _, right = torch.linalg.svd(matrix, full_matrices=False, driver="gesvd")
    long, short = (left, right.mT) if layer.is_tall else (right.mT, left)
    num_protected = layer.osft_protected.shape[1]
    return short[:, num_protected:].contiguous(), long[:, :num_protected].contiguous()


def _skewness(columns: Tensor) -> float:
    """How far columns are from orthonormal."""
    square = columns.mT @ columns
    return (square - torch.eye(len(square), dtype=square.dtype, device=square.device)).abs().max().item()


@torch.no_grad()
def reconstruction_error(osft: Osft) -> float:
    """The largest distance of a W from the sum of its two parts, P P^T W + W F F^T, relative to W (all ranks call).

    Rounding where F and P are the singular directions of this very W; about 1 where they belong to another matrix.
    """
    errors = [0.0]
    for batch in _rounds(osft.layers, osft.model):
        for owner, layer in enumerate(batch):
            weight, free, protected = (
                gather_rows(part, owner) for part in (layer.weight, layer.osft_free, layer.osft_protected)
            )
            if weight is not None and free is not None and protected is not None:
                matrix = layer.matrix(weight) if layer.is_tall else layer.matrix(weight).mT
                rest = matrix - protected @ (protected.mT @ matrix) - (matrix @ free) @ free.mT
                tiny = torch.finfo(matrix.dtype).tiny
                errors.append((rest.norm() / matrix.norm().clamp_min(tiny)).item())
    return largest_of_ranks(max(errors), model_mesh(osft.model))


def _rounds(layers: Sequence[OsftLinear], model: nn.Module) -> Iterator[Sequence[OsftLinear]]:
    """The matrices dearest first, in rounds of one for each rank: those of a round take about as long."""
    mesh = model_mesh(model)
    num_ranks = 1 if mesh is None else mesh.size()
    dearest_first = sorted(layers, key=_work, reverse=True)
    for start in range(0, len(layers), num_ranks):
        yield dearest_first[start : start + num_ranks]


def _undecomposed(osft: Osft) -> list[OsftLinear]:
    if not osft.layers:
        return []
    squares = torch.stack([local_shard(layer.osft_free).square().sum() for layer in osft.layers])
    filled = sum_over_shards(squares, like=osft.layers[0].osft_free).tolist()
    return [layer for layer, square in zip(osft.layers, filled, strict=True) if square == 0]


def _work(layer: OsftLinear) -> int:
    num_outputs, num_inputs = layer.weight.shape
    return num_outputs * num_inputs * min(num_outputs, num_inputs)


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
