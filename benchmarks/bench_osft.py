"""What OSFT costs and what it leaks: this project, mini_trainer's projection functions, PEFT's OSF, plain training.

`python benchmarks/bench_osft.py cost` compares steps in one run, system after system in turn, so that other work on the
machine hits all of them alike: read the ratios. `python benchmarks/bench_osft.py leak --plot leak.png` trains 500 steps
and measures how much of the change of the worst matrix lies in its protected singular directions, by numpy in float64.
PEFT needs `pip install peft`; `--mini-trainer FOLDER` names the folder that holds its package, unpacked.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.fixtures.forgetting import split_copy
from tests.fixtures.models import build_model, build_pack
from tests.fixtures.oracles import protected_share
from trainer.config.groups import ModelArguments
from trainer.model.build import prepare_model
from trainer.model.loss import token_loss_sum
from trainer.model.osft.layers import find_targets, num_free_directions

BETWEEN_LOOKS = 50  # steps


def nothing() -> None:
    pass


@dataclass
class System:
    """A model in training: what is called before clipping and after the optimizer's step, and how it came to be."""

    name: str
    model: Any
    before_clip: Callable[[], object] = nothing
    after_step: Callable[[], object] = nothing
    start_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.prepared = prepare_model(self.model, ModelArguments(), is_packed=True, is_record=True)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
        held = sum(tensor.numel() for tensor in (*self.model.parameters(), *self.model.buffers()))
        self.num_values = held + 3 * sum(parameter.numel() for parameter in trained)

    def step(self, pack: dict[str, Any]) -> None:
        (token_loss_sum(self.prepared, pack) / pack["num_loss_counted_tokens"]).backward()
        self.before_clip()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()


class FactoredLinear(nn.Module):
    """A matrix as mini_trainer holds it: high and low singular triples, both factors of the low ones trained."""

    def __init__(self, factors: dict[str, Any], bias: Tensor | None) -> None:
        super().__init__()
        self.bias, self.rank_high = bias, factors["rank_high"]
        for name in ("U", "S", "V"):
            self.register_parameter(f"{name}_high", nn.Parameter(factors[f"{name}_high"], requires_grad=False))
            self.register_parameter(f"{name}_low", factors[f"{name}_low"])

    @property
    def factors(self) -> dict[str, Any]:
        parts = [f"{name}_{part}" for name in "USV" for part in ("high", "low")]
        return {part: getattr(self, part) for part in parts} | {"rank_high": self.rank_high}

    def forward(self, inputs: Tensor) -> Tensor:
        high = ((inputs @ self.V_high.T) * self.S_high) @ self.U_high.T
        outputs = high + ((inputs @ self.V_low.T) * self.S_low) @ self.U_low.T
        return outputs if self.bias is None else outputs + self.bias


def ours(model: nn.Module, ratio: float, _: str) -> System:
    split, osft = split_copy(model, ratio)
    return System("ours", split, osft.project_gradients, lambda: (osft.project_updates(), osft.report()))


def mini_trainer(model: nn.Module, ratio: float, folder: str) -> System:
    sys.path.insert(0, folder)
    # Their package imports numba and more when it is named; the one module needs none of it.
    package = types.ModuleType("mini_trainer")
    package.__path__ = [str(Path(folder, "mini_trainer"))]
    sys.modules["mini_trainer"] = package
    theirs = importlib.import_module("mini_trainer.osft_utils")
    factored: Any = copy.deepcopy(model).requires_grad_(False)
    layers = []
    for name in find_targets(factored, []):
        layer = factored.get_submodule(name)
        rank = min(layer.weight.shape)
        factors = theirs.create_svd_dict(layer.weight.detach(), rank - num_free_directions(rank, ratio))
        layers.append(FactoredLinear(factors, layer.bias))
        factored.set_submodule(name, layers[-1])

    def project_gradients() -> None:
        for layer in layers:
            theirs.project_gradient_to_orthogonal_space(layer.factors)

    @torch.no_grad()
    def project_parameters() -> None:
        for layer in layers:
            theirs.project_parameter_to_orthogonal_space(layer.factors)

    return System("mini_trainer", factored, project_gradients, project_parameters)


def peft(model: nn.Module, ratio: float, _: str) -> System:
    from peft import OSFConfig, get_peft_model

    targets = sorted({name.rpartition(".")[2] for name in find_targets(model, [])})
    config = OSFConfig(target_modules=targets, effective_rank=1 - ratio)
    return System("PEFT", get_peft_model(copy.deepcopy(model), config).base_model.model)


