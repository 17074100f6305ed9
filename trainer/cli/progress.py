"""What a run shows while it runs: a bar with loss, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.trainer_callback import TrainerCallback, TrainerControl

from trainer.cli.stores import SECONDS_BEFORE_SHOWING, SECONDS_BETWEEN_LINES
from trainer.config.arguments import TrainingArguments
from trainer.training.callbacks import RunState
from trainer.training.generate import Answer
from trainer.training.metrics import StepReport
from trainer.training.trainer import CoreTrainer

console = Console()
_SHOWN_EVALUATION = ("loss", "exact_match")
_LONGEST_CELL = 60  # characters


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
                f"step {report.step}/{_end(state)}  epoch {report.epoch:.2f}  {_news(report)}", soft_wrap=True
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
    """Say what was done and where it lies."""
    state, args = trainer.state, trainer.args
    stopped = "stopped by a signal after" if trainer.stop_signal else "finished"
    console.print(f"{stopped} step {state.global_step}, {state.num_samples_seen} samples", soft_wrap=True)
    console.print(f"metrics and weights: {args.output_dir}", soft_wrap=True)


def _cell(text: str) -> str:
    """Fit a text into a cell: one line, printable, not too long, and no markup."""
    line = " ".join(text.split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return escape(line if len(line) <= _LONGEST_CELL else line[: _LONGEST_CELL - 1] + "…")


def _news(report: StepReport) -> str:
    return f"loss {report.loss:.4f}  lr {report.learning_rate:.2e}  {report.tokens_per_second:,.0f} tokens/s"


def _end(state: RunState) -> str:
    return str(state.max_steps) if state.max_steps > 0 else "∞"
