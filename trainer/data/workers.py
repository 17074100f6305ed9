"""Tokenizing in several processes: the caller, and subprocesses that speak JSON and raw arrays over their pipes.

Owns the processes and the protocol. Must not know what a recipe does. Invariant: results come in the order of the file,
and are those that one process would give. Subprocesses rather than `multiprocessing`: nothing is forked, nothing is
pickled, and the caller's main module is not imported again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Semaphore, Thread
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from trainer.data.formats import AS_IT_IS, Reading
from trainer.data.jsonl import Document, UndecidedError, parse_chunk
from trainer.data.sources import Chunk
from trainer.data.store import TokenBatch
from trainer.data.tokenize import DocumentTokenizer, Recipe
from trainer.errors import DataError

_IN_ADVANCE = 8  # results that a process may have ready before they are asked for: the first of all may take longest
_ARRAYS = (("input_ids", np.int32), ("labels", np.int32), ("lengths", np.int32), ("documents", np.int64))
_MOST_ERRORS = 20  # of one chunk that are kept; all are counted
_SLOW_SECONDS = 5.0


@dataclass
class Broken:
    """Rows that cannot be used: the first ones in order, and counts by kind with the first of each."""

    errors: list[DataError] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, DataError] = field(default_factory=dict)

    def add(self, error: DataError) -> None:
        """Count one row."""
        # A kind is what is allowed, and in which field; places in lists and numbers are not part of it.
        named = f"{error.field}: {error.allowed}" if error.field else error.allowed
        kind = re.sub(r"\[\d+\]|\d[\d,]*", "", named)
        self.counts[kind] += 1
        self.examples.setdefault(kind, error)
        if len(self.errors) < _MOST_ERRORS:
            self.errors.append(error)

    @property
    def total(self) -> int:
        """How many rows there are."""
        return sum(self.counts.values())

    def undecided(self) -> Broken:
        """Return those that another option than on_broken decides about."""
        kinds = [kind for kind, error in self.examples.items() if isinstance(error, UndecidedError)]
        errors: list[DataError] = [error for error in self.errors if isinstance(error, UndecidedError)]
        examples = {kind: self.examples[kind] for kind in kinds}
        counts = Counter({kind: self.counts[kind] for kind in kinds})
        return Broken(errors or list(examples.values()), counts, examples)

    def to_error(self, on_broken: str) -> DataError:
        """Build one error of all rows: the first ones in order, then counts by kind."""
        first = self.errors[0]
        if self.total == 1:
            return first
        listing = [first.allowed, f"{self.total:,} rows cannot be used; the first {len(self.errors)}:"]
        for error in self.errors:
            listing.append("  " + str(error).removesuffix(f"; {error.allowed}"))
        listing.append("by kind:")
        for kind, count in self.counts.items():
            example = self.examples[kind]
            listing.append(f"  {count:,} x {kind} (first: {example.path}:{example.line})")
        remedy = "`trainer preview --broken` shows them"
        if on_broken == "error":
            remedy += "; on_broken=drop leaves them out"
        return DataError(first.found, "\n".join([*listing, remedy]), first.path, first.line, first.field)

    def extend(self, other: Broken) -> None:
        """Count the rows of what follows."""
        self.counts.update(other.counts)
        self.examples = {**other.examples, **self.examples}
        self.errors = [*self.errors, *other.errors][:_MOST_ERRORS]


@dataclass
class Tokenized:
    """What a chunk gives: samples, counts of what happened to its rows, and the rows that cannot be used."""

    batch: TokenBatch
    report: Counter[str]
    broken: Broken
    num_bytes: int = 0


class Task(NamedTuple):
    """A chunk of a source, and how its rows are read."""

    path: str
    chunk: Chunk
    reading: Reading = AS_IT_IS


def tokenize_chunk(tokenizer: DocumentTokenizer, task: Task) -> Tokenized:
    """Tokenize some rows, and collect those that cannot be."""
    report: Counter[str] = Counter()
    documents: list[Document] = []
    errors: list[DataError] = []
    for item in parse_chunk(task.chunk, task.path, tokenizer.recipe.expected, task.reading, report):
        if isinstance(item, DataError):
            errors.append(item)
        else:
            documents.append(item)
    try:
        batch, counts = tokenizer.tokenize(documents)
    except DataError:
        # One of them cannot be used: only one by one shows which.
        batches = []
        counts = Counter()
        for document in documents:
            begun = time.monotonic()
            try:
                one, its_counts = tokenizer.tokenize([document])
            except DataError as error:
                if time.monotonic() - begun > _SLOW_SECONDS:  # no end: other rows would take as long
                    raise
                errors.append(error)
            else:
                batches.append(one)
                counts.update(its_counts)
        batch = TokenBatch.concatenate(batches)
    broken = Broken()
    for refused in sorted(errors, key=lambda refused: refused.line or 0):
        broken.add(refused)
    return Tokenized(batch, report + counts, broken, task.chunk.size)


class TokenizerPool:
    """Tokenizes in the caller, and in some worker processes that start with the first chunks and end on leaving.

    Each takes the next chunk as soon as it has time, a worker not before it has loaded what it needs.
    """

    def __init__(self, recipe: Recipe, num_workers: int) -> None:
        self._recipe, self._num_workers = recipe, num_workers
        self._tokenizer = DocumentTokenizer(recipe)
        self._workers: list[_Worker] = []

    def __enter__(self) -> TokenizerPool:
        self._workers = [_Worker(self._recipe) for _ in range(self._num_workers)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers:
            worker.kill()
            worker.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[Tokenized]:
        """Yield what each task gives, in order."""
        queue = _Tasks(tasks, _IN_ADVANCE * (1 + self._num_workers))
        self._workers += [_Worker(self._recipe) for _ in range(self._num_workers - len(self._workers))]
        workers = list(self._workers)
        threads = [Thread(target=_serve, args=(worker, queue)) for worker in workers]
        for thread in threads:
            thread.start()
        is_done = False
        try:
            while True:
                if queue.is_next_done:
                    yield queue.next_result()
                elif (drawn := queue.draw(wait=False)) is not None:
                    _settle(drawn, lambda task: tokenize_chunk(self._tokenizer, task))
                elif queue.are_left:
                    yield queue.next_result()
                else:
                    is_done = True
                    break
        finally:
            queue.close()
            for worker, thread in zip(workers, threads, strict=True):
                if not is_done or not worker.is_ready:  # it may be starting still, or at work on what nobody wants
                    worker.kill()
                    self._workers = [other for other in self._workers if other is not worker]
                thread.join()
                if worker not in self._workers:
                    worker.close()


class _Tasks:
    """Tasks in order, and the result of each in the same order; drawn by several threads, the results read by one."""

    def __init__(self, tasks: Iterable[Task], most_in_advance: int) -> None:
        self._tasks = iter(tasks)
        self._lock = Lock()
        self._room = Semaphore(most_in_advance)
        self._results: deque[Future[Tokenized]] = deque()

    def draw(self, *, wait: bool) -> tuple[Task, Future[Tokenized]] | None:
        """Take the next task; None if there is none left, or no room for its result and waiting is not wanted."""
        if not self._room.acquire(blocking=wait):
            return None
        with self._lock:
            task = next(self._tasks, None)
            if task is None:
                self._room.release()  # lets others that wait find out too
                return None
            self._results.append(Future())
            return task, self._results[-1]

    @property
    def are_left(self) -> bool:
        """Return whether results are still to be read."""
        return bool(self._results)

    @property
    def is_next_done(self) -> bool:
        """Return whether the next result can be read without waiting."""
        return bool(self._results) and self._results[0].done()

    def next_result(self) -> Tokenized:
        """Wait for the next result; raise what its task raised."""
        result = self._results.popleft().result()
        self._room.release()
        return result

    def close(self) -> None:
        """Hand out no more tasks."""
        with self._lock:
            self._tasks = iter(())
        self._room.release()


def _serve(worker: _Worker, queue: _Tasks) -> None:
    """Hand tasks to a worker until there are none."""
    worker.wait_until_ready()
    while (drawn := queue.draw(wait=True)) is not None:
        _settle(drawn, worker.tokenize)


def _settle(drawn: tuple[Task, Future[Tokenized]], tokenize: Callable[[Task], Tokenized]) -> None:
    task, result = drawn
    try:
        result.set_result(tokenize(task))
    except Exception as error:  # noqa: BLE001  raised when its turn comes: a task before it may hold an error as well
        result.set_exception(error)


class _Worker:
    """The caller's end of one worker process."""

    def __init__(self, recipe: Recipe) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        self._job = recipe.to_json() + "\n"
        self.is_ready = False

    def wait_until_ready(self) -> None:
        """Hand over the job and wait until the worker can begin. That it died is told by the next task."""
        if self.is_ready:
            return
        with contextlib.suppress(OSError):
            self._write(self._job.encode())
            assert self._process.stdout is not None
            self.is_ready = bool(self._process.stdout.readline())

    def tokenize(self, task: Task) -> Tokenized:
        assert self._process.stdout is not None
        chunk, data = task.chunk, task.chunk.data
        head = {
            "path": os.path.abspath(task.path) if data is None else task.path,
            "chunk": [chunk.offset, chunk.size, chunk.first_line, None, chunk.is_table],
            "reading": [task.reading.columns, task.reading.format],
            "bytes": None if data is None else len(data),
        }
        try:
            self._write(json.dumps(head).encode() + b"\n" + (data or b""))
            return self._receive(self._process.stdout, task)
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            status = self._process.wait()
            found = f"a tokenizing process died (exit status {status}) in the rows from here"
            remedy = "was it killed for memory? Lower dataset_num_proc"
            raise DataError(found, remedy, task.path, chunk.first_line) from error

    def _receive(self, pipe: IO[bytes], task: Task) -> Tokenized:
        line, path = pipe.readline(), task.path
        if not line:
            raise EOFError
        head = json.loads(line)
        if "refused" in head:
            raise _unpacked(head["refused"], path)
        broken = Broken(
            [_unpacked(error, path) for error in head["errors"]],
            Counter(head["counts"]),
            {kind: _unpacked(error, path) for kind, error in head["examples"].items()},
        )
        arrays = [
            np.frombuffer(_read(pipe, size), dtype) for size, (_, dtype) in zip(head["sizes"], _ARRAYS, strict=True)
        ]
        return Tokenized(TokenBatch(*arrays), Counter(head["report"]), broken, task.chunk.size)

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it at once; what it did lies with the caller."""
        self._process.kill()

    def close(self) -> None:
        """Close its pipes and wait for its end."""
        with contextlib.suppress(BrokenPipeError), self._process:
            pass


def main() -> None:
    """Serve one caller: read a recipe and tasks from stdin, write results to stdout, end with stdin."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process; read by tokenizers at each call
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)  # what a library prints must not reach the caller as a result
        job = sys.stdin.buffer.readline()
        if not job:
            return
        tokenizer = DocumentTokenizer(Recipe.from_json(job.decode()))
        tokenizer.load()
        _send(results, {"ready": True}, [])
        for line in sys.stdin.buffer:
            head = json.loads(line)
            data = None if head["bytes"] is None else _read(sys.stdin.buffer, head["bytes"])
            columns, form = head["reading"]
            reading = Reading(tuple((field, column) for field, column in columns), form)
            _answer(results, tokenizer, Task(head["path"], Chunk(*head["chunk"])._replace(data=data), reading))


