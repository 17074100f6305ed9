"""Names the fixture plugins, options and markers; holds no fixtures of its own."""

pytest_plugins: list[str] = [
    "tests.fixtures.selection",
    "tests.fixtures.ranks.plugin",
    "tests.fixtures.conformance.plugin",
]
