"""What memory a run takes on one rank, known before a tensor exists.

A step of the run itself is taken, by the code that trains, on tensors that have shapes and no values; the bytes of the
storages that live are counted operation by operation. Nothing is estimated by formula but what shards weigh on other
numbers of ranks. Not counted: what CUDA and its libraries hold beside torch's tensors, and fragmentation.
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedTokenizerBase

from trainer.config.arguments import TrainingArguments
from trainer.data.loader import MicroBatch
from trainer.distributed.group import imagined_mesh
from trainer.errors import ModelError, named_error
from trainer.labels import IGNORE_INDEX
from trainer.model.attention import attention_settings, choose_attention
from trainer.model.borrowing import Borrowing
from trainer.model.build import Adapt, build_on_meta, prepare_model
from trainer.model.cross_entropy import HeadOutput, choose_rows_per_piece, linear_cross_entropy_sum
from trainer.model.fsdp import decoder_blocks, local_shard
from trainer.model.lora import add_lora
from trainer.model.osft.layers import apply_osft
from trainer.model.prepared import Prepared
from trainer.model.tokenizer import fit_vocabulary
from trainer.optim.build import build_optimizer
from trainer.optim.gradients import clip, global_norm, last_backward
from trainer.training.packed_task import pack_loss

FORWARD, LOSS, BACKWARD, STEP = "forward pass", "loss", "backward pass", "optimizer step"
IMAGINED_RANKS = 2  # with which sharding is tried; what other numbers change are the sizes of shards alone
ROUNDING, MOST_TOKENS = 256, 2**20  # of the largest budget: what it is a multiple of, and where the search ends
_GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default
_COLLECTIVES = ("c10d", "fsdp")  # operations whose tensors FSDP2 frees by resizing their storages


@dataclass(frozen=True)
class Load:
    """What one rank runs in one micro-batch, and whether a step has several."""

    num_tokens: int
    longest: int  # tokens of its longest sample
    num_loss_tokens: int
    accumulates: bool = True

    @property
    def lengths(self) -> list[int]:
        """Lengths of samples that are as heavy as any of so many tokens."""
        longest = max(1, min(self.longest, self.num_tokens))
        whole, rest = divmod(self.num_tokens, longest)
        return [longest] * whole + [rest] * (rest > 0)

    def of_tokens(self, num_tokens: int) -> Load:
        """The same kind of load with another number of tokens."""
        share = num_tokens / self.num_tokens
        return replace(self, num_tokens=num_tokens, num_loss_tokens=max(1, round(self.num_loss_tokens * share)))


@dataclass(frozen=True)
class ModuleMemory:
    """Parts of a model that are alike: bytes of their weights over all ranks, and of what they keep for backward."""

    name: str  # with * for the numbers of blocks
    kind: str
    count: int
    weights: int
    kept: int


@dataclass(frozen=True)
class Peak:
    """The most bytes held in a phase of a step; how many of them are shards."""

    total: int
    shards: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank of `world_size`."""

    load: Load
    world_size: int
    weights: int
    gradients: int
    optimizer_state: int
    activations: int  # kept from the forward pass of the model's body for the backward pass
    loss: int  # held at once while the loss is computed: logits, and gradients of the head
    kept: int  # between the forward and the backward pass: activations, and gradients of the head
    peaks: dict[str, Peak]  # of each phase of a step
    modules: tuple[ModuleMemory, ...]
    shapes: tuple[tuple[int, ...], ...] = field(repr=False)  # of the parameters, bytes of a value first
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The most bytes held at any time."""
        return max(peak.total for peak in self.peaks.values())

    @property
    def peak_phase(self) -> str:
        """The phase in which that is."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].total)

    def on_ranks(self, world_size: int, num_shards: int | None = None) -> MemoryEstimate:
        """The same on 2 ranks or more, of which `num_shards` (None: all) share a copy: shards shrink alone."""
        share = _shard_size(self.shapes, num_shards or world_size) / _shard_size(self.shapes, self.world_size)
        peaks = {}
        for phase, peak in self.peaks.items():
            # An optimizer's temporary tensors are as large as shards, too.
            scaled = peak.total if phase == STEP else peak.shards
            peaks[phase] = Peak(round(peak.total + (share - 1) * scaled), round(peak.shards * share))
        return replace(
            self,
            world_size=world_size,
            weights=round(self.weights * share),
            gradients=round(self.gradients * share),
            optimizer_state=round(self.optimizer_state * share),
            peaks=peaks,
        )


