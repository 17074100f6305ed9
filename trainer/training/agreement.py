"""Ranks that agree: before anything could hang on it or train on it, every rank learns whether all were given the same.

Owns what is compared, and what may differ and why. Facts are compared by digest, so that one exchange is enough where
ranks agree; a second one, of the values, names what differs where they do not. One rank alone computes nothing here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

from trainer import __version__
from trainer.checkpoint.run_state import data_fingerprint, tokenizer_fingerprint
from trainer.config.arguments import TrainingArguments
from trainer.data.loader import JsonlDataset
from trainer.data.store import TokenStore
from trainer.distributed.group import Group
from trainer.errors import UsageError

PATH = "a path, which may differ from node to node; what is read there is compared instead"
MAIN_ALONE = "the main rank alone uses it"
DISPLAY = "shows a run and moves none of its numbers; scripts set it on one rank alone"
OF_THE_NODE = "how a node reads its data; the batches are the same"
SCRIPTS = "for scripts; the trainer reads none of it"

MAY_DIFFER = {  # option -> why ranks may have different values; every other one is compared, a new one too
    "output_dir": "a path, which may differ from node to node",
    "data_path": PATH,
    "validation_data_path": PATH,
    "data_cache_dir": "a path, which may differ from node to node",
    "model_name_or_path": PATH,
    "model_config": PATH,
    "tokenizer_name_or_path": PATH,
    "chat_template": PATH,
    "resume_from_checkpoint": "a path, which may differ from node to node; the name of the checkpoint is compared",
    "dataset_num_proc": OF_THE_NODE,
    "dataloader_num_workers": OF_THE_NODE,
    "dataloader_pin_memory": OF_THE_NODE,
    "dataloader_persistent_workers": OF_THE_NODE,
    "dataloader_prefetch_factor": OF_THE_NODE,
    "report_to": DISPLAY,
    "run_name": DISPLAY,
    "project": DISPLAY,
    "trackio_space_id": DISPLAY,
    "trackio_bucket_id": DISPLAY,
    "trackio_static_space_id": DISPLAY,
    "disable_tqdm": DISPLAY,
    "skip_memory_metrics": DISPLAY,
    "hub_token": MAIN_ALONE,
    "hub_model_id": MAIN_ALONE,
    "hub_private_repo": MAIN_ALONE,
    "hub_revision": MAIN_ALONE,
    "do_train": SCRIPTS,
    "do_eval": SCRIPTS,
    "do_predict": SCRIPTS,
}

SAME_OPTIONS = "give all ranks the same options"
SAME_VERSIONS = "install the same versions on all nodes"
SAME_DATA = "have all ranks read the same data: look for an old copy on one of the nodes"
SAME_LENGTHS = "have the loaders of all ranks give equally many batches"
SAME_MODEL = "have all ranks read the same model and tokenizer: look for an old copy on one of the nodes"

NUM_VALUES_READ = 32  # of each parameter, spread over it
NUM_PLACES_READ = 32  # of each file of weights, evenly spread, its header and its end among them; what lies between
NUM_BYTES_READ = 2**16  # and is shorter than a 31st of the file may differ unseen; all of a place
LONGEST_VALUE = 80  # characters of a value in a message
MOST_NAMED = 5  # differences in a message

Facts = dict[str, tuple[Any, str]]  # name -> value, and what to do where ranks differ in it


def option_facts(args: TrainingArguments) -> Facts:
    """Return every option that ranks must share."""
    facts: Facts = {name: (value, SAME_OPTIONS) for name, value in args.to_dict().items() if name not in MAY_DIFFER}
    sources = [{name: value for name, value in source.items() if name != "path"} for source in args.data_mixture]
    return facts | {"data_mixture": (sources, SAME_OPTIONS)}


def version_facts() -> Facts:
    """Return the versions that decide what a step computes."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trainer": __version__}
    return {f"the version of {name}": (str(version), SAME_VERSIONS) for name, version in versions.items()}


def data_facts(name: str, dataset: Any) -> Facts:
    """Return what tells a data set from others; of a dict of several, of each."""
    if isinstance(dataset, Mapping):
        facts: Facts = {name: (list(dataset), SAME_DATA)}
        for key, part in dataset.items():
            facts |= data_facts(f"{name}[{key!r}]", part)
        return facts
    return {name: (_data_digest(dataset), SAME_DATA)}


def model_facts(args: TrainingArguments, model: nn.Module, tokenizer: Any) -> Facts:
    """Return what tells a model that is ready to train from others, without its values: each rank holds its shard."""
    parameters = "".join(
        f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}\n"
        for name, parameter in model.named_parameters()
    )
    facts: Facts = {
        "the model": (type(model).__name__, SAME_MODEL),
        "names, shapes and types of parameters": (_digest(parameters), SAME_MODEL),
        "the tokenizer": (tokenizer_fingerprint(tokenizer), SAME_MODEL),
    }
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_diff_dict"):
        facts["the model's revision"] = getattr(config, "_commit_hash", None), SAME_MODEL
        for key, value in config.to_dict().items():
            if key != "_name_or_path":
                facts[f"the model's config.{key}"] = value, SAME_MODEL
    if args.model_name_or_path is not None:
        for path in Path(args.model_name_or_path).glob("*.safetensors"):
            facts[f"the weights in {path.name}"] = _file_digest(path), SAME_MODEL
    return facts


