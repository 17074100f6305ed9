"""Pretraining: documents joined with EOS, cut into blocks of fixed size.

Invariant: the blocks laid end to end are the documents laid end to end; only the last block may be shorter.
"""

from __future__ import annotations

import numpy as np

from trainer.data.store import Sample, TokenBatch
from trainer.labels import IGNORE_INDEX


def end_with_eos(batch: TokenBatch, eos_id: int) -> TokenBatch:
    """Put EOS behind every document that does not end with it; trained if the document's last token is."""
    ends = np.cumsum(batch.lengths, dtype=np.int64)
    last = np.maximum(ends - 1, 0)
    lacks = batch.lengths == 0
    lacks[~lacks] = batch.input_ids[last[~lacks]] != eos_id
    label = np.full(len(ends), eos_id, np.int32)
    masked = batch.lengths > 0
    label[masked] = np.where(batch.labels[last[masked]] == IGNORE_INDEX, IGNORE_INDEX, eos_id)
    return TokenBatch(
        np.insert(batch.input_ids, ends[lacks], eos_id).astype(np.int32, copy=False),
        np.insert(batch.labels, ends[lacks], label[lacks]).astype(np.int32, copy=False),
        (batch.lengths + lacks).astype(np.int32),
        batch.documents,
    )


class BlockCutter:
    """Takes documents in batches and gives full blocks; what is left over waits for the next batch."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._rest = TokenBatch.join([], [])

    def cut(self, batch: TokenBatch) -> TokenBatch:
        """Add documents; return the blocks that are full, each under the document in which it begins."""
        ids = np.concatenate([self._rest.input_ids, batch.input_ids])
        labels = np.concatenate([self._rest.labels, batch.labels])
        documents = np.concatenate([self._rest.documents, np.repeat(batch.documents, batch.lengths)])
        num_blocks = len(ids) // self.block_size
        cut = num_blocks * self.block_size
        ones = np.ones(len(ids) - cut, np.int32)
        self._rest = TokenBatch(ids[cut:], labels[cut:], ones, documents[cut:])
        lengths = np.full(num_blocks, self.block_size, np.int32)
        return TokenBatch(ids[:cut], labels[:cut], lengths, documents[: cut : self.block_size])

    def finish(self) -> TokenBatch:
        """Return the last, partial block, if anything is left."""
        rest, self._rest = self._rest, TokenBatch.join([], [])
        if not len(rest.input_ids):
            return rest
        return TokenBatch.join([Sample(rest.input_ids, rest.labels)], [int(rest.documents[0])])
