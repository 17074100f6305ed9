"""Saves checkpoints: copies this rank's share, writes it beside the training, and publishes when every rank has.

Owns the one save that may be in flight; knows nothing of when to save or of what the records mean. Invariants: nothing
appears before it is whole; a failure anywhere is the same error on every rank, and leaves what was there before.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.atomic import FileFact, publish_folder, read_sealed, stage_folder, write_file, write_json, write_sealed
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import INDEX, Manifest, rank_file
from trainer.checkpoint.run_state import random_state
from trainer.checkpoint.tensors import Entries, cut, from_json, merge, safetensors_chunks, to_json
from trainer.distributed.group import Group
from trainer.errors import CheckpointError

SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint; the same on every rank but for the regions that each holds of the tensors."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # name of the file -> tensors
    records: Mapping[str, Any]  # name of the file -> JSON values
    files: Mapping[str, bytes] = field(default_factory=dict)  # small files as they are
    own: Mapping[str, Any] = field(default_factory=dict)  # JSON values of this rank, for its record
    is_resumable: bool = True


@dataclass
class _Pending:
    """A save in flight, as this rank sees it."""

    contents: Contents
    hidden: Path
    target: Path
    num_bytes: int  # of this rank's tensors
    started: float = field(default_factory=time.monotonic)
    num_written: int = 0  # of these and the files' headers
    thread: threading.Thread = field(init=False)
    error: Exception | None = None

    def report(self, report: Callable[[int, int, float], None]) -> None:
        """Say how far this rank is."""
        report(min(self.num_written, self.num_bytes), self.num_bytes, time.monotonic() - self.started)

    def counted(self, chunks: Iterable[Any]) -> Iterator[Any]:
        """The chunks, counted as they are taken."""
        for chunk in chunks:
            yield chunk
            self.num_written += memoryview(chunk).nbytes


class CheckpointWriter:
    """Writes checkpoints into a folder.

    Args:
        folder: where they lie, the same for all ranks.
        group: all ranks.
        is_async: write beside the training; it waits only while this rank's share is copied to host memory.
        limit: how many to keep, None for all; see `manifest.retire`.
        report: called now and then with this rank's share: bytes written, bytes in all, seconds since the save began.

    Attributes:
        run_id: of the run that saves; only checkpoints that carry it are ever removed.
        best_step: the step whose checkpoint is never removed.
    """

    def __init__(
        self,
        folder: Path,
        group: Group,
        *,
        is_async: bool,
        limit: int | None,
        report: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        self.folder, self.group, self.is_async, self.limit, self._report = folder, group, is_async, limit, report
        self.run_id: str | None = None
        self.best_step: int | None = None
        self._pending: _Pending | None = None
        self._host: dict[str, Tensor] = {}  # pinned copies, kept from one save to the next

    def save(self, contents: Contents) -> Path | None:
        """Begin to save (all ranks call); a former save is finished first.

        Returns:
            The checkpoint, if it is there already; None if `poll` or `wait` will give it.

        Raises:
            CheckpointError: this save or the former one failed on some rank.
        """
        self.wait()
        target = manifest.folder_of(self.folder, contents.step)
        hidden = manifest.hidden_name(target, "writing", self.run_id)
        self._on_main(lambda: stage_folder(hidden), contents.step)
        shares = {
            name: cut(tensors, f"{name}_{self.group.rank}.safetensors", self.group)
            for name, tensors in contents.tensors.items()
        }
        if self.is_async:
            for name, (entries, tensors) in shares.items():
                copies: dict[str, Tensor] = {}
                for key, tensor in tensors.items():
                    if self.group.device.type != "cuda":
                        copies[key] = tensor.detach().to("cpu", copy=True)
                        continue
                    host = self._host.get(key)
                    if host is None or (host.shape, host.dtype) != (tensor.shape, tensor.dtype):
                        host = self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    copies[key] = host.copy_(tensor.detach(), non_blocking=True)
                shares[name] = entries, copies
            if self.group.device.type == "cuda":
                torch.cuda.synchronize(self.group.device)
        num_bytes = sum(tensor.nbytes for _, tensors in shares.values() for tensor in tensors.values())
        pending = self._pending = _Pending(contents, hidden, target, num_bytes)
        record = {**contents.own, "random": random_state(self.group.device)}
        pending.thread = threading.Thread(target=self._write, args=(pending, shares, record), daemon=True)
        pending.thread.start()
        return None if self.is_async else self._finish()

    def poll(self) -> Path | None:
        """Publish the save in flight once every rank has written its share, and return it (all ranks call)."""
        pending = self._pending
        if pending is None:
            return None
        pending.report(self._report)
        is_done = not pending.thread.is_alive()
        num_done, num_failed = self.group.sum([is_done, is_done and pending.error is not None])
        return self._finish() if num_failed or num_done == self.group.world_size else None

    def wait(self) -> Path | None:
        """Wait until the save in flight is published, and return it; None if there is none (all ranks call)."""
        return None if self._pending is None else self._finish()

    def _write(
        self, pending: _Pending, shares: Mapping[str, tuple[Entries, dict[str, Tensor]]], record: dict[str, Any]
    ) -> None:
        """Write this rank's share, and last its record, which says what that was."""
        try:
            facts: dict[str, FileFact] = {}
            for name, (_, tensors) in shares.items():
                if tensors:
                    file = f"{name}_{self.group.rank}.safetensors"
                    facts[file] = write_file(pending.hidden / file, pending.counted(safetensors_chunks(tensors)))
            entries = {tensor: entry for part, _ in shares.values() for tensor, entry in part.items()}
            body = record | {
                "files": {name: vars(fact) for name, fact in facts.items()},
                "tensors": to_json(entries, self.group.world_size)["tensors"],
            }
            write_sealed(pending.hidden / rank_file(self.group.rank), body)
        except Exception as error:  # noqa: BLE001  whatever it is, it must surface in the training thread
            pending.error = error

    def _finish(self) -> Path:
        """Wait for every rank's share, publish, and remove what is beyond the limit."""
        pending, self._pending = self._pending, None
        assert pending is not None
        pending.report(self._report)
        with self.group.unhurried():
            while pending.thread.is_alive():
                pending.thread.join(SECONDS_BETWEEN_LOOKS)
                pending.report(self._report)
        step = pending.contents.step
        self._agree(pending.error, step, pending.hidden)
        self._on_main(lambda: self._publish(pending), step, pending.hidden)
        if (limit := self.limit) is not None:
            _, error = self.group.try_on_main(
                lambda: manifest.retire(self.folder, limit, self.best_step, self.run_id), OSError, CheckpointError
            )
            if (said := self.group.first_error(error)) is not None:
                raise CheckpointError(f"{pending.target} is there, but older ones could not be removed: {said}")
        return pending.target

    def _on_main(self, act: Callable[[], object], step: int, hidden: Path | None = None) -> None:
        """Run something on the main rank; if it fails there, raise on every rank."""
        _, error = self.group.try_on_main(act, OSError, CheckpointError)
        self._agree(error, step, hidden)

    def _publish(self, pending: _Pending) -> None:
        """Add what is the same for all ranks, seal with the manifest, and rename."""
        files: dict[str, FileFact] = {}
        parts: list[Entries] = []
        for rank in range(self.group.world_size):
            body, fact = read_sealed(pending.hidden / rank_file(rank))
            parts.append(from_json(body["tensors"]))
            files |= {name: FileFact(**entry) for name, entry in body["files"].items()} | {rank_file(rank): fact}
        contents = pending.contents
        records = {**contents.records, INDEX: to_json(merge(parts), self.group.world_size)}
        for name, value in records.items():
            files[name] = write_json(pending.hidden / name, value)
        for name, content in contents.files.items():
            files[name] = write_file(pending.hidden / name, [content])
        versions: dict[str, str] = {}
        for name in ("reference-trainer", "torch", "transformers"):
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = "not installed"
        about = Manifest(
            contents.step, self.group.world_size, contents.is_resumable, files, versions, run_id=self.run_id
        )
        body = {**vars(about), "files": {name: vars(fact) for name, fact in sorted(files.items())}}
        write_sealed(pending.hidden / manifest.MANIFEST, body)
        publish_folder(pending.hidden, pending.target)

    def _agree(self, error: Exception | None, step: int, hidden: Path | None = None) -> None:
        """Raise CheckpointError on every rank if there is an error on any."""
        said = self.group.first_error(error)
        if said is None:
            return
        if hidden is not None and self.group.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
        steps = [number for number in map(manifest.step_of, manifest.list_checkpoints(self.folder)) if number >= 0]
        last = f"the last one is {manifest.folder_of(self.folder, steps[0])}" if steps else "there is none before it"
        raise CheckpointError(f"the checkpoint after step {step} failed: {said}; {last}") from error
