"""Counts the named functions and files of trainer/ that parts of a run enter: how much a reader has to open.

    python -m tests.shape.trips [--list]

build is from `Trainer(args=...)` to the first step, step is steps 3 to 6 together with the loader and what runs beside
it, save is what the last step enters beyond that, restore what a resumed run enters before its first step beyond build.
Lambdas and comprehensions have no name and are not counted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = f"{ROOT / 'trainer'}{os.sep}"
NUM_STEPS = 8

Entered = dict[str, set[tuple[str, str]]]  # part of a run -> (file, function)


class Recorder:
    """Writes down functions of the package as threads enter them, by the part of the run that is going on."""

    def __init__(self) -> None:
        self.part = "idle"
        self.entered: Entered = defaultdict(set)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Be a profile function."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and "<" not in code.co_name:
            self.entered[self.part].add((code.co_filename.removeprefix(PACKAGE), code.co_qualname))


def record_run(folder: Path) -> Entered:
    """Train from files, with a checkpoint at the last step, and resume from it."""
    from transformers import LlamaConfig, TrainerCallback

    from trainer import Trainer, TrainingArguments

    recorder = Recorder()

    class Parts(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if 2 <= state.global_step < 6:
                recorder.part = "step"
            else:
                recorder.part = "last step" if state.global_step == NUM_STEPS - 1 else "other"

    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(folder / "config")
    chats = (ROOT / "examples" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    (folder / "data.jsonl").write_text("\n".join(chats), encoding="utf-8")
    common = {
        "output_dir": str(folder / "out"),
        "model_config": str(folder / "config"),
        "tokenizer_name_or_path": str(ROOT / "examples" / "quickstart" / "tokenizer"),
        "use_cpu": True,
        "data_path": str(folder / "data.jsonl"),
        "data_cache_dir": str(folder / "cache"),
        "dataset_num_proc": 1,
        "batch_size": 4,
        "max_tokens_per_rank": 512,
        "save_steps": NUM_STEPS,
        "export_final": False,
        "disable_tqdm": True,
    }
    resumed = {"max_steps": NUM_STEPS + 1, "resume_from_checkpoint": "auto", "allow_change": ["max_steps"]}
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        for part, more in (("build", {"max_steps": NUM_STEPS}), ("resumed build", resumed)):
            recorder.part = part
            Trainer(args=TrainingArguments(**common, **more), callbacks=[Parts()]).train()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    found = recorder.entered
    return {
        "build": found["build"],
        "step": found["step"],
        "save": found["last step"] - found["step"],
        "restore": found["resumed build"] - found["build"],
    }


def main() -> None:
    """Print the number of functions and of files of each part, or all names."""
    with tempfile.TemporaryDirectory() as folder:
        entered = record_run(Path(folder))
    if "--list" in sys.argv:
        print(json.dumps({part: sorted(map(list, names)) for part, names in entered.items()}, indent=1))
    else:
        print(json.dumps({part: [len(names), len({file for file, _ in names})] for part, names in entered.items()}))


if __name__ == "__main__":
    main()