def estimate_memory(
    args: TrainingArguments,
    config: Any,
    load: Load,
    *,
    is_sharded: bool,
    on_gpu: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> MemoryEstimate:
    """Take a step on tensors without values, and count bytes.

    Args:
        args: How the model trains.
        config: The model's, as transformers reads it.
        load: The micro-batch.
        is_sharded: Over `IMAGINED_RANKS` ranks, see `MemoryEstimate.on_ranks`; else on one process.
        on_gpu: Attend and cut logits into pieces as on a GPU, which need not be there.
        tokenizer: The vocabulary is made to fit it, as in training.

    Raises:
        ModelError: the model cannot be trained as asked, or an operation of it cannot run without values.
    """
    if tokenizer is not None:
        fit_vocabulary(config, tokenizer)
    notes = [f"{name} saves memory that is not taken off here" for name in _NOT_IMITATED if getattr(args, name)]
    args = copy.copy(args)
    args.use_liger_kernels = args.torch_compile = False
    adapt: Adapt | None = partial(apply_osft, args=args) if args.osft else None
    model = build_on_meta(config, trust_remote_code=args.trust_remote_code)
    if args.lora_rank is not None:
        model = add_lora(model, args, args.seed)
    # CUDA's own paths can be taken where there is CUDA; elsewhere the tensors say that they are on the CPU.
    device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    micro_batch = micro_batch_of(load)  # with values: borders and positions are read back
    memory = LiveBytes()
    with ExitStack() as stack:
        mesh = stack.enter_context(imagined_mesh(IMAGINED_RANKS, device)) if is_sharded else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(memory)
        prepared = prepare_model(model, args, mesh, device, is_packed=True, is_dry=True, adapt=adapt)
        prepared = _imitate(prepared, args, memory, on_gpu=on_gpu)
        try:
            return _step(prepared, args, load, micro_batch, memory, notes)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ModelError(
                f"the memory of {type(model).__name__} cannot be told: an operation of it needs values, or another "
                f"format (try with bf16): {named_error(error)}"
            ) from error


_NOT_IMITATED = ("use_liger_kernels", "torch_compile")


def largest_budget(estimate: Callable[[int], int], limit: int, start: int) -> int | None:
    """Find the most tokens, a multiple of `ROUNDING`, for which an estimate of bytes stays within a limit.

    Args:
        estimate: bytes for a number of tokens; grows with it.
        limit: bytes.
        start: tokens to begin with.

    Returns:
        None where not even `ROUNDING` tokens fit; at most `MOST_TOKENS`.
    """
    low, high = ROUNDING, MOST_TOKENS + ROUNDING  # the most that fits, and the least that does not, as far as is known
    last, tokens = low, max(start // ROUNDING, 2) * ROUNDING
    known = {low: estimate(low)}
    if known[low] > limit:
        return None
    while low < tokens < high:
        known[tokens] = estimate(tokens)
        if known[tokens] <= limit:
            low = tokens
        else:
            high = tokens
        # What grows linearly is found at once, what grows faster takes a few more steps.
        slope = (known[tokens] - known[last]) / (tokens - last)
        last = tokens
        tokens = tokens + math.floor((limit - known[tokens]) / max(slope, 1) / ROUNDING) * ROUNDING
        tokens = max(min(tokens, high - ROUNDING), low)
    return low


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside make, as long as they live, with the most of each phase.

    Tensors with values and tensors without count alike; those on the meta device weigh nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.passing = 0  # of them, what FSDP2 gathers and frees again
        self.peaks: dict[str, int] = {}
        self.births_at_peak: dict[str, int] = {}
        self.phase = ""
        self.at_loss = self.kept_at_loss = 0
        self._sizes: dict[int, tuple[int, int, Any]] = {}  # of a storage by id: bytes, number of its birth, weakref
        self._resizable: set[int] = set()
        self._num_births = 0

    def enter(self, phase: str) -> None:
        """Count towards another phase from now on; it may come again."""
        self.phase = phase
        self._note_peak()

    def add(self, tensor: Tensor, *, is_resizable: bool = False) -> None:
        """Count the storage of a tensor, if it is not counted yet."""
        if isinstance(tensor, DTensor):  # whose own storage would be that of the whole
            tensor = tensor._local_tensor
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            self._num_births += 1
            self._sizes[key] = (size, self._num_births, weakref.ref(storage, lambda _: self._drop(key)))
            self.current += size
        elif known[0] != size:
            self._sizes[key] = (size, *known[1:])
            self.current += size - known[0]
        if is_resizable:
            self._resizable.add(key)

    def birth(self, tensor: Tensor) -> int:
        """Return which storage of all this was; the later, the larger."""
        known = self._sizes.get(id(tensor.untyped_storage()))
        return known[1] if known is not None else 0

    def kept(self) -> int:
        """Return the bytes that live now, without what FSDP2 has gathered."""
        self._measure_again()
        gathered = sum(self._sizes[key][0] for key in self._resizable if key in self._sizes)
        return self.current - gathered

    def _drop(self, key: int) -> None:
        self.current -= self._sizes.pop(key)[0]
        self._resizable.discard(key)

    def _measure_again(self) -> None:
        """See which storages were resized: no operation tells."""
        for key in self._resizable:
            size, birth, reference = self._sizes[key]
            storage = reference()
            if storage is not None and storage.nbytes() != size:
                self.current += storage.nbytes() - size
                self._sizes[key] = (storage.nbytes(), birth, reference)

    def _note_peak(self) -> None:
        if self.current > self.peaks.get(self.phase, 0):
            self._measure_again()
            if self.current > self.peaks.get(self.phase, 0):
                self.peaks[self.phase] = self.current
                self.births_at_peak[self.phase] = self._num_births

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        if is_of_experts := func is _GROUPED_PRODUCT and args[0].dtype == torch.float32:
            # A CPU multiplies float32 too, but torch tells shapes of bfloat16 alone.
            args = (args[0].bfloat16(), args[1].bfloat16(), *args[2:])
        outputs = func(*args, **(kwargs or {}))
        outputs = outputs.float() if is_of_experts else outputs
        if func.namespace in ("prim", "profiler"):
            return outputs
        is_collective = func.namespace in _COLLECTIVES
        for value in tree_iter(outputs):
            if isinstance(value, Tensor):
                self.add(value, is_resizable=is_collective)
        if is_collective:
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor):
                    self.add(value, is_resizable=True)
        self._note_peak()
        return outputs


def micro_batch_of(load: Load) -> MicroBatch:
    """Build a micro-batch of a load, as the loader builds them."""
    lengths, num_tokens = load.lengths, load.num_tokens
    labels = torch.full((1, num_tokens), IGNORE_INDEX)
    num_trained = min(load.num_loss_tokens, num_tokens - 1)
    labels[0, num_tokens - num_trained :] = 0
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.zeros(1, num_tokens, dtype=torch.int64),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens": borders,
        "max_length": max(lengths),
        "num_samples": len(lengths),
        "num_tokens": num_tokens,
        "num_loss_counted_tokens": num_trained,
        "batch_num_samples": len(lengths),
        "batch_num_tokens": num_tokens,
        "batch_num_loss_counted_tokens": num_trained,
    }