def build(options: argparse.Namespace, hidden: int) -> list[System]:
    """Every system on a copy of one model; matrices have singular values that are well apart."""
    model = build_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        head_dim=hidden // 8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=options.tokens,
    )
    for name in find_targets(model, []):
        spread_singular_values(model.get_submodule(name).weight)
    makers = [ours, *([mini_trainer] if options.mini_trainer else []), *([peft] if options.peft else [])]
    systems = [System("plain", copy.deepcopy(model))]
    for make in makers:
        started = time.perf_counter()
        systems.append(make(model, options.ratio, options.mini_trainer))
        systems[-1].start_seconds = time.perf_counter() - started
    return systems


@torch.no_grad()
def spread_singular_values(weight: Tensor) -> None:
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    values = torch.linspace(2, 0.1, len(right), dtype=torch.float64)
    weight.copy_(left * values @ right)


def compare_cost(options: argparse.Namespace) -> None:
    print("Operations, step and values held are relative to plain.\n")
    print("| hidden | system | operations | step, best | step, median | start s | values held | logits moved |")
    print("|---|---|---|---|---|---|---|---|")
    for hidden in options.hidden:
        systems = build(options, hidden)
        pack = build_pack([options.tokens // 4] * 4)
        logits = [logits_of(system.model) for system in systems]
        operations = [count_operations(system, pack) for system in systems]
        seconds: list[list[float]] = [[] for _ in systems]
        for _ in range(options.rounds):
            for system, times in zip(systems, seconds, strict=True):
                started = time.perf_counter()
                system.step(pack)
                times.append(time.perf_counter() - started)
        for system, times, own_logits, count in zip(systems, seconds, logits, operations, strict=True):
            best, median = min(times) / min(seconds[0]), statistics.median(times) / statistics.median(seconds[0])
            held = system.num_values / systems[0].num_values
            moved = (own_logits - logits[0]).abs().max().item()
            ratios = (count / operations[0], best, median)
            columns = [
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{system.start_seconds:.1f}",
                f"{held:.2f}",
                f"{moved:.1e}",
            ]
            print(f"| {hidden} | {system.name} |", " | ".join(columns), "|", flush=True)


def count_operations(system: System, pack: dict[str, Any]) -> int:
    """Of the matrix products of one step, which also warms up: unlike seconds the same on every machine."""
    with FlopCounterMode(display=False) as counter:
        system.step(pack)
    total: int = counter.get_total_flops()
    return total


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=build_pack([16])["input_ids"], use_cache=False).logits
    return logits


def compare_leak(options: argparse.Namespace) -> None:
    plain, *systems = build(options, options.hidden[0])
    before = {name: plain.model.get_submodule(name).weight.detach().double() for name in find_targets(plain.model, [])}
    curves: dict[str, list[float]] = {system.name: [] for system in (plain, *systems)}
    looks = list(range(BETWEEN_LOOKS, options.steps + 1, BETWEEN_LOOKS))
    for step in range(1, options.steps + 1):
        pack = build_pack([12, 9], seed=step)
        for system in (plain, *systems):
            system.step(pack)
            if step in looks:
                curves[system.name].append(largest_leak(system.model, before, options.ratio))
    print("| step |", " | ".join(curves), "|")
    print("|---" * (1 + len(curves)) + "|")
    for index, step in enumerate(looks):
        print(f"| {step} |", " | ".join(f"{curve[index]:.1e}" for curve in curves.values()), "|")
    if options.plot:
        plot(looks, curves, options.plot)


def largest_leak(model: nn.Module, before: dict[str, Tensor], ratio: float) -> float:
    shares = []
    for name, weight in before.items():
        change = effective_weight(model.get_submodule(name), weight.shape[1]) - weight
        shares.append(protected_share(change, weight, num_free_directions(min(weight.shape), ratio)))
    return max(shares)


@torch.no_grad()
def effective_weight(layer: nn.Module, num_inputs: int) -> Tensor:
    """The matrix (N, M) that a layer of any system multiplies by, in float64: what it makes of unit vectors."""
    exact: Any = copy.deepcopy(layer).double()
    outputs: Tensor = exact(torch.eye(num_inputs, dtype=torch.float64))
    return (outputs - exact(torch.zeros(1, num_inputs, dtype=torch.float64))).T


def plot(steps: list[int], curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.semilogy(steps, curve, "o-", label=name)
    axes.set(xlabel="steps of AdamW", ylabel="share of the change in protected directions")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cost", "leak"])
    parser.add_argument("--hidden", type=int, nargs="+", default=None, help="512 and 1024 for cost, 64 for leak")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--mini-trainer", metavar="FOLDER")
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.what == "cost":
        options.hidden = options.hidden or [512, 1024]
        compare_cost(options)
    else:
        options.hidden = options.hidden or [64]
        compare_leak(options)


if __name__ == "__main__":
    main()
