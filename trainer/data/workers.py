"""Tokenizing in several processes: the caller, and subprocesses that speak JSON and raw arrays over their pipes.

Owns the processes and the protocol. Must not know what a recipe does. Invariant: results come in the order of the file,
and are those that one process would give. Subprocesses rather than `multiprocessing`: nothing is forked, nothing is
pickled, and the caller's main module is not imported again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Lock, Semaphore, Thread
from types import TracebackType
from typing import IO, Any

import numpy as np

from trainer.data.jsonl import parse_documents
from trainer.data.sources import Chunk
from trainer.data.store import TokenBatch
from trainer.data.tokenize import DocumentTokenizer, Recipe
from trainer.errors import DataError

Tokenized = tuple[TokenBatch, "Counter[str]"]
_Task = tuple[Chunk, "Future[Tokenized]"]

_IN_ADVANCE = 8  # results that a process may have ready before they are asked for: the first of all may take longest
_ARRAYS = (("input_ids", np.int32), ("labels", np.int32), ("lengths", np.int32), ("documents", np.int64))


def tokenize_chunk(tokenizer: DocumentTokenizer, path: str, chunk: Chunk) -> Tokenized:
    """Tokenize some lines of a file."""
    return tokenizer.tokenize(parse_documents(chunk.read(path), path, chunk.first_line, tokenizer.recipe.expected))


class TokenizerPool:
    """Tokenizes in the caller, and in some worker processes that are started on entering and gone on leaving.

    Each takes the next chunk as soon as it has time, a worker not before it has loaded what it needs.
    """

    def __init__(self, recipe: Recipe, path: str, num_workers: int) -> None:
        self._recipe, self._path, self._num_workers = recipe, path, num_workers
        self._tokenizer = DocumentTokenizer(recipe)
        self._workers: list[_Worker] = []

    def __enter__(self) -> TokenizerPool:
        self._workers = [_Worker(self._recipe, self._path) for _ in range(self._num_workers)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers:
            worker.kill()
            worker.close()

    def map(self, chunks: Iterable[Chunk]) -> Iterator[Tokenized]:
        """Yield what each chunk gives, in order."""
        tasks = _Tasks(chunks, _IN_ADVANCE * (1 + self._num_workers))
        threads = [Thread(target=_serve, args=(worker, tasks)) for worker in self._workers]
        for thread in threads:
            thread.start()
        try:
            while True:
                if tasks.is_next_done:
                    yield tasks.next_result()
                elif (task := tasks.draw(wait=False)) is not None:
                    _settle(task, lambda chunk: tokenize_chunk(self._tokenizer, self._path, chunk))
                elif tasks.are_left:
                    yield tasks.next_result()
                else:
                    break
        finally:
            tasks.close()
            for worker, thread in zip(self._workers, threads, strict=True):
                worker.kill()  # it may still be starting
                thread.join()


class _Tasks:
    """Chunks in order, and the result of each in the same order; drawn by several threads, the results read by one."""

    def __init__(self, chunks: Iterable[Chunk], most_in_advance: int) -> None:
        self._chunks = iter(chunks)
        self._lock = Lock()
        self._room = Semaphore(most_in_advance)
        self._results: deque[Future[Tokenized]] = deque()

    def draw(self, *, wait: bool) -> _Task | None:
        """Take the next chunk; None if there is none left, or no room for its result and waiting is not wanted."""
        if not self._room.acquire(blocking=wait):
            return None
        with self._lock:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._room.release()  # lets others that wait find out too
                return None
            self._results.append(Future())
            return chunk, self._results[-1]

    @property
    def are_left(self) -> bool:
        """Whether results are still to be read."""
        return bool(self._results)

    @property
    def is_next_done(self) -> bool:
        """Whether the next result can be read without waiting."""
        return bool(self._results) and self._results[0].done()

    def next_result(self) -> Tokenized:
        """Wait for the next result; raises what its chunk raised."""
        result = self._results.popleft().result()
        self._room.release()
        return result

    def close(self) -> None:
        """Give out no more."""
        with self._lock:
            self._chunks = iter(())
        self._room.release()


def _serve(worker: _Worker, tasks: _Tasks) -> None:
    """Let a worker take chunks until there are none."""
    worker.wait_until_ready()
    while (task := tasks.draw(wait=True)) is not None:
        _settle(task, worker.tokenize)


def _settle(task: _Task, tokenize: Callable[[Chunk], Tokenized]) -> None:
    chunk, result = task
    try:
        result.set_result(tokenize(chunk))
    except Exception as error:  # noqa: BLE001  raised when its turn comes: a chunk before it may hold an error as well
        result.set_exception(error)


class _Worker:
    """The caller's end of one worker process."""

    def __init__(self, recipe: Recipe, path: str) -> None:
        self._path = path
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        self._job = json.dumps(os.path.abspath(path)) + "\n" + recipe.to_json() + "\n"

    def wait_until_ready(self) -> None:
        """Hand over the job and wait until the worker can begin. That it died is told by the next chunk."""
        with contextlib.suppress(OSError):
            self._write(self._job)
            assert self._process.stdout is not None
            self._process.stdout.readline()

    def tokenize(self, chunk: Chunk) -> Tokenized:
        assert self._process.stdout is not None
        try:
            self._write(json.dumps(chunk) + "\n")
            return self._receive(self._process.stdout)
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            status = self._process.wait()
            found = f"a tokenizing process died (exit status {status}) in the lines from here"
            remedy = "was it killed for memory? Lower dataset_num_proc"
            raise DataError(found, remedy, self._path, chunk.first_line) from error

    def _receive(self, pipe: IO[bytes]) -> Tokenized:
        line = pipe.readline()
        if not line:
            raise EOFError
        head = json.loads(line)
        if "refused" in head:
            raise DataError(**{**head["refused"], "path": self._path})
        arrays = [
            np.frombuffer(_read(pipe, size), dtype) for size, (_, dtype) in zip(head["sizes"], _ARRAYS, strict=True)
        ]
        return TokenBatch(*arrays), Counter(head["report"])

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it at once; what it did lies with the caller."""
        self._process.kill()

    def close(self) -> None:
        """Close its pipes and wait for its end."""
        with contextlib.suppress(BrokenPipeError), self._process:
            pass


def main() -> None:
    """Serve one caller: read a path, a recipe and chunks from stdin, write results to stdout, end with stdin."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process; read by tokenizers at each call
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)  # what a library prints must not reach the caller as a result
        path = json.loads(sys.stdin.buffer.readline() or "null")
        if path is None:
            return
        tokenizer = DocumentTokenizer(Recipe.from_json(sys.stdin.buffer.readline().decode()))
        tokenizer.load()
        _send(results, {"ready": True}, [])
        for line in sys.stdin.buffer:
            _answer(results, tokenizer, path, Chunk(*json.loads(line)))


def _answer(results: IO[bytes], tokenizer: DocumentTokenizer, path: str, chunk: Chunk) -> None:
    try:
        batch, report = tokenize_chunk(tokenizer, path, chunk)
    except DataError as error:
        refused = {"found": error.found, "allowed": error.allowed, "line": error.line, "field": error.field}
        _send(results, {"refused": refused}, [])
        return
    arrays = [np.ascontiguousarray(getattr(batch, name), dtype).tobytes() for name, dtype in _ARRAYS]
    _send(results, {"sizes": list(map(len, arrays)), "report": report}, arrays)


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
