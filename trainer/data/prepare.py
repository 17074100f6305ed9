"""A data file to a store of samples: tokenized in parallel, cached by content, everything refused counted.

Invariant: the same data, tokenizer, template and options give the same store, however often and in however many
processes it is prepared. What lies in the cache under a name is a whole store of that content, or is replaced by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.groups import DataArguments
from trainer.data.jsonl import detect_file_kind
from trainer.data.mixture import are_held_out
from trainer.data.sources import Source
from trainer.data.store import FORMAT_VERSION, Sample, StoreWriter, TokenBatch, TokenStore
from trainer.data.tokenize import Recipe
from trainer.data.workers import Tokenized, TokenizerPool
from trainer.errors import DataError, UsageError
from trainer.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as a file is tokenized."""

_BYTES_PER_PROCESS = 2**24
"""A process takes about as long to start as tokenizing so much."""

_COUNTS = (
    "documents",
    "overlong_dropped",
    "overlong_truncated",
    "overlong_split",
    "split_pieces",
    "tokens_dropped",
    "tokens_truncated",
    "untrainable_dropped",
    "untrainable_pieces_dropped",
    "untrainable_blocks_dropped",
    "turns_without_end_of_turn",
    "control_tokens_in_text",
    "messages_not_written_whole",
    "stated_loss_tokens_differ",
)
"""What the report always says, 0 included."""

_DECIDED_BY_PREPARING = ("train_on", "chat_template", "overlong", "on_untrainable", "block_size")


def prepare(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    args: DataArguments,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Return the samples of a JSONL file, or of a folder prepared before.

    `limit` is the longest sample in tokens that training can hold; `tokenizer` may be None for tokenized data. The
    store's metadata holds `report` (counts of documents, samples, tokens, loss tokens and everything refused), `kind`,
    `source`, `fingerprint`, and whether it was `cached`.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, says no where it may not look
        return _open_prepared(path, tokenizer, args, limit)
    expected = detect_file_kind(path)
    recipe = Recipe.build(expected, tokenizer, args, limit)
    source = Source.scan(path)
    key = fingerprint(source.digest, recipe.to_json(), args.validation_split if args.block_size else None)
    job = _Job(source, recipe, args, key, tokenizer, progress)
    store, cached = open_or_build(args.data_cache_dir, key, job.build)
    store.metadata.update(source=str(path), cached=cached)
    if len(store) == 0:
        raise DataError(f"no sample is left to train on ({store.metadata['report']})", "at least one is needed", path)
    return store


def left_out(store: TokenStore) -> str:
    """Say what of the data a prepared store leaves out, cuts, or holds otherwise than stated; empty if nothing."""
    report = store.metadata.get("report", {})
    counts = {name.replace("_", " "): report.get(name, 0) for name in _COUNTS if name != "documents"}
    counts |= {f"ignored field {name!r}": count for name, count in report.get("ignored_fields", {}).items()}
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items() if count)


