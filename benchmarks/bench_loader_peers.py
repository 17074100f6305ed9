"""Loaders beside the peers': `python benchmarks/bench_loader_peers.py --rounds 5 --num-samples 20000`.

Peers that are not installed are reported and left out; `tox -e bench-peers` installs them.
"""

from __future__ import annotations

from pathlib import Path

from compare import command_line, compare, report
from loader_contenders import CONTENDERS


def main() -> None:
    parser = command_line(__doc__, CONTENDERS)
    parser.add_argument("--num-samples", type=int, default=20_000)
    options = parser.parse_args()
    num_samples = 400 if options.tiny else options.num_samples
    script = str(Path(__file__).with_name("loader_contenders.py"))
    commands = {name: [script, name, "--num-samples", str(num_samples)] for name in options.only}
    results = compare(commands, options.rounds)
    report(options, f"loading {num_samples:,} samples", results, "tokens_per_second", ("first_batch_milliseconds",))


if __name__ == "__main__":
    main()
