"""The reference trainer for fine-tuning language models.

Rooms, in the order in which they may import each other: errors, config, data and distributed, model and optim,
checkpoint, training, cli. Public names are resolved lazily, so that `import trainer` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "TrainingArguments": "trainer.config.arguments",
    "prepare": "trainer.data.prepare",
    "JsonlDataset": "trainer.data.loader",
    "InfiniteSampler": "trainer.data.order",
    "EpochSampler": "trainer.data.order",
    "MaxTokensPerRankCollator": "trainer.data.loader",
    "batch_lengths_to_minibatches": "trainer.data.packing",
    "batch_lengths_to_minibatches_lpt": "trainer.data.packing",
    "get_data_loader": "trainer.data.loader",
    "Trainer": "trainer.hf.trainer",
    "Seq2SeqTrainer": "trainer.hf.seq2seq",
    "Seq2SeqTrainingArguments": "trainer.config.arguments",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}; it offers: {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
