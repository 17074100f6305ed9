"""`trainer report`: a page that parses, holds the numbers of the runs, loads nothing, and says what is wrong."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs import build_trainer, random_token_samples
from tests.fixtures.terminal import INTERRUPTIBLE
from trainer.cli.figures import MANY, numbers
from trainer.cli.main import EXIT_FAILED, EXIT_USAGE, main
from trainer.cli.report import SECONDS_BETWEEN_LOOKS, read_runs

SAMPLES = random_token_samples([5 + i % 4 for i in range(16)])
HELD_OUT = random_token_samples([6, 7], seed=1)
NUM_STEPS = 4
VOID = {"meta"}
SMALLEST_LETTERS = 8  # pixels from top to bottom


class Page(HTMLParser):
    """Rows of the tables, text and curves of the figure, what was loaded; fails where tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.drawn: list[str] = []
        self.curves: list[str] = []
        self.loaded: list[str] = []
        self.titles: list[str] = []  # of panels, and what they say in words
        self.descriptions: list[str] = []
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
        elif self._open[-2:] == ["svg", "title"]:
            self.titles.append(data)
        elif self._open[-2:] == ["svg", "desc"]:
            self.descriptions.append(data)

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
    assert set(panels) <= set(page.titles)


def test_several_runs_stand_side_by_side_with_their_differences(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a<b>&$x$"), train(tmp_path / "_c" / "run", learning_rate=0.02)
    page = report(first, second)
    heading = ["", "\u25a0 a<b>&$x$", "\u25a0 _c/run"]
    assert page.rows.count(heading) == 3
    options = len(page.rows) - page.rows[::-1].index(heading) - 3
    assert page.rows[options : options + 2] == [heading, ["learning_rate", "0.01", "0.02"]]
    assert page.cells("seed") == ["42", "42"]  # of where they ran
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
    line = {"step_seconds": 1.0, "data_seconds": 0.0}
    lines = [json.dumps({**line, "step": step, "loss": 10.0 ** (step % 3)}) for step in range(1, 3 * MANY + 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report(tmp_path)
    assert page.cells("last step") == [f"{3 * MANY:,}"]
    assert {"1", "2", "5", "10", "20", "50", "100"} <= set(page.drawn)  # a logarithmic axis
    pale, means, *_ = (set(re.findall(r"[ML] \S+ (\S+)", curve)) for curve in page.curves)
    assert len(pale) == 3
    assert len(means) == 1  # of three steps each


def write_run(folder: Path, lines: list[dict[str, Any]], **files: Any) -> Path:
    """A run of which these lines of metrics are left, and other files by their stem."""
    folder.mkdir(exist_ok=True)
    step = {"step_seconds": 2.0, "data_seconds": 1.0, "num_samples": 4}
    whole = [line if "eval_loss" in line else {**step, **line} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole))
    for name, content in files.items():
        text = content if isinstance(content, list) else [content]
        suffix = ".jsonl" if isinstance(content, list) else ".json"
        (folder / f"{name}{suffix}").write_text("".join(json.dumps(line) + "\n" for line in text))
    return folder


@pytest.mark.parametrize(
    ("x", "label", "places"),
    [
        ("steps", "step", [1, 2, 3]),
        ("tokens", "tokens", [100, 150, 350]),
        ("samples", "samples", [4, 8, 12]),
        ("time", "minutes of training", [3 / 60, 6 / 60, 9 / 60]),
    ],
)
def test_curves_are_drawn_over_what_was_asked_for(tmp_path: Path, x: str, label: str, places: list[float]) -> None:
    lines = [{"step": i, "loss": 4.0 - i, "num_tokens": n} for i, n in enumerate((100, 50, 200), start=1)]
    run = write_run(tmp_path, [*lines, {"step": 3, "eval_loss": 0.5}])
    (read,) = read_runs([run], x)
    assert numbers(read.steps, "loss") == (places, [3.0, 2.0, 1.0])
    assert numbers(read.evaluations, "eval_loss") == (places[-1:], [0.5])
    assert main(["report", str(run), "--x", x]) == 0
    page = Page(run / "report.html")
    assert page.drawn.count(label) == len(page.titles)
    assert page.cells("best eval_loss") == ["0.5 (step 3)"]


def test_what_a_run_does_not_count_is_no_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(write_run(tmp_path, [{"step": 1, "loss": 1.0}])), "--x", "tokens"]) == EXIT_USAGE
    assert "hold no num_tokens; draw over steps" in capsys.readouterr().err


def test_losses_of_sources_share_a_panel(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 2.0, "loss/a": 1.0, "loss/b": 3.0} for i in (1, 2)]
    lines.append({"step": 2, "eval_loss": 2.0, "eval_loss/a": 1.0})
    page = report(write_run(tmp_path / "one", lines))
    assert page.titles[:2] == ["loss", "loss by source"]
    assert {"loss/a", "loss/b", "eval_loss/a"} <= set(page.drawn)
    assert not {"loss/a", "loss/b", "eval_loss/a"} & set(page.titles)
    several = report(tmp_path / "one", write_run(tmp_path / "two", lines))
    assert {"one: loss/a", "two: loss/b", "two: eval_loss/a"} <= set(several.drawn)


def test_each_panel_says_in_words_what_it_shows(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 1.5}]))
    assert page.titles == ["loss", "waiting for data, share of the step"]
    assert page.descriptions[0] == "training, 2 steps from 4 to 1.5"


def test_answers_of_the_last_evaluation_stand_beside_those_before(tmp_path: Path) -> None:
    answers = [
        {"step": step, "sample": i, "question": f"<q{i}>", "reference": "r", "answer": f"a{step}{i}", "exact": 0.0}
        for step in (1, 2, 3)
        for i in range(30)
    ]
    page = report(write_run(tmp_path, [{"step": 3, "loss": 1.0}], answers=answers))
    head = page.rows.index(["sample", "question", "reference", "answer at step 2", "answer at step 3", "exact"])
    assert page.rows[head + 2] == ["1", "<q1>", "r", "a21", "a31", "0.0"]
    assert page.rows[head + 20][0] == "19"
    assert len(page.rows) == head + 21  # the rest is left out, and counted


def test_where_runs_ran_is_shown_and_what_differs_is_set_off(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 1.0}]
    records = ({"packages": {"torch": "2.13.0"}, "seed": 1}, {"packages": {"torch": "2.11.0"}, "seed": 1})
    folders = [write_run(tmp_path / str(i), lines, environment=record) for i, record in enumerate(records)]
    page = report(*folders)
    assert page.cells("packages.torch") == ["2.13.0", "2.11.0"]
    text = (folders[0] / "report.html").read_text()
    assert re.findall(r'<tr class="differs"><td>([^<]*)', text) == ["packages.torch"]


def test_a_page_is_written_anew_while_the_run_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    command = [*INTERRUPTIBLE, sys.executable, "-m", "trainer", "report", str(folder), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits for the first step\n"
        (folder / "metrics.jsonl").write_text('{"step": 1')  # torn: a line is whole once it ends
        time.sleep(2 * SECONDS_BETWEEN_LOOKS)
        assert process.poll() is None
        for number in (1, 2):
            write_run(folder, [{"step": i, "loss": 1.0} for i in range(1, number + 1)])
            limit = time.monotonic() + 60
            page = folder / "report.html"
            while not (page.is_file() and Page(page).cells("last step") == [str(number)]):
                assert time.monotonic() < limit
                time.sleep(0.1)
        assert '<meta http-equiv="refresh"' in page.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout.read().startswith(f"{page}\n")


def test_a_report_loads_no_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [{"step": 1, "loss": 1.0}])
    program = "import sys; from trainer.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_all_of_it_at_any_width(tmp_path: Path, width: int) -> None:
    long = "a question that is long, and " * 20
    answers = [{"step": 1, "sample": 0, "question": long, "reference": "x" * 300, "answer": "b", "exact_match": 1.0}]
    lines = [{"step": i, "loss": 9.0 / i, "loss/a": 1.0, "loss/b": 2.0, "learning_rate": 1e-3} for i in range(1, 40)]
    names = ("a_rather_long_name_of_a_run", "another_rather_long_name", "third")
    runs = [write_run(tmp_path / name, lines, answers=answers, environment={"command": [long]}) for name in names]
    report(*runs)
    page = escape((runs[0] / "report.html").read_text())
    script = (
        "f.onload=()=>{const d=f.contentDocument,texts=[...d.querySelectorAll('svg text')];"
        "const heights=texts.map(t=>t.getBoundingClientRect().height);"
        "document.title=[d.documentElement.scrollWidth,Math.min(...heights)]}"
    )
    around = tmp_path / "around.html"
    frame = f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>'
    around.write_text(f"<!DOCTYPE html><title></title>{frame}<script>{script}</script>")
    options = ["--headless", "--no-sandbox", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"]
    command = ["chromium", *options, "--virtual-time-budget=5000", "--dump-dom", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r"<title>(\d+),([\d.]+)</title>", done.stdout)
    assert found is not None
    assert int(found[1]) <= width
    assert float(found[2]) >= SMALLEST_LETTERS
    assert "CONSOLE" not in done.stderr


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
