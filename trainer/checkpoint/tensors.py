"""Tensors of a run, each rank's share in its own safetensors file, and an index that finds any region of any of them.

Owns the cutting into pieces and the reading across them; knows nothing of models and optimizers. Invariants: the pieces
of a tensor cover it once; what is read is bit for bit what was saved, on any number of ranks; a rank reads no more than
it asks for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainer.atomic import MALFORMED, check_name, open_regular, read_json
from trainer.checkpoint.manifest import INDEX
from trainer.distributed.group import Group
from trainer.errors import CheckpointError
from trainer.model.fsdp import Region, local_part
from trainer.model.lora import is_adapted

OPTIMIZER = "optimizer"  # what the names of its tensors begin with
SPLIT, SHARED, OWN = "split", "shared", "own"  # in pieces, equal on all ranks, another one on each rank
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMED = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A region of a tensor in a file, under the tensor's own name."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class Entry:
    """What the index says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    kind: str  # SPLIT, SHARED or OWN
    placements: tuple[int | None, ...] | None  # of a DTensor: the dimension sharded over each axis, None: replicated
    pieces: list[Piece] = field(default_factory=list)

    def fault(self) -> str | None:
        """Say why the pieces do not cover the tensor once, if they do not."""
        covered = 0
        for piece in self.pieces:
            if self.kind == OWN:  # each rank has one of its own under this name, perhaps of another shape
                if any(start != 0 for start in piece.offset) or any(length < 0 for length in piece.shape):
                    return f"a piece of shape {piece.shape} at {piece.offset} is not a whole tensor"
                continue
            if len(piece.offset) != len(self.shape) or len(piece.shape) != len(self.shape):
                return f"a piece has {len(piece.shape)} dimensions instead of {len(self.shape)}"
            for start, length, size in zip(piece.offset, piece.shape, self.shape, strict=True):
                if start < 0 or length < 0 or start + length > size:
                    return f"a piece of shape {piece.shape} at {piece.offset} lies outside of {self.shape}"
            covered += math.prod(piece.shape)
        if self.kind == OWN:
            return None
        size = math.prod(self.shape)
        if covered != size or len({(piece.offset, piece.shape) for piece in self.pieces}) != len(self.pieces):
            return f"its {len(self.pieces)} pieces hold {covered} of {size} elements"
        return None


Entries = dict[str, Entry]


def cut(tensors: Mapping[str, Tensor], file: str, group: Group) -> tuple[Entries, dict[str, Tensor]]:
    """Decide what this rank writes into its file; all ranks call, with the same names.

    Returns:
        An entry for each tensor, with this rank's piece in it if it has one, and the local tensors to write.

    Raises:
        CheckpointError: a tensor is of a type or placement that cannot be stored.
    """
    plain = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    shared = _equal_on_all_ranks(plain, group)
    entries: Entries = {}
    local: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise CheckpointError(f"{name} is of type {tensor.dtype}: a checkpoint holds {allowed}")
        if isinstance(tensor, DTensor):
            if not all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
                raise CheckpointError(
                    f"{name} is placed as {tensor.placements}: a checkpoint holds shards and replicas"
                )
            kind = SPLIT
            placements = tuple(p.dim if isinstance(p, Shard) else None for p in tensor.placements)
            coordinate: Any = tensor.device_mesh.get_coordinate()
            # Of replicas, the first one writes.
            is_writer = all(at == 0 for at, dimension in zip(coordinate, placements, strict=True) if dimension is None)
        else:
            kind, placements = SHARED if name in shared else OWN, None
            is_writer = kind == OWN or group.is_main
        entry = entries[name] = Entry(DTYPES[tensor.dtype], tuple(tensor.shape), kind, placements)
        part, region = local_part(tensor)
        if is_writer and (part.numel() or not math.prod(entry.shape)):
            offset, shape = tuple(s.start for s in region), tuple(s.stop - s.start for s in region)
            entry.pieces.append(Piece(file, offset, shape))
            local[name] = part
    return entries, local


def _equal_on_all_ranks(tensors: Mapping[str, Tensor], group: Group) -> set[str]:
    """Return the names of the tensors that every rank holds alike."""
    if group.world_size == 1 or not tensors:
        return set(tensors)
    names, fingerprints = sorted(tensors), []
    for name in names:
        tensor = tensors[name]
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=7)
        digest.update(_bytes_of(tensor))
        fingerprints.append(int.from_bytes(digest.digest(), "big"))
    mine = torch.tensor(fingerprints)
    leads = group.sum_tensor(mine.clone() if group.is_main else torch.zeros_like(mine))
    num_other = group.sum_tensor((mine != leads).long()).tolist()
    return {name for name, count in zip(names, num_other, strict=True) if not count}


