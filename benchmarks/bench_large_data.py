"""Time and memory of preparing many samples in many files: `python benchmarks/bench_large_data.py 1000000 --files 64`.

Writes tokenized rows to a temporary folder, prepares them in a process of its own, opens them again, and prints seconds
(of the clock and of the processors, for a machine that others use too) and the memory of that process, pages of mapped
files aside. The rows are short, so that what is measured is what each sample costs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def write_rows(folder: Path, num_samples: int, num_files: int) -> int:
    """Write the rows; return their bytes."""
    source = random.Random(0)
    num_bytes = 0
    for k in range(num_files):
        with (folder / f"{k:03}.jsonl").open("w") as file:
            for i in range(k, num_samples, num_files):
                ids = [i % 50_000, *(source.randrange(50_000) for _ in range(source.randrange(8, 24)))]
                num_bytes += file.write(json.dumps({"input_ids": ids}) + "\n")
    return num_bytes


class PeakMemory(threading.Thread):
    """Watches how much memory this process holds by itself, which pages of mapped files are not."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.start()

    def run(self) -> None:
        """Look every 20 ms."""
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.02)

    def now(self) -> int:
        """Bytes held at this moment (Linux)."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: str, cache: str, num_processes: int) -> None:
    """Prepare, open again, draw an epoch's order; print what each took."""
    import resource

    from trainer.config.groups import DataArguments
    from trainer.data.order import epoch_order
    from trainer.data.prepare import prepare

    def processor_seconds() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    args = DataArguments(data_cache_dir=cache, dataset_num_proc=num_processes)
    memory = PeakMemory()
    idle, used, started = memory.now(), processor_seconds(), time.perf_counter()
    store = prepare(folder, None, args)
    used = processor_seconds() - used
    prepared, started = time.perf_counter() - started, time.perf_counter()
    held = memory.now()
    assert prepare(folder, None, args).metadata["cached"]
    opened, started = time.perf_counter() - started, time.perf_counter()
    epoch_order(len(store), 0, 0)
    ordered = time.perf_counter() - started
    print(
        f"{len(store):>10,} samples, {num_processes} process(es): prepared in {prepared:.1f} s ({used:.1f} s of "
        f"processors), opened again in {opened:.1f} s, order of an epoch {ordered:.2f} s; memory besides mapped files, "
        f"idle {idle / 2**20:.0f} MiB, then {(held - idle) / len(store):.0f} bytes a sample, at most "
        f"{(memory.most - idle) / len(store):.0f}"
    )


def main() -> None:
    """Write, then measure in another process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_samples", type=int, nargs="+")
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "CACHE"))
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, options.processes[0])
        return
    for num_samples in options.num_samples:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "rows").mkdir()
            num_bytes = write_rows(Path(folder) / "rows", num_samples, options.files)
            print(f"{num_samples:,} rows in {options.files} files, {num_bytes / 1e6:,.0f} MB", flush=True)
            for count in options.processes:
                words = [str(num_samples), "--processes", str(count)]
                place = ["--measure", f"{folder}/rows", f"{folder}/cache-{count}"]
                subprocess.run([sys.executable, __file__, *words, *place], check=True)


if __name__ == "__main__":
    main()