def weight_facts(model: nn.Module | None) -> Facts:
    """Return a digest of some values of each parameter of a model that a script gives, whole on every rank."""
    if model is None:
        return {}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if isinstance(parameter, DTensor) or parameter.is_meta or parameter.numel() == 0:
            continue
        values = parameter.detach().flatten()
        step = max(len(values) // NUM_VALUES_READ, 1)
        digest.update(repr(values[::step].tolist()).encode())
    return {"the weights of the model that was given": (digest.hexdigest()[:12], SAME_MODEL)}


def agree(group: Group, list_facts: Callable[[], Facts]) -> None:
    """Raise where ranks have other facts than the rest; all ranks call it, and all of them raise.

    Raises:
        UsageError: names what differs, the ranks that are fewer, and both values.
    """
    if group.world_size == 1:
        return
    facts = list_facts()
    texts = {name: json.dumps(value, sort_keys=True, default=_as_plain) for name, (value, _) in facts.items()}
    names = {_number(name): name for name in facts}
    place = [group.topology.local_rank, group.topology.local_world_size]
    rows = [place, *([number, _number(texts[name])] for number, name in sorted(names.items()))]
    told = [part.tolist() for part in group.gather(torch.tensor(rows, dtype=torch.int64))]
    _check_nodes([(local_rank, size) for (local_rank, size), *_ in told])
    values = [dict(part[1:]) for part in told]  # of each rank: number of a fact's name -> number of its value
    differing = {number for rank in values for number in rank if any(rank[number] != v.get(number) for v in values)}
    if not differing:
        return
    mine = {names[number]: _short(facts[names[number]][0]) for number in differing if number in names}
    told_by_me = json.dumps({name: (text, facts[name][1]) for name, text in mine.items()}).encode()
    letters = torch.tensor(list(told_by_me), dtype=torch.uint8)
    known = [json.loads(bytes(part.tolist())) for part in group.gather(letters)]  # of each rank: what differs there
    raise UsageError(_describe(known, values))


def _describe(known: list[dict[str, tuple[str, str]]], values: list[dict[int, int]]) -> str:
    names = list(dict.fromkeys(name for rank in known for name in rank))
    said: dict[str, list[str]] = {}  # what to do -> differences
    for name in names[:MOST_NAMED]:
        ranks_by_value: dict[int | None, list[int]] = {}
        for rank, numbers in enumerate(values):
            ranks_by_value.setdefault(numbers.get(_number(name)), []).append(rank)
        usual = max(ranks_by_value.values(), key=len)  # of equally many: with the lowest rank
        others = f"{len(usual)} others" if len(usual) > 1 else f"rank {usual[0]}"
        remedy = next(rank[name][1] for rank in known if name in rank)
        for ranks in ranks_by_value.values():
            if ranks is usual:
                continue
            who = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
            own, theirs = (known[rank].get(name, ["none"])[0] for rank in (ranks[0], usual[0]))
            said.setdefault(remedy, []).append(f"{who} from {others} in {name}: {own} instead of {theirs}")
    more = f"; and {len(names) - MOST_NAMED} more differences" if len(names) > MOST_NAMED else ""
    return "; ".join(f"{'; '.join(differences)}; {remedy}" for remedy, differences in said.items()) + more


def _check_nodes(places: list[tuple[int, int]]) -> None:
    """Raise where local ranks and local world sizes are not those of whole nodes, which may differ in size."""
    for size in {size for _, size in places}:
        counts = [places.count((local_rank, size)) for local_rank in range(size)]
        if min(counts) != max(counts):
            listed = ", ".join(f"rank {rank}: {local} of {of}" for rank, (local, of) in enumerate(places))
            raise UsageError(
                f"ranks differ in how many of them share a node (LOCAL_RANK of LOCAL_WORLD_SIZE, {listed}): start all "
                "of a node's ranks with one torchrun"
            )


def _data_digest(dataset: Any) -> str | None:
    store = dataset.store if isinstance(dataset, JsonlDataset) else dataset
    if isinstance(store, TokenStore):
        digest = hashlib.sha256()  # contents: hashes of the ids of each sample; checksums: of all labels too
        for column in (store.lengths, store.num_loss_tokens, store.contents, store.checksums):
            digest.update(np.ascontiguousarray(column).tobytes())
        return f"{len(store)} samples, digest {digest.hexdigest()[:12]}"
    if hasattr(dataset, "with_format") and hasattr(dataset, "_fingerprint") and hasattr(dataset, "__len__"):
        # Of the package datasets. Its fingerprint holds the time of files, and without transforms a row is the same.
        dataset = dataset.with_format(None)
    elif not isinstance(dataset, list | tuple):
        # Reading a sample may draw random numbers, or differ from rank to rank because of them.
        return data_fingerprint(dataset)
    ends = [dataset[0], dataset[len(dataset) - 1]] if len(dataset) else []
    return f"{len(dataset)} samples, digest of the first and last {_digest(json.dumps(ends, default=_as_plain))}"


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in range(NUM_PLACES_READ):
            file.seek(max(size - NUM_BYTES_READ, 0) * place // (NUM_PLACES_READ - 1))
            digest.update(file.read(NUM_BYTES_READ))
    return f"{size} bytes, digest of {NUM_PLACES_READ} places {digest.hexdigest()[:12]}"


def _as_plain(value: Any) -> Any:
    """Return what JSON can hold instead of an object: its content, or its class, never its address."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if hasattr(value, "to_dict") and not isinstance(value, type):
        return value.to_dict()
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _short(value: Any) -> str:
    text = repr(json.loads(json.dumps(value, default=_as_plain)))
    if isinstance(value, str) and " " in value:
        text = value
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... (digest {_digest(text)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
