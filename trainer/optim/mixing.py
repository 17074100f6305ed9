"""How what a package's optimizer lacks is mixed into its class.

A mixin overrides `step` or the state dictionary and calls the package's own. Invariant: hooks on a step run once,
around the outermost one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


class Revived(Optimizer):
    """Mixin: what `state_dict` gives differs from the state itself; `revive` turns the one, loaded, into the other."""

    def revive(self) -> None:
        """Make the state what it was, in place."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self.revive()


def revive(optimizer: Optimizer) -> None:
    """Call after putting what a state dictionary held straight into `optimizer.state`."""
    if isinstance(optimizer, Revived):
        optimizer.revive()


def mix(cls: type[Optimizer], mixins: Sequence[type[Optimizer]]) -> type[Optimizer]:
    """Give the class with the mixins before it, the outermost first."""
    return type(cls.__name__, (*mixins, cls), {}) if mixins else cls


def plain_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Give a bound step without the hooks that torch wraps around every class's own."""
    if not getattr(step, "hooked", False):
        return step
    return step.__wrapped__.__get__(step.__self__)  # type: ignore[attr-defined]
