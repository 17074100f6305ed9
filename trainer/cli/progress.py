"""What a run shows while it runs: a bar with loss, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.trainer_callback import TrainerCallback, TrainerControl

from trainer.cli.stores import SECONDS_BEFORE_SHOWING, SECONDS_BETWEEN_LINES
from trainer.config.arguments import TrainingArguments
from trainer.errors import OutputError
from trainer.training.callbacks import RunState
from trainer.training.generate import Answer
from trainer.training.metrics import StepReport
from trainer.training.trainer import CoreTrainer

console = Console()
_SHOWN_EVALUATION = ("loss", "exact_match")
_LONGEST_CELL = 60  # characters
STEPS_BEFORE_PROFILE, PROFILE = 2, "profile"


class ProgressDisplay(TrainerCallback):
    """Shows the steps of the main rank."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._next_line = SECONDS_BEFORE_SHOWING  # seconds after the start of what takes long

    def on_decompose(self, args: TrainingArguments, state: RunState, done: int, total: int, seconds: float) -> None:
        """Say how far the decomposition of the split matrices is, and how long it will take, now and then."""
        if done < total:
            self._say_share("decomposing", state, done / total, seconds)
        elif state.is_world_process_zero:
            console.print(f"decomposed the matrices in {seconds:.1f} s", soft_wrap=True)

    def on_write(self, args: TrainingArguments, state: RunState, done: int, total: int, seconds: float) -> None:
        """Say how far a checkpoint that takes long is written."""
        if 0 < done < total:
            self._say_share(f"saving step {state.saved_step}", state, done / total, seconds)

    def _say_share(self, what: str, state: RunState, share: float, seconds: float) -> None:
        if seconds < SECONDS_BEFORE_SHOWING:
            self._next_line = SECONDS_BEFORE_SHOWING
        elif seconds >= self._next_line and state.is_world_process_zero:
            console.print(f"{what}: {share:.0%}, about {seconds / share * (1 - share):.0f} s left", soft_wrap=True)
            self._next_line = seconds + SECONDS_BETWEEN_LINES

    def on_train_begin(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Open the bar when there is a terminal to draw it on."""
        if state.is_world_process_zero and console.is_terminal and not args.disable_tqdm:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[news]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            total = state.max_steps if state.max_steps > 0 else None
            self._task = self._bar.add_task("training", total=total, completed=state.global_step, news="")
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: RunState, control: TrainerControl, report: StepReport, **_: Any
    ) -> None:
        """Move the bar, or write a line when one is due."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, news=_news(report))
        elif state.is_world_process_zero and (report.step == 1 or report.step % state.logging_steps == 0):
            console.print(
                f"step {report.step}/{_end(state)}  epoch {report.epoch:.2f}  {_news(report)}{_left(report)}",
                soft_wrap=True,
            )

    def on_evaluate(
        self, args: TrainingArguments, state: RunState, control: TrainerControl, metrics: Mapping[str, float], **_: Any
    ) -> None:
        """Write the evaluation's line."""
        if state.is_world_process_zero:
            shown = [(name, metrics[f"eval_{name}"]) for name in _SHOWN_EVALUATION if f"eval_{name}" in metrics]
            text = "  ".join(f"{name} {value:.4f}" for name, value in shown)
            console.print(f"evaluation after step {state.global_step}: {text}", soft_wrap=True)

    def on_save(
        self, args: TrainingArguments, state: RunState, control: TrainerControl, checkpoint: Path, **_: Any
    ) -> None:
        """Write where a checkpoint lies."""
        if state.is_world_process_zero:
            console.print(f"saved {checkpoint}", soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ProfileSteps(TrainerCallback):
    """Profiles some steps of the main rank: a trace that Perfetto opens, and a table of the dearest operations."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._profiler: Any = None
        self._first = 0

    def on_train_begin(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Choose the steps: the first ones of a run are slower than the rest."""
        self._first = state.global_step + STEPS_BEFORE_PROFILE

    def on_step_begin(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Start before the first of them."""
        if state.is_world_process_zero and state.global_step == self._first:
            self._profiler = torch.profiler.profile(profile_memory=True, acc_events=True)
            self._profiler.start()

    def on_step_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Write after the last of them."""
        if self._profiler is not None and state.global_step >= self._first + self.num_steps:
            self._write(args)

    def on_train_end(self, args: TrainingArguments, state: RunState, control: TrainerControl, **_: Any) -> None:
        """Write what there is of a run that ended earlier."""
        if self._profiler is not None:
            self._write(args)
        elif state.is_world_process_zero and state.global_step <= self._first:
            console.print(f"nothing was profiled: the run ended before step {self._first + 1}", soft_wrap=True)

    def _write(self, args: TrainingArguments) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = Path(args.output_dir, PROFILE)
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / "trace.json"))
            (folder / "operations.txt").write_text(table, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error}") from error
        print(table)
        console.print(f"profile: {folder / 'trace.json'}; open it at https://ui.perfetto.dev", soft_wrap=True)


def show_answers(answers: Mapping[int, list[Answer]], count: int) -> None:
    """Show what the model answered at the first and at the last evaluation."""
    if not count or len(answers) < 2:
        return
    before, after = answers[min(answers)], answers[max(answers)]
    table = Table(title="held-out chats", show_lines=True)
    for column in ("asked", "expected", f"after step {min(answers)}", f"after step {max(answers)}"):
        table.add_column(column, overflow="fold")
    for first, last in list(zip(before, after, strict=True))[:count]:
        table.add_row(*map(_cell, (last.asked, last.reference, first.answer, last.answer)))
    console.print(table)


def show_summary(trainer: CoreTrainer) -> None:
    """Say what was done, where the weights lie, and what can be done with them."""
    state, args = trainer.state, trainer.args
    stopped = "stopped by a signal after" if trainer.stop_signal else "finished"
    console.print(f"{stopped} step {state.global_step}, {state.num_samples_seen} samples", soft_wrap=True)
    weights = trainer.export_folder()
    if weights.is_dir():
        next_command = f"trainer generate {shlex.quote(str(weights))}"
        console.print(f"weights: {weights}; next: {next_command}", soft_wrap=True, markup=False)
    else:
        place = shlex.quote(args.output_dir)
        console.print(f"metrics: {args.output_dir}; next: trainer report {place}", soft_wrap=True, markup=False)


def _cell(text: str) -> str:
    """Fit a text into a cell: one line, printable, not too long, and no markup."""
    line = " ".join(text.split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return escape(line if len(line) <= _LONGEST_CELL else line[: _LONGEST_CELL - 1] + "…")


def _news(report: StepReport) -> str:
    words = [f"loss {report.loss:.4f}", f"lr {report.learning_rate:.2e}"]
    if report.tokens_per_second is not None:
        words.append(f"{report.tokens_per_second:,.0f} tokens/s")
    if report.mfu is not None:
        words.append(f"MFU {report.mfu:.0%}")
    words.append(f"{report.peak_memory_bytes / 2**30:.1f} GiB")
    return "  ".join(words)


def _left(report: StepReport) -> str:
    """Say how long it will take, in words for a line."""
    if report.seconds_left is None:
        return ""
    minutes, seconds = divmod(round(report.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"  {hours}:{minutes:02}:{seconds:02} left"


def _end(state: RunState) -> str:
    return str(state.max_steps) if state.max_steps > 0 else "∞"
