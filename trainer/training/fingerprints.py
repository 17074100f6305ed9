"""What a run trained on, as short texts: a resumed run compares them, for paths may lie. Reading them is quick."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from trainer.data.ordinary import has_length
from trainer.data.store import TokenStore

NUM_SAMPLES_READ = 64  # of a token store, spread over it; all lengths are read besides


def data_fingerprint(dataset: Any) -> str | None:
    """Give what tells a data set from others: content of token data, else its own fingerprint, else its length."""
    if dataset is None:
        return None
    if isinstance(dataset, TokenStore):
        return _store_fingerprint(dataset)
    if isinstance(own := getattr(dataset, "_fingerprint", None), str):
        return f"{type(dataset).__name__} {own}"
    return f"{type(dataset).__name__} of {len(dataset) if has_length(dataset) else 'unknown'} samples"


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Give what tells a tokenizer from others: vocabulary, rules, special tokens, chat template."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    rules = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else ""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [sorted(tokenizer.get_vocab().items()), rules, special, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _store_fingerprint(store: TokenStore) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(store.lengths).tobytes())
    digest.update(np.ascontiguousarray(store.num_loss_tokens).tobytes())
    for i in np.unique(np.linspace(0, len(store) - 1, NUM_SAMPLES_READ).astype(int)):
        sample = store.sample(int(i))
        digest.update(sample.input_ids.tobytes())
        digest.update(sample.labels.tobytes())
    return f"{len(store)} samples {digest.hexdigest()[:32]}"
