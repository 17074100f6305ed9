"""Columns of ordinary data sets: those that the model's forward does not take are left out, with a note.

Knows the names of columns, nothing of models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.errors import UsageError

logger = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]


def keep_columns(dataset: Any, collate: Collate, columns: Sequence[str]) -> tuple[Any, Collate]:
    """Give data set and collator such that batches have these columns alone.

    Raises:
        UsageError: none of the data set's columns is among them.
    """
    present = getattr(dataset, "column_names", None)
    if present is None or not hasattr(dataset, "remove_columns"):  # not of Hugging Face's datasets
        return dataset, ColumnFilter(collate, columns)
    left_out = [name for name in present if name not in columns]
    if len(left_out) == len(present):
        raise _nothing_left(left_out, columns)
    _note(left_out)
    return dataset.remove_columns(left_out), collate


def sample_lengths(dataset: Any, length_column: str, input_name: str) -> list[int]:
    """Give the length of every sample: from its column, or by measuring its input.

    Raises:
        UsageError: there is neither.
    """
    if length_column in getattr(dataset, "column_names", ()):
        return list(dataset[length_column])
    first = dataset[0]
    if not isinstance(first, Mapping) or input_name not in first:
        raise UsageError(
            f"train_sampling_strategy=group_by_length: train_dataset has neither a column {length_column!r} "
            f"(length_column_name) nor an input {input_name!r} to measure"
        )
    return [len(dataset[i][input_name]) for i in range(len(dataset))]


class ColumnFilter:
    """A collator that sees only some columns of each sample."""

    def __init__(self, collate: Collate, columns: Sequence[str]) -> None:
        self.collate, self.columns = collate, columns
        self._was_noted = False

    def __call__(self, samples: list[Any]) -> Any:
        """Collate."""
        return self.collate([self._kept(sample) for sample in samples])

    def _kept(self, sample: Any) -> Any:
        if not isinstance(sample, Mapping):
            return sample
        left_out = [name for name in sample if name not in self.columns]
        if sample and len(left_out) == len(sample):
            raise _nothing_left(left_out, self.columns)
        if not self._was_noted:
            _note(left_out)
            self._was_noted = True
        return {name: value for name, value in sample.items() if name in self.columns} if left_out else sample


def _note(left_out: Sequence[str]) -> None:
    if left_out:
        logger.warning("columns that the model does not take are left out: %s", ", ".join(left_out))


def _nothing_left(left_out: Sequence[str], columns: Sequence[str]) -> UsageError:
    return UsageError(
        f"the model takes none of the columns {', '.join(left_out)}, only {', '.join(columns)}: rename them, or set "
        "remove_unused_columns=False for a data_collator that makes the model's inputs of them"
    )