def _imitate(prepared: Prepared, args: TrainingArguments, memory: LiveBytes, *, on_gpu: bool) -> Prepared:
    """Attend and cut the logits as the device will that is planned for; tell the phase of the loss."""
    kind = "cuda" if on_gpu else "cpu"
    attention = choose_attention(prepared.model, args.attn_implementation, torch.device(kind), prepared.compute_dtype)
    settings = [*prepared.borrowing.settings, *attention_settings(prepared.model, attention)]

    def loss_in_its_phase(hidden: Tensor, head: nn.Linear, *inputs: Any, **options: Any) -> Tensor:
        memory.at_loss, memory.kept_at_loss = memory.current, memory.kept()
        memory.enter(LOSS)
        options["rows_per_piece"] = choose_rows_per_piece(kind, head.weight.shape[0])
        total = linear_cross_entropy_sum(hidden, head, *inputs, **options)
        memory.enter(FORWARD)
        return total

    is_linear = type(prepared.model.get_output_embeddings()) is nn.Linear
    return replace(
        prepared,
        attention=attention,
        borrowing=Borrowing(settings),
        head=HeadOutput() if is_linear else None,
        linear_cross_entropy=loss_in_its_phase,
    )


def _step(
    prepared: Prepared,
    args: TrainingArguments,
    load: Load,
    micro_batch: MicroBatch,
    memory: LiveBytes,
    notes: list[str],
) -> MemoryEstimate:
    """Take a step in the middle of a run: the optimizer has its state, and perhaps gradients are there already."""
    model, osft = prepared.model, prepared.osft
    for tensor in (*model.parameters(), *model.buffers()):
        memory.add(local_shard(tensor))
    weights, trained = memory.current, [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, args)
    optimizer, optimizer_state = _with_state(optimizer, trained, memory, notes)
    if not load.accumulates:
        optimizer.zero_grad()

    memory.peaks.clear()
    with prepared.in_use():
        memory.enter(FORWARD)
        before = memory.kept()
        with _watching_modules(prepared, memory) as kept_by_modules:
            loss = pack_loss(prepared, micro_batch, args.label_smoothing_factor)
        kept = memory.kept() - before
        memory.enter(BACKWARD)
        with last_backward(optimizer):
            loss.backward()
        del loss
    memory.enter(STEP)
    if osft is not None:
        osft.project_gradients()
    norm = global_norm(model.parameters(), optimizer)
    clip(model.parameters(), norm, args.max_grad_norm)
    shards = [local_shard(parameter.grad) for parameter in trained if parameter.grad is not None]
    gradients = [(memory.birth(shard), shard.nbytes) for shard in shards]  # when their storage came to be, and bytes
    optimizer.step()
    if osft is not None:
        osft.project_updates()

    peaks = {}
    for phase, total in memory.peaks.items():
        born = memory.births_at_peak[phase]
        present = sum(size for birth, size in gradients if birth <= born)
        peaks[phase] = Peak(total, weights + optimizer_state + present)
    activations, in_loss = kept, 0
    if LOSS in peaks:
        activations, in_loss = memory.kept_at_loss - before, memory.peaks[LOSS] - memory.at_loss
    return MemoryEstimate(
        load=load,
        world_size=1 if prepared.mesh is None else prepared.mesh.size(),
        weights=weights,
        gradients=sum(size for _, size in gradients),
        optimizer_state=optimizer_state,
        activations=activations,
        loss=in_loss,
        kept=kept,
        peaks=peaks,
        modules=tuple(_rows(model, kept_by_modules)),
        shapes=tuple((parameter.itemsize, *parameter.shape) for parameter in model.parameters()),
        notes=tuple(notes),
    )


