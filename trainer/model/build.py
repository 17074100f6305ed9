"""Makes a model ready to train on this rank, and returns what a run knows of it (`Prepared`).

`load_model` builds a transformers model from a folder, a hub name or a config; `prepare_model` makes it, or any module
that is given, ready: device, attention, kernels, freezing, recomputation, compilation, sharding, precision.
Invariants: no rank holds more than its shards and one tensor of the whole model; the weights are those of a plain load,
bit for bit; nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.groups import LoraArguments, ModelArguments
from trainer.download import WITHOUT_HUB, why_unreachable
from trainer.errors import ModelError, UsageError, named_error
from trainer.model.attention import attention_settings, choose_attention, configurations
from trainer.model.borrowing import Borrowing, Setting, settings_made_by
from trainer.model.cross_entropy import LinearCrossEntropy, linear_cross_entropy_sum
from trainer.model.freezing import freeze
from trainer.model.fsdp import checkpoint_activations, compile_blocks, local_part, shard_for_training, unwrapped
from trainer.model.isolation import check_isolation
from trainer.model.liger import liger_cross_entropy_sum, liger_settings
from trainer.model.lora import ADAPTER, HALVES, AdaptedWeights, add_lora, check_for_packs, hold, is_adapted
from trainer.model.loss import measure_head
from trainer.model.osft.layers import Osft, is_osft_parameter, unread_parameters
from trainer.model.prepared import Prepared
from trainer.model.tokenizer import align_special_ids, fit_vocabulary, padding_row_settings
from trainer.model.traits import QUANTISED, check_module, read_traits
from trainer.model.weights import FileWeights, SeededWeights, Weights

_log = logging.getLogger(__name__)
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
Adapt = Callable[[PreTrainedModel], Osft | None]
_ON_META: ContextVar[bool] = ContextVar("parameters_on_meta", default=False)
HUB_PATTERNS = ["*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja"]


def load_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mesh: DeviceMesh | None = None,
    device: torch.device | str = "cpu",
    *,
    seed: int,
    adapt: Adapt | None = None,
    lora: LoraArguments | None = None,
    is_packed: bool = True,
) -> Prepared:
    """Load or create the model that the options describe, ready to train; every rank of the mesh calls.

    Args:
        args: Where the model is and how it trains.
        tokenizer: Its ids are the model's afterwards; None leaves vocabulary and special ids alone.
        mesh: Ranks to shard over; None for one process.
        device: This rank's device.
        seed: Seed of weights that are not loaded; they do not depend on the number of ranks.
        adapt: Changes the model's modules before it is sharded and filled, such as `apply_osft`.
        lora: Adapters to train in place of the model; None for none.
        is_packed: Whether it will read packs.

    Raises:
        ModelError: The model cannot be found, built, or trained as asked.
        IsolationError: Packed samples would see each other.
    """
    model, weights = open_model(args, tokenizer, seed)
    if lora is not None:
        if tokenizer is not None and len(tokenizer) > read_config(args, find_model(args)).get_text_config().vocab_size:
            raise ModelError(
                f"the tokenizer has {len(tokenizer)} tokens, more than the model has embeddings, and LoRA trains none: "
                "give the model's own tokenizer, or resize and save the model first"
            )
        wrapper = add_lora(model, lora, seed, place_of(args))
        weights = AdaptedWeights(weights, model, wrapper.peft_config[ADAPTER].init_lora_weights, seed)
        model = wrapper
    return prepare_model(model, args, mesh, device, is_packed=is_packed, weights=weights, adapt=adapt)


def open_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> tuple[PreTrainedModel, Weights]:
    """Build the model that the options describe on the meta device, and open where its weights come from."""
    folder = find_model(args)
    config = read_config(args, folder)
    if tokenizer is not None:
        fit_vocabulary(config, tokenizer)
    model = build_on_meta(config, trust_remote_code=args.trust_remote_code)
    weights = open_weights(model, args, folder, seed)
    if tokenizer is not None:
        align_special_ids(model, tokenizer)
    return model, weights


def place_of(args: ModelArguments) -> str | None:
    """The model's folder from anywhere on this machine, or its name on the hub; None for random weights."""
    name = args.model_name_or_path
    return str(Path(name).resolve()) if name is not None and Path(name).is_dir() else name


