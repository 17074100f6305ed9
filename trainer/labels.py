"""The label of a position that is not trained; torch's cross-entropy and transformers use the same number."""

from typing import Final

IGNORE_INDEX: Final = -100
