"""What a key may use: requests and tokens a minute, requests at a time, money a month."""

from dataclasses import dataclass
from typing import Final

__all__ = ["NO_LIMITS", "KeyLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """Limits of one key; None: none."""

    rpm: int | None = None
    """Requests a minute: as many at once, and then one every 60/rpm seconds."""
    tpm: int | None = None
    """Tokens a minute, prompt and output together."""
    concurrency: int | None = None
    """Requests at a time."""
    budget: float | None = None
    """Cost of a calendar month (UTC), in the currency of the GPUs' prices."""


NO_LIMITS: Final = KeyLimits()