def _bytes_of(tensor: Tensor) -> Any:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file tensor by tensor, so that no copy of all of them is needed."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # keeps every tensor aligned
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _bytes_of(tensors[name])


def merge(parts: Iterable[Entries]) -> Entries:
    """Put together what the ranks wrote of each tensor.

    Raises:
        CheckpointError: the pieces of a tensor do not cover it.
    """
    merged: Entries = {}
    for entries in parts:
        for name, entry in entries.items():
            merged.setdefault(name, Entry(entry.dtype, entry.shape, entry.kind, entry.placements))
            merged[name].pieces += entry.pieces
    for name, entry in merged.items():
        if (fault := entry.fault()) is not None:
            raise CheckpointError(f"{name}: {fault}; did all ranks save the same model?")
    return merged


def to_json(entries: Entries, world_size: int) -> Any:
    """Return the index as plain values."""
    tensors = {name: {**vars(e), "pieces": [vars(piece) for piece in e.pieces]} for name, e in entries.items()}
    return {"world_size": world_size, "tensors": tensors}


def from_json(form: Any) -> Entries:
    """Read the tensors of an index back.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: it is not an index.
    """
    entries: Entries = {}
    for name, entry in form.items():
        pieces = []
        for piece in entry["pieces"]:
            pieces.append(Piece(str(piece["file"]), _whole_numbers(piece["offset"]), _whole_numbers(piece["shape"])))
        if entry["dtype"] not in _NAMED or entry["kind"] not in (SPLIT, SHARED, OWN):
            raise ValueError(f"{name} is of type {entry['dtype']!r} and kind {entry['kind']!r}")
        placements = entry["placements"]
        if placements is not None:
            placements = tuple(None if axis is None else _whole_numbers([axis])[0] for axis in placements)
        entries[name] = Entry(entry["dtype"], _whole_numbers(entry["shape"]), entry["kind"], placements, pieces)
    return entries


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"{values!r} is no list of whole numbers")
    return tuple(values)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read which tensors a safetensors file holds: their types and shapes, all of them inside the file.

    Raises:
        CheckpointError: it is not a regular file, or not a safetensors file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            found = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    shape = _whole_numbers(entry["shape"])
                    num_bytes = math.prod(shape) * _NAMED[entry["dtype"]].itemsize
                    if not 0 <= start <= end <= size - 8 - length or end - start != num_bytes:
                        raise ValueError(f"{name} lies outside of the file")
                    found[name] = (entry["dtype"], shape)
        except MALFORMED as error:
            raise CheckpointError(f"{path} is no safetensors file ({error})") from error
        return found


class StoredTensors:
    """The tensors of a checkpoint, read region by region; a source of weights as `model.weights` wants one."""

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        form = read_json(folder / INDEX)
        try:
            self.saved_world_size, self.entries = int(form["world_size"]), from_json(form["tensors"])
        except MALFORMED as error:
            raise CheckpointError(f"{folder / INDEX} is no index of tensors ({error!r})") from error
        self._open: dict[str, Any] = {}

    def entry(self, name: str) -> Entry:
        """What the index says of a tensor.

        Raises:
            CheckpointError: it is not in the checkpoint.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.folder} does not hold {name}: it was saved from another model or optimizer")
        return self.entries[name]

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored."""
        return _NAMED[self.entry(name).dtype]

    def read(self, name: str, region: Region) -> Tensor:
        """One region of a tensor, on the CPU; () is the whole of it."""
        entry = self.entry(name)
        if entry.kind == OWN:
            return self._read_own(name, entry)
        region = region or tuple(slice(0, size) for size in entry.shape)
        found = torch.empty([s.stop - s.start for s in region], dtype=_NAMED[entry.dtype])
        num_missing = found.numel()
        for piece in entry.pieces:
            target, source, num_common = [], [], 1
            for wanted, offset, size in zip(region, piece.offset, piece.shape, strict=True):
                start, stop = max(wanted.start, offset), min(wanted.stop, offset + size)
                target.append(slice(start - wanted.start, stop - wanted.start))
                source.append(slice(start - offset, stop - offset))
                num_common *= max(stop - start, 0)
            if num_common:
                found[tuple(target)] = self._slice(piece.file, name, tuple(source))
                num_missing -= num_common
        if num_missing:
            raise CheckpointError(f"{self.folder}: {num_missing} elements of {name} are in none of its pieces")
        return found

    def find_damage(self) -> dict[str, list[str]]:
        """Return what is wrong with the tensors, by the file in which it shows."""
        faults: dict[str, list[str]] = {}
        headers: dict[str, dict[str, tuple[str, tuple[int, ...]]] | None] = {}
        for name, entry in self.entries.items():
            if (fault := entry.fault()) is not None:
                faults.setdefault(INDEX, []).append(f"{name}: {fault}")
            for piece in entry.pieces:
                if piece.file not in headers:
                    try:
                        check_name(piece.file)
                        headers[piece.file] = read_header(self.folder / piece.file)
                    except CheckpointError as error:
                        headers[piece.file] = None
                        faults.setdefault(piece.file, []).append(str(error))
                header = headers[piece.file]
                if header is not None and header.get(name) != (entry.dtype, piece.shape):
                    expected = f"the index says {entry.dtype} {piece.shape}"
                    faults.setdefault(piece.file, []).append(f"{name} is {header.get(name)}, {expected}")
        return faults

    def _read_own(self, name: str, entry: Entry) -> Tensor:
        """The tensor that this rank had for itself."""
        if len(entry.pieces) != self.world_size:
            raise CheckpointError(
                f"{self.folder}: each of {len(entry.pieces)} ranks saved a {name} of its own, which {self.world_size} "
                f"ranks cannot share; resume on {len(entry.pieces)} ranks"
            )
        piece = entry.pieces[self.rank]
        return self._slice(piece.file, name, tuple(slice(0, size) for size in piece.shape))

    def _slice(self, file: str, name: str, region: Region) -> Tensor:
        try:
            tensor: Tensor = self._file(file).get_slice(name)[region] if region else self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file}: {name} cannot be read ({error})") from error
        return tensor

    def _file(self, file: str) -> Any:
        if file not in self._open:
            try:
                check_name(file)
                open_regular(self.folder / file).close()  # safe_open waits for ever on a pipe
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file} cannot be read ({error})") from error
        return self._open[file]


