"""Attention over packs: each sample sees itself only, whatever it is packed with.

Chooses for each model between two functions registered with transformers: `packed_sdpa` calls torch's attention once
per sample (exact on CPU, knows windows, soft caps and sinks), `varlen` (a module of its own) is torch's variable-length
kernel on CUDA. Both read the borders that `packed_inputs` passes through the model, and act as ordinary attention where
no borders come (padded batches, generation).

T tokens in a pack, S samples, H query heads, G key heads, E head size, B rows (1 for a pack).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from trainer.errors import MissingPackageError, ModelError
from trainer.model.borrowing import Borrowing, Setting
from trainer.model.precision import accumulation_dtype, autocast_dtype

PACKED_SDPA = "packed_sdpa"
VARLEN = "varlen"
OWN_IMPLEMENTATIONS = (PACKED_SDPA, VARLEN)
FLASH_PACKAGES = {"flash_attention_2": ("flash_attn", "flash-attn"), "flash_attention_3": ("flash_attn_interface", "")}
ALLOWED = ("auto", *OWN_IMPLEMENTATIONS, *FLASH_PACKAGES, "sdpa", "eager")
VARLEN_MAX_HEAD_SIZE = 256
HEAD_SIZE_UNIT = 8
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # names in configs
_IMPLEMENTATION = "_attn_implementation_internal"  # what the property `_attn_implementation` of a config reads
_BORDERS_ON_HOST = WeakTensorKeyDictionary()  # borders of a pack -> the same as a list
_READS_PACKS: ContextVar[bool] = ContextVar("reads_packs", default=False)


@dataclass(frozen=True)
class Attention:
    """The name under which an attention function is registered with transformers, and why it was chosen."""

    name: str
    reason: str


def packed_inputs(model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Any]:
    """All that a transformers model needs to keep the samples of a pack apart, with its cache off.

    Every model reads some of these: position_ids (1,T), cu_seq_lens_q and _k (S+1,) with max_length_q and _k (attention
    kernels), seq_idx (1,T) (recurrent kernels). What a forward pass without `**kwargs` cannot take is left out.
    """
    borders, length = micro_batch["cu_seq_lens"], int(micro_batch["max_length"])
    num_tokens = micro_batch["input_ids"].shape[1]
    samples = torch.arange(len(borders) - 1, dtype=torch.int32, device=borders.device)
    seq_idx = torch.repeat_interleave(samples, borders.diff().long(), output_size=num_tokens)
    inputs = {
        "input_ids": micro_batch["input_ids"],
        "position_ids": micro_batch["position_ids"],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": length,
        "max_length_k": length,
        "seq_idx": seq_idx[None],
        "use_cache": False,
    }
    if _READS_PACKS.get() and _reads_borders(model):
        # Spares transformers its search for the borders of a pack, whose answer the host would wait for.
        inputs["attention_mask"] = torch.ones_like(micro_batch["input_ids"], dtype=torch.bool)
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def _reads_borders(model: Any) -> bool:
    """Return whether all layers of a model get the borders of a pack from our functions, and none from a mask."""
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "_attn_implementation", None) not in OWN_IMPLEMENTATIONS:
        return False
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
    return all(kind.endswith("attention") and not kind.startswith("linear") for kind in layer_types)


@contextmanager
def packed_forward() -> Iterator[None]:
    """Inside, this thread's models read packs, and our attention functions need no mask (see `packed_mask`)."""
    token = _READS_PACKS.set(True)
    try:
        yield
    finally:
        _READS_PACKS.reset(token)


