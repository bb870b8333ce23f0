"""What clients are told of their key's limits: headers of answers, and refusals."""

import time
from collections.abc import Iterator
from typing import Final

from services.common.errors import MeshError, Reason
from services.common.ledger import month_of
from services.common.quota import KeyLimits
from services.gateway.limits import Decision, Level

__all__ = ["limit_headers", "over_budget", "over_limit"]

_MONTH_SECONDS: Final = 31 * 86_400
_MESSAGES: Final = {
    "requests": "this key may make {} requests a minute",
    "tokens": "this key may use {} tokens a minute",
    "concurrency": "this key may have {} requests at a time",
}


def over_limit(decision: Decision, limits: KeyLimits) -> MeshError:
    """RATE_LIMIT_EXCEEDED, for a decision that forbids."""
    limit = {"requests": limits.rpm, "tokens": limits.tpm, "concurrency": limits.concurrency}[decision.which]
    wait = max(0.001, decision.wait_seconds)
    return MeshError(Reason.RATE_LIMIT_EXCEEDED, _MESSAGES[decision.which].format(limit), retry_after_seconds=wait)


def limit_headers(decision: Decision) -> Iterator[tuple[str, str]]:
    """OpenAI's headers about a key's limits."""
    for name, level in (("requests", decision.requests), ("tokens", decision.tokens)):
        if level is not None:
            for what, value in _values(level):
                yield f"x-ratelimit-{what}-{name}", value


def _values(level: Level) -> tuple[tuple[str, str], ...]:
    left = max(0, int(level.left + 1e-6))
    return ("limit", str(level.limit)), ("remaining", str(left)), ("reset", _duration(level.reset_seconds))


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{1000 * seconds:.0f}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:.3g}s"


def over_budget(budget: float) -> MeshError:
    """RATE_LIMIT_EXCEEDED until the month ends, for a key that has spent its budget."""
    now = time.time()
    here = month_of(now)
    # The first moment of the next month, found to the second; budgets are counted in UTC.
    low, high = int(now), int(now) + _MONTH_SECONDS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if month_of(middle) == here else (low, middle)
    return MeshError(
        Reason.RATE_LIMIT_EXCEEDED,
        f"this key has used up its budget of {budget:g} for the month",
        code="insufficient_quota",
        retry_after_seconds=high - now,
    )
