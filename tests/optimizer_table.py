"""Writes docs/optimizers.md from the registry and what the conformance suite says of each optimizer on this machine.

`python tests/optimizer_table.py` runs the suite first (install the extra `optimizers` for the whole table);
`python tests/optimizer_table.py REPORT.xml ...` takes the JUnit files of runs with RUN_SLOW=1 instead.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.fixtures.optimizer_bytes import state_bytes  # noqa: E402
from trainer.optim.registry import GONE, OPTIMIZERS, Spec, is_installed  # noqa: E402

SUITE = "tests/trainer/test_trainer_optimizers.py"
CHECKS = {  # column -> tests of the suite
    "moves": ("test_every_trainable_parameter_moves",),
    "converges": ("test_an_optimizer_converges",),
    "accumulates": ("test_accumulated_micro_batches_are_one_batch",),
    "2 ranks": ("test_a_sharded_step_is_the_whole_one", "test_a_sharded_optimizer_resumes"),
    "resumes": ("test_a_resumed_optimizer_goes_on_bit_equal",),
    "unused": ("test_a_parameter_without_gradient_is_tolerated",),
    "rate": ("test_the_learning_rate_is_used",),
    "bytes": ("test_the_bytes_of_the_state_are_as_told",),
    "by hand": ("test_decays_as_by_hand",),
}
MATRIX, RANK = (4096, 4096), 128  # of which the bytes are told
HEAD = """# Optimizers

`optim=NAME` takes one of these, or your own as `module:Class`. Written by `python tests/optimizer_table.py` from the
registry (`trainer/optim/registry.py`) and the results of its suite (`{suite}`); do not edit.
`pip install 'reference-trainer[optimizers]'` brings the packages; galore-torch, apollo-torch (whose licence, CC-BY-NC,
forbids commercial use) and grokadamw are in `research-optimizers`.

- *bytes*: of the optimizer's state for each parameter of a {rows} x {columns} float32 matrix (low rank: {rank}); half
  of it with `optim_bf16_state` where marked with \\*
- *sharded*: trains parameters that FSDP2 spreads over ranks
- *CPU*: runs without a GPU
- *in backward*: steps during the last backward pass of a step; `max_grad_norm` must be 0

| check | passed if |
| --- | --- |
| moves | every trained parameter of a tiny Llama moves, and no frozen one |
| converges | it fits a regression |
| accumulates | two micro-batches of 4 are one of 8 |
| 2 ranks | 2 ranks are one process, and each rank resumes its shard |
| resumes | a run whose state went through tensors and JSON continues bit for bit |
| unused | a parameter without a gradient stays as it is, decay or not |
| rate | the learning rate shown is the one used |
| bytes | the state takes the stated bytes |
| by hand | the first step with decay is that of the formula in float64 (the simple ones) |

`+` passed, `-` failed, `no`: refused, for the reason below, `.`: not run where this was written ({versions}).

"""


def main(words: list[str]) -> None:
    """Write the table."""
    results: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for report in map(Path, words) if words else [run_suite(Path(folder, "report.xml"))]:
            results |= read_results(report)
    (ROOT / "docs" / "optimizers.md").write_text(render(results), encoding="utf-8")


def run_suite(report: Path) -> Path:
    """Run the whole suite; gives its JUnit file."""
    command = [sys.executable, "-m", "pytest", "-q", SUITE, f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "RUN_SLOW": "1"}, check=False)
    return report


def read_results(report: Path) -> dict[tuple[str, str], str]:
    """(test, optimizer) -> +, - or ."""
    results = {}
    for case in ET.parse(report).iter("testcase"):
        test, _, parameters = case.get("name", "").partition("[")
        name = parameters.rstrip("]").split("-")[-1]
        outcomes = {child.tag for child in case}
        results[test, name] = "." if "skipped" in outcomes else "-" if outcomes & {"failure", "error"} else "+"
    return results


def render(results: dict[tuple[str, str], str]) -> str:
    """Put the document together."""
    columns = ["name", "package", "licence", "bytes", "sharded", "CPU", "in backward", *CHECKS]
    rows = [row(name, spec, results) for name, spec in OPTIMIZERS.items()]
    table = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    rows_, columns_ = MATRIX
    head = HEAD.format(suite=SUITE, rows=rows_, columns=columns_, rank=RANK, versions=", ".join(versions()))
    notes = [f"| {name} | {text} |" for name, text in remarks().items()]
    gone = [f"- `{name}`: {why}; nearest: {instead}." for name, (why, instead) in GONE.items()]
    parts = [head, *table, "\n## Limits\n", "| optimizer | what to know |\n| --- | --- |", *notes]
    return "\n".join([*parts, "\n## Names of transformers that nothing here serves\n", *gone]) + "\n"


def row(name: str, spec: Spec, results: dict[tuple[str, str], str]) -> list[str]:
    """Cells of one optimizer."""
    size = f"{state_bytes(name, MATRIX, RANK) / math.prod(MATRIX):.3g}" + (r"\*" if spec.has_plain_state else "")
    able = ["no" if spec.not_sharded else "yes", "no" if spec.not_on_cpu else "yes"]
    checks = [verdict(name, spec, column, results) for column in CHECKS]
    package = spec.package or spec.path.partition(".")[0].replace("trainer", "torch")
    return [f"`{name}`", package, spec.licence, size, *able, "yes" if spec.steps_in_backward else "", *checks]


def verdict(name: str, spec: Spec, column: str, results: dict[tuple[str, str], str]) -> str:
    """One sign for the tests of a column."""
    found = {results[test, name] for test in CHECKS[column] if (test, name) in results}
    if column == "2 ranks" and spec.not_sharded and "-" not in found:
        return "no"
    return "-" if "-" in found else "+" if "+" in found else "." if found else ""


def remarks() -> dict[str, str]:
    """What the registry says of an optimizer beside the table; of several alike once."""
    texts: dict[str, list[str]] = {}
    for name, spec in OPTIMIZERS.items():
        limits = [
            spec.not_sharded and f"not sharded: {spec.not_sharded}",
            spec.not_on_cpu and f"GPU: {spec.not_on_cpu}",
        ]
        if text := "; ".join(filter(None, [*limits, spec.note])):
            texts.setdefault(text, []).append(f"`{name}`")
    return {", ".join(names): text for text, names in texts.items()}


def versions() -> list[str]:
    """The packages of this machine."""
    packages = {"torch", "transformers"} | {s.package for s in OPTIMIZERS.values() if s.package and is_installed(s)}
    return [f"{name} {re.split('[+]', importlib.metadata.version(name))[0]}" for name in sorted(packages)]


if __name__ == "__main__":
    main(sys.argv[1:])