def fill(tensor: Tensor, name: str, stored: StoredTensors) -> None:
    """Overwrite this rank's part of a tensor with what a checkpoint holds of it.

    Raises:
        CheckpointError: the checkpoint does not hold it, or in another shape or type.
    """
    entry = stored.entry(name)
    expected = (DTYPES.get(tensor.dtype), tuple(tensor.shape))
    if (entry.dtype, entry.shape) != expected:
        raise CheckpointError(
            f"{name} is {expected[0]} {expected[1]} here and {entry.dtype} {entry.shape} in {stored.folder}: "
            "the checkpoint was saved from another model"
        )
    part, region = local_part(tensor)
    if part.numel():
        with torch.no_grad():
            part.copy_(stored.read(name, region))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to save, sharded as they are.

    Raises:
        CheckpointError: the model keeps state that is no tensor.
    """
    stored = model.state_dict()
    strange = [name for name, value in stored.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{strange[0]} of the model is no tensor: a checkpoint cannot hold it")
    # What adapters adapt stays as it is: a digest of it is recorded.
    is_whole = not is_adapted(model)
    tensors: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad or is_whole
    }
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def restore_model(model: nn.Module, stored: StoredTensors) -> None:
    """Fill a model, in place, with the weights of a checkpoint.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
    tensors = model_tensors(model)
    strange = [name for name in stored.entries if name not in tensors and not name.startswith(f"{OPTIMIZER}/")]
    if strange:
        raise CheckpointError(f"{stored.folder} holds {strange[0]}, which this model lacks; it is another model's")
    for name, tensor in tensors.items():
        fill(tensor, name, stored)


TENSOR, TUPLE, DICT = "$tensor", "$tuple", "$dict"


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON form of a value; its tensors go into `tensors`, named by their path from `name` on.

    Raises:
        CheckpointError: something in it is neither number, text, tensor, list, tuple nor dict.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | np.integer | np.floating):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, Tensor):
        if name in tensors:
            raise CheckpointError(f"two tensors of a checkpoint would be named {name!r}")
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, list | tuple):
        items = [pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(item, f"{name}/{key}", tensors) for key, item in value.items()}
        unsaved: dict[str, Tensor] = {}
        return {DICT: [[pack(key, name, unsaved), pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    raise CheckpointError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}: only numbers, texts, tensors, and lists, "
        "tuples and dicts of them can be saved; give the object that owns it a state_dict of these"
    )


def unpack(form: Any, read: Callable[[str], Tensor]) -> Any:
    """Return the value that was packed; `read` returns a tensor by its name."""
    if isinstance(form, list):
        return [unpack(item, read) for item in form]
    if not isinstance(form, dict):
        return form
    if form.keys() == {TENSOR}:
        return read(form[TENSOR])
    if form.keys() == {TUPLE}:
        return tuple(unpack(item, read) for item in form[TUPLE])
    if form.keys() == {DICT}:
        return {unpack(key, read): unpack(item, read) for key, item in form[DICT]}
    return {key: unpack(item, read) for key, item in form.items()}
