"""How far a data set is prepared: shown once that takes longer than two seconds."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BEFORE_SHOWING = 2.0
SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal for a bar


class PreparationDisplay:
    """Called with bytes done and bytes in all; a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._next_line = time.monotonic() + SECONDS_BEFORE_SHOWING
        columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("preparing")

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are prepared."""
        self._bar.update(self._task, completed=done, total=total)
        if time.monotonic() < self._next_line:
            return
        if self._console.is_terminal:
            self._bar.start()
        else:
            self._console.print(f"preparing: {done / total:.0%} of {total / 1e6:,.1f} MB", soft_wrap=True)
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
