"""What a person at a terminal sees: a bar while training, answers as they come, an end by Ctrl-C; and `| head`."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.fixtures.runs import as_words, chat_job
from tests.fixtures.terminal import IN_TERMINAL, SECONDS, Dialogue
from tests.shape.source import ROOT

CTRL_C = "\x03"


def test_a_bar_while_training_and_a_chat_that_ctrl_c_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ["train", *as_words(chat_job(tmp_path)), f"--output-dir={run}", "--max-steps=2", "--use-cpu"]
    chat = ["generate", str(run), "--use-cpu", "--max-new-tokens=400", "--temperature=5"]
    code = f"""
import sys
from trainer.cli.main import main
assert main({train!r}) == 0
sys.exit(main({chat!r}))
"""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    words = [*IN_TERMINAL, os.ttyname(theirs), sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True) as process:
        try:
            person = Dialogue(ours)
            person.wait_for("━")
            person.wait_for("2/2")
            person.wait_for("next: trainer generate")
            assert "\nstep 1/2" not in person.text  # the bar stands for the lines
            person.wait_for("Ctrl-D ends")
            person.wait_for("> ")
            person.say("hello")
            person.wait_for("hello\r\n")
            begun = len(person.text)
            while len(person.text) < begun + 20:  # the answer comes word by word; it is not waited for
                person.read()
            os.write(ours, CTRL_C.encode())
            person.wait_for("trainer: error: interrupted")
            assert process.wait(SECONDS) == 130
        finally:
            process.kill()
    os.close(theirs)
    os.close(ours)
    assert "Traceback" not in person.text


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m trainer train --help-all | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "0"
    assert done.stdout.startswith("usage: trainer train")
    assert done.stderr == ""