@dataclass(frozen=True)
class _Job:
    """All that building one store needs."""

    source: Source
    recipe: Recipe
    args: DataArguments
    key: str
    tokenizer: PreTrainedTokenizerBase | None
    progress: Progress | None

    def build(self, directory: Path) -> None:
        report = Counter(dict.fromkeys(_COUNTS, 0))
        pool = TokenizerPool(self.recipe, str(self.source.path), self._num_processes() - 1)
        with StoreWriter(directory) as writer, pool:
            for batch in self._with_blocks(self._counted(pool.map(self.source.chunks), report)):
                # A block of nothing but its first token, or of prompts alone, has nothing to train.
                trainable = batch.count_loss_tokens() > 0
                report.update(untrainable_blocks_dropped=int((~trainable).sum()))
                batch = batch.where(trainable)
                loss_tokens = int(batch.count_loss_tokens().sum())
                report.update(samples=len(batch.lengths), tokens=len(batch.input_ids), loss_tokens=loss_tokens)
                writer.append_batch(batch)
            if self.source.has_changed():
                raise DataError("the file changed while it was read", "prepare it again", self.source.path)
            writer.metadata.update(self._facts(report))

    def _counted(self, results: Iterator[Tokenized], report: Counter[str]) -> Iterator[TokenBatch]:
        done = 0
        for chunk, (batch, counts) in zip(self.source.chunks, results, strict=True):
            report.update(counts)
            done += chunk.size
            if self.progress is not None:
                self.progress(done, self.source.num_bytes)
            yield batch

    def _with_blocks(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        """Cut blocks if asked to; those of held-out documents are cut apart from the others."""
        if not self.args.block_size:
            yield from batches
            return
        assert self.recipe.eos_id is not None
        sides = (BlockCutter(self.args.block_size), BlockCutter(self.args.block_size))
        for batch in batches:
            joined = end_with_eos(batch, self.recipe.eos_id)
            held_out = are_held_out(joined.documents, self.args.validation_split)
            yield from (side.cut(joined.where(held_out == bool(k))) for k, side in enumerate(sides))
        yield from (side.finish() for side in sides)

    def _num_processes(self) -> int:
        wanted = self.args.dataset_num_proc
        if wanted is None:
            wanted = min(len(os.sched_getaffinity(0)), self.source.num_bytes // _BYTES_PER_PROCESS)
        return max(1, min(wanted, len(self.source.chunks)))

    def _facts(self, report: Counter[str]) -> dict[str, Any]:
        prefix = "ignored_field:"
        ignored = {name.removeprefix(prefix): n for name, n in report.items() if name.startswith(prefix)}
        counts = {name: n for name, n in report.items() if not name.startswith(prefix)}
        return {
            "fingerprint": self.key,
            "kind": self.recipe.expected.kind,
            "vocabulary": None if self.tokenizer is None else _vocabulary_digest(self.tokenizer),
            "block_size": self.args.block_size,
            "validation_split": self.args.validation_split if self.args.block_size else None,
            "template_reads_clock": self.recipe.chat is not None and self.recipe.chat.reads_clock,
            "report": {**counts, "ignored_fields": ignored},
        }


def _open_prepared(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, args: DataArguments, limit: int | None
) -> TokenStore:
    store = TokenStore.open(path)
    vocabulary = store.metadata.get("vocabulary")
    if tokenizer is not None and vocabulary is not None and vocabulary != _vocabulary_digest(tokenizer):
        remedy = "name the tokenizer that it was prepared with, or prepare the data again with this one"
        raise DataError("was prepared with a tokenizer of another vocabulary", remedy, path)
    for field in dataclasses.fields(DataArguments):
        if field.name in _DECIDED_BY_PREPARING and getattr(args, field.name) != field.default:
            raise UsageError(
                f"{field.name} = {getattr(args, field.name)!r} has no effect: {path} was prepared already; leave it "
                "out, or prepare the data again from its JSONL file"
            )
    longest = int(store.lengths.max(initial=0))
    if limit is not None and longest > limit:
        raise DataError(f"holds a sample of {longest:,} tokens", f"at most {limit:,} are allowed; prepare again", path)
    return store


def _vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of which token each id stands for."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


_HOME = "~/.cache/trainer/prepared"


def cache_home(data_cache_dir: str | None) -> Path:
    """Where prepared data is kept: the folder asked for, or one in the user's home."""
    return Path(data_cache_dir or _HOME).expanduser()


def fingerprint(digest: str, recipe: str, validation_split: float | None) -> str:
    """Name of a store: a hash of all that decides its content, the versions of the libraries included."""
    versions = [FORMAT_VERSION, version("tokenizers"), version("transformers")]
    return hashlib.sha256(json.dumps([versions, digest, recipe, validation_split]).encode()).hexdigest()[:32]


def open_or_build(data_cache_dir: str | None, key: str, build: Callable[[Path], None]) -> tuple[TokenStore, bool]:
    """Open the store of this name, or build it; say whether it was there. A torn or damaged one is built again."""
    directory = cache_home(data_cache_dir) / key
    store = _open_if_whole(directory)
    if store is not None:
        return store, True
    with _lock(directory):
        store = _open_if_whole(directory)
        if store is not None:
            return store, True
        shutil.rmtree(directory, ignore_errors=True)
        _remove_abandoned(directory.parent, key)
        _build(build, directory)
    return TokenStore.open(directory), False


def _open_if_whole(directory: Path) -> TokenStore | None:
    try:
        return TokenStore.open(directory)
    except DataError:
        return None


def _build(build: Callable[[Path], None], directory: Path) -> None:
    try:
        build(directory)
    except OSError as error:
        remedy = "free some space there, or give another folder with data_cache_dir"
        raise DataError(f"cannot be written ({error})", remedy, directory) from error


def _remove_abandoned(home: Path, own: str) -> None:
    """Remove what processes that were killed have left of any store: nobody holds its lock."""
    for remains in home.glob("*.tmp-*"):
        key = remains.name.partition(".tmp-")[0]
        with (home / f"{key}.lock").open("w") as file, contextlib.suppress(BlockingIOError):
            if key != own:  # whose lock is ours
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(remains, ignore_errors=True)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Let one process build this store at a time."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = directory.with_name(f"{directory.name}.lock").open("w")
    except OSError as error:
        found = f"prepared data cannot be kept in {directory.parent} ({error.strerror})"
        raise UsageError(f"{found}: give a folder that can be written with data_cache_dir") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
