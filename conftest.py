"""Names the fixture plugins, options and markers; holds no fixtures of its own."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores. With more threads they spin against each other: one learning test took 46 s instead of 6.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins: list[str] = [
    "tests.fixtures.selection",
    "tests.fixtures.ranks.plugin",
    "tests.fixtures.conformance.plugin",
]