def _answer(results: IO[bytes], tokenizer: DocumentTokenizer, task: Task) -> None:
    try:
        done = tokenize_chunk(tokenizer, task)
    except DataError as error:
        _send(results, {"refused": _packed(error)}, [])
        return
    arrays = [np.ascontiguousarray(getattr(done.batch, name), dtype).tobytes() for name, dtype in _ARRAYS]
    head = {
        "sizes": list(map(len, arrays)),
        "report": done.report,
        "errors": [_packed(error) for error in done.broken.errors],
        "counts": done.broken.counts,
        "examples": {kind: _packed(error) for kind, error in done.broken.examples.items()},
    }
    _send(results, head, arrays)


def _packed(error: DataError) -> list[Any]:
    """Write an error as JSON values; its path is the caller's to fill in."""
    return [isinstance(error, UndecidedError), error.found, error.allowed, error.line, error.field]


def _unpacked(values: list[Any], path: str) -> DataError:
    is_undecided, found, allowed, line, field = values
    return (UndecidedError if is_undecided else DataError)(found, allowed, path, line, field)


def _send(results: IO[bytes], head: dict[str, Any], arrays: list[bytes]) -> None:
    results.write(json.dumps(head).encode() + b"\n")
    for array in arrays:
        results.write(array)
    results.flush()


def _read(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


if __name__ == "__main__":
    main()