def choose_attention(
    model: PreTrainedModel,
    implementation: str = "auto",
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
) -> Attention:
    """Choose how a model attends over packs; `attention_settings` put it in place.

    Args:
        model: Any transformers model; weights are not needed yet.
        implementation: `auto`, or one of `ALLOWED`.
        device: Where the model will run.
        compute_dtype: Format of queries and keys; None for the model's own.

    Raises:
        ModelError: The name is unknown, or this model or device cannot run it.
        MissingPackageError: Its package is not installed.
    """
    if implementation not in ALLOWED:
        raise ModelError(f"attn_implementation: {implementation!r} is unknown; allowed: {', '.join(ALLOWED)}")
    name, reason = implementation, "asked for"
    if implementation in ("auto", VARLEN):
        obstacle = _varlen_obstacle(model, torch.device(device), compute_dtype or model.dtype)
        if obstacle and implementation == VARLEN:
            raise ModelError(f"attn_implementation: 'varlen' cannot run here: {obstacle}; use 'auto' or 'packed_sdpa'")
        if implementation == "auto":
            name, reason = (PACKED_SDPA, f"not varlen: {obstacle}") if obstacle else (VARLEN, "the fastest here")
    if name == VARLEN:
        importlib.import_module("trainer.model.varlen")  # registers it; half a second that a CPU need not wait
    if name not in OWN_IMPLEMENTATIONS:
        _check_foreign(model, name)
    return Attention(name, reason)


def attention_settings(model: PreTrainedModel, attention: Attention) -> list[Setting]:
    """What makes a model and all of its parts attend so.

    Not `set_attn_implementation`: models without sdpa of their own refuse any custom function there.
    """
    return [Setting(config, _IMPLEMENTATION, attention.name) for config in _configurations(model)]


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of each sample to itself: (B,H,T,E), (B,G,T,E) -> (B,T,H,E).

    Borders come from `cu_seq_lens_q`, or from restarting `position_ids` where a model drops the former. Without borders
    this is ordinary causal attention under the mask given.
    """
    if options.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__} adds a position bias, which 'packed_sdpa' does not know; use 'eager'"
        )
    borders = _borders(module, query, attention_mask, options) if query.shape[2] == key.shape[2] else []
    mask, rounded = attention_mask, autocast_dtype(query)
    on_cpu = query.device.type == "cpu"
    if on_cpu:
        # In float32 at least, rounded once: a CPU takes up to three times as long in bfloat16.
        query, key, value = (tensor.to(accumulation_dtype(tensor.dtype)) for tensor in (query, key, value))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        if len(borders) <= 2:
            attended = _attend(module, query, key, value, mask, options)
        else:
            sizes = [stop - start for start, stop in pairwise(borders)]
            # Split, not slices: the gradient of a slice is as large as the whole pack, for every sample of it.
            samples = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
            parts = []
            for (start, stop), (q, k, v) in zip(pairwise(borders), samples, strict=True):
                part_mask = None if mask is None else mask[..., start:stop, start:stop]
                parts.append(_attend(module, q, k, v, part_mask, options))
            attended = torch.cat(parts, dim=2)
    if on_cpu:
        attended = attended.to(rounded)
    return attended.transpose(1, 2).contiguous(), None


def packed_mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> Tensor | None:
    """No mask where the attention function can tell from borders and windows alone; else transformers' own."""
    is_plain = kwargs.get("attention_mask") is None or _READS_PACKS.get()
    is_plain = is_plain and not kwargs.get("use_vmap", False)
    if is_plain and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, **kwargs)


AttentionInterface.register(PACKED_SDPA, torch.compiler.disable(packed_sdpa))
for _name in OWN_IMPLEMENTATIONS:
    AttentionMaskInterface.register(_name, packed_mask)


