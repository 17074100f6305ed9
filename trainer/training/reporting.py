"""Experiment trackers: transformers' reporting integrations by name, as callbacks. Nothing here knows any of them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.trainer_callback import TrainerCallback

from trainer.errors import MissingPackageError, UsageError


def reporters(report_to: str | Sequence[str]) -> list[TrainerCallback]:
    """Build the callbacks that report to these trackers; "all" means those that are installed, "none" none.

    Raises:
        UsageError: there is no integration of that name.
        MissingPackageError: its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names in ([], ["none"]):
        return []
    # Imported here: it looks for all of their packages.
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if names == ["all"]:
        names = get_available_reporting_integrations()
    if unknown := [name for name in names if name not in INTEGRATION_TO_CALLBACK]:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise UsageError(f"report_to = {', '.join(unknown)}: expected none, all, or some of {known}")
    return [_build(name, INTEGRATION_TO_CALLBACK[name]) for name in names]


def _build(name: str, kind: type[TrainerCallback]) -> TrainerCallback:
    try:
        return kind()
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError(f"report_to = {name}: {error}") from error
