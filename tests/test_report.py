"""`trainer report`: a page that parses, holds the numbers of the runs, loads nothing, and says what is wrong."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs import build_trainer, random_token_samples
from trainer.cli.main import EXIT_FAILED, EXIT_USAGE, main

SAMPLES = random_token_samples([5 + i % 4 for i in range(16)])
HELD_OUT = random_token_samples([6, 7], seed=1)
NUM_STEPS = 4
VOID = {"meta"}


class Page(HTMLParser):
    """Rows of the tables, text and curves of the figure, what was loaded; fails where tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.drawn: list[str] = []
        self.curves: list[str] = []
        self.loaded: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open += [] if tag in VOID else [tag]
        sources = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.loaded += [source for source in sources if not source.startswith("#")]
        self.loaded += [tag] if tag in ("script", "link", "img") else []
        self.curves += [dict(attrs)["d"] or ""] if tag == "path" and "stroke: #1f77b4" in str(attrs) else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        elif "text" in self._open:
            self.drawn.append(data.strip())

    def cells(self, row: str) -> list[str]:
        (found,) = (cells for name, *cells in self.rows if name == row)
        return found


def train(folder: Path, checkpoint: str | None = None, **options: Any) -> Path:
    trainer = build_trainer(folder, SAMPLES, eval_samples=HELD_OUT, eval_strategy="steps", eval_steps=2, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(*words: object) -> Page:
    assert main(["report", *map(str, words)]) == 0
    return Page(Path(str(words[0]), "report.html"))


def test_the_page_holds_the_numbers_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path / "run", learning_rate=0.02)
    page, lines = report(folder), lines_of(folder)
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluated = {line["eval_loss"]: line["step"] for line in lines if "eval_loss" in line}
    waited, busy = (sum(line.get(name, 0) for line in lines) for name in ("data_seconds", "step_seconds"))
    assert len(losses) == NUM_STEPS
    assert page.cells("last step") == [str(NUM_STEPS)]
    assert page.cells("epochs") == ["1"]
    assert page.cells("samples") == [str(len(SAMPLES))]
    assert page.cells("loss tokens") == [str(sum(line.get("num_loss_tokens", 0) for line in lines))]
    assert page.cells("last loss") == [f"{losses[-1]:.5g}"]
    assert page.cells("lowest loss") == [f"{min(losses):.5g}"]
    assert page.cells("best eval_loss") == [f"{min(evaluated):.5g} (step {evaluated[min(evaluated)]})"]
    assert page.cells("waiting for data") == [f"{waited / (waited + busy):.1%} of the time"]
    assert page.cells("learning_rate") == ["0.02", "5e-05"]
    assert page.loaded == []
    panels = ("loss", "learning rate", "gradient norm", "tokens per second", "waiting for data, share of the step")
    assert {*panels, "training", "eval_loss", "packing_efficiency"} <= set(page.drawn)
    assert page.drawn.count("loss") == 1


