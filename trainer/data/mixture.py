"""Which samples an epoch holds: sources and their shares, what is held out for validation, what is on both sides.

A mixture is resolved to sample numbers before the run, so that the order of samples stays a pure function of seed and
epoch and a position stays two integers. Invariants: every piece of a document is on the same side of a split; a mixture
depends on nothing but the store, the options and the seed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.groups import DataArguments
from trainer.data.order import epoch_order
from trainer.data.sources import is_dataset
from trainer.data.store import DOCUMENT_BITS, TokenStore
from trainer.errors import UsageError

_OVERRIDES = ("train_on", "chat_template", "data_format", "columns", "dataset_split", "dataset_revision")


@dataclass(frozen=True)
class SourceSpec:
    """One source: where it lies, its name, its share of an epoch, and options that hold for it alone."""

    path: Any  # a path, several, or a datasets.Dataset
    name: str
    weight: float | None = None
    repeat: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def paths(self) -> list[Any]:
        """The paths, in the order given."""
        return list(self.path) if isinstance(self.path, list | tuple) else [self.path]

    def apply(self, args: DataArguments) -> DataArguments:
        """Return the options as they are for this source."""
        if not self.options:
            return args
        fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(DataArguments)}
        return DataArguments(**{**fields, **self.options})


def source_specs(data: Any) -> list[SourceSpec]:
    """Return the sources that `data_path` or `data_mixture` names: each path of a list is a source.

    Raises:
        UsageError: a source of a mixture is described wrongly.
    """
    if is_dataset(data):
        return [SourceSpec(data, "dataset")]
    entries = list(data) if isinstance(data, list | tuple) else [data]
    if not entries:
        raise UsageError("data_path is empty: name at least one file")
    specs: list[SourceSpec] = []
    for i, entry in enumerate(entries):
        spec = (
            _spec_of(entry, f"data_mixture[{i}]") if isinstance(entry, Mapping) else SourceSpec(entry, _name_of(entry))
        )
        same = sum(other.name == spec.name for other in specs)
        if same and isinstance(entry, Mapping) and "name" in entry:
            raise UsageError(f"data_mixture[{i}]: the name {spec.name!r} is given twice")
        specs.append(dataclasses.replace(spec, name=f"{spec.name}-{i}") if same else spec)
    weighted = [spec for spec in specs if spec.weight is not None]
    if weighted and len(weighted) < len(specs):
        missing = next(spec.name for spec in specs if spec.weight is None)
        raise UsageError(f"data_mixture: {missing!r} has no weight, but {weighted[0].name!r} has: give all or none")
    return specs


def _spec_of(entry: Mapping[str, Any], place: str) -> SourceSpec:
    allowed = ("path", "name", "weight", "repeat", *_OVERRIDES)
    for key in entry:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
            raise UsageError(f"{place}: unknown {key!r}: {advice}")
    if "path" not in entry:
        raise UsageError(f"{place}: path is missing")
    for key in ("weight", "repeat"):
        value = entry.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < float("inf")):
            raise UsageError(f"{place}: {key} = {value!r}: must be a number above 0")
    if entry.get("weight") is not None and entry.get("repeat") is not None:
        raise UsageError(f"{place}: weight and repeat exclude each other: give one")
    options = {key: entry[key] for key in _OVERRIDES if key in entry}
    name = str(entry.get("name") or _name_of(entry["path"]))
    return SourceSpec(entry["path"], name, entry.get("weight"), entry.get("repeat"), options)


def _name_of(path: Any) -> str:
    """Name a source after its file or folder."""
    if is_dataset(path):
        return "dataset"
    first = path[0] if isinstance(path, list | tuple) and path else path
    name = Path(str(first)).name
    if "*" in name:
        name = Path(str(first)).parent.name or name
    return name.partition(".")[0] or str(first)


def mix(store: TokenStore, unit: str, stop: str, seed: int) -> TokenStore:
    """Return the samples of one epoch of a mixture; the store itself where no source has a weight or is repeated.

    Args:
        store: samples of all sources.
        unit: "samples" or "tokens": what weights are shares of.
        stop: "first_exhausted" or "all_exhausted": which source is used exactly once, the others less or more often.
        seed: decides which samples of a source are taken where not all are, or are repeated once more.
    """
    shares = store.metadata.get("mixture", [])
    if all(weight is None and repeat in (None, 1) for weight, repeat in shares):
        return store
    sources = store.sources
    ids = [np.flatnonzero(sources == number) for number in range(len(shares))]
    for number, rows in enumerate(ids):
        if not len(rows):
            raise UsageError(f"source {store.source_names[number]!r} has no samples to mix")
    sizes = np.array(
        [len(rows) if unit == "samples" else store.lengths[rows].sum(dtype=np.int64) for rows in ids], float
    )
    if shares[0][0] is not None:
        weights = np.array([weight for weight, _ in shares], float)
        weights /= weights.sum()
        pick = min if stop == "first_exhausted" else max
        times = weights * pick(sizes / weights) / sizes
    else:
        times = np.array([1.0 if repeat is None else repeat for _, repeat in shares])
    chosen = [
        _repeated(store, rows, float(n), unit, seed, k) for k, (rows, n) in enumerate(zip(ids, times, strict=True))
    ]
    mixed = store.select(np.concatenate(chosen))
    mixed.metadata = {**store.metadata, "epoch_of_mixture": {"times": times.tolist(), "unit": unit, "stop": stop}}
    return mixed


def _repeated(
    store: TokenStore, rows: NDArray[np.int64], times: float, unit: str, seed: int, number: int
) -> NDArray[np.int64]:
    """Return the samples of a source so many times: all of them for each whole time, and a random part of them."""
    whole = int(np.floor(times + 1e-9))
    order = rows[epoch_order(len(rows), seed, number)]
    part = max(times - whole, 0.0)
    if unit == "samples":
        count = round(part * len(rows))
    else:
        tokens = np.cumsum(store.lengths[order], dtype=np.int64)
        count = int(np.searchsorted(tokens, part * int(tokens[-1]), side="right"))
    if not whole and not count:
        count = 1
    return np.sort(np.concatenate([*[rows] * whole, order[:count]]))


def temperature_weights(sizes: Sequence[int], temperature: float) -> list[float]:
    """Return weights in proportion to size ** (1 / temperature): 1 keeps the sizes, more evens them out.

    Raises:
        UsageError: the temperature is not above 0.
    """
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature = {temperature}: must be a number above 0")
    logarithms = np.log(np.maximum(np.asarray(sizes, float), 1)) / temperature
    shares = np.exp(logarithms - logarithms.max())
    return [float(share) for share in shares / shares.sum()]


def find_overlap(train: TokenStore, held_out: TokenStore) -> NDArray[np.int64]:
    """Return the numbers of held-out samples whose tokens are those of a training sample."""
    return np.flatnonzero(np.isin(held_out.contents, train.contents))


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
        held_out = are_held_out(store.documents & ((1 << DOCUMENT_BITS) - 1), fraction)
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
