"""A new user's way, from `pip install` to a model that was trained, evaluated, exported and loaded elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shape.source import ROOT

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_tensors="pt", return_dict=True)
print(model.generate(**ids, max_new_tokens=2).shape[0])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_pip_install_to_a_model_that_loads_elsewhere(tmp_path: Path) -> None:
    """Packages that this Python has are not downloaded again; the folder that is installed from is gone after it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def say(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    say(sys.executable, "-m", "venv", "--without-pip", "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    packages = Path(say(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    (packages / "known.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".tox", "build", "outputs", ".*cache*"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation"]
    say(*pip, "--quiet", "--force-reinstall", str(source))
    shutil.rmtree(source / "trainer")
    trainer = str(tmp_path / "venv" / "bin" / "trainer")

    config = source / "examples" / "quickstart.yaml"
    config.write_text(config.read_text().replace("examples/quickstart", str(source / "examples" / "quickstart")))
    train = [trainer, "train", str(config), "--max-steps=3", "--eval-strategy=no", "--no-eval-on-start", "--use-cpu"]
    assert "next: trainer generate" in say(*train, "--output-dir=run")
    measured = json.loads(say(trainer, "evaluate", "run", "--json", "--use-cpu"))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert measured["eval_loss"] == logged[-1]["eval_loss"]
    assert "report.html" in say(trainer, "report", "run")
    say(trainer, "export", "run", "exported")
    assert say(python, "-c", LOAD, "exported").strip() == "1"
