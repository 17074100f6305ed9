"""Which documents are held out for validation.

Owns the choice only. Invariant: every piece of a document is on the same side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.store import TokenStore
from trainer.errors import UsageError


def split_validation(store: TokenStore, fraction: float, seed: int) -> tuple[TokenStore, TokenStore]:
    """Return (training, validation): disjoint, complete, and no document on both sides.

    Blocks hold parts of several documents, so their documents were divided when the store was prepared, by the
    fraction it was prepared with; the seed decides for all other stores.
    """
    if store.metadata.get("block_size"):
        if store.metadata["validation_split"] != fraction:
            found = (
                f"validation_split={fraction}, but the blocks were prepared with {store.metadata['validation_split']}"
            )
            raise UsageError(f"{found}: prepare them again with this one")
        held_out = are_held_out(store.documents, fraction)
    else:
        documents = np.unique(store.documents)
        num_held_out = max(1, round(fraction * len(documents)))
        order = np.argsort(_hash(documents, seed), kind="stable")
        held_out = np.isin(store.documents, documents[order[:num_held_out]])
    if held_out.all() or not held_out.any():
        raise UsageError(f"validation_split={fraction} of {len(store)} samples leaves one side without any")
    return store.select(np.flatnonzero(~held_out)), store.select(np.flatnonzero(held_out))


def are_held_out(documents: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Which documents a fraction holds out, each by its own number: the same whatever else there is."""
    return _hash(documents, 0) < np.uint64(int(fraction * 2**64))


def _hash(documents: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Spread line numbers evenly over 64 bits (SplitMix64)."""
    x = documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed * 0xD1342543DE82EF95) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
