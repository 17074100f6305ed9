"""Chats to samples, beside the limit and the peers: `python benchmarks/bench_preparation.py --rounds 5`.

JSONL, or with `--parquet` Parquet. A peer that is not installed is reported and left out; `tox -e bench-peers` installs
it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from compare import command_line, compare, report
from preparation_contenders import CONTENDERS, JSONL, PARQUET, write_chats


def main() -> None:
    parser = command_line(__doc__, CONTENDERS)
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--parquet", action="store_true", help="read the same chats from Parquet")
    options = parser.parse_args()
    num_samples = 400 if options.tiny else options.num_samples
    script = str(Path(__file__).with_name("preparation_contenders.py"))
    with tempfile.TemporaryDirectory() as folder:
        write_chats(Path(folder), num_samples)
        data_name = PARQUET if options.parquet else JSONL
        results = compare({name: [script, name, folder, data_name] for name in options.only}, options.rounds)
    report(options, f"preparing {num_samples:,} chats of {data_name}", results, "tokens_per_second", ("tokens",))


if __name__ == "__main__":
    main()
