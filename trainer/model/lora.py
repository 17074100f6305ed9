"""Adapters of PEFT around a model of transformers: LoRA as the options say it, and what the trainer knows of any other.

PEFT is imported only where an adapter is made, read or written. Invariants: what is adapted is not trained, and keeps
the format in which it is stored where the run computes in it; the first values of an adapter depend on the seed and the
name of its layer alone, not on ranks or on where the model comes from.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.groups import LoraArguments
from trainer.errors import MissingPackageError, ModelError
from trainer.model.freezing import near_names
from trainer.model.fsdp import Region, decoder_blocks, local_part, sum_over_shards, unwrapped
from trainer.model.traits import check_module
from trainer.model.weights import Weights

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
BASE_LAYER = "base_layer"  # PEFT's name of the layer that an adapter wraps
ADAPTER = "default"  # PEFT's name of an adapter that was given none
ALL_LINEAR = "all-linear"  # PEFT's name of all linear layers but the head
HALVES = (torch.bfloat16, torch.float16)
CHUNK = 2**24  # elements of which a digest is computed at a time
ODD = 0x9E3779B97F4A7C15 - 2**64  # as a signed number


def load_peft() -> Any:
    """Import PEFT.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise MissingPackageError("LoRA needs the package peft; pip install 'reference-trainer[lora]'") from error


def is_adapted(model: nn.Module) -> bool:
    """Whether a model holds adapters of PEFT."""
    return hasattr(model, "peft_config")


