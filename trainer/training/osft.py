"""Orthogonal subspace fine-tuning around a run: the model split before it is sharded, decomposed before the first step.

Knows the order, and what is told of it; what it means is in `trainer.model.osft.layers`.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.checkpoint import manifest
from trainer.config.arguments import TrainingArguments
from trainer.data.loader import get_data_loader, to_device
from trainer.data.order import EpochSampler
from trainer.data.store import TokenStore
from trainer.distributed.group import Group
from trainer.model.osft.factors import block_importance, start_osft
from trainer.model.osft.layers import Osft, apply_osft
from trainer.model.prepared import Prepared
from trainer.training.callbacks import Events
from trainer.training.checkpoints import read_importance
from trainer.training.metrics import peak_memory_bytes
from trainer.training.task import build_model


def build_split_model(
    model: PreTrainedModel | None,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    group: Group,
    store: TokenStore,
) -> Prepared:
    """Return a model that is ready to train on this rank, its matrices split if the options say so."""
    if not args.osft:
        return build_model(model, args, tokenizer, group)
    importance = None
    if args.osft_adaptive_samples is not None:
        importance = _recorded_importance(args, group)
        if importance is None:
            # A model that is only measured: nothing of it is compiled, or frozen by the names of split parts.
            plain = copy.copy(args)
            plain.torch_compile, plain.freeze_patterns = False, []
            measured = build_model(copy.deepcopy(model), plain, tokenizer, group)
            importance = block_importance(measured, _first_packs(args, store, group))
            del measured
    return build_model(model, args, tokenizer, group, partial(apply_osft, args=args, importance=importance))


def start(osft: Osft, events: Events, group: Group) -> dict[str, float]:
    """Decompose the matrices, reporting progress to callbacks; return how long it took and the most memory held."""
    started = perf_counter()
    num_decomposed = start_osft(
        osft, lambda done, total: events.tell("on_decompose", done, total, perf_counter() - started)
    )
    return {
        "osft/num_decomposed": num_decomposed,
        "osft/start_seconds": perf_counter() - started,
        "osft/peak_memory_bytes": peak_memory_bytes(group.device),
        "osft/reconstruction_error": osft.reconstruction_error,
    }


def _recorded_importance(args: TrainingArguments, group: Group) -> dict[str, float] | None:
    """What the checkpoint that the options say to go on from was split by; all checkpoints of a run agree."""
    asked = args.resume_from_checkpoint
    if asked is None:
        return None
    folder = Path(args.output_dir, manifest.FOLDER) if asked in ("auto", "true") else Path(asked)
    if (folder / manifest.MANIFEST).is_file():
        return read_importance(folder)
    holding = [each for each in manifest.list_checkpoints(folder) if read_importance(each) is not None]
    steps = group.from_main([manifest.step_of(each) for each in holding[:1]])
    return read_importance(manifest.folder_of(folder, steps[0])) if steps else None


def _first_packs(args: TrainingArguments, store: TokenStore, group: Group) -> list[Any]:
    """The first training samples, packed as if for one rank: the same on all."""
    assert args.osft_adaptive_samples is not None
    loader = get_data_loader(
        store=store,
        batch_size=args.osft_adaptive_samples,
        max_tokens_per_rank=args.max_tokens_per_rank,
        rank=0,
        world_size=1,
        sampler=EpochSampler(len(store), args.order_seed),
    )
    return [to_device(pack, group.device) for pack in next(iter(loader))]
