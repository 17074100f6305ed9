"""A real pre-trained model on two cores: fine-tuned beside the peers, what it forgets, and a kill in between.

`python benchmarks/real_model.py --model FOLDER --output docs/images/real-model.png` takes any causal language model
and its tokenizer in Hugging Face's form, and prints the tables of docs/real-model.md. It asks what functions of
Python's standard library do; the answers are the first paragraphs of their docstrings, so no data set is needed.

- compare: the same samples in the same order by this trainer, transformers' and TRL's: losses, speed, memory.
- forget: full fine-tuning, LoRA and OSFT at several ratios and learning rates: what is learned, what is left.
- resume: the command line, killed and started again; then exported, loaded and asked.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import REPOSITORY, Measured, compare, versions
from step_contenders import pad, peak_memory_mb
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trainer.data.order import epoch_order
from trainer.labels import IGNORE_INDEX

TRAINER = [sys.executable, "-m", "trainer"]
PARTS = ["compare", "forget", "resume"]
LEARNING_RATE = 2e-5  # of the comparison
SEED = 42
NUM_HELD_OUT = 16  # questions whose answers are never trained
SHORTEST, LONGEST = 30, 160  # characters of an answer
FACTS = """The capital of France is|Paris
The capital of Japan is|Tokyo
The capital of Italy is|Rome
The capital of Egypt is|Cairo
The capital of Germany is|Berlin
The largest planet of the solar system is|Jupiter
The planet closest to the sun is|Mercury
Water is made of hydrogen and|oxygen
The opposite of hot is|cold
The opposite of black is|white
The first month of the year is|January
The day after Monday is|Tuesday
The author of Hamlet is William|Shakespeare
The theory of relativity was developed by Albert|Einstein
The language spoken in Brazil is|Portuguese
The currency of Japan is the|yen
The chemical symbol of gold is|Au
Bees make|honey
Two plus two equals|four
The Eiffel Tower is in the city of|Paris"""

Sample = dict[str, list[int]]


def questions() -> list[tuple[str, str]]:
    """What public functions of the standard library do: (question, answer), read from its sources, not imported."""
    found = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            answer = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            if SHORTEST <= len(answer) <= LONGEST:
                found[f"What does {path.stem}.{node.name} do?"] = answer
    names = sorted(found)
    return [(names[i], found[names[i]]) for i in epoch_order(len(names), SEED, 0)]


def encode(tokenizer: Any, prompt: str, answer: str) -> Sample:
    """Tokens of a prompt and its answer, of which the answer is trained."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    asked = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return {"input_ids": asked + said, "labels": [IGNORE_INDEX] * len(asked) + said}


def asked_and_answered(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[Sample]:
    return [encode(tokenizer, f"Question: {q}\nAnswer:", f" {a}{tokenizer.eos_token}") for q, a in pairs]


def known_text(tokenizer: Any, num_tokens: int = 512, length: int = 128) -> list[Sample]:
    """English that has nothing to do with the questions: this repository's licence, in pieces."""
    text = " ".join((REPOSITORY / "LICENSE").read_text(encoding="utf-8").split())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]
    return [{"input_ids": ids[i : i + length], "labels": ids[i : i + length]} for i in range(0, len(ids), length)]


def facts(tokenizer: Any) -> list[Sample]:
    return [encode(tokenizer, *(line.partition("|")[0], " " + line.partition("|")[2])) for line in FACTS.split("\n")]


class Watch(TrainerCallback):
    """Seconds of each step, data loading included."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def shared_options(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every trainer is told, under the names that they share."""
    return {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "seed": SEED,
    }


def ours(options: argparse.Namespace, folder: Path, samples: list[Sample], watch: Watch) -> Any:
    trainer = our_trainer(options, samples, shared_options(options, folder), callbacks=[watch])
    trainer.train()
    return trainer


def our_trainer(
    options: argparse.Namespace, samples: list[Sample], arguments: dict[str, Any], model: Any = None, **more: Any
) -> Any:
    from trainer import Trainer, TrainingArguments
    from trainer.data.store import TokenStore

    args = TrainingArguments(
        batch_size=options.batch_size, max_tokens_per_rank=options.tokens, export_final=False, use_cpu=True, **arguments
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) if model is None else model
    return Trainer(model, args, train_dataset=TokenStore.from_samples(map(arrays, samples)), **more)


