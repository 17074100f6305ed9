"""What changed between the run that was saved and the one that goes on, by name, and what of it was allowed.

Which options may change freely is said at each option (`at_resume="free"`); all others are fixed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trainer.config.arguments import names_free_at_resume
from trainer.errors import UsageError


def find_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Name what differs, with both values; an option that only one of the two knows counts where it has a value."""
    free = names_free_at_resume()
    names = [name for name in {**saved, **current} if name not in free]
    return {
        name: f"{saved.get(name)!r} when it was saved, {current.get(name)!r} now"
        for name in names
        if saved.get(name) != current.get(name)
    }


def check_changes(changes: Mapping[str, str], allowed: Collection[str], place: str) -> None:
    """Raise UsageError where something changed that was not allowed to."""
    refused = {name: values for name, values in changes.items() if name not in allowed}
    if refused:
        listed = "; ".join(f"{name} was {values}" for name, values in refused.items())
        raise UsageError(
            f"{place} cannot be gone on with exactly: {listed}; set it back, or say allow_change={','.join(refused)}"
        )