def test_several_runs_stand_side_by_side_with_their_differences(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a<b>&$x$"), train(tmp_path / "_c" / "run", learning_rate=0.02)
    page = report(first, second)
    heading = ["", "\u25a0 a<b>&$x$", "\u25a0 _c/run"]
    assert page.rows.count(heading) == 2
    assert page.rows[-2:] == [heading, ["learning_rate", "0.01", "0.02"]]
    assert page.cells("last loss") == [
        f"{[line['loss'] for line in lines_of(folder) if 'loss' in line][-1]:.5g}" for folder in (first, second)
    ]


def test_metrics_of_ones_own_get_panels_and_the_best_is_the_best(tmp_path: Path) -> None:
    folder = train(tmp_path)
    chosen_by = {"metric_for_best_model": "accuracy", "greater_is_better": True}
    (folder / "training_params.json").write_text(json.dumps({**chosen_by, "data_path": "<b>"}))
    with (folder / "metrics.jsonl").open("a") as file:
        for step, share in ((2, 0.5), (4, 0.75), (6, 0.25)):
            line = {"step": step, "eval_accuracy": share, "osft/$x$<y": 1.0, "eval_table": [[1]], "eval_runtime": 1.0}
            file.write(json.dumps(line) + "\n")
    page = report(folder)
    assert page.cells("best eval_accuracy") == ["0.75 (step 4)"]
    assert page.cells("data_path") == ['"<b>"', "null"]
    assert {"eval_accuracy", "osft/$x$<y"} <= set(page.drawn)
    assert not {"eval_table", "eval_runtime"} & set(page.drawn)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = train(tmp_path)
    path = folder / "metrics.jsonl"
    steps = [line for line in path.read_text().splitlines() if '"loss"' in line]
    path.write_text("\n".join([*steps[:3], steps[3][:-1]]))
    assert report(folder).cells("last step") == ["3"]
    path.write_text("\n".join(steps))  # whole but for its end: more digits could follow a number
    assert report(folder).cells("last step") == ["3"]


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    for checkpoint in (None, str(tmp_path / "checkpoints" / "step_2")):
        train(tmp_path, save_strategy="steps", save_steps=2, async_save=False, checkpoint=checkpoint)
    assert report(tmp_path).cells("samples") == [str(len(SAMPLES))]


def test_what_is_not_known_gets_no_row(tmp_path: Path) -> None:
    known = ("step", "epoch", "num_samples", "samples_per_second", "data_seconds", "step_seconds")
    line = {**dict.fromkeys(known, 1), "is_skipped": True}  # of ordinary data, its loss not finite
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = report(tmp_path)
    assert page.cells("skipped steps") == ["1"]
    assert page.cells("median samples per second") == ["1.0"]
    assert not {"last loss", "loss tokens", "median tokens per second", "learning_rate"} & {row[0] for row in page.rows}


def test_the_legend_names_each_of_several_runs(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        line = {"step": 1, "loss": 2.0, "step_seconds": 1.0, "data_seconds": 0.0, "seconds_left": 3.0, "mfu": 0.5}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["report", str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    page = Page(tmp_path / "first" / "report.html")
    assert {"first", "second", "share of the GPU's nominal rate (MFU)"} <= set(page.drawn)
    assert "seconds_left" not in page.drawn


def test_long_runs_are_drawn_with_means(tmp_path: Path) -> None:
    from trainer.cli.report import MANY

    line = {"step_seconds": 1.0, "data_seconds": 0.0}
    lines = [json.dumps({**line, "step": step, "loss": 10.0 ** (step % 3)}) for step in range(1, 3 * MANY + 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report(tmp_path)
    assert page.cells("last step") == [f"{3 * MANY:,}"]
    assert {"1", "2", "5", "10", "20", "50", "100"} <= set(page.drawn)  # a logarithmic axis
    pale, means, *_ = (set(re.findall(r"[ML] \S+ (\S+)", curve)) for curve in page.curves)
    assert len(pale) == 3
    assert len(means) == 1  # of three steps each


@pytest.mark.parametrize(
    ("content", "said", "code"),
    [
        (None, "holds no metrics.jsonl: name the output_dir of a run", EXIT_USAGE),
        ('{"step": 1', "holds no whole line yet: wait for the first step", EXIT_USAGE),
        (
            '{"step": 1}\n{"st\n{"step": 3}\n',
            r"metrics.jsonl:2: no JSON .*expected what a run",
            EXIT_FAILED,
        ),
    ],
    ids=["none", "begun", "damaged"],
)
def test_what_cannot_be_drawn_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str, code: int
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == code
    assert re.search(f"{re.escape(str(tmp_path))}.*{said}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-run"], "no-such-run is no folder"),
        ([], "FOLDERS is missing"),
        (["x"] * 11, "11 folders given: .* 1 to 10"),
    ],
    ids=["typo", "none", "many"],
)
def test_folders_are_named(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["report", *words]) == EXIT_USAGE
    assert re.search(said, capsys.readouterr().err)


def test_the_file_may_be_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path / "run")
    report_to = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(report_to)]) == 0
    assert Page(report_to).cells("last step") == [str(NUM_STEPS)]
    report_to.write_text("<p>my notes</p>")
    assert main(["report", str(folder), "--output", str(report_to)]) == 0
    assert Page(report_to).cells("last step") == [str(NUM_STEPS)]
    assert (tmp_path / "page.1.html").read_text() == "<p>my notes</p>"
    assert main(["report", str(folder), "--output", str(tmp_path / "nowhere" / "page.html")]) == EXIT_FAILED
    assert "nowhere/page.html cannot be written" in capsys.readouterr().err


def test_the_package_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(folder)]) == EXIT_FAILED
    assert "pip install 'reference-trainer[report]'" in capsys.readouterr().err