def add_lora(model: PreTrainedModel, args: LoraArguments, seed: int, place: str | None = None) -> Any:
    """Put low-rank adapters into a model and return PEFT's wrapper of it; everything else of the model is frozen.

    Args:
        model: On any device; on the meta device `AdaptedWeights` has the values of the adapters.
        args: Which rank, which modules.
        seed: Of the adapters' first values.
        place: Where the model was loaded from, which exports of the adapters name.

    Raises:
        ModelError: The model holds adapters already, or modules to adapt are not there or cannot be adapted.
    """
    peft, rank = load_peft(), args.lora_rank
    assert rank is not None
    if is_adapted(model):
        raise ModelError("lora_rank: the model holds adapters of PEFT already; leave the option out to train those")
    check_module(model, is_packed=True)
    targets = args.lora_target_modules
    if targets is None or targets == ALL_LINEAR:
        targets = _linear_layers(model)
    else:
        _check_targets(model, targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        use_rslora=args.lora_use_rslora,
        use_dora=args.lora_use_dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        init_lora_weights=True if args.lora_init == "default" else args.lora_init,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            wrapper = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora_target_modules: PEFT cannot adapt {targets}: {error}") from error
    if wrapper.peft_config[ADAPTER].target_parameters:
        raise ModelError(
            f"lora_target_modules: {targets} stand for experts whose weights are one tensor, which are no linear "
            "layers; name other modules, or leave the option out for those of attention"
        )
    if place is not None:
        wrapper.peft_config[ADAPTER].base_model_name_or_path = place
    for name, layer in lora_layers(model).items():
        if not layer.weight.is_meta:
            with torch.no_grad():
                for own_name, value in _first_values(layer, name, config.init_lora_weights, seed).items():
                    layer.get_parameter(own_name).copy_(value)
    return wrapper


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that LoRA adapts, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Ends of the names of all linear layers of the blocks; of a mixture of experts, of those of attention.

    There PEFT (0.21) takes the names of dense layers for those of experts, whose weights are one tensor for all.
    """
    blocks = tuple(f"{block}." for block in decoder_blocks(model))
    is_mixture = False
    for module in model.modules():
        is_conv = isinstance(module, nn.Conv1d)
        is_mixture |= not is_conv and any(parameter.ndim > 2 for parameter in module.parameters(recurse=False))
    found = []
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        is_chosen = not is_mixture or "Attention" in type(parent).__name__
        if name.startswith(blocks) and type(module) in (nn.Linear, Conv1D) and is_chosen:
            found.append(name)
    ends = {name.rpartition(".")[2] for name in found}
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in found}
    return found if ends & others else sorted(ends)


def _check_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    """Refuse names that stand for no module, which PEFT leaves out in silence, and weights that are shared."""
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            found = [name for name in names if re.fullmatch(target, name)]
        else:
            found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            raise ModelError(
                f"lora_target_modules: {target!r} is no module of this model (a list holds names or their ends, one "
                f"text is a regular expression); names like it: {', '.join(near_names(target, names))}"
            )
        chosen.update(found)
    for name, twin in model.all_tied_weights_keys.items():
        for weight, other in ((name, twin), (twin, name)):
            if weight.removesuffix(".weight") in chosen:
                raise ModelError(
                    f"lora_target_modules: {weight} is tied to {other}, which would not see the change; leave it out"
                )


def _first_values(
    layer: Any, name: str, init: bool | str, seed: int, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """The first values of the adapters of one layer, on the CPU, by their name in the layer.

    Args:
        layer: Left as it is; on the meta device or with its values.
        name: Its name in the model.
        init: How, as PEFT's configuration has it.
        seed: Of the run.
        weight: That of the layer itself, where it is on the meta device and the adapters begin from it (DoRA).
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    drawn = copy.deepcopy(layer)._apply(lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t.cpu())
    base = drawn.get_base_layer()
    base.requires_grad_(False)
    if weight is not None:
        base.weight.data = weight.to(base.weight.dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        if init == "orthogonal":
            drawn.orthogonal_init(ADAPTER)
        else:
            drawn.reset_lora_parameters(ADAPTER, init)
        if ADAPTER in drawn.lora_variant:  # DoRA's magnitudes are those of the weight
            drawn.lora_variant[ADAPTER].init(drawn, adapter_name=ADAPTER)
    parameters = drawn.named_parameters()
    return {own_name: value.detach() for own_name, value in parameters if not own_name.startswith(BASE_LAYER)}


class AdaptedWeights:
    """Weights of a model with adapters: what it adapts from a source that knows no adapters, these by their seed."""

    def __init__(self, base: Weights, model: nn.Module, init: bool | str, seed: int) -> None:
        """`model` is whole, on the meta device."""
        self._base, self._init, self._seed = base, init, seed
        self._layers = lora_layers(copy.deepcopy(model))
        self._drawn: tuple[str, dict[str, Tensor]] = ("", {})  # of the layer that was asked for last

    def read(self, name: str, region: Region) -> Tensor:
        """One region of a tensor."""
        place = next((place for place in self._layers if name.startswith(f"{place}.")), None)
        own_name = name if place is None else name.removeprefix(f"{place}.")
        if place is None or own_name.startswith(BASE_LAYER):
            return self._base.read(name.replace(f".{BASE_LAYER}.", "."), region)
        if self._drawn[0] != place:
            layer = self._layers[place]
            weight = self._base.read(f"{place}.weight", ()) if layer.lora_variant else None
            self._drawn = place, _first_values(layer, place, self._init, self._seed, weight)
        return self._drawn[1][own_name][region]


def check_for_packs(wrapper: Any, *, is_sharded: bool) -> None:
    """Refuse adapters that do not let the samples of a pack apart, or whose wrapper does more than run its model.

    Raises:
        ModelError: Names the method.
    """
    tuners = importlib.import_module("peft.tuners.tuners_utils")
    if not hasattr(wrapper, "get_base_model"):
        raise ModelError("the model holds adapters that add_adapter put there; give what peft.get_peft_model returns")
    for config in wrapper.peft_config.values():
        method = getattr(config.peft_type, "value", str(config.peft_type))
        runs_alone = type(wrapper.base_model).forward is tuners.BaseTuner.forward
        if not runs_alone or getattr(config, "alora_invocation_tokens", None):
            raise ModelError(
                f"adapters of the kind {method} cannot be trained on packed token data: they add tokens to each row, a "
                "term to the loss, or work by the tokens of a row; use LoRA, or give a data set of your own"
            )
        if is_sharded and getattr(config, "target_parameters", None):
            raise ModelError(
                f"adapters of parameters ({', '.join(sorted(config.target_parameters))}), such as those of experts, "
                "cannot be shared out: PEFT replaces these parameters in each forward pass, and FSDP2 loses them; "
                "train on one rank, or adapt linear layers alone"
            )


def hold(model: nn.Module, stored_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Cast the parameters of a model with adapters to the formats to train in, in place.

    What is trained is float32, as always. What is not keeps the 16 bits in which it is stored where the run computes in
    that format, and is float32 otherwise, exactly as it was.
    """
    frozen = stored_dtype if stored_dtype == compute_dtype else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALVES:
            parameter.data = parameter.data.float()
        elif not parameter.requires_grad and (parameter.dtype in HALVES or (parameter.is_meta and frozen in HALVES)):
            parameter.data = parameter.data.to(frozen)


def base_fingerprint(model: nn.Module) -> str | None:
    """A digest of all that a model with adapters does not train, on any number of ranks the same (all of them call).

    None for a model without adapters. Each element's bits are multiplied by a number of its place and added up: sums of
    shards add up to the sum of the whole.
    """
    if not is_adapted(model):
        return None
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    sums = {name: _sum_of_bits(parameter) for name, parameter in frozen.items()}
    shards = [name for name, parameter in frozen.items() if isinstance(parameter, DTensor)]
    if shards:
        whole_sums = sum_over_shards(torch.stack([sums[name] for name in shards]), like=frozen[shards[0]])
        sums |= dict(zip(shards, whole_sums, strict=True))
    digest = hashlib.sha256()
    for name, parameter in frozen.items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {int(sums[name])}\n".encode())
    return digest.hexdigest()[:32]


def _sum_of_bits(parameter: Tensor) -> Tensor:
    part, region = local_part(parameter)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    if not part.numel():
        return total
    start = region[0].start * math.prod(parameter.shape[1:]) if region else 0
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
    bits = part.contiguous().flatten().view(integers)
    for first in range(0, len(bits), CHUNK):
        piece = bits[first : first + CHUNK].long()
        places = torch.arange(start + first, start + first + len(piece), device=part.device)
        total += (piece * ((2 * places + 1) * ODD)).sum()
    return total


def adapter_tensors(wrapper: Any) -> dict[str, Tensor]:
    """What belongs to the adapters of a model, sharded as it is, under the names of the wrapper."""
    state: dict[str, Tensor] = wrapper.state_dict()
    kept: set[int] = set()
    for adapter in wrapper.peft_config:
        chosen = load_peft().get_peft_model_state_dict(wrapper, state_dict=state, adapter_name=adapter)
        kept.update(id(tensor) for tensor in chosen.values())
    return {name: tensor for name, tensor in state.items() if id(tensor) in kept}


def write_configurations(wrapper: Any, folder: Path) -> None:
    """Write how each adapter is made, where PEFT looks for it."""
    for adapter, config in wrapper.peft_config.items():
        config.save_pretrained(folder if adapter == ADAPTER else folder / adapter)


def write_adapters(wrapper: Any, tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write the adapters that are trained, whose whole tensors are given, as PEFT reads them; return the file names."""
    names = []
    for adapter in wrapper.active_adapters:
        place = Path() if adapter == ADAPTER else Path(adapter)
        chosen = load_peft().get_peft_model_state_dict(wrapper, state_dict=dict(tensors), adapter_name=adapter)
        (folder / place).mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in chosen.items()}, folder / place / ADAPTER_WEIGHTS)
        names.append((place / ADAPTER_WEIGHTS).as_posix())
    return names


def place_of_base(folder: Path) -> str | None:
    """Where the model lies that the adapters of a folder belong to; None where nobody knows."""
    name: str | None = load_peft().PeftConfig.from_pretrained(folder).base_model_name_or_path
    return name or None


def read_adapters(model: PreTrainedModel, folder: Path) -> Any:
    """Put the adapters that an export holds into a model, and return PEFT's wrapper of it.

    Raises:
        ModelError: They are not in safetensors, or belong to another model.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder} lacks {ADAPTER_WEIGHTS}; pickled weights can run code when read and are refused")
    try:
        return load_peft().PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the adapters in {folder} do not fit {type(model).__name__}: {error}") from error


def recorded_adapters(model: PreTrainedModel, folder: Path) -> Any:
    """Put adapters into a model as the configurations in a folder describe them, their values still to be filled."""
    peft = load_peft()
    wrapper = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))
    for path in sorted(folder.glob(f"*/{ADAPTER_CONFIG}")):
        wrapper.add_adapter(path.parent.name, peft.PeftConfig.from_pretrained(path.parent))
    return wrapper


def merge(wrapper: Any) -> PreTrainedModel:
    """Add the active adapters to the weights that they adapt, and return the model without adapters."""
    model = cast(PreTrainedModel, unwrapped(wrapper))
    for name, twin in dict(model.all_tied_weights_keys).items():
        pair = [model.get_submodule(each.rpartition(".")[0]) for each in (name, twin)]
        if any(hasattr(module, BASE_LAYER) or hasattr(module, "modules_to_save") for module in pair):
            # One of the two changes, the other must not.
            layer = getattr(pair[0], BASE_LAYER, pair[0])
            if "weight" in layer._parameters:
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            del model.all_tied_weights_keys[name]
            model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    merged: PreTrainedModel = wrapper.merge_and_unload()
    return merged
