"""What the batches of an evaluation gave, joined in the order of the samples: predictions, labels, inputs, losses.

Anything nested (tuples, lists, mappings) whose leaves are tensors with a row for each sample. Rows of different widths
are padded at the end with -100, over batches and over ranks alike, so that neither shows in the result. Knows nothing
of models.

N samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.trainer_pt_utils import nested_numpify

from trainer.distributed.group import Group

PADDING = -100


class Collected:
    """Nested tensors of one batch after another; every rank holds those of all ranks."""

    def __init__(self, *, joins: bool = True, padding: int = PADDING) -> None:
        self.joins, self.padding = joins, padding  # not joined: a list with an entry for each batch
        self._batches: list[Any] = []
        self._num_on_host = 0

    def add(self, batch: Any) -> None:
        """Take in what all ranks have for the next samples."""
        self._batches.append(batch)

    def move_to_host(self) -> None:
        """Free the device of what was taken in so far."""
        for i in range(self._num_on_host, len(self._batches)):
            self._batches[i] = tree_map(_host, self._batches[i])
        self._num_on_host = len(self._batches)

    def arrays(self) -> Any:
        """Give everything as numpy arrays (N over all batches, ...), nested as it came; None if nothing came."""
        self.move_to_host()
        if not self._batches:
            return None
        if not self.joins:
            return nested_numpify(self._batches)
        return nested_numpify(tree_map(lambda *parts: join_rows(parts, self.padding), *self._batches))


def gather_rows(nested: Any, group: Group, *, has_rows: bool = True, padding: int = PADDING) -> Any:
    """Join what each rank has for the same batch, in the order of ranks.

    Args:
        nested: this rank's rows.
        group: all ranks; every one of them calls.
        has_rows: whether the rows are this rank's own; those of a rank that only kept the others company are left out.
        padding: fills rows that are narrower than others.
    """

    def rows(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        tensor = torch.atleast_1d(tensor)
        return join_rows(group.gather(tensor if has_rows else tensor[:0]), padding)

    return tree_map(rows, nested)


def join_rows(parts: Sequence[Any], padding: int) -> Any:
    """Put tensors (N, ...) under each other; dimensions behind the first are padded to the largest."""
    if len(parts) == 1 or not isinstance(parts[0], Tensor):
        return parts[0]
    widths = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_full((sum(len(part) for part in parts), *widths), padding)
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return whole


def _host(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf
