"""On whose behalf something is asked of the mesh."""

from dataclasses import dataclass
from typing import Final

from opentelemetry.trace import INVALID_SPAN, Span

from services.gateway.accounts import Account
from services.gateway.guardrails import Guard
from services.gateway.router_client import OnQueued

__all__ = ["LONGEST_SESSION", "Caller"]

LONGEST_SESSION: Final = 256
"""Characters of a session's name that count."""


@dataclass(slots=True, kw_only=True)
class Caller:
    """On whose behalf a generation runs."""

    request_id: str
    tenant: str
    priority: int = 0
    session_id: str = ""
    span: Span = INVALID_SPAN
    """That of the request."""
    slo_class: str = ""
    """What the client may wait for, by name; empty leaves it to the policy."""
    wait_seconds: float | None = None
    """How long its client lets it wait for a worker; None leaves it to the policy."""
    allow_degrade: bool = False
    """Whether a smaller model may answer when the one asked for has no room."""
    account: Account | None = None
    """What the request may take, and has taken; None: nobody asks."""
    guard: Guard | None = None
    """What its prompt and its answer go through; None: nothing."""
    on_queued: OnQueued | None = None
    """Hears of its place in the router's queue."""