def find_model(args: ModelArguments) -> Path:
    """The folder that holds the model's files, fetched from the hub if need be."""
    place = args.model_name_or_path or args.model_config
    if place is None or (args.model_name_or_path and args.model_config):
        raise UsageError("give either model_name_or_path (weights to fine-tune) or model_config (random weights)")
    path = Path(place)
    if path.is_dir():
        return path
    if args.model_config is not None or path.is_file():
        if path.is_file() and path.suffix == ".json":
            return path.parent
        raise ModelError(f"no model at {place!r}; give a folder with a config.json, or the file itself")
    unreachable = why_unreachable(place, "model")
    try:
        found = snapshot_download(place, allow_patterns=HUB_PATTERNS, local_files_only=unreachable is not None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if unreachable is not None:
            raise ModelError(
                f"no folder {place!r} here, no model of that name was downloaded before, and {unreachable}: "
                f"{WITHOUT_HUB}"
            ) from error
        raise ModelError(f"no folder {place!r} here, and the hub does not give it: {error}") from error
    if unreachable is not None:
        _log.warning("%s: %s; what was downloaded before is used", place, unreachable)
    return Path(found)


def read_config(args: ModelArguments, folder: Path) -> Any:
    """Read the model's configuration.

    Raises:
        ModelError: There is none, it needs code that is not trusted, or it describes quantised weights.
    """
    place = Path(args.model_config) if args.model_config is not None else folder
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # noqa: BLE001  a malformed file makes transformers raise anything
        raise ModelError(f"no usable config.json in {place}: {named_error(error)}") from error
    _forget_kernels(config, place)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{place}: {QUANTISED}")
    return config


def _forget_kernels(config: Any, place: Path) -> None:
    """Clear the implementations that a config names: transformers would fetch and run the kernels that they stand for.

    Options choose (`attn_implementation`), never a file that was downloaded. transformers' own files name none.
    """
    for part in configurations([config]):
        for name in ("_attn_implementation", "_experts_implementation"):
            if getattr(part, name, None) is not None:
                _log.warning("%s: %s = %r in its config.json is not used", place, name.strip("_"), getattr(part, name))
                setattr(part, f"{name}_internal", None)


def build_on_meta(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with float32 parameters on the meta device and real buffers (rotary tables and the like).

    `config.dtype` keeps the format in which the model is stored: exports go back to it.
    """
    stored_dtype = config.dtype
    try:
        with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # noqa: BLE001  a config may say anything
        reason = str(error).partition("Model type should be one of")[0]  # a list of hundreds follows
        raise ModelError(
            f"model type {config.model_type!r} cannot be built as a causal language model: {type(error).__name__}: "
            f"{reason}"
        ) from error
    model.config.dtype = stored_dtype
    return model


def open_weights(model: PreTrainedModel, args: ModelArguments, folder: Path, seed: int) -> Weights:
    """Where the weights of a model from `build_on_meta` come from: the folder's safetensors, or the seed."""
    if args.model_name_or_path is None:
        return SeededWeights(build_on_meta(model.config, trust_remote_code=args.trust_remote_code), seed)
    if (folder / "generation_config.json").is_file():
        model.generation_config = _read_generation_config(folder)
    return FileWeights(model, find_files(folder))


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ModelError: There are none; pickled weights are named and refused.
    """
    names = _names_in_index(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else [SINGLE_NAME]
    absent = [name for name in names if not (folder / name).is_file()]
    if not absent:
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise ModelError(
            f"{folder} holds {pickles[0]}: pickled weights can run code when read and are refused; convert them where "
            "you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ModelError(f"{folder} lacks {', '.join(absent)}; fetch or export the model again")


def _names_in_index(path: Path) -> list[str]:
    try:
        return sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no index of weights ({named_error(error)}); fetch or export it again") from error


def _read_generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  a malformed file makes transformers raise anything
        raise ModelError(f"no usable generation_config.json in {folder}: {named_error(error)}; delete it") from error


def prepare_model(
    model: nn.Module,
    args: ModelArguments,
    mesh: DeviceMesh | None = None,
    device: torch.device | str = "cpu",
    *,
    is_packed: bool,
    label_names: Sequence[str] | None = None,
    weights: Weights | None = None,
    is_record: bool = False,
    is_dry: bool = False,
    adapt: Adapt | None = None,
) -> Prepared:
    """Make a model ready to train on this rank, in place; every rank of the mesh calls.

    Args:
        model: Any module with its weights, or one from `build_on_meta` with `weights`; PEFT may wrap it.
        args: How it trains.
        mesh: Ranks to shard over; None for one process.
        device: This rank's device.
        is_packed: It will read packs of token data: a transformers model whose samples must not see each other.
        label_names: Names of its labels, where its class does not tell.
        weights: Fills a model on the meta device.
        is_record: `weights` are of a run, with all that `adapt` adds, and are not judged.
        is_dry: A model from `build_on_meta` gets tensors without values: nothing is read, and nothing tried out.
        adapt: Changes the model's modules before it is sharded and filled, such as `apply_osft`.

    Raises:
        ModelError: It cannot be trained as asked.
        IsolationError: Packed samples would see each other.
    """
    device, wrapper = torch.device(device), None
    if is_packed and is_adapted(model):
        # PEFT's wrapper runs its model past the hooks of FSDP2, so a trainer runs the model itself.
        check_for_packs(model, is_sharded=mesh is not None)
        wrapper, model = model, unwrapped(model)
    check_module(model, is_packed=is_packed)
    traits = read_traits(model, label_names)
    compute_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    stored_dtype = _set_formats(model, compute_dtype or torch.float32, is_packed=is_packed)
    osft = adapt(model) if adapt is not None else None
    if weights is None and not is_dry:
        model.to(device)
    settings, attention = [], None
    linear_cross_entropy: LinearCrossEntropy = linear_cross_entropy_sum
    if args.use_liger_kernels:
        settings += liger_settings(model, device)
        linear_cross_entropy = liger_cross_entropy_sum
    if is_packed:
        attention = choose_attention(model, args.attn_implementation, device, compute_dtype or torch.float32)
        settings += attention_settings(model, attention) + padding_row_settings(model)
    freeze(model, args.freeze_patterns)
    settings += _block_settings(model, args)
    if mesh is not None:
        shard_for_training(model, mesh, compute_dtype, unread=unread_parameters(model), casts_inputs=is_packed)
        _refuse_saving(model, wrapper)
    model.train()
    if is_dry:
        _allocate(model, device)
    if weights is not None:
        fresh = set() if is_record else set(filter(is_osft_parameter, model.state_dict()))
        materialise(model, weights, device, zeros=fresh)
    prepared = Prepared(
        model,
        device,
        mesh,
        compute_dtype or next(model.parameters()).dtype,
        uses_autocast=compute_dtype is not None and (mesh is None or not is_packed),
        traits=traits,
        stored_dtype=stored_dtype,
        attention=attention,
        linear_cross_entropy=linear_cross_entropy,
        osft=osft if osft is not None and osft.layers else None,
        wrapper=wrapper,
        recomputes=args.gradient_checkpointing,
        borrowing=Borrowing(settings),
    )
    if is_packed and not (is_dry or is_record):
        check_isolation(prepared)
    return replace(prepared, head=measure_head(prepared)) if is_packed and not is_dry else prepared


def _block_settings(model: nn.Module, args: ModelArguments) -> list[Setting]:
    """What makes the blocks of a model recompute their activations and run compiled, where that is asked for."""
    settings = []
    if args.gradient_checkpointing:
        settings += settings_made_by(lambda: checkpoint_activations(model, args), model)
    if args.torch_compile:
        compiler = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        given = {name: value for name, value in compiler.items() if value is not None}
        settings += settings_made_by(lambda: compile_blocks(model, **given), model)
    return settings


def _refuse_saving(*parts: Any) -> None:
    """Refuse save_pretrained of a sharded model, and name what to call: each rank has shards alone."""

    def save_pretrained(part: Any, *args: Any, **options: Any) -> Any:
        if options.get("state_dict") is not None:
            return type(part).save_pretrained(part, *args, **options)
        raise ModelError(
            "save_pretrained on several ranks, each of which holds shards of the weights: have all ranks call "
            "trainer.save_model(folder), or run `trainer export CHECKPOINT FOLDER`"
        )

    for part in parts:
        if hasattr(part, "save_pretrained"):
            Setting(part, "save_pretrained", partial(save_pretrained, part)).stay()


def _set_formats(model: nn.Module, compute_dtype: torch.dtype, *, is_packed: bool) -> torch.dtype | None:
    """Cast the parameters of a model that reads packs to the formats to train in; return the stored format."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        return None
    stored_dtype = inner.config.dtype or torch.float32
    if not is_packed:
        return stored_dtype
    if inner.dtype in HALVES:
        stored_dtype = inner.dtype
    if is_adapted(inner):
        hold(inner, stored_dtype, compute_dtype)
    elif inner.dtype in HALVES:
        inner.float()  # master weights are float32
    return stored_dtype


def materialise(
    model: PreTrainedModel, weights: Weights, device: torch.device | str, zeros: Collection[str] = ()
) -> None:
    """Allocate a model of the meta device on `device` and read its weights; a sharded rank reads its shards only.

    Args:
        model: Sharded or not.
        weights: Where they are read from.
        device: This rank's device.
        zeros: Names of parameters that `weights` does not hold, and that begin as 0.
    """
    _allocate(model, torch.device(device))
    persistent = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in persistent:
            local, region = local_part(tensor)
            if name in zeros:
                local.zero_()
            elif local.numel():
                local.copy_(weights.read(name, region))


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Move parameters from meta to uninitialised memory and buffers as they are; tied parameters stay one."""
    replacements: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in replacements:
                empty = torch.empty_like(parameter, device=device)
                replacements[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = replacements[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers inside lie on the meta device; buffers and other tensors are real.

    What draws their values then does nothing.
    """
    token = _ON_META.set(True)
    try:
        yield
    finally:
        _ON_META.reset(token)


def _move_to_meta(_: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if not _ON_META.get() or parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


register_module_parameter_registration_hook(_move_to_meta)  # type: ignore[arg-type]  # it may return a parameter
