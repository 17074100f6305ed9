"""Make the pictures of the README: `python docs/make_pictures.py RUN`, where RUN is the folder of a quickstart.

Writes docs/images/preview.svg, what `trainer preview` shows in a terminal, and docs/images/report.png, the top of the
page of `trainer report` as Chromium (which must be installed) draws it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS = 92
REPORT_SIZE = (1180, 805)  # pixels of the window
PREVIEW = ["preview", "examples/quickstart.yaml", "--num-samples", "2"]
BLACK, RED, GREEN, YELLOW = (0, 0, 0), (220, 90, 90), (130, 200, 120), (210, 180, 90)
BLUE, MAGENTA, CYAN, WHITE = (110, 150, 230), (190, 120, 200), (90, 190, 190), (225, 225, 225)
COLOURS = [BLACK, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, WHITE]  # black letters on green are legible
THEME = TerminalTheme((36, 36, 40), WHITE, COLOURS)


def show(words: list[str]) -> str:
    """Return what a command writes to a terminal with colours."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "trainer", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def draw_preview(path: Path) -> None:
    """Draw the preview of the quickstart's first samples; no font is fetched from elsewhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(f"$ trainer {' '.join(PREVIEW)}", highlight=False)
        console.print(Text.from_ansi(show(PREVIEW).rstrip()))
    drawn = console.export_svg(title="trainer preview", unique_id="preview", theme=THEME)
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.S).replace("Fira Code, monospace", "monospace")
    path.write_text("\n".join(line.rstrip() for line in drawn.splitlines()) + "\n", encoding="utf-8")


def draw_report(run: Path, path: Path) -> None:
    """Draw the top of a run's report."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        show(["report", str(run.resolve()), "--output", str(page)])
        size = f"--window-size={REPORT_SIZE[0]},{REPORT_SIZE[1]}"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", size, f"--user-data-dir={folder}/profile"]
        subprocess.run([browser, *options, f"--screenshot={path}", page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    draw_preview(IMAGES / "preview.svg")
    draw_report(Path(sys.argv[1]), IMAGES / "report.png")
