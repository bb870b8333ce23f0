"""A refusal that stands for a while, whatever is asked and whoever else asks: one gateway may say it for all.

Of what gateways share only one answer can't change before its time. Requests are never given back, so a key that has
used up those of a minute may make none until the bucket has filled up to the next one, which is told with the refusal.
Tokens are given back when requests end, and places among running requests come free, at any time.
"""

from dataclasses import dataclass, replace
from typing import Final

from services.common.quota import KeyLimits
from services.gateway.limits import Decision, Level

__all__ = ["Standing", "standing"]

_MINUTE: Final = 60.0
# It is told in whole milliseconds, rounded up.
_ROUNDING_SECONDS: Final = 0.001


@dataclass(frozen=True, slots=True)
class Standing:
    """A refusal, and between which moments it stands."""

    limits: KeyLimits
    """Under others it may be wrong."""
    decision: Decision
    """As it was heard."""
    heard_at: float
    until: float

    def decision_at(self, now: float, limits: KeyLimits) -> Decision | None:
        """What a request of these limits is told now; None: it is not known any more, whoever decides has to be asked.

        Nothing passes meanwhile, so the buckets fill up as they did before.
        """
        if now >= self.until or limits != self.limits:
            return None
        passed, told = now - self.heard_at, self.decision
        return replace(
            told,
            wait_seconds=max(0.0, told.wait_seconds - passed),
            requests=_filled(told.requests, passed),
            tokens=_filled(told.tokens, passed),
        )


def standing(decision: Decision, limits: KeyLimits, *, asked_at: float, heard_at: float) -> Standing | None:
    """What a decision means for all requests of its key; None where it depends on them, or may change at any time.

    `asked_at`, `heard_at`: seconds on the clock that it is asked by later. It was decided in between.
    """
    if decision.allowed or decision.which != "requests":
        return None
    tokens = decision.tokens
    if tokens is not None and tokens.reset_seconds > decision.wait_seconds:
        # One that wants more tokens would have to wait for those.
        return None
    return Standing(limits, decision, heard_at, asked_at + decision.wait_seconds - _ROUNDING_SECONDS)


def _filled(level: Level | None, seconds: float) -> Level | None:
    if level is None:
        return None
    return Level(level.limit, min(float(level.limit), level.left + seconds * level.limit / _MINUTE))