def _borders(module: nn.Module, query: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> list[int]:
    """Where the parts of a row begin that see themselves only, and where the last one ends.

    Parts are samples, and the chunks of samples in a layer that attends in chunks.
    """
    borders, positions, length = options.get("cu_seq_lens_q"), options.get("position_ids"), query.shape[2]
    parts = [0, length]
    if borders is not None:
        if borders not in _BORDERS_ON_HOST:  # read once for all layers: the host waits for a GPU to give it
            _BORDERS_ON_HOST[borders] = borders.tolist()
        parts = _BORDERS_ON_HOST[borders]
    elif mask is None and positions is not None and query.shape[0] == 1:
        positions = positions.reshape(-1, length)[0]
        starts = (positions[1:] != positions[:-1] + 1).nonzero().flatten() + 1
        parts = [0, *starts.tolist(), length]
    config: Any = getattr(module, "config", None)
    layer, layer_types = getattr(module, "layer_idx", None), getattr(config, "layer_types", None)
    if mask is None and layer is not None and layer_types and layer_types[layer] == "chunked_attention":  # Llama 4
        starts = []
        for first, last in pairwise(parts):
            starts += range(first, last, config.attention_chunk_size)
        parts = [*starts, length]
    return parts


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> Tensor:
    """Attention of queries over all keys given, in (B,H,T,E)."""
    window, causal = options.get("sliding_window"), options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None and causal and window is not None and num_keys > window:
        mask = _window_mask(num_queries, num_keys, window, query.device)
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        if mask is None and causal and num_queries > 1:
            mask = _window_mask(num_queries, num_keys, num_keys, query.device)
        return _attend_by_hand(query, key, value, mask, options)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type == "cuda" and _lacks_grouped_kernel(query, mask):
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and causal and num_queries > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _lacks_grouped_kernel(query: Tensor, mask: Tensor | None) -> bool:
    """Return whether `enable_gqa` would leave only the kernel on CUDA that keeps all scores of a layer in memory.

    Only flash attention groups heads: without a mask, in 16 bits, for heads up to 256. What is left takes T * T values
    a head; repeated keys are small beside that.
    """
    return mask is not None or query.dtype.itemsize > 2 or query.shape[-1] > VARLEN_MAX_HEAD_SIZE


def _attend_by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> Tensor:
    """Attention with soft cap (c * tanh(x / c) on the scores) or sinks (a column that takes weight and gives none)."""
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        # Finite: a padding token sees nothing, and must not become NaN.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights[..., : key.shape[2]], options.get("dropout", 0.0))
    return weights @ value


def _window_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """Each query sees itself and the window - 1 keys before it; (queries, keys), True where it sees."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    offset = num_keys - num_queries
    return ones.tril(offset).triu(offset - window + 1)


def _varlen_obstacle(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run this model here, or None."""
    if device.type != "cuda":
        return f"it needs CUDA, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {dtype}; set bf16"
    config = model.config.get_text_config()
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "the model attends in chunks"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model caps attention scores"
    if any(name.rpartition(".")[2] in ("sinks", "sink") for name, _ in model.named_parameters()):
        return "the model has attention sinks"
    dropout = max((float(getattr(config, name, 0.0) or 0.0) for name in DROPOUTS), default=0.0)
    if dropout > 0:
        return f"the model drops attention weights in training ({dropout:g}), which the kernel cannot"
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        return "some layer of the model is not causal"
    return _head_size_obstacle(model, config)


def _head_size_obstacle(model: PreTrainedModel, config: Any) -> str | None:
    nope, rope = getattr(config, "qk_nope_head_dim", None), getattr(config, "qk_rope_head_dim", None)
    if nope is not None and nope + (rope or 0) != getattr(config, "v_head_dim", None):
        return "queries and values have different head sizes"
    # Layers may differ (Gemma 4), and then no number of the config holds for all.
    sizes = {size for module in model.modules() if isinstance(size := getattr(module, "head_dim", None), int)}
    if not sizes:
        sizes = {getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}
    for size in sorted(sizes, reverse=True):
        if size > VARLEN_MAX_HEAD_SIZE or size % HEAD_SIZE_UNIT:
            return f"head size {size}: allowed are multiples of {HEAD_SIZE_UNIT} up to {VARLEN_MAX_HEAD_SIZE}"
    return None


def _configurations(model: PreTrainedModel) -> list[Any]:
    """The configurations of a model and of all its parts, each once."""
    return configurations([getattr(module, "config", None) for module in model.modules()])


def configurations(given: Sequence[Any]) -> list[Any]:
    """The configurations among what is given, and those of their parts, each once."""
    found: dict[int, Any] = {}
    waiting = list(given)
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


def _check_foreign(model: PreTrainedModel, name: str) -> None:
    """Raise where transformers would not let a model use one of its implementations."""
    module, package = FLASH_PACKAGES.get(name, ("torch", ""))
    if importlib.util.find_spec(module) is None:
        remedy = f"pip install {package}" if package else "see its project page"
        raise MissingPackageError(f"attn_implementation: {name!r} needs the package {module}; {remedy}, or use 'auto'")
    present = [Setting(config, _IMPLEMENTATION, config._attn_implementation) for config in _configurations(model)]
    with Borrowing(present).held():
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise ModelError(f"attn_implementation: {model.config.model_type} cannot use {name!r}: {error}") from error
