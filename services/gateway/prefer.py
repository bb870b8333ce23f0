"""What a client prefers where there is no room for its request: the `Prefer` header (RFC 7240)."""

from dataclasses import dataclass
from typing import Final

from services.common.errors import MeshError, Reason

__all__ = ["LONGEST_WAIT_SECONDS", "PREFER", "Preference", "preference_of"]

PREFER: Final = b"prefer"
LONGEST_WAIT_SECONDS: Final = 3600
_RESPOND_ASYNC: Final = "respond-async"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """What of the header matters here; the rest may be ignored, as the RFC says."""

    wait_seconds: int | None = None
    """How long the request may wait for a worker (`wait=`); None leaves it to the policy."""
    is_async: bool = False
    """Whether it may be answered later, as a batch (`respond-async`)."""


def preference_of(header: str | None) -> Preference | None:
    """What a header says; None where there is nothing to heed. Of a preference that is there twice the first counts.

    Raises:
        MeshError: `wait` is no whole number of seconds within bounds (INVALID_REQUEST).
    """
    if header is None:
        return None
    said: dict[str, str] = {}
    for each in header.split(","):
        name, _, value = each.partition(";")[0].partition("=")
        said.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = said.get("wait")
    if wait is None and _RESPOND_ASYNC not in said:
        return None
    return Preference(wait_seconds=None if wait is None else _seconds(wait), is_async=_RESPOND_ASYNC in said)


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and int(text) <= LONGEST_WAIT_SECONDS):
        message = f"prefer: wait: expected a whole number of seconds from 0 to {LONGEST_WAIT_SECONDS}"
        raise MeshError(Reason.INVALID_REQUEST, message, field="prefer")
    return int(text)
