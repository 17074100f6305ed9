"""Muon for the hidden matrices, AdamW for everything else, as one optimizer.

Muon is for matrices between hidden states; embeddings, head, norms, biases and experts stacked in one tensor go to
AdamW. Its updates are scaled to the size of AdamW's, so one learning rate and one decay serve both.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from trainer.optim.adapters import Revived

Groups = list[dict[str, Any]]
MUON_OPTIONS = {"momentum": 0.95, "nesterov": True, "ns_steps": 5}


class MuonWithAdamw(Revived):
    """torch.optim.Muon over the groups marked `is_hidden_matrix`, torch.optim.AdamW over the others.

    The groups and the state are those of the two; `part.param_groups` holds the same dictionaries as `param_groups`.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float], eps: float, **muon: Any) -> None:
        super().__init__(groups, {"lr": lr, "is_hidden_matrix": False})
        self._parts: list[tuple[bool, Optimizer]] = []
        if self._groups_of(True):
            options = {**MUON_OPTIONS, **muon, "adjust_lr_fn": "match_rms_adamw"}
            self._parts.append((True, torch.optim.Muon(self._groups_of(True), lr=lr, **options)))
        if self._groups_of(False):
            self._parts.append((False, torch.optim.AdamW(self._groups_of(False), lr=lr, betas=betas, eps=eps)))
        self.param_groups = [group for _, part in self._parts for group in part.param_groups]
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both."""
        assert closure is None
        for _, part in self._parts:
            part.step()

    def revive(self) -> None:
        """Hand the loaded groups and state to both optimizers."""
        self._share()

    def _groups_of(self, is_hidden_matrix: bool) -> Groups:
        return [group for group in self.param_groups if group["is_hidden_matrix"] == is_hidden_matrix]

    def _share(self) -> None:
        self.state = defaultdict(dict, self.state)
        for is_hidden_matrix, part in self._parts:
            part.param_groups, part.state = self._groups_of(is_hidden_matrix), self.state


def mark_hidden_matrices(model: nn.Module, groups: Groups) -> Groups:
    """Split every group into hidden matrices, marked so, and the rest."""
    hidden = hidden_matrices(model)
    split = [
        {**group, "params": [p for p in group["params"] if (p in hidden) == is_hidden], "is_hidden_matrix": is_hidden}
        for is_hidden in (True, False)
        for group in groups
    ]
    return [group for group in split if group["params"]]


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of two dimensions that are neither embedding nor head."""
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if isinstance(model, PreTrainedModel):
        ends += [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    outer = {parameter for end in ends for parameter in end.parameters()}
    return {parameter for parameter in model.parameters() if parameter.ndim == 2 and parameter not in outer}
