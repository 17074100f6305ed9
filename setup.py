"""Packages of the distribution: the trainer, and what tests it, which others install as `trainer_testing`."""

from setuptools import find_packages, setup

TESTING = [f"trainer_testing.{name}" for name in find_packages("tests/fixtures")]

setup(
    packages=[*find_packages(include=["trainer", "trainer.*"]), "trainer_testing", *TESTING],
    package_dir={"trainer_testing": "tests/fixtures"},
)
