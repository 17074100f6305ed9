"""Data to a store of samples: tokenized in parallel, cached by content, everything refused counted.

Every file is prepared on its own (a large one in parts), so that only what changed is prepared anew, an interrupted
preparation goes on where it was, and processes that share a cache share the work. Invariant: the same data, tokenizer,
template and options give the same store, however often and in however many processes it is prepared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.groups import DataArguments
from trainer.data.cache import fingerprint, open_or_build
from trainer.data.formats import Reading
from trainer.data.jsonl import detect_file_kind
from trainer.data.messages import KNOWN_ROLES
from trainer.data.mixture import SourceSpec, are_held_out, find_overlap, mix, source_specs, split_validation
from trainer.data.sources import Source, find_sources, is_dataset
from trainer.data.store import StoreWriter, TokenBatch, TokenStore
from trainer.data.tokenize import BlockCutter, Recipe, end_with_eos
from trainer.data.workers import Broken, Task, Tokenized, TokenizerPool
from trainer.errors import DataError, UsageError

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as files are tokenized."""

PART_BYTES = 2**28
"""A larger file of lines is prepared in parts of about this size."""

_BYTES_PER_PROCESS = 2**24
"""A process takes about as long to start as tokenizing so much."""

_COUNTS = (
    "documents",
    "broken_dropped",
    "packed_rows_split",
    "nulls_removed",
    "overlong_dropped",
    "overlong_truncated",
    "overlong_split",
    "split_pieces",
    "tokens_dropped",
    "tokens_truncated",
    "untrainable_dropped",
    "untrainable_pieces_dropped",
    "untrainable_blocks_dropped",
    "chats_split",
    "samples_of_split_chats",
    "open_turns_closed",
    "turns_without_end_of_turn",
    "marks_that_cover_a_header",
    "messages_after_trained_turns_left_out",
    "control_tokens_in_text",
    "messages_not_written_whole",
    "stated_loss_tokens_differ",
)
"""What the report always says, 0 included."""

ROLE_COUNTS = ("messages", "trained_turns", "trained_tokens")
"""What the report counts of each role."""

SHOWN_ROLES = KNOWN_ROLES | {"all", "text"}
"""Roles that a report names without a warning; 'all' and 'text' are what is trained whole."""

_DECIDED_BY_PREPARING = (
    *("train_on", "chat_template", "chat_template_kwargs", "split_chats", "on_open_turn"),
    *("overlong", "on_untrainable", "block_size"),
    *("data_format", "columns", "dataset_split", "dataset_revision"),
)