def arrays(sample: Sample) -> tuple[list[int], list[int]]:
    return sample["input_ids"], sample["labels"]


def peers_options(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return shared_options(options, folder) | {
        "per_device_train_batch_size": options.batch_size // 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
    }


def transformers(options: argparse.Namespace, folder: Path, samples: list[Sample], watch: Watch) -> Any:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**peers_options(options, folder), bf16=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    trainer = Trainer(model, args, data_collator=pad, train_dataset=samples, callbacks=[watch])
    trainer.train()
    return trainer


def trl(options: argparse.Namespace, folder: Path, samples: list[Sample], watch: Watch) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    masks = [[int(label != IGNORE_INDEX) for label in sample["labels"]] for sample in samples]
    rows = [{"input_ids": s["input_ids"], "completion_mask": mask} for s, mask in zip(samples, masks, strict=True)]
    # Without completion_only_loss TRL leaves the mask of tokenized rows unread, and trains every token.
    args = SFTConfig(
        **peers_options(options, folder),
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        completion_only_loss=True,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[watch],
    )
    trainer.train()
    return trainer


CONTENDERS: dict[str, Callable[..., Any]] = {"ours": ours, "transformers": transformers, "trl": trl}


def contend(options: argparse.Namespace) -> Measured:
    """Train with one contender: losses, tokens a second from the second step on, peak memory."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = asked_and_answered(tokenizer, questions()[NUM_HELD_OUT:])[: options.steps * options.batch_size]
    order = epoch_order(len(samples), SEED, 0)  # ours shuffles; the others get what comes of it, in their own order
    laid_out = samples if options.contender == "ours" else [samples[i] for i in order]
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = CONTENDERS[options.contender](options, Path(folder), laid_out, watch)
    num_tokens = sum(len(samples[i]["input_ids"]) for i in order[options.batch_size :])
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens_per_second": num_tokens / (watch.times[-1] - watch.times[1]),
        "peak_memory_mb": peak_memory_mb(),
    }


def comparison(options: argparse.Namespace) -> dict[str, list[Measured]]:
    script = str(Path(__file__))
    numbers = ["--steps", str(options.steps), "--batch-size", str(options.batch_size), "--tokens", str(options.tokens)]
    commands = {n: [script, "--model", str(options.model), "--contender", n, *numbers] for n in CONTENDERS}
    results = compare(commands, options.rounds)
    print("| trainer | tokens/s, ratio to ours | peak memory, MB | largest difference of a loss from ours |")
    print("|---|---|---|---|")
    first = results["ours"]
    for name, runs in results.items():
        speed = statistics.median(
            r["tokens_per_second"] / f["tokens_per_second"] for r, f in zip(runs, first, strict=True)
        )
        memory = statistics.median(r["peak_memory_mb"] for r in runs)
        apart = np.abs(np.subtract(runs[0]["losses"], first[0]["losses"])).max()
        print(f"| {name} | {speed:.2f} | {memory:,.0f} | {apart:.1e} |")
    print(f"\nlosses of ours: {', '.join(f'{loss:.3f}' for loss in first[0]['losses'])}\n", flush=True)
    return results


METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA, rank 16": {"lora_rank": 16},
    "OSFT 0.75": {"osft": True, "osft_unfreeze_rank_ratio": 0.75},
    "OSFT 0.5": {"osft": True, "osft_unfreeze_rank_ratio": 0.5},
    "OSFT 0.25": {"osft": True, "osft_unfreeze_rank_ratio": 0.25},
}
LORA_FACTOR = 10  # LoRA is given that many times the learning rate, as is usual


def forgetting(options: argparse.Namespace) -> list[Measured]:
    """Learn the questions in each way at each learning rate; measure them, known text and known facts, held out."""
    from trainer.data.store import TokenStore

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pairs = questions()
    samples = asked_and_answered(tokenizer, pairs[NUM_HELD_OUT:])[: options.steps * options.batch_size]
    held_out = {
        "questions": asked_and_answered(tokenizer, pairs[:NUM_HELD_OUT]),
        "text": known_text(tokenizer),
        "facts": facts(tokenizer),
    }
    sets = {name: TokenStore.from_samples(map(arrays, each)) for name, each in held_out.items()}
    found = []
    print("| method | learning rate | loss of questions | of known text | of known facts |\n|---|---|---|---|---|")
    for method, extra in METHODS.items():
        for rate in options.rates:
            learning_rate = rate * LORA_FACTOR if "lora_rank" in extra else rate
            with tempfile.TemporaryDirectory() as folder:
                arguments = shared_options(options, Path(folder)) | {"learning_rate": learning_rate} | extra
                trainer = our_trainer(options, samples, arguments, eval_dataset=sets)
                if not found:
                    found.append(losses("before", 0.0, trainer.evaluate()))
                trainer.train()
                found.append(losses(method, learning_rate, trainer.evaluate()))
    return found


def losses(method: str, learning_rate: float, metrics: dict[str, float]) -> Measured:
    row = {name: metrics[f"eval_{name}_loss"] for name in ("questions", "text", "facts")}
    print(
        f"| {method} | {learning_rate:g} | {row['questions']:.3f} | {row['text']:.3f} | {row['facts']:.3f} |",
        flush=True,
    )
    return {"method": method, "learning_rate": learning_rate, **row}


def plot(results: dict[str, list[Measured]], found: list[Measured], path: Path) -> None:
    """Left: losses of the comparison. Then: what is lost of known text and facts against what is learned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, *others = figure.subplots(1, 3)
    for (name, runs), style in zip(results.items(), ("-", "--", ":"), strict=True):
        left.plot(range(1, len(runs[0]["losses"]) + 1), runs[0]["losses"], style, linewidth=2, label=name)
    left.set(xlabel="step", ylabel="training loss", title="The same samples, three trainers")
    before = found[0]
    for axes, known in zip(others, ("text", "facts"), strict=True):
        for method in METHODS:
            rows = [row for row in found if row["method"] == method]
            learned = [before["questions"] - row["questions"] for row in rows]
            axes.plot(learned, [row[known] - before[known] for row in rows], "o-", label=method)
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(xlabel="learned: fall of the questions' loss", ylabel="forgotten: rise of the loss")
        axes.set_title(f"Known {known}, two learning rates")
    for axes in (left, *others):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def resume(options: argparse.Namespace, folder: Path) -> None:
    """Train by the command line, once whole and once killed after its first checkpoint; export, load, ask."""
    data, pairs = folder / "questions.jsonl", questions()
    rows = [{"prompt": f"Question: {q}\nAnswer:", "completion": f" {a}"} for q, a in pairs[: 4 * options.batch_size]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = f"--max-steps 4 --save-steps 2 --batch-size {options.batch_size} --max-tokens-per-rank {options.tokens}"
    train = [*TRAINER, "train", "--model-name-or-path", str(options.model), "--data-path", str(data), *words.split()]
    train += ["--learning-rate", str(LEARNING_RATE), "--resume-from-checkpoint", "auto", "--use-cpu"]
    whole, killed = folder / "whole", folder / "killed"
    started = time.perf_counter()
    run_command([*train, "--output-dir", str(whole)])
    seconds = time.perf_counter() - started
    with subprocess.Popen([*train, "--output-dir", str(killed)], cwd=REPOSITORY, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(killed.glob("checkpoints/step_*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    run_command([*train, "--output-dir", str(killed)])
    verdict = "equal" if digest(whole) == digest(killed) else "NOT equal"
    print(f"killed and resumed: the exported weights are {verdict} bit for bit")
    print(f"one run of 4 steps with 2 checkpoints took {seconds:.0f} s from launch to end")
    prompt = ["--prompt", f"Question: {pairs[0][0]}\nAnswer:", "--max-new-tokens", "24"]
    print(run_command([*TRAINER, "generate", str(whole), *prompt]))


def digest(run: Path) -> str:
    (weights,) = run.glob("hf_format/*/model.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def run_command(command: list[str]) -> str:
    return subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model and its tokenizer")
    parser.add_argument(
        "--parts", nargs="+", choices=["compare", "forget", "resume"], default=["compare", "forget", "resume"]
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of one micro-batch of ours")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-5, 1e-4])
    parser.add_argument("--output", type=Path, help="picture of the comparison and of what is forgotten")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender is not None:
        print(json.dumps(contend(options)))
        return
    print(f"{options.model.name}; {versions('trl', 'peft')}\n", flush=True)
    started = time.perf_counter()
    results = comparison(options) if "compare" in options.parts else {}
    found = forgetting(options) if "forget" in options.parts else []
    if options.output is not None and results and found:
        plot(results, found, options.output)
    if "resume" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            resume(options, Path(folder))
    print(f"all of this took {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
