"""Rows of many widths, batches and ranks come out as one array, in order: what numpy makes of them row by row."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.arguments import TrainingArguments
from trainer.distributed.group import Group
from trainer.training.evaluate import PADDING, Collected, gather_rows

SHAPES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=5)


def numbered(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Tensors of these shapes; no number stands there twice."""
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    return [
        torch.arange(end - np.prod(shape), end).reshape(shape).to(dtype)
        for shape, end in zip(shapes, ends, strict=True)
    ]


def padded_by_hand(tensors: list[torch.Tensor]) -> np.ndarray:
    """Row after row, each padded to the widest."""
    widest = np.max([tensor.shape[1:] for tensor in tensors], axis=0)
    rows = [row for tensor in tensors for row in tensor.numpy()]
    padded = [
        np.pad(row, [(0, w - n) for w, n in zip(widest, row.shape, strict=True)], constant_values=PADDING)
        for row in rows
    ]
    return np.stack(padded) if padded else np.empty((0, *widest))


@given(shapes=SHAPES, every=st.sampled_from([1, 2, None]))
def test_batches_are_joined_in_order(shapes: list[tuple[int, ...]], every: int | None) -> None:
    batches, collected = numbered(shapes), Collected()
    for number, batch in enumerate(batches, start=1):
        collected.add({"whole": batch, "parts": (batch[:, 0], -batch)})
        if every is not None and number % every == 0:
            collected.move_to_host()
    arrays = collected.arrays()
    np.testing.assert_array_equal(arrays["whole"], padded_by_hand(batches))
    np.testing.assert_array_equal(arrays["parts"][0], padded_by_hand([batch[:, 0] for batch in batches]))
    np.testing.assert_array_equal(arrays["parts"][1], padded_by_hand([-batch for batch in batches]))


def test_batches_stay_apart_when_asked_to() -> None:
    batches, collected = numbered([(2, 3), (1, 2)]), Collected(joins=False)
    for batch in batches:
        collected.add(batch)
        collected.move_to_host()
    assert [array.tolist() for array in collected.arrays()] == [batch.tolist() for batch in batches]


def test_nothing_gives_nothing() -> None:
    assert Collected().arrays() is None


def test_what_numpy_has_no_type_for_comes_as_float32() -> None:
    collected = Collected()
    collected.add(torch.tensor([1.5], dtype=torch.bfloat16))
    assert collected.arrays().dtype == np.float32


@pytest.mark.world_size(1, 2, 3)
@given(shapes=SHAPES)
def test_ranks_are_joined_in_order(ranks: Any, shapes: list[tuple[int, ...]]) -> None:
    group = Group.join(TrainingArguments(use_cpu=True))
    shapes = (shapes * ranks.world_size)[: ranks.world_size]
    tensors = numbered(shapes, torch.int64)
    gathered = gather_rows({"rows": tensors[ranks.rank], "none": None}, group)
    np.testing.assert_array_equal(gathered["rows"].numpy(), padded_by_hand(tensors))
    assert gathered["none"] is None


@pytest.mark.world_size(2)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.int32])
def test_a_rank_without_rows_leaves_no_trace(ranks: Any, dtype: torch.dtype) -> None:
    group = Group.join(TrainingArguments(use_cpu=True))
    own = torch.ones(2, 3, dtype=dtype) if ranks.is_main else torch.zeros(4, 3, dtype=dtype)
    gathered = gather_rows(own, group, has_rows=ranks.is_main)
    assert torch.equal(gathered, torch.ones(2, 3, dtype=dtype))
