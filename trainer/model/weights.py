"""Where weights come from: safetensors files, or a seed. Both answer for any region of any tensor by its name.

Knows nothing of ranks: a rank asks for its own regions. Invariant: a file source covers every tensor of the model and
the model uses every tensor of the files, else it is an error that names them; a seed gives the same weights whatever
is asked, in whatever order. No pickle is ever read.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from trainer.errors import ModelError
from trainer.model.fsdp import Region, decoder_blocks

NUM_NAMES_SHOWN = 8
# Buffers that old checkpoints hold and today's models compute.
COMPUTED_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")


class Weights(Protocol):
    """A source of tensors by name."""

    def read(self, name: str, region: Region) -> Tensor:
        """One region of a tensor, in the format in which it is stored."""
        ...


@dataclass
class _Recipe:
    """How one group of the model's tensors is made from tensors of the files."""

    targets: list[str]
    sources: list[tuple[str, str]] = field(default_factory=list)  # (key in the files, converter's pattern)
    converter: WeightConverter | None = None


class FileWeights:
    """Safetensors files of a checkpoint, read region by region; converted where the model's names or layout differ."""

    def __init__(self, model: PreTrainedModel, files: Sequence[Path]) -> None:
        """Match the files' tensors with the model's; `model` is whole (not sharded), on any device.

        Raises:
            ModelError: Tensors are missing, unexpected, or of another shape.
        """
        self._model = model
        self._files = {key: path for path in files for key in _keys(path)}
        self._open: dict[Path, Any] = {}
        self._expected = model.state_dict()
        self._tied = dict(model.all_tied_weights_keys)
        self._growing = _vocabulary_names(model)
        self._means: dict[str, Tensor] = {}
        self._recipes = self._match()
        self._converted: tuple[str, dict[str, Tensor]] = ("", {})
        self._check_tied()

    def read(self, name: str, region: Region) -> Tensor:
        """One region of a tensor; rows beyond the stored vocabulary are the mean of the stored rows."""
        stored = self._stored_shape(name)
        if not region:
            return self._whole(name)
        if name not in self._growing or region[0].stop <= stored[0]:
            return self._region(name, region)
        known = slice(region[0].start, max(region[0].start, stored[0]))
        num_new = region[0].stop - known.stop
        new = self._mean(name)[(None, *region[1:])].expand(num_new, *(part.stop - part.start for part in region[1:]))
        if known.stop == known.start:
            return new
        return torch.cat([self._region(name, (known, *region[1:])), new])

    def _match(self) -> dict[str, _Recipe]:
        conversions = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        recipes: dict[str, _Recipe] = {}
        for key in sorted(self._files, key=dot_natural_key):
            prefix = self._model.base_model_prefix
            target, pattern = rename_source_key(key, renamings, converters, prefix, self._expected)
            if target not in self._expected and key in self._expected:
                target, pattern = key, None
            recipe = recipes.setdefault(target, _Recipe([target]))
            recipe.sources.append((key, pattern or key))
            if pattern is not None:
                recipe.converter = by_pattern[pattern]
        for target, recipe in list(recipes.items()):
            if recipe.converter is not None:
                shapes = self._convert(target, recipe, is_dry=True)
                recipe.targets = list(shapes)
        by_target = {target: recipe for recipe in recipes.values() for target in recipe.targets}
        self._check_names(by_target)
        return by_target

    def _check_names(self, recipes: dict[str, _Recipe]) -> None:
        missing = [name for name in self._expected if name not in recipes and not self._may_be_missing(name, recipes)]
        unexpected = [name for name in recipes if name not in self._expected and not self._may_be_unexpected(name)]
        for names, fault, remedy in (
            (missing, "lacks", "the files are incomplete or belong to another model; check config.json"),
            (unexpected, "has unknown", "the files belong to another model; check config.json"),
        ):
            if names:
                raise ModelError(
                    f"checkpoint {self._place()} {fault} {len(names)} tensors of {type(self._model).__name__}: "
                    f"{_shown(names)}; {remedy}"
                )

    def _may_be_missing(self, name: str, recipes: Mapping[str, _Recipe]) -> bool:
        twins = {self._tied.get(name)} | {target for target, source in self._tied.items() if source == name}
        twins |= {target for target, source in self._tied.items() if source == self._tied.get(name)}
        return bool(twins & set(recipes)) or _matches(self._model._keys_to_ignore_on_load_missing, name)

    def _may_be_unexpected(self, name: str) -> bool:
        patterns = [*(self._model._keys_to_ignore_on_load_unexpected or ()), *COMPUTED_BUFFERS]
        return _matches(patterns, name)

    def _check_tied(self) -> None:
        for target, source in self._tied.items():
            if target not in self._recipes or source not in self._recipes:
                continue
            if not torch.equal(self._whole(target), self._whole(source)):
                raise ModelError(
                    f"checkpoint {self._place()}: {target} and {source} differ although config.json ties them; "
                    "set tie_word_embeddings to false there"
                )

    def _name_in_files(self, name: str) -> str:
        if name in self._recipes:
            return name
        source = self._tied.get(name, name)
        twins = [source, *(target for target, other in self._tied.items() if other == source)]
        return next((twin for twin in twins if twin in self._recipes), name)

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        name = self._name_in_files(name)
        recipe, expected = self._recipes[name], tuple(self._expected[name].shape)
        if recipe.converter is not None:
            return expected
        stored = tuple(self._slice(recipe.sources[0][0]).get_shape())
        if stored != expected and not (name in self._growing and stored[1:] == expected[1:] and stored < expected):
            raise ModelError(
                f"checkpoint {self._place()}: {name} has shape {stored}, the model expects {expected}; "
                "the files and config.json do not belong together"
            )
        return stored

    def _region(self, name: str, region: Region) -> Tensor:
        name = self._name_in_files(name)
        recipe = self._recipes[name]
        if recipe.converter is not None:
            return self._whole(name)[region]
        region_of_file: Tensor = self._slice(recipe.sources[0][0])[region]
        return region_of_file

    def _whole(self, name: str) -> Tensor:
        name = self._name_in_files(name)
        recipe = self._recipes[name]
        if recipe.converter is None:
            return self._tensor(recipe.sources[0][0])
        first = recipe.targets[0]
        if self._converted[0] != first:
            self._converted = (first, self._convert(first, recipe, is_dry=False))
        return self._converted[1][name]

    def _mean(self, name: str) -> Tensor:
        if name not in self._means:
            self._means[name] = self._whole(name).float().mean(dim=0)
        return self._means[name]

    def _convert(self, target: str, recipe: _Recipe, *, is_dry: bool) -> dict[str, Tensor]:
        """Run transformers' conversion of one group; dry on meta tensors, for the names and shapes alone."""
        converter = copy.deepcopy(recipe.converter)
        assert converter is not None
        for key, pattern in recipe.sources:
            tensor = torch.empty(self._slice(key).get_shape(), device="meta") if is_dry else self._tensor(key)
            converter.add_tensor(target, key, pattern, tensor)
        result = converter.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}

    def _slice(self, key: str) -> Any:
        return self._file(key).get_slice(key)

    def _tensor(self, key: str) -> Tensor:
        tensor: Tensor = self._file(key).get_tensor(key)
        return tensor

    def _file(self, key: str) -> Any:
        path = self._files[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def _place(self) -> str:
        return str(next(iter(self._files.values())).parent) if self._files else "(no files)"


class SeededWeights:
    """Random weights as the model's own class draws them, block by block, each block from its own seed."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        """`model` is whole, on the meta device; this object uses it up."""
        self._model, self._seed = model, seed
        self._units = [*decoder_blocks(model)]
        self._filled = ("", {})  # type: tuple[str, dict[str, Tensor]]

    def read(self, name: str, region: Region) -> Tensor:
        """One region of a tensor."""
        unit = next((unit for unit in self._units if name.startswith(f"{unit}.")), name.rpartition(".")[0])
        if self._filled[0] != unit:
            self._filled = (unit, self._fill(unit))
        return self._filled[1][name][region]

    def _fill(self, unit: str) -> dict[str, Tensor]:
        digest = hashlib.sha256(f"{self._seed}:{unit}".encode()).digest()
        part = self._model.get_submodule(unit)
        filled = copy.deepcopy(part)._apply(lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            owner = self._model  # the innermost transformers model around the module: its rules draw the weights
            for name, module in self._model.named_modules():
                if isinstance(module, PreTrainedModel) and unit.startswith(f"{name}."):
                    owner = module
            _initialise(filled, owner)
        return {f"{unit}.{name}".lstrip("."): tensor for name, tensor in filled.state_dict().items()}


def _initialise(module: nn.Module, owner: PreTrainedModel) -> None:
    for child in module.children():
        _initialise(child, owner)
    owner._init_weights(module)


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except Exception as error:  # noqa: BLE001  safetensors raises a class of its own that it does not export everywhere
        raise ModelError(f"{path} is not a readable safetensors file ({error}); fetch or export it again") from error


def _vocabulary_names(model: PreTrainedModel) -> set[str]:
    """Names of the tensors whose first dimension is the vocabulary."""
    parts = [model.get_input_embeddings()]
    with contextlib.suppress(AttributeError, NotImplementedError):
        parts.append(model.get_output_embeddings())
    owned = {id(parameter) for part in parts if part is not None for parameter in part.parameters(recurse=False)}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in owned}


def _matches(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMES_SHOWN} more" if len(names) > NUM_NAMES_SHOWN else ""
    return ", ".join(names[:NUM_NAMES_SHOWN]) + more
