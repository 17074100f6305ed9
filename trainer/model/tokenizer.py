"""The tokenizer, and its agreement with the model: vocabulary size and special ids.

Knows nothing of weights. Invariant: every id of the tokenizer has an embedding; ids that the tokenizer names are the
model's ids; no row of an embedding is left untrained because some id is called padding.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.groups import ModelArguments
from trainer.download import WITHOUT_HUB, why_unreachable
from trainer.errors import ModelError, UsageError, named_error
from trainer.model.borrowing import Setting

VOCABULARY_UNIT = 8
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `tokenizer_name_or_path`, or the model's own.

    Raises:
        UsageError: No place is given.
        ModelError: There is no tokenizer there.
    """
    place = args.tokenizer_name_or_path or args.model_name_or_path
    if place is None and args.model_config is None:
        raise UsageError("model_name_or_path is missing: name the model to fine-tune, or give model_config")
    if place is None:
        raise UsageError("tokenizer_name_or_path: needed with model_config, a config has no tokenizer of its own")
    unreachable = None if os.path.exists(place) else why_unreachable(place, "model")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, trust_remote_code=args.trust_remote_code, local_files_only=unreachable is not None
        )
    except Exception as error:  # noqa: BLE001  a malformed file makes transformers raise anything
        if unreachable is not None:
            raise ModelError(
                f"no tokenizer could be loaded from {place!r}: it is no folder here, no tokenizer of that name was "
                f"downloaded before, and {unreachable}: {WITHOUT_HUB}"
            ) from error
        absent = "" if os.path.exists(place) else ", which is no folder here"
        raise ModelError(f"no tokenizer could be loaded from {place!r}{absent}: {named_error(error)}") from error
    return tokenizer


def fit_vocabulary(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Enlarge the config's vocabulary to a multiple of 8 if it is too small for the tokenizer; return the new size."""
    text_config, needed = config.get_text_config(), len(tokenizer)
    if needed <= text_config.vocab_size:
        return None
    text_config.vocab_size = -(-needed // VOCABULARY_UNIT) * VOCABULARY_UNIT
    return int(text_config.vocab_size)


def align_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the model's pad, bos and eos ids to the tokenizer's; further eos ids of its generation config stay."""
    generation = getattr(model, "generation_config", None)
    for name in SPECIAL_IDS:
        value = getattr(tokenizer, name, None)
        if value is None:
            continue
        setattr(model.config.get_text_config(), name, value)
        if generation is not None:
            former = getattr(generation, name)
            if name == "eos_token_id" and isinstance(former, list):
                value = [value, *(other for other in former if other != value)]
            setattr(generation, name, value)
    if generation is not None and generation.pad_token_id is None and tokenizer.eos_token_id is not None:
        generation.pad_token_id = tokenizer.eos_token_id


def padding_row_settings(model: nn.Module) -> list[Setting]:
    """What lets every row of the embeddings get its gradient.

    Torch drops the gradient of the row `padding_idx`. Packs hold no padding, so the only effect would be an end token
    that is never trained where the tokenizer pads with it.
    """
    return [Setting(module, "padding_idx", None) for module in model.modules() if isinstance(module, nn.Embedding)]
