"""Tokenized samples as a torch data set.

Owns the form in which samples meet torch: int64 tensors one by one, and a whole global batch by its counts alone, from
which the collator reads what it needs. Knows no ranks and no order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from trainer.data.jsonl import detect_kind, read_documents
from trainer.data.store import Sample, TokenStore
from trainer.data.tokens import agrees_on_loss_tokens, read_tokens
from trainer.errors import DataError, UsageError


class JsonlDataset(Dataset[dict[str, Any]]):
    """Samples of a tokenized .jsonl file or of a prepared store, in the order of the file.

    An item has `input_ids` and `labels` (int64 tensors; -100 marks what is not trained), `len`, and
    `num_loss_counted_tokens`, the trained tokens after the causal shift. That number is always counted; a line that
    states another one (some tools count before the shift) is counted in `store.metadata`.

    Args:
        path: the file or the store's folder.
        store: an opened store instead.

    Raises:
        DataError: a line is not a tokenized sample.
    """

    def __init__(self, path: str | PathLike[str] | None = None, *, store: TokenStore | None = None) -> None:
        if (path is None) == (store is None):
            raise UsageError(f"path={path!r}, store={store!r}: give either the path of the data or an opened store")
        self.store = store if store is not None else _open(Path(path))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        i = index.__index__()
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        sample = self.store.sample(i)
        return {
            "input_ids": torch.from_numpy(sample.input_ids.astype(np.int64)),
            "labels": torch.from_numpy(sample.labels.astype(np.int64)),
            "len": int(self.store.lengths[i]),
            "num_loss_counted_tokens": int(self.store.num_loss_tokens[i]),
        }

    def __getitems__(self, indices: Sequence[int]) -> StoredSamples:
        """The samples of a global batch, none of them read yet; torch's DataLoader asks for them by this name."""
        return StoredSamples(self, np.asarray(indices, np.int64))


TokenData = TokenStore | JsonlDataset


def is_token_data(dataset: Any) -> bool:
    """Whether a data set is one of ours, whose samples are packed."""
    return isinstance(dataset, TokenData)


class StoredSamples(Sequence[dict[str, Any]]):
    """Some samples of a data set: counts at hand, tokens read when asked for."""

    def __init__(self, dataset: JsonlDataset, indices: NDArray[np.int64]) -> None:
        self._dataset = dataset
        self._indices = indices
        self.lengths = dataset.store.lengths[indices]
        self.num_loss_tokens = dataset.store.num_loss_tokens[indices]

    def read(self, indices: Sequence[int]) -> Sample:
        """Tokens and labels of the samples with these numbers among these, end to end."""
        return self._dataset.store.read(self._indices[indices])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: Any) -> Any:
        return self._dataset[self._indices[i]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._dataset[i] for i in self._indices)


def _open(path: Path) -> TokenStore:
    if path.is_dir():
        return TokenStore.open(path)
    kind = detect_kind(path)
    if kind != "tokens":
        raise DataError(
            f"its lines are of kind {kind!r}",
            "token ids are needed here; tokenize the file with `trainer prepare`",
            path,
        )
    samples, num_miscounted = [], 0
    for document in read_documents(path):
        input_ids, labels = read_tokens(document)
        samples.append((input_ids, labels))
        num_miscounted += not agrees_on_loss_tokens(document, labels)
    return TokenStore.from_samples(samples, {"kind": kind, "num_miscounted_loss_tokens": num_miscounted})
