"""What is left of task A after task B is learned: full fine-tuning, OSFT and LoRA, over learning rates and seeds.

`python benchmarks/osft_forgetting.py` prints the table of all runs and the front: for each method, the most that is
kept of A among the learning rates that learn B. `--plot front.png` draws it; LoRA needs `pip install peft`. A method
that wins at one learning rate only has proved little: read the front.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tests.fixtures.forgetting import Task, draw_tasks, learn, learner, split_copy
from trainer.model.osft.layers import Osft

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 16
GOAL = 0.95  # of B; A is learned until it is reached as well

Adapted = tuple[nn.Module, Osft | None]


@dataclass(frozen=True)
class Outcome:
    method: str
    learning_rate: float
    retained: float  # accuracy on A
    accuracy: float  # on B
    num_steps: int | None  # until B reached the goal


def full(model: nn.Module) -> Adapted:
    return copy.deepcopy(model), None


def lora(model: nn.Module) -> Adapted:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LINEAR)
    return get_peft_model(copy.deepcopy(model), config), None


METHODS: dict[str, Callable[[nn.Module], Adapted]] = {
    "full": full,
    "OSFT 0.5": lambda model: split_copy(model, 0.5),
    "OSFT 0.25": lambda model: split_copy(model, 0.25),
    "OSFT 0.25, rest trained": lambda model: split_copy(model, 0.25, osft_train_patterns=["."]),
    "LoRA": lora,
}


def run(model: nn.Module, tasks: tuple[Task, Task], method: str, learning_rate: float, num_steps: int) -> Outcome:
    torch.manual_seed(0)
    adapted, osft = METHODS[method](model)
    reached = learn(adapted, tasks[1], learning_rate, num_steps, osft, GOAL)
    return Outcome(method, learning_rate, tasks[0].accuracy(adapted), tasks[1].accuracy(adapted), reached)


def sweep(options: argparse.Namespace) -> list[Outcome]:
    outcomes = []
    for seed in range(options.seeds):
        tasks = draw_tasks(seed, (options.facts, options.facts * 3 // 4), options.vocabulary)
        model = learner(seed, options.hidden, options.vocabulary)
        learn(model, tasks[0], 3e-3, options.steps)
        before = tasks[0].accuracy(model)
        print(f"seed {seed}: A learned to {before:.3f}", flush=True)
        assert before >= GOAL
        for method in options.methods:
            for learning_rate in options.rates:
                outcomes.append(run(model, tasks, method, learning_rate, options.steps))
                print(f"  {row([outcomes[-1]])}", flush=True)
    return outcomes


def row(outcomes: list[Outcome]) -> str:
    """One line of the table: means over seeds, and the range of what is retained."""
    retained = [outcome.retained for outcome in outcomes]
    accuracy = statistics.mean(outcome.accuracy for outcome in outcomes)
    steps = mean_steps(outcomes)
    needed = "never" if steps is None else f"{steps:.0f}"
    kept = f"{statistics.mean(retained):.3f} ({min(retained):.2f} to {max(retained):.2f})"
    return f"| {outcomes[0].method} | {outcomes[0].learning_rate:g} | {kept} | {accuracy:.3f} | {needed} |"


def groups(outcomes: list[Outcome]) -> dict[tuple[str, float], list[Outcome]]:
    found: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.method, outcome.learning_rate), []).append(outcome)
    return found


def front(outcomes: list[Outcome]) -> list[str]:
    """For each method the learning rate that keeps most of A among those that learn B with every seed."""
    best: dict[str, list[Outcome]] = {}
    for (method, _), runs in groups(outcomes).items():
        if any(o.accuracy < GOAL for o in runs):
            continue
        if method not in best or mean_retained(runs) > mean_retained(best[method]):
            best[method] = runs
    return [row(runs) for runs in sorted(best.values(), key=mean_retained, reverse=True)]


def mean_steps(outcomes: list[Outcome]) -> float | None:
    """Steps until B was learned; None if some seed never learned it."""
    steps = [outcome.num_steps for outcome in outcomes if outcome.num_steps is not None]
    return statistics.mean(steps) if len(steps) == len(outcomes) else None


def mean_retained(outcomes: list[Outcome]) -> float:
    return statistics.mean(outcome.retained for outcome in outcomes)


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Draw what is left of A against the learning rate, hollow where B was not learned, and against the steps of B."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    by_rate, by_steps = figure.subplots(1, 2, sharey=True)
    for method, marker in zip(dict.fromkeys(outcome.method for outcome in outcomes), "osD^v", strict=False):
        runs = {rate: runs for (name, rate), runs in groups(outcomes).items() if name == method}
        (line,) = by_rate.plot(list(runs), [mean_retained(each) for each in runs.values()], "-", label=method)
        learned = []
        for rate, each in runs.items():
            steps, retained = mean_steps(each), mean_retained(each)
            inside = "white" if steps is None else line.get_color()
            by_rate.plot(rate, retained, marker, color=line.get_color(), markerfacecolor=inside)
            if steps is not None:
                learned.append((steps, retained))
        by_steps.plot(*zip(*sorted(learned), strict=True), f"{marker}-", alpha=0.8)
    by_rate.set(xlabel=f"learning rate (hollow: B did not reach {GOAL})", ylabel="accuracy left on A", xscale="log")
    by_steps.set(xlabel=f"steps until B reached {GOAL}", xscale="log", xticks=[10, 20, 50, 100, 200])
    by_steps.xaxis.set_major_formatter("{x:g}")
    by_steps.xaxis.set_minor_formatter("")
    by_rate.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--facts", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=64)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    outcomes = sweep(options)
    heading = "| method | learning rate | A retained (range) | B | steps to B |\n|---|---|---|---|---|"
    print(f"\nall runs\n\n{heading}", *map(row, groups(outcomes).values()), sep="\n")
    print(f"\nthe front: B learned to {GOAL} with every seed\n\n{heading}", *front(outcomes), sep="\n")
    if options.plot:
        plot(outcomes, options.plot)


if __name__ == "__main__":
    main()
