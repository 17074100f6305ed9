"""`launch` with faults in files: whichever way a file is written, and at the syncs and renames that publish it."""

import errno
import os
import tempfile
from pathlib import Path

import numpy
import pyarrow
import pytest
import torch
from safetensors.torch import save_file

from tests.fixtures.ranks.faults import bit_flipped, disk_full, kill, throw, truncated

CONTENT = b"x" * 1000


def by_open(path):
    with open(path, "wb") as file:
        file.write(CONTENT)


def by_pathlib(path):
    Path(path).write_bytes(CONTENT)


def by_descriptor(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, CONTENT)
    finally:
        os.close(descriptor)


def by_tempfile(path):
    descriptor, name = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(descriptor, "wb") as file:
        file.write(CONTENT)
    os.replace(name, path)


def by_numpy(path):
    with open(path, "wb") as file:
        numpy.save(file, numpy.frombuffer(CONTENT, numpy.uint8))


def by_arrow(path):
    with pyarrow.OSFile(path, "wb") as file:
        file.write(CONTENT)


def by_safetensors(path):
    save_file({"x": torch.ones(250)}, path)


WRITERS = [by_open, by_pathlib, by_descriptor, by_tempfile, by_numpy, by_arrow, by_safetensors]


def write_two(write, folder):
    write(f"{folder}/first")
    write(f"{folder}/second")


def publish(folder):
    """As careful programs do: written, synchronised, renamed, and the folder synchronised."""
    for name in ("weights", "manifest"):
        with open(f"{folder}/{name}.part", "wb") as file:
            file.write(CONTENT)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{folder}/{name}.part", f"{folder}/{name}")
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def alone(launch, fn, *args, faults):
    """Outcome of a function in one process without a group."""
    return launch(1, fn, *args, faults=faults, group=False)[0]


def bits(path):
    return int.from_bytes(path.read_bytes(), "little")


@pytest.mark.parametrize("write", WRITERS)
def test_whoever_writes_meets_the_full_disk(launch, tmp_path, write):
    outcome = alone(launch, write_two, write, str(tmp_path), faults=[disk_full(0, at=("write", 2))])
    assert isinstance(outcome.error, OSError)
    assert outcome.error.errno == errno.ENOSPC
    assert (tmp_path / "first").stat().st_size >= len(CONTENT)


@pytest.mark.parametrize("write", WRITERS)
def test_whatever_was_written_is_ruined(launch, tmp_path, write):
    faults = [bit_flipped(0, at=("write", 1)), truncated(0, at=("write", 2), keep=0.25)]
    assert alone(launch, write_two, write, str(tmp_path), faults=faults).is_done
    write(f"{tmp_path}/whole")
    flipped, short, whole = (tmp_path / name for name in ("first", "second", "whole"))
    assert (bits(flipped) ^ bits(whole)).bit_count() == 1
    assert short.read_bytes() == whole.read_bytes()[: whole.stat().st_size // 4]


@pytest.mark.parametrize(
    ("at", "left"),
    [
        (("write", 2), {"weights"}),
        (("sync", 1), {"weights.part"}),
        (("rename", 1), {"weights.part"}),
        (("sync", 1, "manifest*"), {"weights", "manifest.part"}),
        (("rename", 1, "manifest"), {"weights", "manifest.part"}),
        (("sync", 3), {"weights", "manifest"}),
    ],
    ids=lambda part: str(part) if isinstance(part, tuple) else " and ".join(sorted(part)),
)
def test_a_program_dies_between_any_two_steps_of_publishing(launch, tmp_path, at, left):
    assert alone(launch, publish, str(tmp_path), faults=[kill(0, at=at)]).signal == "SIGKILL"
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize("at", [("sync", 2), ("rename", 2)], ids=str)
def test_a_disk_is_full_as_late_as_at_sync_and_rename(launch, tmp_path, at):
    outcome = alone(launch, publish, str(tmp_path), faults=[disk_full(0, at=at)])
    assert isinstance(outcome.error, OSError)
    assert outcome.error.errno == errno.ENOSPC
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "manifest.part"}


def test_a_sync_can_raise_anything(launch, tmp_path):
    fault = throw(0, OSError(errno.EIO, "the disk is broken"), at=("sync", 1))
    assert alone(launch, publish, str(tmp_path), faults=[fault]).error.errno == errno.EIO


def test_only_writes_are_written_over():
    with pytest.raises(ValueError, match="flip at 'rename': allowed at write"):
        bit_flipped(0, at=("rename", 1))