def prepare(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: DataArguments,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Return the samples of some data, unmixed, in the order of its sources, files and rows.

    Args:
        data: what `data_path` may be, the sources of a mixture, a `datasets.Dataset`, or a folder prepared before.
        tokenizer: may be None for tokenized data.
        args: how the data is read.
        limit: the longest sample in tokens that training can hold.
        progress: is told how far the preparation is.

    The store's metadata holds `report` (counts of documents, samples, tokens, loss tokens and everything refused),
    `kind`, `source`, `fingerprint`, and whether all of it was `cached`.

    Raises:
        DataError: rows cannot be used; it lists the first ones of all files, and counts them by kind.
    """
    specs = source_specs(data)
    parts: list[_Part] = []
    num_files = 0
    for number, spec in enumerate(specs):
        found = _parts_of(spec, number, num_files, tokenizer, args, limit)
        parts += found
        num_files = found[-1].file + 1
    if parts[0].store is not None and len(parts) == 1:
        store, cached = parts[0].store, True
    else:
        store, cached = _prepare_all(parts, args, tokenizer, progress)
    store.metadata.update(cached=cached, source=_named(data))
    facts: dict[str, Any] = {"files": [], "source_of_files": [], "source_names": [], "mixture": []}
    for part in parts:
        if part.is_first:
            facts["files"].append(part.path)
            facts["source_of_files"].append(part.number)
    for spec in specs:
        facts["source_names"].append(spec.name)
        facts["mixture"].append([spec.weight, spec.repeat])
    store.metadata.update(facts)
    counts = np.bincount(store.sources, minlength=len(specs))
    store.metadata["samples_of_sources"] = counts.tolist()
    if len(store) == 0:
        raise DataError(
            f"no sample is left to train on ({store.metadata['report']})", "at least one is needed", _named(data)
        )
    report = store.metadata.setdefault("report", {})
    report["exact_duplicates"] = len(store) - len(np.unique(store.contents))
    return store


def load_data(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[TokenStore, TokenStore | None, list[str]]:
    """Prepare the training samples, mixed, and the held-out ones; say what of them a user should know.

    Raises:
        UsageError: no data is named.
        DataError: rows cannot be used, or held-out samples are trained on as well and on_overlap is "error".
    """
    data = args.data_mixture or args.data_path
    if data is None:
        raise UsageError("data_path is missing: name the files to train on, or give data_mixture")
    train = prepare(data, tokenizer, args, limit, progress)
    notes = [f"{_named(data)}: {words}"] if (words := warnings_line(train)) else []
    held_out = None
    if args.validation_split:
        train, held_out = split_validation(train, args.validation_split, seed)
    elif args.validation_data_path is not None:
        held_out = prepare(args.validation_data_path, tokenizer, args, limit, progress)
        if words := warnings_line(held_out):
            notes.append(f"{_named(args.validation_data_path)}: {words}")
    if held_out is not None:
        overlap = find_overlap(train, held_out)
        if len(overlap):
            file, row = held_out.place(int(overlap[0]))
            found = f"{len(overlap):,} of {len(held_out):,} held-out samples are trained on as well, first {file}:{row}"
            if args.on_overlap == "error":
                raise DataError(found, "take them out, or choose on_overlap=warn")
            notes.append(found)
    return mix(train, args.mixture_unit, args.mixture_stop, seed), held_out, notes


def roles_line(store: TokenStore) -> str:
    """Say how many messages, trained turns and trained tokens each role has; empty for data that is no chat."""
    said = []
    for role, counts in store.metadata.get("report", {}).get("roles", {}).items():
        numbers = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items() if count)
        said.append(f"{role}: {numbers or 'nothing'}")
    return "; ".join(said)


def warnings_line(store: TokenStore) -> str:
    """Say what of the data a prepared store leaves out, cuts, or holds otherwise than stated; empty if nothing."""
    report = store.metadata.get("report", {})
    said = []
    for name in (*_COUNTS[1:], "exact_duplicates"):
        if report.get(name):
            said.append(f"{name.replace('_', ' ')}: {report[name]:,}")
    for role, counts in report.get("roles", {}).items():
        if role not in SHOWN_ROLES and counts.get("messages"):
            said.append(f"messages of the role {role!r}: {counts['messages']:,}")
    for name, count in report.get("ignored_fields", {}).items():
        said.append(f"ignored field {name!r}: {count:,}")
    return ", ".join(said)


def find_broken(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, args: DataArguments, limit: int | None = None
) -> Iterator[tuple[Broken, Source]]:
    """Yield, for each part of each file, the rows that cannot be used; nothing is written."""
    for number, spec in enumerate(source_specs(data)):
        for part in _parts_of(spec, number, 0, tokenizer, args, limit):
            if part.source is None or part.recipe is None:
                continue
            broken = Broken()
            with TokenizerPool(part.recipe, 0) as pool:
                for result in pool.map(part.tasks()):
                    broken.extend(result.broken)
            yield broken, part.source


@dataclass
class _Part:
    """A file, a part of one, or a store prepared before: what it is made of, and its place among all."""

    path: str
    number: int  # of its source
    file: int
    is_first: bool  # part of its file
    source: Source | None = None
    recipe: Recipe | None = None
    reading: Reading = dataclasses.field(default_factory=Reading)
    key: str = ""
    store: TokenStore | None = None

    def tasks(self) -> Iterator[Task]:
        assert self.source is not None
        for chunk in self.source.read_chunks():
            yield Task(self.path, chunk, self.reading)


class _BrokenRows(Exception):
    """Rows of a file cannot be used, so that it gives no store."""

    def __init__(self, broken: Broken) -> None:
        super().__init__()
        self.broken = broken


def _parts_of(
    spec: SourceSpec,
    number: int,
    first_file: int,
    tokenizer: PreTrainedTokenizerBase | None,
    args: DataArguments,
    limit: int | None,
) -> list[_Part]:
    """Find the files of a source, and what is to be made of each."""
    args = spec.apply(args)
    if not is_dataset(spec.path) and all(os.path.isfile(os.path.join(path, "metadata.json")) for path in spec.paths):
        return [
            _Part(str(path), number, first_file + i, True, store=_open_prepared(Path(path), tokenizer, args, limit))
            for i, path in enumerate(spec.paths)
        ]
    files: list[list[Source]] = []
    for path in spec.paths:
        files += find_sources(path, args.dataset_split, args.dataset_revision, None if args.block_size else PART_BYTES)
    reading = Reading(tuple(sorted(args.columns.items())), args.data_format)
    expected = detect_file_kind(files[0][0], reading)
    recipe = Recipe.build(expected, tokenizer, args, limit)
    split = args.validation_split if args.block_size else None
    facts = (recipe.to_json(), dataclasses.astuple(reading), args.on_broken, split)
    return [
        _Part(
            *(source.path, number, first_file + i, source is parts[0], source, recipe, reading),
            key=fingerprint(source.digest, source.form, source.first_row, *facts),
        )
        for i, parts in enumerate(files)
        for source in parts
    ]


def _prepare_all(
    parts: list[_Part], args: DataArguments, tokenizer: PreTrainedTokenizerBase | None, progress: Progress | None
) -> tuple[TokenStore, bool]:
    """Open or build the store of every part, and join them; say whether all were there."""
    total = sum(part.source.num_bytes for part in parts if part.source is not None)
    done, all_cached, broken = 0, True, Broken()
    with ExitStack() as stack:
        pools: dict[str, TokenizerPool] = {}
        # First what nobody else is at work on, then what others have not finished.
        for wait in (False, True):
            for part in parts:
                if part.store is not None or part.source is None or part.recipe is None:
                    continue
                job = _Job(part, args, tokenizer, pools, stack, total, done, progress)
                try:
                    opened = open_or_build(args.data_cache_dir, part.key, job.build, wait)
                except _BrokenRows as error:
                    broken.extend(error.broken)
                    part.source = None  # not again
                    continue
                if opened is None:
                    continue
                part.store, cached = opened
                all_cached &= cached
                done += part.source.num_bytes
                if not cached:
                    _log.debug("prepared %s: %s samples", part.source.path, f"{len(part.store):,}")
                    if progress is not None:
                        progress(done, total)
    if broken.errors:
        raise broken.to_error(args.on_broken)
    stores = [part.store for part in parts if part.store is not None]
    if len(stores) == 1:
        return stores[0], all_cached
    return TokenStore.concatenate(stores, [part.file for part in parts], _joined_facts(stores, parts)), all_cached


def _joined_facts(stores: list[TokenStore], parts: list[_Part]) -> dict[str, Any]:
    """Return the metadata of several stores as one."""
    joined: dict[str, Any] = {}
    for store in stores:
        joined = _added(joined, {"report": store.metadata.get("report", {})})
        for name in ("num_samples", "num_tokens", "num_loss_tokens"):
            joined[name] = joined.get(name, 0) + store.metadata[name]
    first = stores[0].metadata
    for name in ("vocabulary", "block_size", "validation_split"):
        joined[name] = first.get(name)
    keys, kinds, joined["template_reads_clock"] = [], set(), False
    for store, part in zip(stores, parts, strict=True):
        keys.append([store.metadata["fingerprint"], part.number])
        kinds.add(store.metadata["kind"])
        joined["template_reads_clock"] |= bool(store.metadata.get("template_reads_clock"))
    joined["fingerprint"] = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:32]
    joined["kind"] = ", ".join(sorted(kinds))
    return joined


def _added(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Add counts of the same name, in objects of counts too."""
    total = dict(a)
    for name, value in b.items():
        if isinstance(value, dict):
            total[name] = _added(total.get(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value
    return total


def _named(data: Any) -> str:
    if isinstance(data, list | tuple):
        return ", ".join(spec.name for spec in source_specs(data))
    if is_dataset(data):
        return "datasets.Dataset"
    return str(data)


@dataclass(frozen=True)
class _Job:
    """All that building the store of one part needs."""

    part: _Part
    args: DataArguments
    tokenizer: PreTrainedTokenizerBase | None
    pools: dict[str, TokenizerPool]  # by recipe: parts share their workers
    stack: ExitStack
    total_bytes: int
    done_bytes: int
    progress: Progress | None

    def build(self, directory: Path) -> None:
        part = self.part
        assert part.source is not None
        assert part.recipe is not None
        report = Counter(dict.fromkeys(_COUNTS, 0))
        broken = Broken()
        with StoreWriter(directory) as writer:
            for batch in self._with_blocks(self._counted(self._pool().map(part.tasks()), report, broken)):
                # A block of nothing but its first token, or of prompts alone, has nothing to train.
                trainable = batch.count_loss_tokens() > 0
                report.update(untrainable_blocks_dropped=int((~trainable).sum()))
                batch = batch.where(trainable)
                loss_tokens = int(batch.count_loss_tokens().sum())
                report.update(samples=len(batch.lengths), tokens=len(batch.input_ids), loss_tokens=loss_tokens)
                if not broken.errors or self.args.on_broken == "drop":
                    writer.append_batch(batch)
            if part.source.has_changed():
                raise DataError("the file changed while it was read", "prepare it again", part.path)
            if self.args.on_broken == "drop":
                report["broken_dropped"] = broken.total - broken.undecided().total
                broken = broken.undecided()
            if broken.errors:
                raise _BrokenRows(broken)
            writer.metadata.update(self._facts(report))

    def _pool(self) -> TokenizerPool:
        recipe = self.part.recipe
        assert recipe is not None
        name = recipe.to_json()
        if name not in self.pools:
            wanted = self.args.dataset_num_proc
            if wanted is None:
                left = self.total_bytes - self.done_bytes
                wanted = min(len(os.sched_getaffinity(0)), left // _BYTES_PER_PROCESS)
            source = self.part.source
            assert source is not None
            if source.form == "lines" and source.num_bytes == self.total_bytes:
                wanted = min(wanted, len(source.chunks))
            self.pools[name] = self.stack.enter_context(TokenizerPool(recipe, max(1, wanted) - 1))
        return self.pools[name]

    def _counted(self, results: Iterator[Tokenized], report: Counter[str], broken: Broken) -> Iterator[TokenBatch]:
        done = self.done_bytes
        for result in results:
            report.update(result.report)
            broken.extend(result.broken)
            done += result.num_bytes
            if self.progress is not None:
                self.progress(done, self.total_bytes)
            yield result.batch

    def _with_blocks(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        """Cut blocks if asked to; those of held-out documents are cut apart from the others."""
        if not self.args.block_size:
            yield from batches
            return
        assert self.part.recipe is not None
        assert self.part.recipe.eos_id is not None
        sides = (BlockCutter(self.args.block_size), BlockCutter(self.args.block_size))
        for batch in batches:
            joined = end_with_eos(batch, self.part.recipe.eos_id)
            held_out = are_held_out(joined.documents, self.args.validation_split)
            yield from (side.cut(joined.where(held_out == bool(k))) for k, side in enumerate(sides))
        yield from (side.finish() for side in sides)

    def _facts(self, report: Counter[str]) -> dict[str, Any]:
        """Return the metadata of the store.

        Raises:
            DataError: no turn ends in a token that the model could learn to stop with.
        """
        recipe = self.part.recipe
        assert recipe is not None
        num_turns = report["trained_turns:assistant"]
        if num_turns and report["turns_without_end_of_turn"] >= num_turns:
            raise DataError(
                f"none of {num_turns:,} trained turns ends in a trained end-of-turn token: the model would never stop",
                "give a chat_template whose {% generation %} marks cover the token that ends a turn",
                Path(self.part.path),
            )
        ignored = {name.partition(":")[2]: n for name, n in report.items() if name.startswith("ignored_field:")}
        counts = {name: n for name, n in report.items() if ":" not in name}
        roles: dict[str, dict[str, int]] = {}
        for name, count in sorted(report.items()):
            what, _, role = name.partition(":")
            if what in ROLE_COUNTS:
                roles.setdefault(role, {})[what] = count
        return {
            "fingerprint": self.part.key,
            "kind": recipe.expected.kind,
            "vocabulary": None if self.tokenizer is None else _vocabulary_digest(self.tokenizer),
            "block_size": self.args.block_size,
            "validation_split": self.args.validation_split if self.args.block_size else None,
            "template_reads_clock": recipe.chat is not None and recipe.chat.reads_clock,
            "report": {**counts, "ignored_fields": ignored, "roles": roles},
        }


def _open_prepared(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, args: DataArguments, limit: int | None
) -> TokenStore:
    store = TokenStore.open(path)
    vocabulary = store.metadata.get("vocabulary")
    if tokenizer is not None and vocabulary is not None and vocabulary != _vocabulary_digest(tokenizer):
        remedy = "name the tokenizer that it was prepared with, or prepare the data again with this one"
        raise DataError("was prepared with a tokenizer of another vocabulary", remedy, path)
    defaults = DataArguments()
    for name in _DECIDED_BY_PREPARING:
        if getattr(args, name) != getattr(defaults, name):
            raise UsageError(
                f"{name} = {getattr(args, name)!r} has no effect: {path} was prepared already; leave it "
                "out, or prepare the data again from its files"
            )
    longest = int(store.lengths.max(initial=0))
    if limit is not None and longest > limit:
        raise DataError(f"holds a sample of {longest:,} tokens", f"at most {limit:,} are allowed; prepare again", path)
    return store


def _vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of which token each id stands for."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