def _with_state(
    optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], memory: LiveBytes, notes: list[str]
) -> tuple[torch.optim.Optimizer, int]:
    """Take a first step, in which the optimizer makes its state; return it, and the bytes of its state."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    before = memory.current
    memory.enter(STEP)
    try:
        optimizer.step()
    except Exception as error:  # noqa: BLE001  an optimizer that looks at values can raise anything
        name, kind = type(optimizer).__name__, type(error).__name__
        notes.append(f"{name} looks at values ({kind}), so AdamW's memory is counted for it")
        optimizer = torch.optim.AdamW(trained)
        optimizer.step()
    return optimizer, memory.current - before


@contextmanager
def _watching_modules(prepared: Prepared, memory: LiveBytes) -> Iterator[dict[str, int]]:
    """Yield what each part of a model that has a row keeps of its forward pass, as it comes."""
    model = prepared.model
    blocks = decoder_blocks(model)
    kept: dict[str, int] = {}
    entered: dict[str, int] = {}

    def enter(name: str, *_: Any) -> None:
        entered[name] = memory.kept()

    def leave(name: str, *_: Any) -> None:
        kept[name] = kept.get(name, 0) + memory.kept() - entered[name]

    with ExitStack() as stack:
        for name in _parts(model):
            if prepared.recomputes and name.rpartition(".")[0] in blocks:
                continue  # what it keeps goes at the end of its block
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
            stack.callback(module.register_forward_hook(partial(leave, name)).remove)
        yield kept


def _parts(model: Any) -> list[str]:
    """Return the names of the blocks, of their parts, and of what else holds weights."""
    blocks = decoder_blocks(model)
    names = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{block}.") for block in blocks)
        holds_weights = any(True for _ in module.parameters(recurse=False))
        if name in blocks or name.rpartition(".")[0] in blocks or (name and holds_weights and not is_inside):
            names.append(name)
    return names


def _rows(model: nn.Module, kept: dict[str, int]) -> Iterable[ModuleMemory]:
    """Yield a row for the parts of a model whose names differ by numbers alone."""
    rows: dict[tuple[str, str], ModuleMemory] = {}
    for name in _parts(model):
        module = model.get_submodule(name)
        kind = type(module).__name__.removeprefix("FSDP")
        weights = sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
        key = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), kind
        row = rows.get(key, ModuleMemory(*key, 0, 0, 0))
        rows[key] = replace(row, count=row.count + 1, weights=row.weights + weights, kept=row.kept + kept.get(name, 0))
    return rows.values()


def _shard_size(shapes: Iterable[Sequence[int]], world_size: int) -> int:
    """Count the bytes of the largest shards of parameters: rows are dealt out, scalars are held whole."""
    total = 0
    for itemsize, *sizes in shapes:
        if sizes:
            sizes[0] = -(-sizes[0] // world_size)
        total += itemsize * math.prod(sizes)
    return total
