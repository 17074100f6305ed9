"""The exceptions a user can meet, one class for each kind of remedy.

Raised where the bad value enters; the command line prints their text without a traceback. Every message says what was
given, what is allowed, where it came from, and what to do. This module knows nothing of the rest of the package.
"""

from __future__ import annotations

from os import PathLike


class TrainerError(Exception):
    """Base of all errors that a user can cause and mend."""


def named_error(error: Exception) -> str:
    """Say what another library raised; many of its messages mean nothing without their class."""
    return f"{type(error).__name__}: {error}"


class UsageError(TrainerError, ValueError):
    """An option is unknown, out of range, without effect, or contradicts another one (exit code 2)."""


class DataError(TrainerError, ValueError):
    """A data file, or one line of it, cannot be trained on as it stands."""

    def __init__(
        self,
        found: str,
        allowed: str,
        path: str | PathLike[str] | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        self.found, self.allowed = found, allowed
        self.path, self.line, self.field = path, line, field
        place = ":".join(str(part) for part in (path, line) if part is not None)
        named = f"field {field!r}: " if field is not None else ""
        super().__init__(f"{place + ': ' if place else ''}{named}{found}; {allowed}")

    def __reduce__(self) -> tuple[type[DataError], tuple[object, ...]]:
        return type(self), (self.found, self.allowed, self.path, self.line, self.field)


class ModelError(TrainerError, ValueError):
    """The model or tokenizer cannot be loaded or trained as asked."""


class IsolationError(ModelError):
    """Packed samples would see each other with this model and attention implementation."""


class MissingPackageError(TrainerError, ImportError):
    """An optional package is needed; the message holds the exact `pip install`."""

    @classmethod
    def in_extra(cls, need: str, extra: str) -> MissingPackageError:
        """Build the error that says what needs which package, and the extra of ours that brings it."""
        return cls(f"{need}: pip install 'reference-trainer[{extra}]'")


class CheckpointError(TrainerError, RuntimeError):
    """A checkpoint could not be written, or what lies on disk is not a valid one."""


class OutputError(TrainerError, OSError):
    """What the run writes could not be written: the disk is full, or the folder is gone."""


class NonFiniteError(TrainerError, ArithmeticError):
    """A loss or gradient is NaN or infinite; the step was not taken."""


class LeakError(TrainerError, ArithmeticError):
    """Orthogonal subspace fine-tuning: the weights moved in directions that are protected."""


class RankError(TrainerError, RuntimeError):
    """A rank died, hung, or the ranks disagree."""


class PeerError(RankError):
    """Another rank of this node failed and says why; the command line leaves the message to it."""
