"""How much a key may do: requests and tokens a minute as token buckets, and requests at a time, in this process.

A bucket holds what a minute allows and fills up evenly over a minute. Tokens are reserved on arrival and settled at the
end; who used more than was reserved is in debt, and waits for as long as that takes to fill up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final, Literal, Protocol

from services.common.quota import KeyLimits

__all__ = ["Decision", "KeyState", "Level", "Limiter", "LocalLimits", "Reservation"]

Which = Literal["", "requests", "tokens", "concurrency"]
_MINUTE: Final = 60.0
# How long somebody waits for a place among its own requests is not known; this is when to look again.
_BUSY_SECONDS: Final = 1.0
_MAX_KEYS: Final = 20_000


@dataclass(frozen=True, slots=True)
class Level:
    """What is left of a minute's allowance."""

    limit: int
    left: float

    @property
    def reset_seconds(self) -> float:
        """Until all of it is there again."""
        return max(0.0, (self.limit - self.left) * _MINUTE / self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether a request may begin."""

    allowed: bool
    which: Which = ""
    """The limit that forbids it."""
    wait_seconds: float = 0.0
    """When it would not."""
    requests: Level | None = None
    tokens: Level | None = None


@dataclass(slots=True)
class Reservation:
    """What a request that runs has taken."""

    key_id: str
    limits: KeyLimits
    tokens: float
    is_shared: bool = False
    """Whether it was taken from what all gateways share."""


class Limiter(Protocol):
    """Decides whether requests may begin."""

    async def admit(self, key_id: str, limits: KeyLimits, tokens: float) -> tuple[Decision, Reservation]:
        """Takes one request and `tokens` of a key's allowance, if they are there."""

    def refusal(self, key_id: str, limits: KeyLimits) -> Decision | None:
        """What each request of a key is told now, if all are refused alike; None: it depends, or nobody knows yet."""

    def settle(self, reservation: Reservation, used: float) -> None:
        """Ends a request that was admitted, and puts the tokens that it used in place of those reserved."""


class _Bucket:
    __slots__ = ("at", "left")

    def __init__(self, left: float, now: float) -> None:
        self.left = left
        self.at = now

    def fill(self, capacity: float, limit: float, now: float) -> float:
        """What is there now."""
        self.left = min(capacity, self.left + (now - self.at) * limit / _MINUTE)
        self.at = now
        return self.left


class KeyState:
    """What one key has used here."""

    __slots__ = ("busy", "limits", "requests", "tokens", "used_requests", "used_tokens")

    def __init__(self, limits: KeyLimits, share: float, now: float) -> None:
        self.limits = limits
        self.requests = _Bucket(_capacity(limits.rpm, share), now)
        self.tokens = _Bucket(_capacity(limits.tpm, share), now)
        self.busy = 0
        self.used_requests = 0.0
        """Since a gateway could last say so to the others."""
        self.used_tokens = 0.0


class LocalLimits:
    """Limits as far as this process sees them: all there is without Redis, and a share of it while Redis is away."""

    def __init__(self, *, replicas: int = 1, clock: Callable[[], float] = monotonic) -> None:
        """`replicas`: how many gateways give away parts of the same limits. `clock` gives seconds."""
        self._clock = clock
        self._keys: dict[str, KeyState] = {}
        self.share = 1.0 / replicas
        """The part of every limit that this process may give away by itself."""

    @property
    def keys(self) -> dict[str, KeyState]:
        """What is known, by key."""
        return self._keys

    def levels(self, state: KeyState) -> tuple[float, float]:
        """What would be left of a minute's requests and tokens if every gateway had used as much as this one."""
        now, limits, share = self._clock(), state.limits, self.share
        requests = state.requests.fill(_capacity(limits.rpm, share), (limits.rpm or 0) * share, now)
        tokens = state.tokens.fill(_capacity(limits.tpm, share), (limits.tpm or 0) * share, now)
        return requests / share, tokens / share

    def mirror(self, state: KeyState, requests: float, tokens: float) -> None:
        """Takes over what is left of a minute's requests and tokens for all gateways together."""
        now = self._clock()
        state.requests.left, state.requests.at = requests * self.share, now
        state.tokens.left, state.tokens.at = tokens * self.share, now

    def state(self, key_id: str, limits: KeyLimits) -> KeyState:
        """What one key has used."""
        state = self._keys.get(key_id)
        if state is None:
            if len(self._keys) >= _MAX_KEYS:
                self._forget_idle()
            state = self._keys[key_id] = KeyState(limits, self.share, self._clock())
        state.limits = limits
        return state

    async def admit(self, key_id: str, limits: KeyLimits, tokens: float) -> tuple[Decision, Reservation]:
        """As a Limiter."""
        return self.take(key_id, limits, tokens)

    def take(self, key_id: str, limits: KeyLimits, tokens: float) -> tuple[Decision, Reservation]:
        """The same without waiting."""
        state, now = self.state(key_id, limits), self._clock()
        which, wait, taken = self._weigh(state, tokens, now)
        if not which:
            self._use(state, taken)
        return _decision(which, wait, limits, state, self.share), Reservation(key_id, limits, taken)

    def refusal(self, key_id: str, limits: KeyLimits) -> Decision | None:
        """As a Limiter."""
        state, now = self.state(key_id, limits), self._clock()
        which, wait, _ = self._weigh(state, 0.0, now)
        if not which or self._weigh(state, math.inf, now)[:2] != (which, wait):
            return None
        return _decision(which, wait, limits, state, self.share)

    def _weigh(self, state: KeyState, tokens: float, now: float) -> tuple[Which, float, float]:
        """What forbids a request of so many tokens, for how many seconds, and what it would take."""
        limits = state.limits
        which: Which = ""
        wait, taken = 0.0, 0.0
        if limits.rpm is not None:
            left = state.requests.fill(_capacity(limits.rpm, self.share), limits.rpm * self.share, now)
            if left < 1:
                which, wait = "requests", (1 - left) * _MINUTE / (limits.rpm * self.share)
        if limits.tpm is not None:
            capacity = _capacity(limits.tpm, self.share)
            taken = min(tokens, capacity)
            left = state.tokens.fill(capacity, limits.tpm * self.share, now)
            lack = (taken - left) * _MINUTE / (limits.tpm * self.share)
            if lack > wait:
                which, wait = "tokens", lack
        if limits.concurrency is not None and state.busy >= max(1, limits.concurrency * self.share):
            which, wait = which or "concurrency", max(wait, _BUSY_SECONDS)
        return which, wait, taken

    def _use(self, state: KeyState, tokens: float) -> None:
        state.busy += 1
        state.requests.left -= 1
        state.tokens.left -= tokens
        state.used_requests += 1
        state.used_tokens += tokens

    def settle(self, reservation: Reservation, used: float) -> None:
        """As a Limiter."""
        state = self.state(reservation.key_id, reservation.limits)
        state.busy = max(0, state.busy - 1)
        if reservation.limits.tpm is not None:
            state.tokens.left += reservation.tokens - used
            state.used_tokens -= reservation.tokens - used

    def _forget_idle(self) -> None:
        now = self._clock()
        self._keys = {
            key: state for key, state in self._keys.items() if state.busy or now - state.requests.at < _MINUTE
        }


def _capacity(limit: int | None, share: float) -> float:
    return 0.0 if limit is None else max(1.0, limit * share)


def _decision(which: Which, wait: float, limits: KeyLimits, state: KeyState, share: float) -> Decision:
    return Decision(
        allowed=not which,
        which=which,
        wait_seconds=wait,
        requests=None if limits.rpm is None else Level(limits.rpm, state.requests.left / share),
        tokens=None if limits.tpm is None else Level(limits.tpm, state.tokens.left / share),
    )
