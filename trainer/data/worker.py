"""Tokenising in several processes: the caller, and subprocesses that speak JSON and raw arrays over their pipes.

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
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from trainer.data.jsonl import parse_documents
from trainer.data.store import TokenBatch
from trainer.data.tokenise import Recipe, Tokeniser
from trainer.errors import DataError

Tokenised = tuple[TokenBatch, "Counter[str]"]

_MOST_IN_ADVANCE = 8  # results that one process may keep ready; while others start, there are many
_ARRAYS = (("input_ids", np.int32), ("labels", np.int32), ("lengths", np.int32), ("documents", np.int64))


class Chunk(NamedTuple):
    """Whole lines of a file: where they begin, how many bytes they are, and the number of the first."""

    offset: int
    size: int
    first_line: int


def tokenise_chunk(tokeniser: Tokeniser, path: str, chunk: Chunk) -> Tokenised:
    """Tokenise some lines of a file."""
    with Path(path).open("rb") as file:
        file.seek(chunk.offset)
        lines = file.read(chunk.size).split(b"\n")
    return tokeniser.tokenise(parse_documents(lines, path, chunk.first_line, tokeniser.recipe.expected))


class TokeniserPool:
    """Tokenises in the caller, and in some worker processes that are started on entering and gone on leaving."""

    def __init__(self, recipe: Recipe, path: str, num_workers: int) -> None:
        self._recipe, self._path, self._num_workers = recipe, path, num_workers
        self._tokeniser = Tokeniser(recipe)
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()

    def __enter__(self) -> TokeniserPool:
        for _ in range(self._num_workers):
            self._workers.append(_Worker(self._recipe, self._path))
            self._idle.put(self._workers[-1])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in self._workers:
            worker.stop(at_once=error is not None)

    def map(self, chunks: Iterable[Chunk]) -> Iterator[Tokenised]:
        """Yield what each chunk gives, in order; the caller tokenises those for which no worker has time."""
        in_advance = _MOST_IN_ADVANCE * (1 + self._num_workers)
        with ThreadPoolExecutor(max(1, self._num_workers)) as threads:
            results: deque[Future[Tokenised]] = deque()
            try:
                for chunk in chunks:
                    num_under_way = sum(not result.done() for result in results)
                    has_time = num_under_way < 2 * self._num_workers
                    results.append(threads.submit(self._run, chunk) if has_time else self._run_here(chunk))
                    while results and (results[0].done() or len(results) >= in_advance):
                        yield results.popleft().result()
                while results:
                    yield results.popleft().result()
            finally:
                threads.shutdown(cancel_futures=True)

    def _run_here(self, chunk: Chunk) -> Future[Tokenised]:
        result: Future[Tokenised] = Future()
        try:
            result.set_result(tokenise_chunk(self._tokeniser, self._path, chunk))
        except DataError as error:  # raised when its turn comes: a chunk before it may hold one as well
            result.set_exception(error)
        return result

    def _run(self, chunk: Chunk) -> Tokenised:
        worker = self._idle.get()
        try:
            return worker.tokenise(chunk)
        finally:
            self._idle.put(worker)


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
        self._task = json.dumps(os.path.abspath(path)) + "\n" + recipe.to_json() + "\n"

    def tokenise(self, chunk: Chunk) -> Tokenised:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write((self._task + json.dumps(chunk) + "\n").encode())
            self._process.stdin.flush()
            self._task = ""
            return self._receive(self._process.stdout)
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            status = self._process.wait()
            found = f"a tokenising process died (exit status {status}) in the lines from here"
            remedy = "was it killed for memory? Lower dataset_num_proc"
            raise DataError(found, remedy, self._path, chunk.first_line) from error

    def _receive(self, pipe: IO[bytes]) -> Tokenised:
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

    def stop(self, at_once: bool) -> None:
        if at_once:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:
            pass  # leaving closes the pipes, upon which the process ends, and waits for it


def main() -> None:
    """Serve one caller: read a path, a recipe and chunks from stdin, write results to stdout, end with stdin."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process; read by tokenizers at each call
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)  # what a library prints must not reach the caller as a result
        path = json.loads(sys.stdin.buffer.readline() or "null")
        if path is None:
            return
        tokeniser = Tokeniser(Recipe.from_json(sys.stdin.buffer.readline().decode()))
        for line in sys.stdin.buffer:
            _answer(results, tokeniser, path, Chunk(*json.loads(line)))


def _answer(results: IO[bytes], tokeniser: Tokeniser, path: str, chunk: Chunk) -> None:
    try:
        batch, report = tokenise_chunk(tokeniser, path, chunk)
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
