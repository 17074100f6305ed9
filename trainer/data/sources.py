"""A data file as it was when it was looked through: its digest, and its whole lines in pieces to hand out.

Knows nothing of what the lines say.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

CHUNK_BYTES = 2**18


class Chunk(NamedTuple):
    """Whole lines of a file: where they begin, how many bytes they are, and the number of the first."""

    offset: int
    size: int
    first_line: int

    def read(self, path: str) -> list[bytes]:
        """Read the lines, without their ends."""
        with Path(path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size).split(b"\n")


@dataclass(frozen=True)
class Source:
    """A file: SHA-256 of its bytes, its lines in chunks, its size and time of change."""

    path: Path
    digest: str
    chunks: list[Chunk]
    stamp: tuple[int, int]

    @classmethod
    def scan(cls, path: Path) -> Self:
        """Hash a file and find whole lines to hand out, in one pass."""
        digest, chunks, stamp = hashlib.sha256(), [], _stamp(path)
        begin = offset = 0
        line = 1
        with path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
                end = offset + block.rfind(b"\n") + 1
                if end > offset:
                    chunks.append(Chunk(begin, end - begin, line))
                    begin, line = end, line + block.count(b"\n")
                offset += len(block)
        if offset > begin:
            chunks.append(Chunk(begin, offset - begin, line))
        return cls(path, digest.hexdigest(), chunks, stamp)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.stamp[0]

    def has_changed(self) -> bool:
        """Whether the file is another now."""
        return _stamp(self.path) != self.stamp


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
